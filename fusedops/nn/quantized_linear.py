"""What linear layers share that store something else than their weight: codes, or the part that is not zero."""

import torch
from torch import nn
from torch.nn import Parameter

from fusedops._core import checks
from fusedops.nn._linear import (
    as_input_scale,
    autocast_dtype,
    dequantized_weight,
    differentiable,
    entering,
    wants_gradient,
)
from fusedops.nn._stored import StoredModule


class QuantizedLinear(StoredModule):
    """What `Int8Linear`, `Fp8Linear`, `WeightOnlyLinear` and `Sparse24Linear` share."""

    OPTIONS = {}  # with what stands where one is left out

    def __init__(self, in_features, out_features, bias=True, device=None, dtype=None, **options):
        super().__init__()
        for name, size in (("in_features", in_features), ("out_features", out_features)):
            if size < 1:
                raise ValueError(f"{type(self).__name__}: {name} must be at least 1, got {size}")
        self.in_features = in_features
        self.out_features = out_features
        self.dtype = torch.get_default_dtype() if dtype is None else dtype
        self.options = self.checked(**options)
        for name, (shape, stored) in self.layout(in_features, out_features, self.dtype, **self.options).items():
            fill = torch.ones if name.endswith("scale") else torch.zeros
            setattr(self, name, Parameter(fill(shape, dtype=stored, device=device), requires_grad=False))
        if bias:
            self.bias = Parameter(torch.zeros(out_features, dtype=self.dtype, device=device))
        else:
            self.register_parameter("bias", None)

    @classmethod
    def checked(cls, **options):
        """All options of the format, with those that were left out.

        Raises:
            TypeError: an option is none of this format.
            ValueError: a value is none of the option's.
        """
        for name in options:
            if name not in cls.OPTIONS:
                known = ", ".join(cls.OPTIONS)
                raise TypeError(f"{cls.__name__}: options must be among {known}, got {name}={options[name]!r}")
        return cls.OPTIONS | options

    @classmethod
    def layout(cls, in_features, out_features, dtype, **options):
        """``{name: (shape, dtype)}`` of all parameters but bias, of a layer of these sizes, dtype and options."""
        return cls._layout(in_features, out_features, dtype, **cls.checked(**options))

    @classmethod
    def quantize_weight(cls, weight, **options):
        """Quantise a weight, for a layer or a checkpoint.

        Args:
            weight: ``[N, K]``, float16, bfloat16 or float32, with any strides.
            options: Of the format, as in the constructor.

        Returns:
            Tensors by the names of the parameters that they are for.

        Raises:
            ValueError: a shape or option does not fit.
            TypeError: the dtype is not one of the above, or an option is none of this format.
        """
        options = cls.checked(**options)
        checks.bind_shapes(cls.__name__, weight=(weight, "N K"))
        checks.check_float(cls.__name__, weight=weight)
        weight = weight.detach()
        return cls._quantized(weight if weight.stride(1) == 1 else weight.contiguous(), options)

    @classmethod
    def from_linear(cls, linear, *, input_scale=None, **options):
        """A layer with the quantised weight of a ``torch.nn.Linear``, whose bias it shares.

        Args:
            linear: The layer, which is not changed.
            input_scale: For layers that quantise their input: a number by which every input is divided, in place of
                scales that are computed from each.
            options: Of the format, as in the constructor.

        Raises:
            TypeError: `linear` is not a ``torch.nn.Linear``, or an option is none of this format.
            ValueError: an option does not fit.
        """
        cls.check_linear(linear)
        if input_scale is not None:
            options["static_input"] = True
        options = cls.checked(**options)
        stored = {}
        if options.get("static_input"):
            stored["input_scale"] = as_input_scale(cls.__name__, input_scale, linear.weight.device)
        return cls._of(linear, stored | cls.quantize_weight(linear.weight, **options), options)

    @classmethod
    def check_linear(cls, linear):
        """Raise TypeError where a module is not a ``torch.nn.Linear``."""
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"{cls.__name__}: linear must be a torch.nn.Linear, got {type(linear).__name__}")

    @classmethod
    def _of(cls, linear, stored, options):
        """A layer in the place of a plain one, whose bias it shares, with these tensors."""
        N, K = linear.weight.shape
        made = cls(K, N, linear.bias is not None, "meta", linear.weight.dtype, **options)
        made.take(stored)
        if linear.bias is not None:
            made.bias = linear.bias
        return made.train(linear.training)

    def dequantize(self, dtype=None):
        """The weight ``[N, K]``, computed in float32 and rounded to `dtype`, by default to the layer's."""
        return dequantized_weight(self._parameters, self.in_features, self.dtype if dtype is None else dtype)

    def to_linear(self, dtype=None):
        """A ``torch.nn.Linear`` with the dequantised weight and a copy of the bias."""
        dtype = self.dtype if dtype is None else dtype
        made = nn.Linear(self.in_features, self.out_features, self.bias is not None, "meta", dtype)
        made.weight = Parameter(self.dequantize(dtype))
        if self.bias is not None:
            made.bias = Parameter(self.bias.detach().to(dtype, copy=True))
        return made.train(self.training)

    def forward(self, x):
        """Multiply x ``[..., K]``; the result ``[..., N]`` has x's dtype, under autocast that of autocast."""
        x = entering(self, x)
        dtype = autocast_dtype(x)
        if dtype is not None:
            with torch.autocast(x.device.type, enabled=False):  # which would round what operators do in float32
                return self.forward(x.to(dtype))
        parameters = self.operands(x)
        if wants_gradient(x, parameters["bias"]):
            return differentiable(type(self), x, None, parameters)
        return self.compute(x, parameters)[0]

    def operands(self, x):
        """What `compute` gets for an input."""
        return self._parameters

    @classmethod
    def compute(cls, x, parameters):
        """``(out, values, scale)``: the result, and x as it was quantised, ``[M, K]``; None where it was not.

        Args:
            x: ``[..., K]``, with a contiguous last dimension.
            parameters: Tensors by the names of a layer's parameters.
        """
        raise NotImplementedError

    def extra_repr(self):
        """Arguments in the printed form of a model."""
        options = "".join(f", {name}={value!r}" for name, value in self.options.items())
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, bias={self.bias is not None}{options}"
