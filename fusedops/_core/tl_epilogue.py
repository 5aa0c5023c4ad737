"""What follows a product, in float32: scales, bias, activation, residual and the rounding to the result.

Kinds of scales are "one" for all, "row" for one each, "block" where the sums have been multiplied by them already, and
"none".
"""

import triton
import triton.language as tl

from fusedops._core.tl import activate, split_columns, times

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
def sum_of_parts(parts_ptr, offs_m, offs_n, M, N, num_parts):
    """Sums [rows, columns] of parts [num_parts, M, N] in their order; offs_m is [.., 1], offs_n [1, ..]."""
    mask = (offs_m < M) & (offs_n < N)
    acc = tl.zeros(mask.shape, parts_ptr.dtype.element_ty)
    for part in range(num_parts):
        rows = (part * M + offs_m).to(tl.int64)
        acc += tl.load(parts_ptr + rows * N + offs_n, mask=mask, other=0)
    return acc


@triton.jit
def real(
    acc, offs_m, offs_n, scale_a_ptr, scale_b_ptr, bias_ptr, M, N, SCALE_A: tl.constexpr, SCALE_B: tl.constexpr
):
    """Sums at rows offs_m [.., 1] and columns offs_n [1, ..] with scales and bias."""
    x = to_float(acc)
    if SCALE_A == "one":
        x *= tl.load(scale_a_ptr)
    elif SCALE_A == "row":
        x *= tl.load(scale_a_ptr + offs_m, mask=offs_m < M, other=0.0)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)
    if SCALE_B == "row" or SCALE_B == "one":
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
    return x


@triton.jit
def finish(
    acc, offs_m, first_n, scale_a_ptr, scale_b_ptr, bias_ptr, residual_ptr, out_ptr, stride_residual_m, M, N,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, SCALE_A: tl.constexpr, SCALE_B: tl.constexpr,
):  # fmt: skip
    """Store a tile of sums at rows offs_m [.., 1] and all columns from first_n on."""
    if GATED:
        gate, up = split_columns(acc)
        finish_pairs(
            gate, up, offs_m, first_n, scale_a_ptr, scale_b_ptr, bias_ptr, residual_ptr, out_ptr, stride_residual_m,
            M, N, ACTIVATION, SCALE_A, SCALE_B,
        )  # fmt: skip
    else:
        offs_n = first_n + tl.arange(0, acc.shape[1])[None, :]
        x = activate(real(acc, offs_m, offs_n, scale_a_ptr, scale_b_ptr, bias_ptr, M, N, SCALE_A, SCALE_B), ACTIVATION)
        mask = (offs_m < M) & (offs_n < N)
        rows = offs_m.to(tl.int64)
        if residual_ptr is not None:
            x += tl.load(residual_ptr + rows * stride_residual_m + offs_n, mask=mask, other=0.0).to(tl.float32)
        tl.store(out_ptr + rows * N + offs_n, x.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def finish_pairs(
    gate, up, offs_m, first_n, scale_a_ptr, scale_b_ptr, bias_ptr, residual_ptr, out_ptr, stride_residual_m, M, N,
    ACTIVATION: tl.constexpr, SCALE_A: tl.constexpr, SCALE_B: tl.constexpr,
):  # fmt: skip
    """Store what becomes of sums of even columns from first_n on and of those behind each."""
    columns = first_n // 2 + tl.arange(0, gate.shape[1])[None, :]
    x = real(gate, offs_m, 2 * columns, scale_a_ptr, scale_b_ptr, bias_ptr, M, N, SCALE_A, SCALE_B)
    y = real(up, offs_m, 2 * columns + 1, scale_a_ptr, scale_b_ptr, bias_ptr, M, N, SCALE_A, SCALE_B)
    x = times(activate(x, ACTIVATION), y)
    N //= 2
    mask = (offs_m < M) & (columns < N)
    rows = offs_m.to(tl.int64)
    if residual_ptr is not None:
        x += tl.load(residual_ptr + rows * stride_residual_m + columns, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + rows * N + columns, x.to(out_ptr.dtype.element_ty), mask=mask)
