"""Paged attention by torch: each sequence's pages are gathered, and attended to as contiguous keys are.

Memory is that of the longest sequence. Lengths and pages are read on the host, as a CPU may.
"""

import torch

from fusedops._core.register import operators


def paged_attention(
    q, k_cache, v_cache, block_table, cache_seqlens, cu_seqlens_q, max_seqlen_q, sinks, alibi_slopes, k_scale, v_scale,
    tree_mask, softmax_scale, causal, window_left, window_right, softcap, num_splits,
):  # fmt: skip
    """One sequence after another."""
    out = torch.zeros((*q.shape[:2], v_cache.shape[3]), dtype=q.dtype, device=q.device)
    lse = torch.full((q.shape[1], q.shape[0]), float("-inf"), dtype=torch.float32, device=q.device)
    if q.is_meta:
        return out, lse
    attention = operators()["attention"]
    attend = attention.direct(q) or attention
    quantised = k_cache.dtype != q.dtype
    starts = range(len(q) + 1) if cu_seqlens_q is None else cu_seqlens_q.tolist()
    capacity = block_table.shape[1] * k_cache.shape[1]
    absent = (block_table < 0) | (block_table >= k_cache.shape[0])
    suspicious = bool(absent.any())  # unused entries may be anything
    lengths = cache_seqlens.tolist()
    room = -(-min(max(lengths, default=0), capacity) // k_cache.shape[1])
    # one place for the pages of all sequences: fresh memory for each costs more than the copy
    places = [None if quantised else cache.new_empty((room, *cache.shape[1:])) for cache in (k_cache, v_cache)]
    for b, length in enumerate(lengths):
        length = min(max(length, 0), capacity)
        first, last = (min(max(start, 0), len(q)) for start in starts[b : b + 2])
        if first >= last:
            continue
        used = slice(0, -(-length // k_cache.shape[1]))
        pages = block_table[b, used]
        missing = absent[b, used] if suspicious and bool(absent[b, used].any()) else None
        keys = _gather(k_cache, k_scale, pages, missing, length, places[0], float("nan"))
        values = _gather(v_cache, v_scale, pages, missing, length, places[1], 0.0)
        queries = q[first:last].float() if quantised else q[first:last]
        slopes = alibi_slopes if alibi_slopes is None or alibi_slopes.dim() == 1 else alibi_slopes[b]
        mask = None if tree_mask is None else _tree(tree_mask[first:last], length)
        part, sums = attend(
            queries[None], keys[None], values[None], sinks if sinks is None or not quantised else sinks.float(),
            slopes, mask, None, None, None, softmax_scale, causal, window_left, window_right, softcap,
        )  # fmt: skip
        out[first:last], lse[:, first:last] = part[0], sums[0]
    return out, lse


def _gather(cache, scale, pages, missing, length, place, filling):
    """[length, Hk, D] of one sequence, in `place`, or in float32 where the stored values are codes and it is None.

    Missing pages are full of `filling`.
    """
    if missing is not None:
        pages = pages.masked_fill(missing, 0)
        if cache.shape[0] == 0:
            cache = cache.new_zeros((1, *cache.shape[1:]))
            scale = scale if scale is None or scale.dim() < 3 else scale.new_zeros((1, *scale.shape[1:]))
    if place is None:
        found = cache[pages].float()
    else:
        found = torch.index_select(cache, 0, pages, out=place[: len(pages)])
    if scale is not None:
        found *= scale[pages][..., None] if scale.dim() == 3 else scale.reshape(-1, 1)
    if missing is not None:
        found[missing] = filling
    return found.flatten(0, 1)[:length]


def _tree(words, length):
    """[1, 1, Sq, Sk] bool: the context, and of the new tokens those whose bit is set."""
    num_queries, num_words = words.shape
    shifts = torch.arange(32, dtype=torch.int32, device=words.device)
    seen = ((words[:, :, None] >> shifts) & 1).bool().flatten(1)
    mask = torch.ones(num_queries, length, dtype=torch.bool, device=words.device)
    context = length - num_queries
    new = torch.zeros(num_queries, num_queries, dtype=torch.bool, device=words.device)
    new[:, : 32 * num_words] = seen[:, :num_queries]
    mask[:, max(context, 0) :] = new[:, max(-context, 0) :]
    return mask[None, None]
