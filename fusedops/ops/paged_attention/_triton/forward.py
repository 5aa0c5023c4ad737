"""The kernel of paged attention: every option, whole sequences or one part of their keys.

The rows of a tile are pairs (query, head) of the heads that share a key head, so that a page is read once for each key
head. Tiles are cut by the keys' positions, never by pages: the arithmetic does not know the page size, and where a page
lies does not show in the result. A key on a page that does not exist has NaN as its score.
"""

import triton
import triton.language as tl

from fusedops._core.tl import LOG2E, biased, close_rows, in_sight, key_range, online_softmax, scaled
from fusedops.ops.paged_attention._triton.schedule import first_block, lengths_of, parts_of, sequence_of

WORD = tl.constexpr(32)  # draft tokens of one word of a tree mask


@triton.jit
def _in_tree(visible, tree_row, mask_m, offs_n, context, num_words):
    """Which keys the tree leaves: all of the context, and of the new tokens those whose bit is set."""
    place = offs_n - context
    known = (place >= 0) & (place < num_words * WORD)
    place = tl.where(known, place, 0)
    words = tl.load(tree_row[:, None] + place[None, :] // WORD, mask=mask_m & known[None, :], other=0)
    bits = (words >> (place[None, :] % WORD)) & 1
    return visible & ((offs_n < context)[None, :] | (bits != 0))


@triton.jit
def _weighted(p, v, acc, alpha, v_scale, V_SCALE: tl.constexpr):
    """``acc * alpha + (p * v_scale) @ v``; before they are rounded to 16 bits, weights are brought to at most 1.

    So a single key's weight stays exact, and small scales do not leave float16's range.
    """
    if V_SCALE == "token":
        p = p * v_scale[None, :]
        if v.dtype != tl.float32:
            top = tl.max(tl.abs(p), 1)
            top = tl.where((top > 0.0) & (top < float("inf")), top, 1.0)
            part = tl.dot((p / top[:, None]).to(v.dtype), v, input_precision="ieee")
            return acc * alpha[:, None] + part * top[:, None]
    return tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision="ieee")


