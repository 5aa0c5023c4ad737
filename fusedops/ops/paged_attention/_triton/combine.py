"""Join the parts of a sequence's keys, always in the same order."""

import triton
import triton.language as tl

from fusedops._core.tl import close_rows
from fusedops.ops.paged_attention._triton.schedule import lengths_of, parts_of


@triton.jit
def _join(m_i, l_i, acc, m_parts, l_parts, parts):
    """Add some parts to what was joined before; a part without a visible key counts nothing, were its values NaN."""
    m_new = tl.maximum(m_i, tl.max(m_parts, 0))
    m_finite = tl.where(m_new == float("-inf"), 0.0, m_new)
    shares = tl.exp2(m_parts - m_finite)
    alpha = tl.exp2(m_i - m_finite)
    weighted = tl.where((shares == 0.0)[:, None], 0.0, parts * shares[:, None])
    # products that are rounded: fused with the sum's additions each lane would fuse its own, and lanes would differ
    added = tl.sum(tl.fma(l_parts, shares, tl.zeros_like(shares)), 0)
    return m_new, l_i * alpha + added, acc * alpha + tl.sum(weighted, 0)


@triton.jit
def _combine_kernel(
    seqlens_ptr, cu_q_ptr, sinks_ptr, parts_ptr, states_ptr, out_ptr, lse_ptr,
    T, B, capacity, num_kv_heads, pack, extra, num_splits, part_rows, window_left,
    SPLITS: tl.constexpr, IS_VARLEN: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_SINKS: tl.constexpr, DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
):  # fmt: skip
    """One program joins BLOCK_DV values of one row (query, head) of one sequence."""
    pid = tl.program_id(0)
    row = pid % part_rows
    kv_head = pid // part_rows % num_kv_heads
    b = pid // part_rows // num_kv_heads
    start_q, Sq, _ = lengths_of(b, seqlens_ptr, cu_q_ptr, T, capacity, True, IS_VARLEN)
    if row >= Sq * pack:
        return
    first_slot, num_parts = parts_of(
        b, seqlens_ptr, cu_q_ptr, Sq, B, T, capacity, pack, extra, num_splits, window_left,
        SPLITS, IS_VARLEN, HAS_LEFT, BLOCK_M, BLOCK_N, BLOCK_B,
    )  # fmt: skip
    if num_parts == 1:
        return
    offs_dv = tl.program_id(1) * BLOCK_DV + tl.arange(0, BLOCK_DV)
    mask_dv = offs_dv < DV
    m_i = tl.cast(float("-inf"), tl.float32)
    l_i = 0.0
    acc = tl.zeros([BLOCK_DV], tl.float32)
    for first in range(0, num_parts, BLOCK_SPLITS):
        splits = first + tl.arange(0, BLOCK_SPLITS)
        mask = splits < num_parts
        places = ((first_slot + splits).to(tl.int64) * num_kv_heads + kv_head) * part_rows + row
        m_parts = tl.load(states_ptr + 2 * places, mask=mask, other=float("-inf"))
        l_parts = tl.load(states_ptr + 2 * places + 1, mask=mask, other=0.0)
        part_ptrs = parts_ptr + places[:, None] * DV + offs_dv[None, :]
        parts = tl.load(part_ptrs, mask=mask[:, None] & mask_dv[None, :], other=0.0)
        m_i, l_i, acc = _join(m_i, l_i, acc, m_parts, l_parts, parts)
    head = kv_head * pack + row % pack
    token = (start_q + row // pack).to(tl.int64)
    sink = 0.0
    if HAS_SINKS:
        sink = tl.load(sinks_ptr + head).to(tl.float32)
    one = tl.arange(0, 1)
    out, lse = close_rows(acc[None, :], m_i + tl.zeros([1], tl.float32), l_i + tl.zeros([1], tl.float32), sink,
                          HAS_SINKS, False)  # fmt: skip
    tl.store(lse_ptr + head.to(tl.int64) * T + token + one, lse, mask=tl.program_id(1) + one == 0)
    out_row = out_ptr + (token * (num_kv_heads * pack) + head) * DV
    tl.store(out_row + offs_dv[None, :], out.to(out_ptr.dtype.element_ty), mask=mask_dv[None, :])
