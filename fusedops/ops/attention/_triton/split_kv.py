"""Join attentions over disjoint sets of keys: the splits of one call in a fixed order, or two results of a caller."""

import triton
import triton.language as tl

from fusedops._core.tl import LOG2E, close_rows, row_offsets


@triton.jit
def _share(m, m_all, NATURAL: tl.constexpr):
    """What sums relative to m count beside sums relative to the larger m_all; nothing where both are -inf."""
    distance = m - tl.where(m_all == float("-inf"), 0.0, m_all)
    if NATURAL:
        distance *= LOG2E
    return tl.exp2(distance)


@triton.jit
def _weighted(values, share):
    """Values times their share; where that is 0 nobody looks at them, were they NaN."""
    return tl.where((share == 0.0)[:, None], 0.0, values.to(tl.float32) * share[:, None])


@triton.jit
def _lse_rows(rows, S, H):
    """Heads of rows laid out as [..., S, H], and their places in [..., H, S]."""
    tokens = rows // H
    heads = rows % H
    return heads, (tokens // S * H + heads) * S + tokens % S


@triton.jit
def _combine_kernel(
    parts_ptr, states_ptr, sinks_ptr, out_ptr, lse_ptr, S, H, num_rows, num_splits,
    HAS_SINKS: tl.constexpr, NATURAL: tl.constexpr, DV: tl.constexpr,
    BLOCK_DV: tl.constexpr, BLOCK_SPLITS: tl.constexpr,
):  # fmt: skip
    """One program joins all splits of BLOCK_DV values of one row, every one of them loaded at once."""
    row = tl.program_id(0).to(tl.int64)
    offs_dv = tl.program_id(1) * BLOCK_DV + tl.arange(0, BLOCK_DV)
    head, lse_row = _lse_rows(row, S, H)
    splits = tl.arange(0, BLOCK_SPLITS)
    split_rows = splits.to(tl.int64) * num_rows
    mask_states = splits < num_splits
    mask_dv = offs_dv < DV

    m_parts = tl.load(states_ptr + lse_row + 2 * split_rows, mask=mask_states, other=float("-inf"))
    l_parts = tl.load(states_ptr + lse_row + 2 * split_rows + num_rows, mask=mask_states, other=0.0)
    part_ptrs = parts_ptr + (split_rows[:, None] + row) * DV + offs_dv[None, :]
    parts = tl.load(part_ptrs, mask=mask_states[:, None] & mask_dv[None, :], other=0.0)
    m = tl.max(m_parts[None, :], 1)
    shares = _share(m_parts, tl.max(m_parts, 0), NATURAL)
    # products that are rounded: fused with the sum's additions each lane would fuse its own, and lanes would differ
    l_i = tl.sum(tl.fma(l_parts, shares, tl.zeros_like(shares))[None, :], 1)
    acc = tl.sum(_weighted(parts, shares), 0)[None, :]
    sink = 0.0
    if HAS_SINKS:
        sink = tl.load(sinks_ptr + head).to(tl.float32)
    out, lse = close_rows(acc, m, l_i, sink, HAS_SINKS, NATURAL)
    offs_one = tl.arange(0, 1)
    tl.store(lse_ptr + lse_row + offs_one, lse, mask=tl.program_id(1) + offs_one == 0)
    tl.store(out_ptr + row * DV + offs_dv[None, :], out.to(out_ptr.dtype.element_ty), mask=mask_dv[None, :])


@triton.jit
def _merge_kernel(
    out_a_ptr, lse_a_ptr, out_b_ptr, lse_b_ptr, out_ptr, lse_ptr,
    stride_a_outer, stride_a_inner, stride_b_outer, stride_b_inner, S, H, num_rows, inner,
    DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """One program joins BLOCK_M rows of two results: each is a state with maximum lse, sum 1 and values out."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = rows < num_rows
    _, lse_rows = _lse_rows(rows, S, H)
    offs_dv = tl.arange(0, BLOCK_DV)[None, :]
    mask = mask_m[:, None] & (offs_dv < DV)
    lse_a = tl.load(lse_a_ptr + lse_rows, mask=mask_m, other=float("-inf"))
    lse_b = tl.load(lse_b_ptr + lse_rows, mask=mask_m, other=float("-inf"))
    a_ptrs = out_a_ptr + row_offsets(rows, inner, stride_a_outer, stride_a_inner)[:, None] + offs_dv
    b_ptrs = out_b_ptr + row_offsets(rows, inner, stride_b_outer, stride_b_inner)[:, None] + offs_dv
    m = tl.maximum(lse_a, lse_b)
    share_a = _share(lse_a, m, True)
    share_b = _share(lse_b, m, True)
    acc = _weighted(tl.load(a_ptrs, mask=mask, other=0.0), share_a)
    acc += _weighted(tl.load(b_ptrs, mask=mask, other=0.0), share_b)
    out, lse = close_rows(acc, m, share_a + share_b, 0.0, False, True)
    tl.store(lse_ptr + lse_rows, lse, mask=mask_m)
    tl.store(out_ptr + rows[:, None] * DV + offs_dv, out.to(out_ptr.dtype.element_ty), mask=mask)


def warps_of_join(num_values):
    """So many that a thread holds at most 64 of the values."""
    return min(max(num_values // 2048, 1), 8)
