"""A linear layer that is trained with 2 of every 4 weights held at zero."""

import torch
import torch.nn.functional as F
from torch import nn

from fusedops.nn._linear import keeping_dtypes
from fusedops.nn.sparse_24_linear import Sparse24Linear
from fusedops.ops.compress_24 import prune_24


class Masked24Linear(nn.Linear):
    """Train the kept 2 of every 4 consecutive weights of a row: the others are 0 and have the gradient 0.

    ``out = x @ (weight * mask).T + bias``; ``grad_weight = grad.T @ x * mask``

    Args:
        in_features, out_features, bias, device, dtype: As in ``torch.nn.Linear``. The mask keeps everything until
            `from_linear` or `choose` has chosen.

    Stored: weight and bias, under torch's names. The mask is a buffer that is not stored: a stored weight of this layer
    is 2:4 already, and pruning it again chooses all that is not 0.

    Numerics: an optimizer whose step depends on an element's own gradients (SGD with momentum, Adam, with weight decay)
        leaves the zeros exactly 0. What another one adds to them, or one that still has momentum from before, is never
        computed with, and is set to 0 when the weights are stored, loaded or converted.
    From: Mishra et al., "Accelerating Sparse Deep Neural Networks", 2021, https://arxiv.org/abs/2104.08378
    """

    def __init__(self, in_features, out_features, bias=True, device=None, dtype=None):
        super().__init__(in_features, out_features, bias, device, dtype)
        self.register_buffer("mask", torch.ones_like(self.weight, dtype=torch.bool), persistent=False)

    @classmethod
    def from_linear(cls, linear, *, scores=None, mask=None):
        """A layer that shares weight and bias with a ``torch.nn.Linear``, whose dropped weights become 0, in place.

        Args:
            linear: The layer.
            scores: ``[N, K]``: of each 4 the 2 with the largest score are kept. None is ``|weight|``.
            mask: bool ``[N, K]``, in place of scores: that of another layer with the same weight.

        Raises:
            TypeError: `linear` is not a ``torch.nn.Linear``.
            ValueError: scores have another shape, or hold NaN.
        """
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"Masked24Linear: linear must be a torch.nn.Linear, got {type(linear).__name__}")
        N, K = linear.weight.shape
        made = cls(K, N, linear.bias is not None, "meta", linear.weight.dtype)
        made.weight, made.bias = linear.weight, linear.bias
        if mask is None:
            made.choose(scores)
        else:
            made.mask = mask
            made.apply_mask()
        return made.train(linear.training)

    def choose(self, scores=None):
        """Choose anew which weights are kept, and set the others to 0; scores as in `from_linear`."""
        weight = self.weight.detach()
        scores = weight.abs() if scores is None else scores
        self.mask = prune_24(torch.ones_like(weight), scores=scores) != 0
        self.apply_mask()

    def apply_mask(self):
        """Set the dropped weights to 0, in place."""
        with torch.no_grad():
            self.weight.masked_fill_(~self.mask, 0)

    def forward(self, x):
        """Multiply x ``[..., K]`` by the kept weights."""
        return F.linear(x, torch.where(self.mask, self.weight, 0), self.bias)

    def convert(self, *, format=None, dense_below=None):
        """The compressed layer, with the same weights, bit for bit; it shares the bias."""
        self.apply_mask()
        return Sparse24Linear.from_linear(self, format=format, dense_below=dense_below)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        self.apply_mask()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, *args):
        super()._load_from_state_dict(*args)
        if self.mask.is_meta and not self.weight.is_meta:
            self.choose()
        else:
            self.apply_mask()

    def _apply(self, fn, recurse=True):
        return super()._apply(keeping_dtypes(fn, [self.mask]), recurse)
