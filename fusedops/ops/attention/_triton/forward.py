"""The portable forward kernel: dense and varlen, every option, whole rows or one split of the keys.

The rows of a tile are pairs (query, head) of up to `pack` heads that share their key head, so that grouped heads read
keys and values once. Maxima are kept in base 2, ``m = max(s) * unit``, or in natural units with an additive mask, whose
most negative numbers would overflow in base 2.
"""

import triton
import triton.language as tl

from fusedops._core.tl import LOG2E, biased, close_rows, in_sight, key_range, online_softmax, scaled, split_range

FP8_SUMS = tl.constexpr(32)  # products that Hopper may sum in its 14 bits before they are added in float32


@triton.jit
def _load_tile(ptrs, mask_rows, mask_columns, MASK_ROWS: tl.constexpr, MASK_COLUMNS: tl.constexpr):
    """A tile of rows, 0 where a mask that is asked for is False."""
    if MASK_ROWS and MASK_COLUMNS:
        return tl.load(ptrs, mask=mask_rows & mask_columns, other=0.0)
    elif MASK_ROWS:
        return tl.load(ptrs, mask=mask_rows, other=0.0)
    elif MASK_COLUMNS:
        return tl.load(ptrs, mask=mask_columns, other=0.0)
    else:
        return tl.load(ptrs)