@triton.jit
def _attend(
    acc, m_i, l_i, q, k_ptr, v_ptr, table_ptr, k_scale_ptr, v_scale_ptr, tree_row,
    stride_k_p, stride_k_s, stride_v_p, stride_v_s, stride_k_scale_p, stride_k_scale_s, stride_v_scale_p,
    stride_v_scale_s, num_pages, num_words, start, end, first_key, last_key, context, pos_m, mask_m,
    scale, unit, softcap, slope, window_left, window_right,
    PARTLY: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    HAS_ALIBI: tl.constexpr, HAS_TREE: tl.constexpr, K_SCALE: tl.constexpr, V_SCALE: tl.constexpr, PLAIN: tl.constexpr,
    PAGE_SIZE: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Attend to the keys of the blocks start..end. PARTLY: some pairs of them may be hidden."""
    offs_d = tl.arange(0, BLOCK_D)[None, :]
    offs_dv = tl.arange(0, BLOCK_DV)[None, :]
    for start_n in range(start, end, BLOCK_N):
        offs_n = start_n + tl.arange(0, BLOCK_N)
        # no query of this tile may see a key outside first_key..last_key: it reads as 0, were it NaN in memory
        if PARTLY:
            reached = (offs_n >= first_key) & (offs_n < last_key)
            page = tl.load(table_ptr + offs_n // PAGE_SIZE, mask=reached, other=0)
        else:
            reached = offs_n >= 0
            page = tl.load(table_ptr + offs_n // PAGE_SIZE)
        exists = (page >= 0) & (page < num_pages)
        reached = reached & exists
        page = page.to(tl.int64)
        place = (offs_n % PAGE_SIZE).to(tl.int64)
        k_rows = page * stride_k_p + place * stride_k_s
        k_mask = reached[:, None]
        if D < BLOCK_D:
            k_mask = k_mask & (offs_d < D)
        k = tl.load(k_ptr + k_rows[:, None] + offs_d, mask=k_mask, other=0.0)
        s = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision="ieee")
        if K_SCALE == "token":
            k_scale_rows = page * stride_k_scale_p + place * stride_k_scale_s
            s *= tl.load(k_scale_ptr + k_scale_rows, mask=reached, other=0.0)[None, :]
        if not PLAIN:
            s = scaled(s, scale, softcap, HAS_SOFTCAP)
            s = biased(s, slope, pos_m, offs_n[None, :], s, HAS_ALIBI, False)
        s = tl.where(exists[None, :], s, float("nan"))
        if PARTLY:
            visible = in_sight(pos_m, offs_n[None, :], last_key, window_left, window_right, HAS_LEFT, HAS_RIGHT)
            if HAS_TREE:
                visible = _in_tree(visible, tree_row, mask_m, offs_n, context, num_words)
                reached = reached & (tl.max((visible & mask_m).to(tl.int32), 0) != 0)
            s = tl.where(visible, s, float("-inf"))
        p, alpha, m_i, l_i = online_softmax(s, m_i, l_i, unit, False)
        v_rows = page * stride_v_p + place * stride_v_s
        v_mask = reached[:, None]
        if DV < BLOCK_DV:
            v_mask = v_mask & (offs_dv < DV)
        v = tl.load(v_ptr + v_rows[:, None] + offs_dv, mask=v_mask, other=0.0)
        v_scale = 1.0
        if V_SCALE == "token":
            v_scale_rows = page * stride_v_scale_p + place * stride_v_scale_s
            v_scale = tl.load(v_scale_ptr + v_scale_rows, mask=reached, other=0.0)
        acc = _weighted(p, v.to(q.dtype), acc, alpha, v_scale, V_SCALE)
    return acc, m_i, l_i


@triton.jit
def _key_blocks(
    first_m, last_m, Sq, Sk, split, num_parts, window_left, window_right,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_TREE: tl.constexpr, IS_SPLIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """`key_range` of the queries first_m..last_m, or the part of it that a split takes: equal numbers of blocks."""
    start, full_start, full_end, end = key_range(
        first_m, last_m, Sq, Sk, window_left, window_right, HAS_LEFT, HAS_RIGHT, BLOCK_N
    )
    if HAS_TREE:  # only blocks of the context are known to be visible as a whole
        full_end = tl.maximum(tl.minimum(full_end, tl.maximum(Sk - Sq, 0) // BLOCK_N * BLOCK_N), full_start)
    if IS_SPLIT:
        if num_parts > 1:  # the tile holds all queries
            low = first_block(Sq, Sk, window_left, HAS_LEFT, BLOCK_N)
            share = tl.cdiv(tl.cdiv(Sk, BLOCK_N) - low, num_parts) * BLOCK_N
            start = low * BLOCK_N + split * share
            end = tl.maximum(tl.minimum(end, start + share), start)
            full_start = tl.minimum(tl.maximum(full_start, start), end)
            full_end = tl.minimum(tl.maximum(full_end, start), end)
    return start, full_start, full_end, end


@triton.jit
def _store_rows(
    acc, m_i, l_i, sinks_ptr, out_ptr, lse_ptr, parts_ptr, states_ptr, tokens, heads, offs_part, mask_m,
    T, num_heads, num_parts, HAS_SINKS: tl.constexpr, IS_SPLIT: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """The finished rows of out and lse, or where there are several parts what `_combine_kernel` joins."""
    offs_dv = tl.arange(0, BLOCK_DV)[None, :]
    mask = mask_m[:, None] & (offs_dv < DV)
    if IS_SPLIT:
        if num_parts > 1:
            tl.store(states_ptr + 2 * offs_part, m_i, mask=mask_m)
            tl.store(states_ptr + 2 * offs_part + 1, l_i, mask=mask_m)
            tl.store(parts_ptr + offs_part[:, None] * DV + offs_dv, acc, mask=mask)
            return
    sink = 0.0
    if HAS_SINKS:
        sink = tl.load(sinks_ptr + heads, mask=mask_m, other=0.0).to(tl.float32)
    out, lse = close_rows(acc, m_i, l_i, sink, HAS_SINKS, False)
    tl.store(lse_ptr + heads.to(tl.int64) * T + tokens, lse, mask=mask_m)
    out_rows = out_ptr + (tokens * num_heads + heads)[:, None] * DV
    tl.store(out_rows + offs_dv, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _paged_attention_kernel(
    q_ptr, k_ptr, v_ptr, table_ptr, seqlens_ptr, cu_q_ptr, sinks_ptr, alibi_ptr, k_scale_ptr, v_scale_ptr, tree_ptr,
    out_ptr, lse_ptr, parts_ptr, states_ptr,
    stride_q_t, stride_q_h, stride_k_p, stride_k_s, stride_k_h, stride_v_p, stride_v_s, stride_v_h, stride_table_b,
    stride_alibi_b, stride_k_scale_p, stride_k_scale_s, stride_k_scale_h,
    stride_v_scale_p, stride_v_scale_s, stride_v_scale_h, stride_tree_t,
    T, B, num_pages, capacity, num_blocks_m, num_kv_heads, pack, extra, num_splits, num_words, part_rows,
    softmax_scale, softcap, window_left, window_right,
    SPLITS: tl.constexpr, IS_VARLEN: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, HAS_ALIBI: tl.constexpr, HAS_SINKS: tl.constexpr, HAS_TREE: tl.constexpr,
    K_SCALE: tl.constexpr, V_SCALE: tl.constexpr, PLAIN: tl.constexpr, PAGE_SIZE: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M rows (query, head) of one key head of one sequence, over their keys or a part of them."""
    pid = tl.program_id(0)
    first_row = (num_blocks_m - 1 - pid % num_blocks_m) * BLOCK_M  # under a causal mask the longest rows start first
    pid = pid // num_blocks_m
    kv_head = pid % num_kv_heads
    slot = pid // num_kv_heads
    b = sequence_of(
        slot, seqlens_ptr, cu_q_ptr, B, T, capacity, pack, extra, num_splits, window_left,
        SPLITS, IS_VARLEN, HAS_LEFT, BLOCK_M, BLOCK_N, BLOCK_B,
    )  # fmt: skip
    if b >= B:
        return
    start_q, Sq, Sk = lengths_of(b, seqlens_ptr, cu_q_ptr, T, capacity, True, IS_VARLEN)
    if first_row >= Sq * pack:
        return
    split = 0
    num_parts = 1
    if SPLITS != "none":
        first_slot, num_parts = parts_of(
            b, seqlens_ptr, cu_q_ptr, Sq, B, T, capacity, pack, extra, num_splits, window_left,
            SPLITS, IS_VARLEN, HAS_LEFT, BLOCK_M, BLOCK_N, BLOCK_B,
        )  # fmt: skip
        split = slot - first_slot
        if split >= num_parts:
            return
    rows = first_row + tl.arange(0, BLOCK_M)
    mask_m = rows < Sq * pack
    offs_m = rows // pack
    heads = kv_head * pack + rows % pack
    tokens = (start_q + offs_m).to(tl.int64)
    first_m = first_row // pack
    last_m = (tl.minimum(first_row + BLOCK_M, Sq * pack) - 1) // pack
    context = Sk - Sq
    pos_m = (offs_m + context)[:, None]

    head = kv_head.to(tl.int64)
    b_wide = b.to(tl.int64)
    offs_d = tl.arange(0, BLOCK_D)[None, :]
    q_rows = q_ptr + (tokens * stride_q_t + heads.to(tl.int64) * stride_q_h)[:, None]
    q = tl.load(q_rows + offs_d, mask=mask_m[:, None] & (offs_d < D), other=0.0)
    scale = softmax_scale
    unit = softmax_scale * LOG2E if PLAIN else LOG2E
    if K_SCALE == "head":
        scale = softmax_scale * tl.load(k_scale_ptr + head * stride_k_scale_h)
    if K_SCALE == "token":
        k_scale_ptr += head * stride_k_scale_h
    if V_SCALE != "none":
        v_scale_ptr += head * stride_v_scale_h
    slope = 0.0
    if HAS_ALIBI:
        slope = tl.load(alibi_ptr + b_wide * stride_alibi_b + heads, mask=mask_m, other=0.0)[:, None]
    tree_row = tree_ptr
    if HAS_TREE:
        tree_row = tree_ptr + tokens * stride_tree_t

    start, full_start, full_end, end = _key_blocks(
        first_m, last_m, Sq, Sk, split, num_parts, window_left, window_right,
        HAS_LEFT, HAS_RIGHT, HAS_TREE, SPLITS != "none", BLOCK_N,
    )  # fmt: skip
    first_key = 0
    if HAS_LEFT:
        first_key = first_m + context - window_left
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    for part in tl.static_range(3):
        if part == 0:
            first, last = start, full_start
        elif part == 1:
            first, last = full_start, full_end
        else:
            first, last = full_end, end
        if part != 0 or HAS_LEFT:
            acc, m_i, l_i = _attend(
                acc, m_i, l_i, q, k_ptr + head * stride_k_h, v_ptr + head * stride_v_h,
                table_ptr + b_wide * stride_table_b, k_scale_ptr, v_scale_ptr, tree_row,
                stride_k_p, stride_k_s, stride_v_p, stride_v_s, stride_k_scale_p, stride_k_scale_s, stride_v_scale_p,
                stride_v_scale_s, num_pages, num_words, first, last, first_key, Sk, context, pos_m,
                mask_m[:, None], scale, unit, softcap, slope, window_left, window_right,
                part != 1, HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, HAS_ALIBI, HAS_TREE, K_SCALE, V_SCALE, PLAIN,
                PAGE_SIZE, D, DV, BLOCK_N, BLOCK_D, BLOCK_DV,
            )  # fmt: skip
    if V_SCALE == "head":
        acc *= tl.load(v_scale_ptr)
    offs_part = (tl.cast(slot, tl.int64) * num_kv_heads + kv_head) * part_rows + rows
    _store_rows(
        acc, m_i, l_i, sinks_ptr, out_ptr, lse_ptr, parts_ptr, states_ptr, tokens, heads, offs_part, mask_m,
        T, num_kv_heads * pack, num_parts, HAS_SINKS, SPLITS != "none", DV, BLOCK_DV,
    )  # fmt: skip
