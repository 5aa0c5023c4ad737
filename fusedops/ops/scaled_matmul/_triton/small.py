"""The kernels for few rows of a: weights are read once, by many programs, each of which has a part of the depth.

b stands on the left of the product, where the tensor cores take 64 rows at a time, and a's few rows are the columns:
so the instructions, and with them the order of every sum, are the same for any number of rows.
"""

import triton
import triton.language as tl

from fusedops._core.tl import paired_rows, split_paired_rows
from fusedops._core.tl_epilogue import finish, finish_pairs, sum_of_parts
from fusedops.ops.scaled_matmul._triton.tiles import add_block, operand


@triton.jit(do_not_specialize=["M"])
def _scaled_matmul_small_kernel(
    a_ptr, b_ptr, scale_a_ptr, scale_b_ptr, bias_ptr, residual_ptr, out_ptr, parts_ptr,
    stride_a_m, stride_b_n, stride_scale_a_m, stride_scale_a_k, stride_scale_b_n, stride_scale_b_k, stride_residual_m,
    M, N, K, split_k,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, SCALE_A: tl.constexpr, SCALE_B: tl.constexpr, EVEN_K: tl.constexpr,
    EXPAND: tl.constexpr, ACC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program has all rows, BLOCK_N columns and split_k of the depth: a multiple of BLOCK_K.

    Of parts of sums GATED is False: what is done with pairs follows when they have been added.
    """
    split = tl.program_id(1)
    start, end = split * split_k, tl.minimum((split + 1) * split_k, K)
    offs_m = tl.arange(0, BLOCK_M)[None, :]
    first_n = tl.program_id(0) * BLOCK_N
    rows_n = tl.arange(0, BLOCK_N)
    offs_n = (first_n + (paired_rows(rows_n) if GATED else rows_n))[:, None]
    offs_k = tl.arange(0, BLOCK_K)
    a_ptrs = a_ptr + tl.minimum(offs_m, M - 1).to(tl.int64) * stride_a_m + start + offs_k[:, None]
    b_ptrs = b_ptr + tl.minimum(offs_n, N - 1).to(tl.int64) * stride_b_n + start + offs_k[None, :]
    acc = tl.zeros([BLOCK_N, BLOCK_M], ACC)
    for first_k in range(start, end, BLOCK_K):
        b = operand(b_ptrs, first_k, offs_k[None, :], K, EVEN_K, EXPAND)
        a = operand(a_ptrs, first_k, offs_k[:, None], K, EVEN_K, EXPAND)
        acc = add_block(
            acc, b, a, offs_m, offs_n, first_k, scale_a_ptr, scale_b_ptr,
            stride_scale_a_m, stride_scale_a_k, stride_scale_b_n, stride_scale_b_k, M, N, SCALE_A, SCALE_B, EXPAND,
        )  # fmt: skip
        a_ptrs += BLOCK_K
        b_ptrs += BLOCK_K
    offs_m = tl.arange(0, BLOCK_M)[:, None]
    if parts_ptr is not None:
        offs_n = (first_n + rows_n)[None, :]
        rows = (split * M + offs_m).to(tl.int64)
        tl.store(parts_ptr + rows * N + offs_n, tl.trans(acc), mask=(offs_m < M) & (offs_n < N))
    elif GATED:
        gate, up = split_paired_rows(acc)
        finish_pairs(
            tl.trans(gate), tl.trans(up), offs_m, first_n, scale_a_ptr, scale_b_ptr, bias_ptr, residual_ptr, out_ptr,
            stride_residual_m, M, N, ACTIVATION, SCALE_A, SCALE_B,
        )  # fmt: skip
    else:
        finish(
            tl.trans(acc), offs_m, first_n, scale_a_ptr, scale_b_ptr, bias_ptr, residual_ptr, out_ptr,
            stride_residual_m, M, N, ACTIVATION, GATED, SCALE_A, SCALE_B,
        )  # fmt: skip


@triton.jit(do_not_specialize=["M"])
def _scaled_matmul_combine_kernel(
    parts_ptr, scale_a_ptr, scale_b_ptr, bias_ptr, residual_ptr, out_ptr, stride_residual_m, M, N, num_splits,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, SCALE_A: tl.constexpr, SCALE_B: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program adds up BLOCK_N columns of a row in the order of their splits, and finishes them."""
    offs_m = tl.program_id(1) + tl.arange(0, 1)[:, None]
    first_n = tl.program_id(0) * BLOCK_N
    offs_n = (first_n + tl.arange(0, BLOCK_N))[None, :]
    acc = sum_of_parts(parts_ptr, offs_m, offs_n, M, N, num_splits)
    finish(
        acc, offs_m, first_n, scale_a_ptr, scale_b_ptr, bias_ptr, residual_ptr, out_ptr, stride_residual_m, M, N,
        ACTIVATION, GATED, SCALE_A, SCALE_B,
    )  # fmt: skip


def combine_block(gated):
    """Sums of a row that one program adds up: 16 bytes of results for each thread, of which pairs give half as many."""
    return 2048 if gated else 1024
