"""Linear layers of 8 bits that quantise their input as well as their weight."""

import torch

from fusedops._core import checks
from fusedops._core.numbers import ceil_div
from fusedops._core.register import operators
from fusedops.nn._linear import beside, direct
from fusedops.nn.quantized_linear import QuantizedLinear
from fusedops.ops.quantize import BLOCK, quantize_fp8, quantize_int8
from fusedops.ops.scaled_matmul import MAX_K_INT8, fp8_matmul, int8_matmul

FP8 = torch.float8_e4m3fn
GRANULARITIES = ("row", "block")
_quantize_scaled = operators()["quantize_scaled"]


class ScaledLinear(QuantizedLinear):
    """Layers that quantise their input too: QUANTIZE, MATMUL and `quantize`, `matmul` are the operators for CODE."""

    KEPT = ("weight", "weight_scale", "input_scale")

    @classmethod
    def compute(cls, x, parameters):
        """See `QuantizedLinear.compute`."""
        values, scale = cls.quantized_rows(x, parameters)
        weight, weight_scale, bias = cls._stored(parameters, x.dtype)
        run = direct(cls.MATMUL, x)
        if run is None:
            out = cls.matmul(values, weight, scale, weight_scale, bias=bias, out_dtype=x.dtype)
        else:
            out = run(values, weight, scale, weight_scale, bias, x.dtype, None, None)
        return out.view(*x.shape[:-1], out.shape[-1]), values, scale

    @classmethod
    def quantized_rows(cls, x, parameters):
        """``(values [M, K], scale)``: x ``[..., K]`` as the layer multiplies it."""
        rows, static = x if x.dim() > 1 else x.unsqueeze(0), parameters.get("input_scale")
        if static is not None:
            values, scale = cls._quantize(rows, "tensor", static)
        elif parameters["weight_scale"].dim() == 2:
            values, scale = cls._quantize(rows, "block", None)
            scale = scale.view(-1, scale.shape[-1])
        else:
            values, scale = cls._quantize(rows, "row", None)
            scale = scale.view(-1)
        return values.view(-1, values.shape[-1]), scale

    @classmethod
    def _quantize(cls, x, granularity, scale):
        if scale is None:
            run = direct(cls.QUANTIZE, x)
            return cls.quantize(x, granularity=granularity) if run is None else run(x, granularity, *cls.DTYPE)
        run = direct(_quantize_scaled, x)
        if run is None:
            return cls.quantize(x, granularity=granularity, scale=scale)
        return run(x, scale, granularity, cls.CODE), scale

    @staticmethod
    def _stored(parameters, out_dtype):
        return parameters["weight"][0], parameters["weight_scale"], beside(out_dtype, parameters["bias"])

    def forward_quantized(self, values, scale, out_dtype, residual=None):
        """Multiply an input that is quantised already. The result has no derivative.

        Args:
            values: ``[..., K]``, codes of the weight's dtype with a contiguous last dimension.
            scale: float32, one number (``[]`` or ``[1]``), one for each row ``[...]``, or in float8 one for each block
                of 128 elements of a row ``[..., ceil(K / 128)]``.
            out_dtype: float16, bfloat16 or float32.
            residual: ``[..., N]`` of `out_dtype`, which is added; None adds nothing.

        Returns:
            ``[..., N]`` of `out_dtype`.

        Raises:
            ValueError: a shape or device does not fit.
            TypeError: a dtype is not one of the above.
        """
        leading = values.shape[:-1]
        if values.dim() != 2:
            blocks = scale.dim() == values.dim() and (leading or scale.numel() > 1)
            scale = scale.reshape(-1, scale.shape[-1]) if blocks else scale.reshape(-1)
            values = values.reshape(-1, values.shape[-1])
            residual = None if residual is None else residual.reshape(-1, residual.shape[-1])
        weight, weight_scale, bias = self._stored(self._parameters, out_dtype)
        options = {"bias": bias, "out_dtype": out_dtype, "residual": residual}
        return self.matmul(values, weight, scale, weight_scale, **options).view(*leading, self.out_features)

    @classmethod
    def _layout(cls, in_features, out_features, dtype, *, static_input, granularity="row"):
        blocks = ceil_div(out_features, BLOCK), ceil_div(in_features, BLOCK)
        found = {
            "weight": ((1, out_features, in_features), cls.CODE),
            "weight_scale": (blocks if granularity == "block" else (out_features,), torch.float32),
        }
        return found | ({"input_scale": ((), torch.float32)} if static_input else {})


