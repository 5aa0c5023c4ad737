"""What follows the product, in float32: scales, bias, activation, residual and the rounding to the result."""

import triton
import triton.language as tl

from fusedops._core.tl import activate

TOP = tl.constexpr(-(2**31))  # what 2**31 wraps to in int32; no sum that fits is as low
INT32_END = tl.constexpr(2147483648.0)


@triton.jit
def to_float(acc):
    """Sums as float32. Of the integers one wraps: 2**17 products of -128, the most there may be."""
    x = acc.to(tl.float32)
    if acc.dtype == tl.int32:
        x = tl.where(acc == TOP, INT32_END, x)
    return x


@triton.jit
def finish(
    acc, offs_m, offs_n, mask, scale_a_ptr, scale_b_ptr, bias_ptr, residual_ptr, out_ptr,
    stride_residual_m, M, N, ACTIVATION: tl.constexpr, SCALE_A: tl.constexpr, SCALE_B: tl.constexpr,
):  # fmt: skip
    """Store a tile of sums at rows offs_m [.., 1] and columns offs_n [1, ..]. Scales of blocks are in the sums."""
    x = to_float(acc)
    if SCALE_A == "one":
        x *= tl.load(scale_a_ptr)
    elif SCALE_A == "row":
        x *= tl.load(scale_a_ptr + offs_m, mask=offs_m < M, other=0.0)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)
    if SCALE_B != "block":
        if SCALE_B == "row":
            scale = tl.load(scale_b_ptr + offs_n, mask=offs_n < N, other=0.0)
        else:
            scale = tl.load(scale_b_ptr)
        if bias_ptr is not None:  # said in words, so that every kernel rounds once here
            x = tl.fma(x, tl.broadcast_to(scale, x.shape), tl.broadcast_to(bias, x.shape))
        else:
            x *= scale
    elif bias_ptr is not None:
        x += bias
    x = activate(x, ACTIVATION)
    rows = offs_m.to(tl.int64)
    if residual_ptr is not None:
        x += tl.load(residual_ptr + rows * stride_residual_m + offs_n, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + rows * N + offs_n, x.to(out_ptr.dtype.element_ty), mask=mask)
