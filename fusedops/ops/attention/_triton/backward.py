"""Gradients of attention without atomics: every element of dq, dk and dv is summed by one program, in a fixed order.

With p = exp(s - lse), dp = grad_out @ v.T and delta = rowsum(grad_out * out) - grad_lse, the scores' gradient is
ds = p * dp, times the softcap's derivative; then dv = p.T @ grad_out, dk = scale * ds.T @ q and
dq = scale * ds @ k. A sink is a score without a value: its gradient is the sum of -exp(sink - lse) * delta.
Dense and packed sequences take the same kernels: packed ones have batch strides of 0 and their own first row.
"""

import triton
import triton.language as tl

from fusedops._core.tl import LOG2E, biased, block_range, in_sight, key_range, scaled


@triton.jit
def query_range(
    first_n, last_n, Sq, Sk, window_left, window_right,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """`block_range` of the queries (indices) that may see the keys first_n..last_n (inclusive)."""
    shift = Sq - Sk
    return block_range(first_n + shift, last_n + shift, Sq, window_right, window_left, HAS_RIGHT, HAS_LEFT, BLOCK_M)


@triton.jit
def _load_tile(base, rows, offs_d, stride, mask_rows, MASK_ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Rows of a matrix of WIDTH columns; zero beyond them and, where MASK_ROWS, in rows whose mask is False."""
    pointers = base + rows.to(tl.int64)[:, None] * stride + offs_d[None, :]
    mask_d = (offs_d < WIDTH)[None, :]
    if MASK_ROWS and WIDTH < offs_d.shape[0]:
        return tl.load(pointers, mask=mask_rows[:, None] & mask_d, other=0.0)
    elif MASK_ROWS:
        return tl.load(pointers, mask=mask_rows[:, None], other=0.0)
    elif WIDTH < offs_d.shape[0]:
        return tl.load(pointers, mask=mask_d, other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def _load_row(pointers, mask, other, MASKED: tl.constexpr):
    """One number of each row."""
    if MASKED:
        return tl.load(pointers, mask=mask, other=other)
    else:
        return tl.load(pointers)


@triton.jit
def _store_tile(base, rows, offs_d, stride, mask_rows, values, WIDTH: tl.constexpr):
    mask = mask_rows[:, None] & (offs_d < WIDTH)[None, :]
    pointers = base + rows.to(tl.int64)[:, None] * stride + offs_d[None, :]
    tl.store(pointers, values.to(base.dtype.element_ty), mask=mask)


@triton.jit
def _sequence(cu_q_ptr, cu_k_ptr, b, Sq, Sk, IS_VARLEN: tl.constexpr):
    """First query and key of a batch entry in memory, in int64, and its lengths."""
    first_q = b * 0
    first_k = b * 0
    if IS_VARLEN:
        first_q = tl.load(cu_q_ptr + b).to(tl.int64)
        first_k = tl.load(cu_k_ptr + b).to(tl.int64)
        Sq = (tl.load(cu_q_ptr + b + 1) - first_q).to(tl.int32)
        Sk = (tl.load(cu_k_ptr + b + 1) - first_k).to(tl.int32)
    return first_q, first_k, Sq, Sk


@triton.jit
def _weights_and_gradient(
    qk, dp, lse, offs_m, offs_n, mask_ptr, stride_mask_m, stride_mask_n, slope,
    Sq, Sk, softmax_scale, softcap, window_left, window_right,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_ALIBI: tl.constexpr,
    MASK_KIND: tl.constexpr, PARTLY: tl.constexpr,
):  # fmt: skip
    """p, ds and visibility of one tile, either way round: offs_m and offs_n broadcast to it. Hidden pairs are 0."""
    pos_m = offs_m + (Sk - Sq)
    visible = offs_n < Sk
    bias = qk
    if PARTLY:
        visible = in_sight(pos_m, offs_n, Sk, window_left, window_right, HAS_LEFT, HAS_RIGHT) & (offs_m < Sq)
        if MASK_KIND != "none":
            mask_tile = mask_ptr + offs_m.to(tl.int64) * stride_mask_m + offs_n.to(tl.int64) * stride_mask_n
            if MASK_KIND == "bool":
                visible &= tl.load(mask_tile, mask=visible, other=0) != 0
            else:
                bias = tl.load(mask_tile, mask=visible, other=float("-inf")).to(tl.float32)
                visible &= bias != float("-inf")
    if HAS_SOFTCAP or HAS_ALIBI or MASK_KIND == "additive":
        capped = scaled(qk, softmax_scale, softcap, HAS_SOFTCAP)
        s = biased(capped, slope, pos_m, offs_n, bias, HAS_ALIBI, MASK_KIND == "additive")
        if MASK_KIND == "additive":  # natural units: the most negative numbers would overflow in base 2
            p = tl.exp2((s - lse) * LOG2E)
        else:
            p = tl.exp2(s * LOG2E - lse)
    else:
        p = tl.exp2(scaled(qk, softmax_scale * LOG2E, softcap, False) - lse)
    ds = p * dp
    if HAS_SOFTCAP:
        ds *= 1.0 - (capped / softcap) * (capped / softcap)
    if PARTLY:
        p = tl.where(visible, p, 0.0)
        ds = tl.where(visible, ds, 0.0)
    return p, ds, visible


@triton.jit
def _attention_delta_kernel(
    grad_out_ptr, out_ptr, lse_ptr, grad_lse_ptr, sinks_ptr, cu_q_ptr, row_lse_ptr, delta_ptr, dsinks_ptr,
    stride_grad_out_b, stride_grad_out_s, stride_grad_out_h, stride_out_b, stride_out_s, stride_out_h,
    stride_lse_b, stride_lse_h, stride_lse_s, stride_grad_lse_b, stride_grad_lse_h, stride_grad_lse_s,
    stride_row_b, stride_row_h,
    H, Sq,
    DV: tl.constexpr, HAS_GRAD_LSE: tl.constexpr, HAS_SINKS: tl.constexpr, NATURAL: tl.constexpr,
    IS_VARLEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """One program: delta and lse of BLOCK_M rows of one head (+inf where no key is seen), and their part of dsinks."""
    num_blocks = tl.cdiv(Sq, BLOCK_M)
    pid = tl.program_id(0)
    pid_m = pid % num_blocks
    h = (pid // num_blocks % H).to(tl.int64)
    b = (pid // num_blocks // H).to(tl.int64)
    first_q, _, Sq, _ = _sequence(cu_q_ptr, cu_q_ptr, b, Sq, Sq, IS_VARLEN)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < Sq
    offs_dv = tl.arange(0, BLOCK_DV)
    grad_out_base = grad_out_ptr + b * stride_grad_out_b + first_q * stride_grad_out_s + h * stride_grad_out_h
    out_base = out_ptr + b * stride_out_b + first_q * stride_out_s + h * stride_out_h
    grad_out = _load_tile(grad_out_base, offs_m, offs_dv, stride_grad_out_s, mask_m, True, DV).to(tl.float32)
    out = _load_tile(out_base, offs_m, offs_dv, stride_out_s, mask_m, True, DV).to(tl.float32)
    delta = tl.sum(grad_out * out, axis=1)
    rows = first_q + offs_m
    lse = tl.load(lse_ptr + b * stride_lse_b + h * stride_lse_h + rows * stride_lse_s, mask=mask_m, other=0.0)
    if HAS_GRAD_LSE:
        grad_lse_base = grad_lse_ptr + b * stride_grad_lse_b + h * stride_grad_lse_h
        delta -= tl.load(grad_lse_base + rows * stride_grad_lse_s, mask=mask_m, other=0.0)
    empty = lse == float("-inf")
    delta = tl.where(empty, 0.0, delta)
    row = b * stride_row_b + h * stride_row_h + rows
    unit: tl.constexpr = 1.0 if NATURAL else LOG2E
    tl.store(row_lse_ptr + row, tl.where(empty, float("inf"), lse * unit), mask=mask_m)
    tl.store(delta_ptr + row, delta, mask=mask_m)
    if HAS_SINKS:
        weight = tl.exp2((tl.load(sinks_ptr + h).to(tl.float32) - lse) * LOG2E)
        terms = tl.where(mask_m & (lse != float("-inf")), weight * delta, 0.0)
        tl.store(dsinks_ptr + pid, -tl.sum(terms, axis=0))


@triton.jit
def _dkdv_steps(
    dk, dv, k, v, offs_n, first, count, skip_from, skip, grad_out_ptr, q_ptr, lse_ptr, delta_ptr, alibi_ptr, mask_ptr,
    stride_grad_out_s, stride_grad_out_h, stride_q_s, stride_q_h, stride_row_h, stride_alibi_h,
    stride_mask_h, stride_mask_m, stride_mask_n,
    group, Sq, Sk, softmax_scale, softcap, window_left, window_right,
    D: tl.constexpr, DV: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    HAS_ALIBI: tl.constexpr, MASK_KIND: tl.constexpr, PARTLY: tl.constexpr,
    HAS_DK: tl.constexpr, HAS_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Add `count` blocks of queries of each head of the group; blocks from `skip_from` on stand `skip` rows later."""
    MASK_ROWS: tl.constexpr = PARTLY or not (HAS_LEFT or HAS_RIGHT)
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    BLOCK_N: tl.constexpr = k.shape[0]
    for step in range(group * count):
        head = (step // count).to(tl.int64)
        start_m = first + step % count * BLOCK_M
        start_m += tl.where(start_m >= skip_from, skip, 0)
        offs_m = start_m + tl.arange(0, BLOCK_M)
        mask_m = offs_m < Sq
        q = _load_tile(q_ptr + head * stride_q_h, offs_m, offs_d, stride_q_s, mask_m, MASK_ROWS, D)
        grad_out_base = grad_out_ptr + head * stride_grad_out_h
        grad_out = _load_tile(grad_out_base, offs_m, offs_dv, stride_grad_out_s, mask_m, MASK_ROWS, DV)
        slope = 0.0
        if HAS_ALIBI:
            slope = tl.load(alibi_ptr + head * stride_alibi_h)
        mask_base = mask_ptr
        if MASK_KIND != "none":
            mask_base = mask_ptr + head * stride_mask_h
        qk = tl.dot(k, tl.trans(q), input_precision="ieee")
        dp = qk
        if HAS_DK:
            delta = _load_row(delta_ptr + head * stride_row_h + offs_m, mask_m, 0.0, MASK_ROWS)
            dp = tl.zeros([BLOCK_N, BLOCK_M], tl.float32) - delta[None, :]
            dp = tl.dot(v, tl.trans(grad_out), dp, input_precision="ieee")
        lse = _load_row(lse_ptr + head * stride_row_h + offs_m, mask_m, float("inf"), MASK_ROWS)
        p, ds, _ = _weights_and_gradient(
            qk, dp, lse[None, :], offs_m[None, :], offs_n[:, None],
            mask_base, stride_mask_m, stride_mask_n, slope,
            Sq, Sk, softmax_scale, softcap, window_left, window_right,
            HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, HAS_ALIBI, MASK_KIND, PARTLY,
        )  # fmt: skip
        if HAS_DV:
            dv = tl.dot(p.to(grad_out.dtype), grad_out, dv, input_precision="ieee")
        if HAS_DK:
            dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    return dk, dv


@triton.jit
def _attention_dkdv_kernel(
    grad_out_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, delta_ptr, alibi_ptr, mask_ptr, cu_q_ptr, cu_k_ptr, dk_ptr, dv_ptr,
    stride_grad_out_b, stride_grad_out_s, stride_grad_out_h, stride_q_b, stride_q_s, stride_q_h,
    stride_k_b, stride_k_s, stride_k_h, stride_v_b, stride_v_s, stride_v_h,
    stride_row_b, stride_row_h, stride_alibi_b, stride_alibi_h,
    stride_mask_b, stride_mask_h, stride_mask_m, stride_mask_n,
    stride_dk_b, stride_dk_s, stride_dk_h, stride_dv_b, stride_dv_s, stride_dv_h,
    group, Hk, Sq, Sk, softmax_scale, softcap, window_left, window_right,
    D: tl.constexpr, DV: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    HAS_ALIBI: tl.constexpr, MASK_KIND: tl.constexpr, IS_VARLEN: tl.constexpr,
    HAS_DK: tl.constexpr, HAS_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """One program: dk and dv of BLOCK_N keys of one key head, from all queries of its group that see any of them."""
    num_blocks = tl.cdiv(Sk, BLOCK_N)
    pid = tl.program_id(0)
    start_n = pid % num_blocks * BLOCK_N
    hk = (pid // num_blocks % Hk).to(tl.int64)
    b = (pid // num_blocks // Hk).to(tl.int64)
    first_q, first_k, Sq, Sk = _sequence(cu_q_ptr, cu_k_ptr, b, Sq, Sk, IS_VARLEN)
    if start_n < Sk:
        h = hk * group
        offs_n = start_n + tl.arange(0, BLOCK_N)
        mask_n = offs_n < Sk
        offs_d = tl.arange(0, BLOCK_D)
        offs_dv = tl.arange(0, BLOCK_DV)
        k_base = k_ptr + b * stride_k_b + first_k * stride_k_s + hk * stride_k_h
        v_base = v_ptr + b * stride_v_b + first_k * stride_v_s + hk * stride_v_h
        k = _load_tile(k_base, offs_n, offs_d, stride_k_s, mask_n, True, D)
        v = _load_tile(v_base, offs_n, offs_dv, stride_v_s, mask_n, True, DV)
        q_base = q_ptr + b * stride_q_b + first_q * stride_q_s + h * stride_q_h
        grad_out_base = grad_out_ptr + b * stride_grad_out_b + first_q * stride_grad_out_s + h * stride_grad_out_h
        row = b * stride_row_b + h * stride_row_h + first_q
        alibi_base = alibi_ptr
        if HAS_ALIBI:
            alibi_base = alibi_ptr + b * stride_alibi_b + h * stride_alibi_h
        mask_base = mask_ptr
        if MASK_KIND != "none":
            mask_base = mask_ptr + b * stride_mask_b + h * stride_mask_h
        last_n = tl.minimum(start_n + BLOCK_N, Sk) - 1
        start, full_start, full_end, end = query_range(
            start_n, last_n, Sq, Sk, window_left, window_right, HAS_LEFT, HAS_RIGHT, BLOCK_M
        )
        if not (HAS_LEFT or HAS_RIGHT):  # queries beyond the last add nothing: their lse is +inf
            full_end = tl.cdiv(Sq, BLOCK_M) * BLOCK_M
        dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
        full = 0
        if MASK_KIND == "none":
            full = full_end - full_start
            dk, dv = _dkdv_steps(
                dk, dv, k, v, offs_n, full_start, full // BLOCK_M, full_end, 0,
                grad_out_base, q_base, lse_ptr + row, delta_ptr + row, alibi_base, mask_base,
                stride_grad_out_s, stride_grad_out_h, stride_q_s, stride_q_h, stride_row_h, stride_alibi_h,
                stride_mask_h, stride_mask_m, stride_mask_n,
                group, Sq, Sk, softmax_scale, softcap, window_left, window_right,
                D, DV, HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, HAS_ALIBI, MASK_KIND, False,
                HAS_DK, HAS_DV, BLOCK_M, BLOCK_D, BLOCK_DV,
            )  # fmt: skip
        if HAS_LEFT or HAS_RIGHT or MASK_KIND != "none":
            dk, dv = _dkdv_steps(
                dk, dv, k, v, offs_n, start, tl.cdiv(end - start - full, BLOCK_M), full_start, full,
                grad_out_base, q_base, lse_ptr + row, delta_ptr + row, alibi_base, mask_base,
                stride_grad_out_s, stride_grad_out_h, stride_q_s, stride_q_h, stride_row_h, stride_alibi_h,
                stride_mask_h, stride_mask_m, stride_mask_n,
                group, Sq, Sk, softmax_scale, softcap, window_left, window_right,
                D, DV, HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, HAS_ALIBI, MASK_KIND, True,
                HAS_DK, HAS_DV, BLOCK_M, BLOCK_D, BLOCK_DV,
            )  # fmt: skip
        dk_base = dk_ptr + b * stride_dk_b + first_k * stride_dk_s + hk * stride_dk_h
        dv_base = dv_ptr + b * stride_dv_b + first_k * stride_dv_s + hk * stride_dv_h
        if HAS_DK:
            _store_tile(dk_base, offs_n, offs_d, stride_dk_s, mask_n, dk * softmax_scale, D)
        if HAS_DV:
            _store_tile(dv_base, offs_n, offs_dv, stride_dv_s, mask_n, dv, DV)


@triton.jit
def _dq_steps(
    dq, q, grad_out, lse, delta, offs_m, first, count, skip_from, skip, first_key, last_key,
    k_ptr, v_ptr, mask_ptr, slope, stride_k_s, stride_v_s, stride_mask_m, stride_mask_n,
    Sq, Sk, softmax_scale, softcap, window_left, window_right,
    D: tl.constexpr, DV: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    HAS_ALIBI: tl.constexpr, MASK_KIND: tl.constexpr, PARTLY: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Add `count` blocks of keys; blocks from `skip_from` on stand `skip` keys later."""
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    BLOCK_M: tl.constexpr = q.shape[0]
    for step in range(count):
        start_n = first + step * BLOCK_N
        start_n += tl.where(start_n >= skip_from, skip, 0)
        offs_n = start_n + tl.arange(0, BLOCK_N)
        # a key that none of these queries sees reads as 0, were it NaN in memory: 0 * NaN is NaN
        reached = (offs_n >= first_key) & (offs_n < last_key)
        k = _load_tile(k_ptr, offs_n, offs_d, stride_k_s, reached, PARTLY, D)
        v = _load_tile(v_ptr, offs_n, offs_dv, stride_v_s, reached, PARTLY, DV)
        qk = tl.dot(q, tl.trans(k), input_precision="ieee")
        dp = tl.zeros([BLOCK_M, BLOCK_N], tl.float32) - delta[:, None]
        dp = tl.dot(grad_out, tl.trans(v), dp, input_precision="ieee")
        _, ds, visible = _weights_and_gradient(
            qk, dp, lse[:, None], offs_m[:, None], offs_n[None, :],
            mask_ptr, stride_mask_m, stride_mask_n, slope,
            Sq, Sk, softmax_scale, softcap, window_left, window_right,
            HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, HAS_ALIBI, MASK_KIND, PARTLY,
        )  # fmt: skip
        if MASK_KIND != "none":
            reached = tl.max(visible.to(tl.int32), axis=0) > 0
            k = tl.where(reached[:, None], k, 0.0)
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
    return dq


@triton.jit
def _attention_dq_kernel(
    grad_out_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, delta_ptr, alibi_ptr, mask_ptr, cu_q_ptr, cu_k_ptr, dq_ptr,
    stride_grad_out_b, stride_grad_out_s, stride_grad_out_h, stride_q_b, stride_q_s, stride_q_h,
    stride_k_b, stride_k_s, stride_k_h, stride_v_b, stride_v_s, stride_v_h,
    stride_row_b, stride_row_h, stride_alibi_b, stride_alibi_h,
    stride_mask_b, stride_mask_h, stride_mask_m, stride_mask_n,
    stride_dq_b, stride_dq_s, stride_dq_h,
    group, H, Sq, Sk, softmax_scale, softcap, window_left, window_right,
    D: tl.constexpr, DV: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    HAS_ALIBI: tl.constexpr, MASK_KIND: tl.constexpr, IS_VARLEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """One program: dq of BLOCK_M queries of one head."""
    num_blocks = tl.cdiv(Sq, BLOCK_M)
    pid = tl.program_id(0)
    start_m = (num_blocks - 1 - pid % num_blocks) * BLOCK_M  # causal rows see the more keys the later: longest first
    h = (pid // num_blocks % H).to(tl.int64)
    hk = h // group
    b = (pid // num_blocks // H).to(tl.int64)
    first_q, first_k, Sq, Sk = _sequence(cu_q_ptr, cu_k_ptr, b, Sq, Sk, IS_VARLEN)
    if start_m < Sq:
        offs_m = start_m + tl.arange(0, BLOCK_M)
        mask_m = offs_m < Sq
        offs_d = tl.arange(0, BLOCK_D)
        offs_dv = tl.arange(0, BLOCK_DV)
        q_base = q_ptr + b * stride_q_b + first_q * stride_q_s + h * stride_q_h
        grad_out_base = grad_out_ptr + b * stride_grad_out_b + first_q * stride_grad_out_s + h * stride_grad_out_h
        k_base = k_ptr + b * stride_k_b + first_k * stride_k_s + hk * stride_k_h
        v_base = v_ptr + b * stride_v_b + first_k * stride_v_s + hk * stride_v_h
        q = _load_tile(q_base, offs_m, offs_d, stride_q_s, mask_m, True, D)
        grad_out = _load_tile(grad_out_base, offs_m, offs_dv, stride_grad_out_s, mask_m, True, DV)
        row = b * stride_row_b + h * stride_row_h + first_q
        lse = tl.load(lse_ptr + row + offs_m, mask=mask_m, other=float("inf"))
        delta = tl.load(delta_ptr + row + offs_m, mask=mask_m, other=0.0)
        slope = 0.0
        if HAS_ALIBI:
            slope = tl.load(alibi_ptr + b * stride_alibi_b + h * stride_alibi_h)
        mask_base = mask_ptr
        if MASK_KIND != "none":
            mask_base = mask_ptr + b * stride_mask_b + h * stride_mask_h
        last_m = tl.minimum(start_m + BLOCK_M, Sq) - 1
        start, full_start, full_end, end = key_range(
            start_m, last_m, Sq, Sk, window_left, window_right, HAS_LEFT, HAS_RIGHT, BLOCK_N
        )
        first_key = 0
        if HAS_LEFT:
            first_key = start_m + (Sk - Sq) - window_left
        dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        full = 0
        if MASK_KIND == "none":
            full = full_end - full_start
            dq = _dq_steps(
                dq, q, grad_out, lse, delta, offs_m, full_start, full // BLOCK_N, full_end, 0,
                first_key, end, k_base, v_base, mask_base, slope, stride_k_s, stride_v_s, stride_mask_m, stride_mask_n,
                Sq, Sk, softmax_scale, softcap, window_left, window_right,
                D, DV, HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, HAS_ALIBI, MASK_KIND, False,
                BLOCK_N, BLOCK_D, BLOCK_DV,
            )  # fmt: skip
        dq = _dq_steps(
            dq, q, grad_out, lse, delta, offs_m, start, tl.cdiv(end - start - full, BLOCK_N), full_start, full,
            first_key, end, k_base, v_base, mask_base, slope, stride_k_s, stride_v_s, stride_mask_m, stride_mask_n,
            Sq, Sk, softmax_scale, softcap, window_left, window_right,
            D, DV, HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, HAS_ALIBI, MASK_KIND, True,
            BLOCK_N, BLOCK_D, BLOCK_DV,
        )  # fmt: skip
        dq_base = dq_ptr + b * stride_dq_b + first_q * stride_dq_s + h * stride_dq_h
        _store_tile(dq_base, offs_m, offs_d, stride_dq_s, mask_m, dq * softmax_scale, D)
