"""Causal attention with an online softmax: plain pointers, and descriptors."""

import triton
import triton.language as tl


@triton.jit
def _step(q, k, v, acc, m_i, l_i, offs_m, offs_n, S, scale_log2):
    scores = tl.dot(q, tl.trans(k)) * scale_log2
    scores = tl.where((offs_n[None, :] <= offs_m[:, None]) & (offs_n[None, :] < S), scores, float("-inf"))
    m_new = tl.maximum(m_i, tl.max(scores, 1))
    p = tl.exp2(scores - m_new[:, None])
    correction = tl.exp2(m_i - m_new)
    acc = tl.dot(p.to(v.dtype), v, acc * correction[:, None])
    return acc, m_new, l_i * correction + tl.sum(p, 1)


@triton.jit
def attention_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, S, scale_log2, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """A block of queries of one head against all keys before them; ``[heads, S, D]``."""
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, D)
    base = tl.program_id(1) * S * D
    rows = base + offs_m[:, None] * D + offs_d[None, :]
    q = tl.load(q_ptr + rows, offs_m[:, None] < S, other=0.0)
    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, D], tl.float32)
    for start in range(0, (tl.program_id(0) + 1) * BLOCK_M, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        columns = base + offs_n[:, None] * D + offs_d[None, :]
        k = tl.load(k_ptr + columns, offs_n[:, None] < S, other=0.0)
        v = tl.load(v_ptr + columns, offs_n[:, None] < S, other=0.0)
        acc, m_i, l_i = _step(q, k, v, acc, m_i, l_i, offs_m, offs_n, S, scale_log2)
    tl.store(out_ptr + rows, (acc / l_i[:, None]).to(out_ptr.dtype.element_ty), offs_m[:, None] < S)


@triton.jit
def descriptor_attention_kernel(
    q_desc, k_desc, v_desc, out_desc, S, scale_log2, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    WARP_SPECIALIZE: tl.constexpr = False,
):  # fmt: skip
    """The same through descriptors of ``[heads * S, D]``; S is a multiple of the blocks."""
    start_m = tl.program_id(0) * BLOCK_M
    offs_m = start_m + tl.arange(0, BLOCK_M)
    base = tl.program_id(1) * S
    q = q_desc.load([base + start_m, 0])
    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, D], tl.float32)
    for start in tl.range(0, start_m + BLOCK_M, BLOCK_N, warp_specialize=WARP_SPECIALIZE):
        k = k_desc.load([base + start, 0])
        v = v_desc.load([base + start, 0])
        acc, m_i, l_i = _step(q, k, v, acc, m_i, l_i, offs_m, start + tl.arange(0, BLOCK_N), S, scale_log2)
    out_desc.store([base + start_m, 0], (acc / l_i[:, None]).to(out_desc.dtype))