class Int8Linear(ScaledLinear):
    """Multiply int8 codes of the input with int8 codes of the weight.

    ``out = (codes(x) @ weight.T) * scale(x) * weight_scale + bias``, in place of ``torch.nn.Linear``

    Args:
        in_features, out_features, bias, device, dtype: As in ``torch.nn.Linear``, any numbers from 1. The weight is 0
            until it is loaded; `from_linear` quantises one.
        static_input: Whether all inputs share one scale, which is stored, in place of one that is computed for each
            row. What is larger than 127 times it is cut.

    Stored, and only bias is trained: ``weight`` int8 ``[1, N, K]``, so that nobody takes it for a plain
    layer's; ``weight_scale`` float32 ``[N]``; ``input_scale`` float32 ``[]``, with `static_input` alone; ``bias``
    ``[N]`` or None.

    Raises:
        ValueError: a size is below 1.
        NotImplementedError: in_features > MAX_K_INT8, where sums leave int32.

    Numerics: codes as by `fusedops.quantize_int8`, the product as by `fusedops.int8_matmul`. ``.to(dtype)`` changes the
        dtype of bias alone, no code and no scale. Infinity and NaN stay in their row of the result; with
        `static_input` infinity is cut and NaN counts as 0.
    From: Dettmers et al., "LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale", 2022,
        https://arxiv.org/abs/2208.07339
    """

    OPTIONS = {"static_input": False}
    CODE, DTYPE = torch.int8, ()
    QUANTIZE, MATMUL = operators()["quantize_int8"], operators()["int8_matmul"]
    quantize, matmul = staticmethod(quantize_int8), staticmethod(int8_matmul)

    def __init__(self, in_features, out_features, bias=True, device=None, dtype=None, *, static_input=False):
        if in_features > MAX_K_INT8:
            raise NotImplementedError(
                f"Int8Linear: in_features must be at most MAX_K_INT8 = {MAX_K_INT8}, got {in_features}"
            )
        super().__init__(in_features, out_features, bias, device, dtype, static_input=static_input)

    @classmethod
    def _quantized(cls, weight, options):
        values, scale = quantize_int8(weight)
        return {"weight": values[None], "weight_scale": scale}


class Fp8Linear(ScaledLinear):
    """Multiply float8 codes (e4m3) of the input with float8 codes of the weight.

    ``out = (codes(x) @ weight.T) * scale(x) * weight_scale + bias``, in place of ``torch.nn.Linear``

    Args:
        in_features, out_features, bias, device, dtype, static_input: As in `Int8Linear`; the largest code is 448.
        granularity: ``"row"`` for a scale for each row of the weight and of the input, ``"block"`` for one for each
            128 by 128 elements of the weight and each 128 elements of a row of the input.

    Stored as in `Int8Linear`: ``weight`` float8_e4m3fn; ``weight_scale`` float32 ``[N]`` or
    ``[ceil(N / 128), ceil(K / 128)]``.

    Raises:
        ValueError: a size is below 1, or the granularity is none of these.

    Numerics: codes as by `fusedops.quantize_fp8`, the product as by `fusedops.fp8_matmul`. ``.to(dtype)`` changes the
        dtype of bias alone, no code and no scale. Infinity and NaN stay in their row of the result; with
        `static_input` infinity is cut.
    From: Micikevicius et al., "FP8 Formats for Deep Learning", 2022, https://arxiv.org/abs/2209.05433; for blocks
        DeepSeek-AI, "DeepSeek-V3 Technical Report", 2024, https://arxiv.org/abs/2412.19437
    """

    OPTIONS = {"granularity": "row", "static_input": False}
    CODE, DTYPE = FP8, (FP8,)
    QUANTIZE, MATMUL = operators()["quantize_fp8"], operators()["fp8_matmul"]
    quantize, matmul = staticmethod(quantize_fp8), staticmethod(fp8_matmul)

    def __init__(self, in_features, out_features, bias=True, device=None, dtype=None, *, granularity="row",
                 static_input=False):  # fmt: skip
        options = {"granularity": granularity, "static_input": static_input}
        super().__init__(in_features, out_features, bias, device, dtype, **options)

    @classmethod
    def checked(cls, **options):
        """See `QuantizedLinear.checked`."""
        options = super().checked(**options)
        checks.check_choice(cls.__name__, "granularity", options["granularity"], GRANULARITIES)
        return options

    @classmethod
    def _quantized(cls, weight, options):
        granularity = "block_2d" if options["granularity"] == "block" else "row"
        values, scale = quantize_fp8(weight, granularity=granularity)
        return {"weight": values[None], "weight_scale": scale}
