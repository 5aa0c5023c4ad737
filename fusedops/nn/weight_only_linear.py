"""Linear layers whose weight alone is quantised, to 8 or 4 bits."""

import torch
import torch.nn.functional as F

from fusedops._core import checks, codes
from fusedops._core.numbers import ceil_div
from fusedops._core.register import operators
from fusedops.nn._linear import beside, direct
from fusedops.nn.quantized_linear import QuantizedLinear
from fusedops.ops.quantize import quantize_fp8, quantize_int8
from fusedops.ops.quantize_int4 import GROUPS, quantize_int4
from fusedops.ops.weight_only_matmul import weight_only_matmul

CODES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn, "int4": torch.uint8}  # by the names of formats
ALIGNMENT = 64  # bytes: what a CPU's product with int8 weights wants
_weight_only_matmul = operators()["weight_only_matmul"]


class WeightOnlyLinear(QuantizedLinear):
    """Multiply an input of 16 or 32 bits with codes of the weight.

    ``out = x @ weight.T + bias`` with ``weight = codes * weight_scale``, of 4-bit codes
    ``(codes - weight_zero / 16) * weight_scale``, in place of ``torch.nn.Linear``

    Args:
        in_features, out_features, bias, device, dtype: As in ``torch.nn.Linear``, any numbers from 1. The weight is 0
            until it is loaded; `from_linear` quantises one.
        format: ``"int8"``, ``"fp8"`` (e4m3) or ``"int4"``.
        group_size: Consecutive columns of a row that share a scale: 32, 64 or 128; the last group may be smaller. None
            is a scale for each row, in int4 32.

    Stored, and only bias is trained: ``weight`` ``[1, N, K]`` of int8 or float8_e4m3fn, in int4
    ``[1, N, ceil(K / 2)]`` of uint8 (two codes in a byte, see `fusedops.weight_only_matmul`), so that nobody takes it
    for a plain layer's; ``weight_scale`` ``[N]`` or ``[N, ceil(K / group_size)]`` of the layer's dtype;
    ``weight_zero`` uint8 of weight_scale's shape, in int4 alone; ``bias`` ``[N]`` or None.

    Raises:
        ValueError: a size is below 1, or an option is none of these.

    Numerics: scales are rounded up to the layer's dtype before codes are computed, so that codes fit their scale; the
        product as by `fusedops.weight_only_matmul`, for x of another dtype than the layer's with the scale and bias in
        float32. ``.to(dtype)`` rounds scale and bias, as a plain layer's weight, and no code.
    From: Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", 2022,
        https://arxiv.org/abs/2210.17323
    """

    OPTIONS = {"format": "int8", "group_size": None}
    KEPT = ("weight", "weight_zero")

    def __init__(self, in_features, out_features, bias=True, device=None, dtype=None, *, format="int8",
                 group_size=None):  # fmt: skip
        super().__init__(in_features, out_features, bias, device, dtype, format=format, group_size=group_size)

    @classmethod
    def checked(cls, **options):
        """See `QuantizedLinear.checked`."""
        options = super().checked(**options)
        checks.check_choice(cls.__name__, "format", options["format"], tuple(CODES))
        if options["group_size"] is None and options["format"] == "int4":
            options["group_size"] = GROUPS[0]
        checks.check_choice(cls.__name__, "group_size", options["group_size"], (None, *GROUPS))
        return options

    @classmethod
    def _layout(cls, in_features, out_features, dtype, *, format, group_size):
        table = (out_features,) if group_size is None else (out_features, ceil_div(in_features, group_size))
        columns = ceil_div(in_features, 2) if format == "int4" else in_features
        found = {"weight": ((1, out_features, columns), CODES[format]), "weight_scale": (table, dtype)}
        return found | ({"weight_zero": (table, torch.uint8)} if format == "int4" else {})

    @classmethod
    def _quantized(cls, weight, options):
        group_size = options["group_size"]
        if options["format"] == "int4":
            values, scale, zero = quantize_int4(weight, group_size=group_size)
            return {"weight": values[None], "weight_scale": scale, "weight_zero": zero}
        quantize = quantize_int8 if options["format"] == "int8" else quantize_fp8
        (N, K), rows = weight.shape, weight
        if group_size is not None:
            rows = F.pad(weight, (0, -K % group_size)).unflatten(1, (-1, group_size))
        values, scale = quantize(rows)
        if weight.dtype != torch.float32:
            scale = codes.rounded_up(scale, weight.dtype)
            values, _ = quantize(rows, scale=scale)
        values = values.reshape(1, N, -1)[..., :K].contiguous()
        return {"weight": values, "weight_scale": scale.to(weight.dtype)}

    def register_parameter(self, name, param):
        """As in ``torch.nn.Module``; int8 codes that lie where a file has them are copied to where they are fast."""
        if name == "weight" and param is not None and param.is_cpu and type(param.data) is torch.Tensor:
            if param.dtype == torch.int8 and param.data_ptr() % ALIGNMENT:
                param, attributes = torch.nn.Parameter(param.detach().clone(), requires_grad=False), vars(param)
                vars(param).update(attributes)  # transformers marks what it has loaded
        super().register_parameter(name, param)

    @classmethod
    def compute(cls, x, parameters):
        """See `QuantizedLinear.compute`."""
        values, scale = parameters["weight"][0], beside(x.dtype, parameters["weight_scale"])
        zero, bias = parameters.get("weight_zero"), beside(x.dtype, parameters["bias"])
        run = direct(_weight_only_matmul, x)
        if run is None:
            return weight_only_matmul(x, values, scale, zero=zero, bias=bias), None, None
        return run(x, values, scale, zero, bias, None, None), None, None