@triton.jit
def _attend(
    acc, m_i, l_i, q, k_ptr, v_ptr, mask_ptr, mask_offsets, stride_k_s, stride_v_s, stride_mask_n,
    start, end, first_key, last_key, pos_m, mask_m, scale, unit, softcap, slope, window_left, window_right,
    PARTLY: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    HAS_ALIBI: tl.constexpr, MASK_KIND: tl.constexpr, PLAIN: tl.constexpr,
    WIDE: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Attend to the keys of the blocks start..end. PARTLY: some pairs of them may be hidden."""
    p_dtype: tl.constexpr = tl.float16 if v_ptr.dtype.element_ty.is_fp8() else v_ptr.dtype.element_ty
    offs_d = tl.arange(0, BLOCK_D)[None, :]
    offs_dv = tl.arange(0, BLOCK_DV)[None, :]
    block = tl.arange(0, BLOCK_N)
    places = block.to(tl.int64) if WIDE else block
    k_offsets = places[:, None] * stride_k_s + offs_d
    v_offsets = places[:, None] * stride_v_s + offs_dv
    for start_n in range(start, end, BLOCK_N):
        offs_n = start_n + block
        row_n = tl.cast(start_n, tl.int64)
        # no query of this tile may see a key outside first_key..last_key: it reads as 0, were it NaN in memory
        reached = (offs_n >= first_key) & (offs_n < last_key)
        k = _load_tile(k_ptr + row_n * stride_k_s + k_offsets, reached[:, None], offs_d < D, PARTLY, D < BLOCK_D)
        s = tl.dot(q, tl.trans(k), input_precision="ieee", max_num_imprecise_acc=FP8_SUMS if q.dtype.is_fp8() else None)
        bias = s
        if PARTLY:
            visible = in_sight(pos_m, offs_n[None, :], last_key, window_left, window_right, HAS_LEFT, HAS_RIGHT)
        if MASK_KIND != "none":
            mask_tile = mask_ptr + row_n * stride_mask_n + (mask_offsets + places[None, :] * stride_mask_n)
            if MASK_KIND == "bool":
                allowed = tl.load(mask_tile, mask=mask_m & reached[None, :], other=0)
                visible = visible & (allowed != 0)
            else:
                bias = tl.load(mask_tile, mask=mask_m & reached[None, :], other=float("-inf")).to(tl.float32)
                visible = visible & (bias != float("-inf"))
            reached = reached & (tl.max(visible.to(tl.int32), 0) != 0)
        if not PLAIN:
            s = scaled(s, scale, softcap, HAS_SOFTCAP)
            s = biased(s, slope, pos_m, offs_n[None, :], bias, HAS_ALIBI, MASK_KIND == "additive")
        if PARTLY:
            s = tl.where(visible, s, float("-inf"))
        p, alpha, m_i, l_i = online_softmax(s, m_i, l_i, unit, MASK_KIND == "additive")
        v = _load_tile(v_ptr + row_n * stride_v_s + v_offsets, reached[:, None], offs_dv < DV, PARTLY, DV < BLOCK_DV)
        acc = tl.dot(p.to(p_dtype), v.to(p_dtype), acc * alpha[:, None], input_precision="ieee")
    return acc, m_i, l_i


@triton.jit
def _attention_kernel(
    q_ptr, k_ptr, v_ptr, sinks_ptr, alibi_ptr, mask_ptr, q_scale_ptr, k_scale_ptr, v_scale_ptr, cu_q_ptr, cu_k_ptr,
    out_ptr, lse_ptr,
    stride_q_b, stride_q_s, stride_q_h, stride_k_b, stride_k_s, stride_k_h, stride_v_b, stride_v_s, stride_v_h,
    stride_alibi_b, stride_mask_b, stride_mask_h, stride_mask_m, stride_mask_n,
    stride_q_scale_b, stride_k_scale_b, stride_v_scale_b,
    stride_out_b, stride_out_s, stride_out_h, stride_lse_b, stride_lse_h,
    Sq, Sk, num_blocks_m, num_packs, pack, group, num_splits, num_rows,
    softmax_scale, softcap, window_left, window_right,
    IS_VARLEN: tl.constexpr, IS_SPLIT: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, HAS_ALIBI: tl.constexpr, HAS_SINKS: tl.constexpr,
    HAS_QK_SCALE: tl.constexpr, HAS_V_SCALE: tl.constexpr, MASK_KIND: tl.constexpr, PLAIN: tl.constexpr,
    WIDE: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M rows (query, head) of one pack of heads, over the keys that they see or a split of them."""
    pid = tl.program_id(0)
    first_row = (num_blocks_m - 1 - pid % num_blocks_m) * BLOCK_M  # under a causal mask the longest rows start first
    pid = pid // num_blocks_m
    split = pid % num_splits
    pid = pid // num_splits
    first_head = pid % num_packs * pack
    b = (pid // num_packs).to(tl.int64)
    if IS_VARLEN:
        start_q = tl.load(cu_q_ptr + b)
        start_k = tl.load(cu_k_ptr + b)
        Sq = tl.load(cu_q_ptr + b + 1) - start_q
        Sk = tl.load(cu_k_ptr + b + 1) - start_k
        q_ptr += start_q.to(tl.int64) * stride_q_s
        k_ptr += start_k.to(tl.int64) * stride_k_s
        v_ptr += start_k.to(tl.int64) * stride_v_s
        out_ptr += start_q.to(tl.int64) * stride_out_s
        lse_ptr += start_q
    if first_row >= Sq * pack:
        return
    rows = first_row + tl.arange(0, BLOCK_M)
    mask_m = rows < Sq * pack
    offs_m = rows // pack
    heads = first_head + rows % pack
    first_m = first_row // pack
    last_m = (tl.minimum(first_row + BLOCK_M, Sq * pack) - 1) // pack
    pos_m = (offs_m + (Sk - Sq))[:, None]

    kv_head = (first_head // group).to(tl.int64)
    k_ptr += b * stride_k_b + kv_head * stride_k_h
    v_ptr += b * stride_v_b + kv_head * stride_v_h
    offs_d = tl.arange(0, BLOCK_D)[None, :]
    q_ptr += b * stride_q_b
    q_rows = q_ptr + (offs_m.to(tl.int64) * stride_q_s + heads.to(tl.int64) * stride_q_h)[:, None]
    q = tl.load(q_rows + offs_d, mask=mask_m[:, None] & (offs_d < D), other=0.0)

    scale = softmax_scale
    unit = LOG2E
    if PLAIN:
        unit = softmax_scale * LOG2E
    if HAS_QK_SCALE:
        q_scale = tl.load(q_scale_ptr + b * stride_q_scale_b + heads, mask=mask_m, other=0.0)
        scale = (q_scale * (softmax_scale * tl.load(k_scale_ptr + b * stride_k_scale_b + kv_head)))[:, None]
    slope = 0.0
    if HAS_ALIBI:
        slope = tl.load(alibi_ptr + b * stride_alibi_b + heads, mask=mask_m, other=0.0)[:, None]
    mask_offsets = pos_m
    if MASK_KIND != "none":  # one that differs between heads comes with packs of one head
        mask_ptr += b * stride_mask_b + first_head.to(tl.int64) * stride_mask_h + first_m.to(tl.int64) * stride_mask_m
        mask_rows = offs_m - first_m
        mask_offsets = (mask_rows.to(tl.int64) if WIDE else mask_rows)[:, None] * stride_mask_m

    start, full_start, full_end, end = key_range(
        first_m, last_m, Sq, Sk, window_left, window_right, HAS_LEFT, HAS_RIGHT, BLOCK_N
    )
    first_key = 0
    if HAS_LEFT:
        first_key = first_m + (Sk - Sq) - window_left
    last_key = end
    if IS_SPLIT:
        start, full_start, full_end, end = split_range(start, full_start, full_end, end, split, num_splits, BLOCK_N)

    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    if MASK_KIND != "none":  # then no block is known to be visible as a whole
        full_start = start
        full_end = start
    for part in tl.static_range(3):
        if part == 0:
            first, last = start, full_start
        elif part == 1:
            first, last = full_start, full_end
        else:
            first, last = full_end, end
        if part == 2 or (MASK_KIND == "none" and (part == 1 or HAS_LEFT)):
            acc, m_i, l_i = _attend(
                acc, m_i, l_i, q, k_ptr, v_ptr, mask_ptr, mask_offsets, stride_k_s, stride_v_s, stride_mask_n,
                first, last, first_key, last_key, pos_m, mask_m[:, None],
                scale, unit, softcap, slope, window_left, window_right,
                part != 1, HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, HAS_ALIBI, MASK_KIND, PLAIN,
                WIDE, D, DV, BLOCK_N, BLOCK_D, BLOCK_DV,
            )  # fmt: skip

    offs_dv = tl.arange(0, BLOCK_DV)[None, :]
    out_rows = out_ptr + b * stride_out_b + offs_m.to(tl.int64) * stride_out_s + heads.to(tl.int64) * stride_out_h
    lse_rows = lse_ptr + b * stride_lse_b + heads.to(tl.int64) * stride_lse_h + offs_m
    if HAS_V_SCALE:
        acc *= tl.load(v_scale_ptr + b * stride_v_scale_b + kv_head)
    if IS_SPLIT:
        out_rows += tl.cast(split, tl.int64) * num_rows * DV
        lse_rows += tl.cast(split, tl.int64) * num_rows * 2
        tl.store(lse_rows, m_i, mask=mask_m)
        tl.store(lse_rows + num_rows, l_i, mask=mask_m)
        out = acc
    else:
        sink = 0.0
        if HAS_SINKS:
            sink = tl.load(sinks_ptr + heads, mask=mask_m, other=0.0).to(tl.float32)
        out, lse = close_rows(acc, m_i, l_i, sink, HAS_SINKS, MASK_KIND == "additive")
        tl.store(lse_rows, lse, mask=mask_m)
    mask = mask_m[:, None] & (offs_dv < DV)
    tl.store(out_rows[:, None] + offs_dv, out.to(out_ptr.dtype.element_ty), mask=mask)
