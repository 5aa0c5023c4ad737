"""Linear layers that keep their weight in 8 or 4 bits."""

import torch
from torch import nn
from torch.nn import Parameter

from fusedops._core import checks, codes
from fusedops._core.numbers import ceil_div
from fusedops.nn._gradients import StraightThrough, dequantized_weight
from fusedops.ops.quantize import BLOCK, quantize_fp8, quantize_int8
from fusedops.ops.quantize_int4 import GROUPS, quantize_int4
from fusedops.ops.scaled_matmul import MAX_K_INT8, fp8_matmul, int8_matmul
from fusedops.ops.weight_only_matmul import weight_only_matmul

FP8 = torch.float8_e4m3fn
FORMATS = ("int8", "fp8", "int4")
GRANULARITIES = ("row", "block")


class QuantizedLinear(nn.Module):
    """What the quantised layers share; use `Int8Linear`, `Fp8Linear` or `WeightOnlyLinear`.

    ``out = x @ weight.T + bias`` with a weight of codes and scales, in place of ``torch.nn.Linear``.
    """

    KEPT = ()  # parameters whose dtype belongs to the format, whatever the module is converted to

    def __init__(self, in_features, out_features, bias=True, device=None, dtype=None, **options):
        super().__init__()
        name = type(self).__name__
        for argument, size in (("in_features", in_features), ("out_features", out_features)):
            if size < 1:
                raise ValueError(f"{name}: {argument} must be at least 1, got {size}")
        self.in_features = in_features
        self.out_features = out_features
        self.dtype = torch.get_default_dtype() if dtype is None else dtype
        self.options = self.checked(**options)
        for key, (shape, stored) in self.layout(in_features, out_features, self.dtype, **self.options).items():
            fill = torch.ones if key.endswith("scale") else torch.zeros
            setattr(self, key, Parameter(fill(shape, dtype=stored, device=device), requires_grad=False))
        if bias:
            self.bias = Parameter(torch.zeros(out_features, dtype=self.dtype, device=device))
        else:
            self.register_parameter("bias", None)

    @classmethod
    def checked(cls, **options):
        """All options of the format, with what was left out."""
        raise NotImplementedError

    @classmethod
    def layout(cls, in_features, out_features, dtype, **options):
        """``{name: (shape, dtype)}`` of the parameters but bias."""
        raise NotImplementedError

    @classmethod
    def quantize_weight(cls, weight, **options):
        """Quantise a weight ``[N, K]``.

        Returns:
            A dict of tensors, named and shaped as the parameters.
        """
        weight = weight.detach()
        checks.bind_shapes(cls.__name__, weight=(weight, "N K"))
        checks.check_float(cls.__name__, weight=weight)
        return cls._quantized(weight if weight.stride(1) == 1 else weight.contiguous(), **cls.checked(**options))

    @classmethod
    def from_linear(cls, linear, **options):
        """A layer with the quantised weight of a ``torch.nn.Linear``, whose bias it shares.

        Raises:
            TypeError: `linear` is not a ``torch.nn.Linear``.
        """
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"{cls.__name__}: linear must be a torch.nn.Linear, got {type(linear).__name__}")
        N, K = linear.weight.shape
        made = cls(K, N, linear.bias is not None, "meta", linear.weight.dtype, **options)
        for name, tensor in cls.quantize_weight(linear.weight, **made.options).items():
            setattr(made, name, Parameter(tensor, requires_grad=False))
        if linear.bias is not None:
            made.bias = linear.bias
        return made.train(linear.training)

    def dequantize(self, dtype=None):
        """The weight ``[N, K]``, computed in float32 and rounded to `dtype`, by default the module's."""
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
        """Multiply x ``[..., K]``; the result ``[..., N]`` has x's dtype."""
        x = self._entering(x)
        parameters = self._parameters
        bias = parameters["bias"]
        if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
            return self.differentiable(x, None, parameters)
        return self.compute(x, parameters)[0]

    def _entering(self, x):
        """x as the operators take it; the error of the module where it does not fit."""
        if x.shape[-1:] != (self.in_features,) or x.device != self.weight.device:
            checks.bind_shapes(type(self).__name__, weight=(self.weight, "1 N columns"), x=(x, "... K"))
            raise ValueError(
                f"{type(self).__name__}: x must have shape [..., K] with K={self.in_features}, got {list(x.shape)}"
            )
        kind = x.device.type
        if kind != "meta" and torch.is_autocast_enabled(kind):
            x = x.to(torch.get_autocast_dtype(kind))
        return x if x.stride(-1) == 1 else x.contiguous()

    @classmethod
    def compute(cls, x, parameters):
        """``(out, values, scale)``: the result, and x as it was multiplied (scale None where it was not quantised).

        Args:
            x: ``[..., K]``.
            parameters: Tensors by the names of the module's parameters.
        """
        raise NotImplementedError

    @classmethod
    def differentiable(cls, x, weight, parameters):
        """The same result with straight-through gradients; `weight` is the float weight, or None."""
        with torch.no_grad():
            out, values, scale = cls.compute(x, parameters)
        stored = (parameters["weight"], parameters["weight_scale"], parameters.get("weight_zero"))
        return StraightThrough.apply(out, x, weight, parameters["bias"], values, scale, *stored)

    def extra_repr(self):
        """Arguments in the printed form of a model."""
        options = "".join(f", {name}={value!r}" for name, value in self.options.items())
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}{options}"
        )

    def _apply(self, fn, recurse=True):
        """Devices change as everywhere; dtypes only of what is of the module's dtype."""
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.weight.device)).dtype
        kept = {id(self._parameters.get(name)) for name in self.KEPT}

        def changed(tensor):
            result = fn(tensor)
            if id(tensor) in kept and result.dtype != tensor.dtype:
                return tensor.to(result.device)
            return result

        return super()._apply(changed, recurse)


