"""Quantising to int8 and float8, for products with narrow operands."""

import math

import torch

from fusedops._core import checks, codes, env, invariance
from fusedops._core.numbers import ceil_div
from fusedops._core.register import register
from fusedops.ops.attention import check_table

BLOCK = 128  # elements of a block in each direction that it has
GRANULARITIES = ("row", "tensor", "block", "block_2d")
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def quantize_int8(x, *, granularity="row", scale=None):
    """Quantise to int8, symmetrically, with one scale for each row, block or the whole tensor.

    ``scale = max(abs(x)) / 127``;  ``values = round(x * (1 / scale))``;  ``x`` is about ``values * scale``

    Args:
        x: ``[..., K]``, float16, bfloat16 or float32; rows may be strided, the last dimension is contiguous.
        granularity: What shares a scale: ``"row"`` for each row of K, ``"tensor"`` for all, ``"block"`` for 128
            elements of a row (activations), ``"block_2d"`` for 128 rows by 128 columns of ``[..., N, K]`` (weights).
            The last blocks may be smaller.
        scale: float32, a scale that is known before: a single number (``[]`` or ``[1]``), or of the shape that
            `granularity` gives; at least 2**-126. None computes it.

    Returns:
        ``(values, scale)``: int8 of x's shape, contiguous, and float32 that multiplies the values: ``[...]`` of rows,
        ``[]`` of the tensor, ``[..., ceil(K / 128)]`` of blocks, ``[..., ceil(N / 128), ceil(K / 128)]`` of
        two-dimensional ones; the very tensor, where one was given. Empty input gives empty values.

    Raises:
        ValueError: a shape, stride, device or option does not fit; with FUSEDOPS_VALIDATE=2 also scales that are not
            finite or too small.
        TypeError: a dtype is not one of the above.

    Numerics: in float32, the reciprocal of the scale rounded, the product rounded, and that rounded to the nearest even
        integer; a given scale cuts at -127 and 127, so that the codes of -x are those of x negated. A computed scale is
        at least 2**-126: zeros have codes of 0 and a finite scale. Where infinity or NaN is, the scale is infinity or
        NaN, and all codes that share it are 0; with a given scale NaN is 0.
    Runs on: CUDA 8.0 and newer (Triton); elsewhere torch.
    From: Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference",
        2018, https://arxiv.org/abs/1712.05877
    """
    args = x, granularity
    if scale is not None:
        _check("quantize_int8", x, granularity, scale)
        return _quantize_scaled(x, scale, granularity, torch.int8), scale
    done = _quantize_int8.again(*args)
    if done is not None:
        return done
    _check("quantize_int8", x, granularity)
    return _quantize_int8(*args)


def quantize_fp8(x, *, granularity="row", dtype=torch.float8_e4m3fn, scale=None):
    """Quantise to float8 with one scale for each row, block or the whole tensor.

    ``scale = max(abs(x)) / largest``;  ``values = round(x * (1 / scale))``;  ``x`` is about ``values * scale``

    Args:
        x, granularity, scale: As in `quantize_int8`.
        dtype: float8_e4m3fn, whose largest number is 448, or float8_e5m2, 57344.

    Returns:
        ``(values, scale)`` as `quantize_int8`, the values of `dtype`.

    Raises:
        ValueError: a shape, stride, device or option does not fit; with FUSEDOPS_VALIDATE=2 also scales that are not
            finite or too small.
        TypeError: a dtype is not one of the above.

    Numerics: in float32, the reciprocal of the scale rounded, the product rounded, and that rounded to the nearest
        number of `dtype`, ties to even, denormal numbers included; beyond the range the largest number stands, of
        infinity too. A computed scale is at least 2**-126: zeros have codes of 0 and a finite scale. Where infinity or
        NaN is, the scale is infinity or NaN, and what shares it is 0 or NaN; with a given scale NaN is NaN.
    Runs on: CUDA 8.0 and newer (Triton; before 8.9 rounded by integer arithmetic to the same bits); elsewhere torch.
    From: Micikevicius et al., "FP8 Formats for Deep Learning", 2022, https://arxiv.org/abs/2209.05433
    """
    args = x, granularity, dtype
    if scale is not None:
        _check("quantize_fp8", x, granularity, scale, dtype)
        return _quantize_scaled(x, scale, granularity, dtype), scale
    done = _quantize_fp8.again(*args)
    if done is not None:
        return done
    _check("quantize_fp8", x, granularity, dtype=dtype)
    return _quantize_fp8(*args)


def _check(op, x, granularity, scale=None, dtype=torch.float8_e4m3fn):
    checks.check_choice(op, "granularity", granularity, GRANULARITIES)
    if scale is None and granularity in ("tensor", "block_2d"):
        invariance.refuse(op, f"a scale of {granularity!r} is computed from several rows")
    checks.bind_shapes(op, x=(x, "... N K" if granularity == "block_2d" else "... K"))
    checks.check_float(op, x=x)
    checks.check_rows(op, x=x)
    checks.check_dtype(op, dtype, FP8)
    if scale is not None:
        _check_scale(op, x, granularity, scale)


def _check_scale(op, x, granularity, scale):
    fitting = scale_shape(x.shape, granularity)
    check_table(op, "scale", scale, x, [fitting, (), (1,)], f"of {granularity!r}, [] or [1]", (torch.float32,))
    if env.validate() == 2 and not torch.compiler.is_compiling() and not x.is_meta:
        bad = ~(scale.isfinite() & (scale >= codes.LEAST_SCALE))
        if bool(bad.any()):
            raise ValueError(f"{op}: scale must be finite and at least 2**-126, got {scale[bad][0].item()}")


def scale_shape(shape, granularity):
    """The shape of the scales of a tensor."""
    if granularity == "tensor":
        return ()
    if granularity == "row":
        return tuple(shape[:-1])
    rows = shape[:-1] if granularity == "block" else (*shape[:-2], ceil_div(shape[-2], BLOCK))
    return *rows, ceil_div(shape[-1], BLOCK)


def _fake(x, granularity, dtype=torch.int8):
    scale = x.new_empty(scale_shape(x.shape, granularity), dtype=torch.float32)
    return x.new_empty(x.shape, dtype=dtype), scale


def _cost(x, granularity, dtype=torch.int8):
    scales = math.prod(scale_shape(x.shape, granularity))
    reads = 2 if granularity == "tensor" else 1  # the scale is known when all has been read
    return (reads * x.element_size() + 1) * x.numel() + 4 * scales, 4 * x.numel()


def _example(shape, dtype, device):
    return (torch.randn(shape, device=device).to(dtype),), {}


IMPLEMENTATIONS = ("triton", "torch", "reference")
_quantize_int8 = register(
    "quantize_int8(Tensor x, str granularity) -> (Tensor, Tensor)",
    package=__name__,
    implementations=IMPLEMENTATIONS,
    fake=_fake,
    cost=_cost,
    example=_example,
)
_quantize_fp8 = register(
    "quantize_fp8(Tensor x, str granularity, ScalarType dtype) -> (Tensor, Tensor)",
    package=__name__,
    implementations=IMPLEMENTATIONS,
    fake=_fake,
    cost=_cost,
    example=_example,
)
_quantize_scaled = register(
    "quantize_scaled(Tensor x, Tensor scale, str granularity, ScalarType dtype) -> Tensor",
    package=__name__,
    implementations=IMPLEMENTATIONS,
    fake=lambda x, scale, granularity, dtype: x.new_empty(x.shape, dtype=dtype),
    cost=lambda x, scale, *rest: ((x.element_size() + 1) * x.numel() + 4 * scale.numel(), 2 * x.numel()),
)
