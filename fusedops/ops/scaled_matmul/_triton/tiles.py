"""How kernels that read through pointers get the tiles of a depth block and multiply them."""

import triton
import triton.language as tl

from fusedops._core.tl import float8_as_half

BLOCK = tl.constexpr(128)  # elements of a block that shares a scale, and of a sum that tensor cores add up in float8


@triton.jit
def operand(ptrs, first_k, offs_k, K, EVEN_K: tl.constexpr, EXPAND: tl.constexpr):
    """Rows of a depth block. With EXPAND the bytes of float8_e4m3fn become float16 of 2**-8 times their value."""
    if EVEN_K:
        x = tl.load(ptrs)
    elif EXPAND or ptrs.dtype.element_ty == tl.int8:
        x = tl.load(ptrs, mask=offs_k < K - first_k, other=0)
    else:
        x = tl.load(ptrs, mask=offs_k < K - first_k, other=0.0)
    if EXPAND:
        x = float8_as_half(x)
    return x


@triton.jit
def block_scales(ptr, offs, stride, stride_k, first_k, mask, DIVISOR: tl.constexpr):
    """The scales of rows for the block that a depth block is of; a scale of b stands for DIVISOR rows."""
    return tl.load(ptr + (offs // DIVISOR).to(tl.int64) * stride + first_k // BLOCK * stride_k, mask=mask, other=0.0)


@triton.jit
def add_block(
    acc, left, right, offs_m, offs_n, first_k, scale_a_ptr, scale_b_ptr,
    stride_scale_a_m, stride_scale_a_k, stride_scale_b_n, stride_scale_b_k, M, N,
    SCALE_A: tl.constexpr, SCALE_B: tl.constexpr, EXPAND: tl.constexpr,
):  # fmt: skip
    """acc + left @ right for one depth block: integers in the accumulator, of floats the sum of the block first.

    offs_m and offs_n have the shape that broadcasts over acc, which may be the transposed product.
    """
    if acc.dtype == tl.int32:
        return tl.dot(left, right, acc, out_dtype=tl.int32)
    else:
        part = tl.dot(left, right, out_dtype=tl.float32)
        if EXPAND:
            part *= 65536.0  # 2**8 of each side
        if SCALE_A == "block":
            unit = block_scales(scale_a_ptr, offs_m, stride_scale_a_m, stride_scale_a_k, first_k, offs_m < M, 1)
            part *= unit
        if SCALE_B == "block":
            unit = block_scales(scale_b_ptr, offs_n, stride_scale_b_n, stride_scale_b_k, first_k, offs_n < N, 128)
            part *= unit
        return acc + part