class _ScaledLinear(QuantizedLinear):
    """Layers that quantise their input too."""

    KEPT = ("weight", "weight_scale", "input_scale")

    @classmethod
    def from_linear(cls, linear, *, input_scale=None, **options):
        """As `QuantizedLinear.from_linear`; `input_scale`, a number, is used for every input in place of its rows'."""
        if options.get("static_input", False) and input_scale is None:
            raise ValueError(f"{cls.__name__}: input_scale must be given where static_input is set, got None")
        made = super().from_linear(linear, **{**options, "static_input": input_scale is not None})
        if input_scale is not None:
            scale = torch.as_tensor(input_scale, dtype=torch.float32, device=made.weight.device)
            made.input_scale = Parameter(scale.detach().reshape(()).clone(), requires_grad=False)
        return made

    @classmethod
    def compute(cls, x, parameters):
        rows = x if x.dim() > 1 else x.unsqueeze(0)
        static = parameters.get("input_scale")
        values, scale = cls._quantized_input(rows, static, parameters["weight_scale"])
        values = values.view(-1, values.shape[-1])
        if static is None:
            scale = scale.view(-1) if scale.dim() < rows.dim() else scale.view(-1, scale.shape[-1])
        out = cls._product(values, scale, parameters, x.dtype, None)
        return out.view(*x.shape[:-1], out.shape[-1]), values, scale

    @classmethod
    def _product(cls, values, scale, parameters, out_dtype, residual):
        bias = parameters["bias"]
        if bias is not None and bias.dtype is not out_dtype:
            bias = bias.float()
        return cls._matmul(
            values, parameters["weight"][0], scale, parameters["weight_scale"],
            bias=bias, out_dtype=out_dtype, residual=residual,
        )  # fmt: skip

    def forward_quantized(self, values, scale, out_dtype, residual=None):
        """Multiply an input that is quantised already.

        Args:
            values: ``[..., K]``, codes.
            scale: float32, one number or ``[...]``; for float8 also ``[..., ceil(K / 128)]``.
            out_dtype: dtype of the result.
            residual: ``[..., N]`` of `out_dtype`, is added; None adds nothing.
        """
        leading = values.shape[:-1]
        if values.dim() != 2:
            blocks = scale.dim() == values.dim() > 1
            scale = scale.reshape(-1, scale.shape[-1]) if blocks else scale.reshape(-1)
            values = values.reshape(-1, values.shape[-1])
            residual = None if residual is None else residual.reshape(-1, residual.shape[-1])
        out = self._product(values, scale, self._parameters, out_dtype, residual)
        return out.view(*leading, out.shape[-1])


class Int8Linear(_ScaledLinear):
    """Multiply int8 codes of the input with int8 codes of the weight."""

    _matmul = staticmethod(int8_matmul)

    def __init__(self, in_features, out_features, bias=True, device=None, dtype=None, *, static_input=False):
        if in_features > MAX_K_INT8:
            raise NotImplementedError(f"Int8Linear: in_features must be at most {MAX_K_INT8}, got {in_features}")
        super().__init__(in_features, out_features, bias, device, dtype, static_input=static_input)

    @classmethod
    def checked(cls, *, static_input=False):
        return {"static_input": bool(static_input)}

    @classmethod
    def layout(cls, in_features, out_features, dtype, *, static_input=False):
        found = {
            "weight": ((1, out_features, in_features), torch.int8),
            "weight_scale": ((out_features,), torch.float32),
        }
        return found | ({"input_scale": ((), torch.float32)} if static_input else {})

    @classmethod
    def _quantized(cls, weight, static_input):
        values, scale = quantize_int8(weight)
        return {"weight": values[None], "weight_scale": scale}

    @staticmethod
    def _quantized_input(x, static, weight_scale):
        return quantize_int8(x) if static is None else quantize_int8(x, granularity="tensor", scale=static)


