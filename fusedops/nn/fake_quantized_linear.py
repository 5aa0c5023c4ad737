"""A linear layer that is trained with the weight that it will be quantised to."""

import torch
from torch import nn

from fusedops.nn._linear import as_input_scale, autocast_dtype, differentiable, entering, keeping_dtypes, wants_gradient
from fusedops.nn.quantized_linear import QuantizedLinear


class FakeQuantizedLinear(nn.Linear):
    """Train a layer for a quantised format: its forward is that of the converted layer, bit for bit.

    ``out = x @ quantised(weight).T + bias``, by the operators of the target at every call; in the backward pass
    quantising counts as the identity: ``grad_x = grad @ dequantised weight``,
    ``grad_weight = grad.T @ dequantised x``.

    Args:
        in_features, out_features, bias, device, dtype: As in ``torch.nn.Linear``.
        target: `Int8Linear`, `Fp8Linear` or `WeightOnlyLinear`.
        options: Of the target's format. With ``static_input`` there is a buffer ``input_scale``, float32 ``[]``.

    Raises:
        TypeError: target is no class of quantised layers, or an option is none of its format.
        ValueError: an option does not fit.

    Numerics: parameters are of any of the three dtypes and are what an optimizer trains; codes are computed from the
        current weight at each call. Gradients are products in the dtype of the incoming one; those of x beyond a
        static scale's range are not cut.
    From: Bengio, Leonard and Courville, "Estimating or Propagating Gradients Through Stochastic Neurons for
        Conditional Computation", 2013, https://arxiv.org/abs/1308.3432
    """

    def __init__(self, in_features, out_features, bias=True, device=None, dtype=None, *, target, **options):
        if not (isinstance(target, type) and issubclass(target, QuantizedLinear)):
            raise TypeError(f"FakeQuantizedLinear: target must be a class of quantised layers, got {target!r}")
        super().__init__(in_features, out_features, bias, device, dtype)
        self.target = target
        self.options = target.checked(**options)
        static = self.options.get("static_input")
        self.register_buffer("input_scale", torch.ones((), dtype=torch.float32, device=device) if static else None)

    @classmethod
    def from_linear(cls, linear, target, *, input_scale=None, **options):
        """A layer that shares weight and bias with a ``torch.nn.Linear``, so that ties stay ties.

        Args:
            linear: The layer, which is not changed.
            target, options: As in the constructor.
            input_scale: As in `Int8Linear.from_linear`.

        Raises:
            TypeError: `linear` is not a ``torch.nn.Linear``, or another argument is refused by the constructor.
        """
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"{cls.__name__}: linear must be a torch.nn.Linear, got {type(linear).__name__}")
        if input_scale is not None:
            options["static_input"] = True
        N, K = linear.weight.shape
        made = cls(K, N, linear.bias is not None, "meta", target=target, **options)
        if made.input_scale is not None:
            made.input_scale = as_input_scale(cls.__name__, input_scale, linear.weight.device)
        made.weight, made.bias = linear.weight, linear.bias
        return made.train(linear.training)

    def forward(self, x):
        """Multiply x ``[..., K]`` by the quantised weight; the result ``[..., N]`` has x's dtype."""
        x = entering(self, x)
        dtype = autocast_dtype(x)
        if dtype is not None:
            with torch.autocast(x.device.type, enabled=False):  # as in the converted layer
                return self.forward(x.to(dtype))
        target, weight, bias = self.target, self.weight, self.bias
        parameters = {**target.quantize_weight(weight, **self.options), "bias": bias, "input_scale": self.input_scale}
        trained = weight if torch.is_grad_enabled() and weight.requires_grad else None
        if trained is not None or wants_gradient(x, bias):
            return differentiable(target, x, trained, parameters)
        return target.compute(x, parameters)[0]

    def convert(self):
        """The quantised layer, which gives the same results and shares the bias."""
        return self.target.from_linear(self, input_scale=self.input_scale, **self.options)

    def extra_repr(self):
        """Arguments in the printed form of a model."""
        options = "".join(f", {name}={value!r}" for name, value in self.options.items())
        return f"{super().extra_repr()}, target={self.target.__name__}{options}"

    def _apply(self, fn, recurse=True):
        return super()._apply(keeping_dtypes(fn, [self.input_scale]), recurse)
