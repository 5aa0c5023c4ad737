"""The meaning of paged attention. In float64 this is the truth that every implementation is measured against."""

import torch


def paged_attention(
    q, k_cache, v_cache, block_table, cache_seqlens, cu_seqlens_q, max_seqlen_q, sinks, alibi_slopes, k_scale, v_scale,
    tree_mask, softmax_scale, causal, window_left, window_right, softcap, num_splits=None,
):  # fmt: skip
    """The keys and values of each sequence, gathered from their pages, and attention to them."""
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = torch.zeros(*q.shape[:2], v_cache.shape[3], dtype=q.dtype, device=q.device)
    lse = torch.zeros(q.shape[1], q.shape[0], dtype=wide, device=q.device)
    starts = range(len(q) + 1) if cu_seqlens_q is None else cu_seqlens_q.clamp(0, len(q)).tolist()
    for b in range(block_table.shape[0]):
        rows = slice(starts[b], max(starts[b + 1], starts[b]))
        keys = _gather(k_cache, k_scale, block_table[b], cache_seqlens[b], wide, float("nan"))
        values = _gather(v_cache, v_scale, block_table[b], cache_seqlens[b], wide, 0.0)
        slopes = alibi_slopes if alibi_slopes is None or alibi_slopes.dim() == 1 else alibi_slopes[b]
        tree = None if tree_mask is None else tree_mask[rows]
        options = softmax_scale, causal, window_left, window_right, softcap
        out[rows], lse[:, rows] = _attention(q[rows].to(wide), keys, values, sinks, slopes, tree, *options)
    return out, lse


def _gather(cache, scale, pages, length, wide, missing):
    """[length, Hk, D] real values of one sequence; `missing` on pages that do not exist."""
    num_pages, page_size = cache.shape[:2]
    tokens = torch.arange(min(max(int(length), 0), len(pages) * page_size), device=cache.device)
    page, slot = pages[tokens // page_size].long(), tokens % page_size
    exists = (page >= 0) & (page < num_pages)
    values = torch.full((len(tokens), *cache.shape[2:]), missing, dtype=wide, device=cache.device)
    values[exists] = cache[page[exists], slot[exists]].to(wide)
    if scale is not None and scale.dim() == 3:
        values[exists] *= scale[page[exists], slot[exists]].to(wide)[..., None]
    elif scale is not None:
        values *= scale.to(wide).reshape(-1, 1)
    return values


def _attention(q, k, v, sinks, slopes, tree, softmax_scale, causal, window_left, window_right, softcap):
    """One sequence: q [Sq, H, D], k [Sk, Hk, D], v [Sk, Hk, Dv]."""
    group = q.shape[1] // k.shape[1]
    keys, values = (t.repeat_interleave(group, 1).transpose(0, 1) for t in (k, v))
    scores = q.transpose(0, 1) @ keys.mT * softmax_scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    context = k.shape[0] - q.shape[0]
    distance = torch.arange(k.shape[0], device=q.device) - torch.arange(q.shape[0], device=q.device)[:, None] - context
    if slopes is not None:
        scores = scores - slopes.to(q.dtype)[:, None, None] * distance.abs()
    visible = torch.ones_like(distance, dtype=torch.bool)
    if causal:
        visible = visible & (distance <= 0)
    if window_left >= 0:
        visible = visible & (distance >= -window_left)
    if window_right >= 0:
        visible = visible & (distance <= window_right)
    if tree is not None:
        visible = visible & _seen_in_tree(tree, context, k.shape[0])
    scores = scores.masked_fill(~visible, float("-inf"))
    values = values.masked_fill(~visible.any(0)[:, None], 0.0)
    if sinks is not None:
        scores = torch.cat((scores, sinks.to(q.dtype)[:, None, None].expand(-1, q.shape[0], 1)), -1)
    empty = (scores == float("-inf")).all(-1, keepdim=True)
    filled = scores.masked_fill(empty, 0.0)
    lse = torch.logsumexp(filled, -1).masked_fill(empty.squeeze(-1), float("-inf"))
    weights = torch.softmax(filled, -1).masked_fill(empty, 0.0)
    return (weights[..., : k.shape[0]] @ values).transpose(0, 1), lse


def _seen_in_tree(tree, context, num_keys):
    """[Sq, Sk]: the context, and the new tokens whose bit is set; beyond the words nothing is."""
    new = torch.arange(num_keys, device=tree.device) - context
    known = (new >= 0) & (new < 32 * tree.shape[1])
    place = new.clamp(0, max(32 * tree.shape[1] - 1, 0))
    bits = (tree[:, place // 32] >> (place % 32)) & 1 if tree.shape[1] else tree[:, :0].new_zeros(len(tree), num_keys)
    return (new < 0) | (known & (bits != 0))