class Fp8Linear(_ScaledLinear):
    """Multiply float8 codes of the input with float8 codes of the weight."""

    _matmul = staticmethod(fp8_matmul)

    def __init__(
        self, in_features, out_features, bias=True, device=None, dtype=None, *, granularity="row", static_input=False
    ):
        super().__init__(
            in_features, out_features, bias, device, dtype, granularity=granularity, static_input=static_input
        )

    @classmethod
    def checked(cls, *, granularity="row", static_input=False):
        checks.check_choice(cls.__name__, "granularity", granularity, GRANULARITIES)
        return {"granularity": granularity, "static_input": bool(static_input)}

    @classmethod
    def layout(cls, in_features, out_features, dtype, *, granularity="row", static_input=False):
        blocks = ceil_div(out_features, BLOCK), ceil_div(in_features, BLOCK)
        found = {
            "weight": ((1, out_features, in_features), FP8),
            "weight_scale": (blocks if granularity == "block" else (out_features,), torch.float32),
        }
        return found | ({"input_scale": ((), torch.float32)} if static_input else {})

    @classmethod
    def _quantized(cls, weight, granularity, static_input):
        values, scale = quantize_fp8(weight, granularity="block_2d" if granularity == "block" else "row")
        return {"weight": values[None], "weight_scale": scale}

    @staticmethod
    def _quantized_input(x, static, weight_scale):
        if static is not None:
            return quantize_fp8(x, granularity="tensor", scale=static)
        return quantize_fp8(x, granularity="block" if weight_scale.dim() == 2 else "row")


class WeightOnlyLinear(QuantizedLinear):
    """Multiply an input of 16 or 32 bits with codes of the weight."""

    KEPT = ("weight", "weight_zero")

    def __init__(
        self, in_features, out_features, bias=True, device=None, dtype=None, *, format="int8", group_size=None
    ):
        super().__init__(in_features, out_features, bias, device, dtype, format=format, group_size=group_size)

    @classmethod
    def checked(cls, *, format="int8", group_size=None):
        checks.check_choice(cls.__name__, "format", format, FORMATS)
        if group_size is None and format == "int4":
            group_size = GROUPS[0]
        if group_size is not None:
            checks.check_choice(cls.__name__, "group_size", group_size, GROUPS)
        return {"format": format, "group_size": group_size}

    @classmethod
    def layout(cls, in_features, out_features, dtype, *, format="int8", group_size=None):
        group_size = cls.checked(format=format, group_size=group_size)["group_size"]
        table = (out_features,) if group_size is None else (out_features, ceil_div(in_features, group_size))
        if format == "int4":
            weight = (1, out_features, ceil_div(in_features, 2)), torch.uint8
            return {"weight": weight, "weight_scale": (table, dtype), "weight_zero": (table, torch.uint8)}
        weight = (1, out_features, in_features), torch.int8 if format == "int8" else FP8
        return {"weight": weight, "weight_scale": (table, dtype)}

    @classmethod
    def _quantized(cls, weight, format, group_size):
        if format == "int4":
            values, scale, zero = quantize_int4(weight, group_size=group_size)
            return {"weight": values[None], "weight_scale": scale, "weight_zero": zero}
        quantize = quantize_int8 if format == "int8" else quantize_fp8
        (N, K), rows = weight.shape, weight
        if group_size is not None:
            padded = nn.functional.pad(weight, (0, -K % group_size))
            rows = padded.unflatten(1, (-1, group_size))
        values, scale = quantize(rows)
        if weight.dtype != torch.float32:
            scale = codes.rounded_up(scale, weight.dtype)
            values, _ = quantize(rows, scale=scale)
        values = values.reshape(N, -1)[:, :K].contiguous()
        return {"weight": values[None], "weight_scale": scale.to(weight.dtype)}

    @classmethod
    def compute(cls, x, parameters):
        scale, bias = parameters["weight_scale"], parameters["bias"]
        if scale.dtype is not x.dtype:
            scale = scale.float()
        if bias is not None and bias.dtype is not x.dtype:
            bias = bias.float()
        zero = parameters.get("weight_zero")
        return weight_only_matmul(x, parameters["weight"][0], scale, zero=zero, bias=bias), x, None
