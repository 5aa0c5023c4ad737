"""The kernel for any GPU, any strides and any sizes: one tile of the result a program."""

import triton
import triton.language as tl

from fusedops._core.tl_epilogue import finish
from fusedops.ops.scaled_matmul._triton.tiles import add_block, operand


@triton.jit
def tile_of(pid, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """Tile of a program: GROUP_M rows of tiles are walked through column by column, so that b's tiles stay in cache."""
    num_m = tl.cdiv(M, BLOCK_M)
    in_group = GROUP_M * tl.cdiv(N, BLOCK_N)
    first_m = pid // in_group * GROUP_M
    rows = tl.minimum(num_m - first_m, GROUP_M)
    return first_m + pid % in_group % rows, pid % in_group // rows


@triton.jit(do_not_specialize=["M"])
def _scaled_matmul_kernel(
    a_ptr, b_ptr, scale_a_ptr, scale_b_ptr, bias_ptr, residual_ptr, out_ptr,
    stride_a_m, stride_b_n, stride_scale_a_m, stride_scale_a_k, stride_scale_b_n, stride_scale_b_k, stride_residual_m,
    M, N, K,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, SCALE_A: tl.constexpr, SCALE_B: tl.constexpr, EVEN_K: tl.constexpr,
    EXPAND: tl.constexpr, ACC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):  # fmt: skip
    """One program computes a tile of BLOCK_M rows and BLOCK_N columns."""
    pid_m, pid_n = tile_of(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    offs_m = (pid_m * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
    offs_n = (pid_n * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    offs_k = tl.arange(0, BLOCK_K)
    # Rows beyond the last are the last again: what they give is not stored.
    a_ptrs = a_ptr + tl.minimum(offs_m, M - 1).to(tl.int64) * stride_a_m + offs_k[None, :]
    b_ptrs = b_ptr + tl.minimum(offs_n, N - 1).to(tl.int64) * stride_b_n + offs_k[:, None]
    acc = tl.zeros([BLOCK_M, BLOCK_N], ACC)
    for first_k in range(0, K, BLOCK_K):
        a = operand(a_ptrs, first_k, offs_k[None, :], K, EVEN_K, EXPAND)
        b = operand(b_ptrs, first_k, offs_k[:, None], K, EVEN_K, EXPAND)
        acc = add_block(
            acc, a, b, offs_m, offs_n, first_k, scale_a_ptr, scale_b_ptr,
            stride_scale_a_m, stride_scale_a_k, stride_scale_b_n, stride_scale_b_k, M, N, SCALE_A, SCALE_B, EXPAND,
        )  # fmt: skip
        a_ptrs += BLOCK_K
        b_ptrs += BLOCK_K
    finish(
        acc, offs_m, pid_n * BLOCK_N, scale_a_ptr, scale_b_ptr, bias_ptr, residual_ptr, out_ptr, stride_residual_m,
        M, N, ACTIVATION, GATED, SCALE_A, SCALE_B,
    )  # fmt: skip
