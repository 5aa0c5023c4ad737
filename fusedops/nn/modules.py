"""Drop-in modules: torch's own classes with another forward, so that state dicts and constructors stay theirs."""

import torch
from torch import nn

from fusedops.nn import functional


class RMSNorm(nn.RMSNorm):
    """Normalise by the root mean square, as ``torch.nn.RMSNorm``.

    ``out = x / sqrt(mean(x**2) + eps) * (weight + weight_offset)`` over the last dimensions ``normalized_shape``.

    Args:
        normalized_shape, eps, elementwise_affine, device, dtype: As in ``torch.nn.RMSNorm``; eps None is float32's
            machine epsilon, as in torch.
        weight_offset: Added to the weight; 1.0 for Gemma. The weight then starts at zero.
        rounding: ``"once"`` or ``"llama"``, see `fusedops.rms_norm`.

    From: Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019, https://arxiv.org/abs/1910.07467
    """

    def __init__(self, normalized_shape, eps=None, elementwise_affine=True, device=None, dtype=None, *,
                 weight_offset=0.0, rounding="once"):
        self.weight_offset = float(weight_offset)
        self.rounding = rounding
        super().__init__(normalized_shape, eps, elementwise_affine, device, dtype)

    def reset_parameters(self):
        """Set the weight so that the norm scales by one."""
        if self.elementwise_affine:
            nn.init.constant_(self.weight, 1.0 - self.weight_offset)

    def forward(self, x):
        """Normalise x of shape ``[..., *normalized_shape]``."""
        return functional.scaled_rms_norm(
            x, self.normalized_shape, self.weight, self.eps, self.weight_offset, self.rounding
        )

    def extra_repr(self):
        """Arguments in the printed form of a model."""
        text = super().extra_repr()
        text += f", weight_offset={self.weight_offset}" if self.weight_offset else ""
        return text + (f", rounding={self.rounding!r}" if self.rounding != "once" else "")

    @classmethod
    def from_module(cls, module, **options):
        """A norm that shares the weight of a ``torch.nn.RMSNorm``.

        Raises:
            TypeError: `module` is not a ``torch.nn.RMSNorm``.
        """
        if not isinstance(module, nn.RMSNorm):
            raise TypeError(f"RMSNorm: module must be a torch.nn.RMSNorm, got {type(module).__name__}")
        made = cls(module.normalized_shape, module.eps, module.elementwise_affine, torch.device("meta"), **options)
        made.weight = module.weight
        return made.train(module.training)


class LayerNorm(nn.LayerNorm):
    """Normalise to mean zero and variance one, as ``torch.nn.LayerNorm``.

    ``out = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias`` over the last dimensions ``normalized_shape``.
    The arguments are those of ``torch.nn.LayerNorm``.

    From: Ba, Kiros and Hinton, "Layer Normalization", 2016, https://arxiv.org/abs/1607.06450
    """

    def forward(self, x):
        """Normalise x of shape ``[..., *normalized_shape]``."""
        return functional.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)

    @classmethod
    def from_module(cls, module):
        """A norm that shares the parameters of a ``torch.nn.LayerNorm``.

        Raises:
            TypeError: `module` is not a ``torch.nn.LayerNorm``.
        """
        if not isinstance(module, nn.LayerNorm):
            raise TypeError(f"LayerNorm: module must be a torch.nn.LayerNorm, got {type(module).__name__}")
        bias = module.bias is not None
        made = cls(module.normalized_shape, module.eps, module.elementwise_affine, bias, device="meta")
        made.weight, made.bias = module.weight, module.bias
        return made.train(module.training)
