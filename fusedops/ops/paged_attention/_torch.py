"""Paged attention by torch: each sequence's pages are gathered, and attended to as contiguous keys are.

Memory is that of the longest sequence. Lengths and pages are read on the host, as a CPU may.
"""

import torch

from fusedops._core import invariance
from fusedops._core.register import operators
from fusedops._core.sharing import shares_reading

GATHERED = 1 << 20  # elements of keys that are gathered at once: larger copies are fresh memory each time

_attend = torch._scaled_dot_product_flash_attention_for_cpu


def paged_attention(
    q, k_cache, v_cache, block_table, cache_seqlens, cu_seqlens_q, max_seqlen_q, sinks, alibi_slopes, k_scale, v_scale,
    tree_mask, softmax_scale, causal, window_left, window_right, softcap, num_splits,
):  # fmt: skip
    """One sequence after another; decoding without options has a shorter way."""
    out = torch.zeros((*q.shape[:2], v_cache.shape[3]), dtype=q.dtype, device=q.device)
    lse = torch.full((q.shape[1], q.shape[0]), float("-inf"), dtype=torch.float32, device=q.device)
    if q.is_meta:
        return out, lse
    attention = operators()["attention"]
    attend = attention.direct(q) or attention
    quantised = k_cache.dtype != q.dtype
    sequences = list(_sequences(q, k_cache, block_table, cache_seqlens, cu_seqlens_q))
    if sinks is alibi_slopes is tree_mask is None and window_left < 0 and softcap == 0.0 and softmax_scale > 0.0:
        if q.is_cpu and q.dtype is k_cache.dtype is torch.float32 and q.shape[2] == v_cache.shape[3]:
            sequences = _single_queries(q, k_cache, v_cache, sequences, softmax_scale, out, lse)
    # one place for the pages of all sequences: fresh memory for each costs more than the copy
    room = max((len(pages) for *_, pages, _ in sequences), default=0)
    places = [None if quantised else cache.new_empty((room, *cache.shape[1:])) for cache in (k_cache, v_cache)]
    for b, rows, length, pages, missing in sequences:
        keys = _gather(k_cache, k_scale, pages, missing, length, places[0], float("nan"))
        values = _gather(v_cache, v_scale, pages, missing, length, places[1], 0.0)
        queries = q[rows].float() if quantised else q[rows]
        slopes = alibi_slopes if alibi_slopes is None or alibi_slopes.dim() == 1 else alibi_slopes[b]
        mask = None if tree_mask is None else _tree(tree_mask[rows], length)
        part, sums = attend(
            queries[None], keys[None], values[None], sinks if sinks is None or not quantised else sinks.float(),
            slopes, mask, None, None, None, softmax_scale, causal, window_left, window_right, softcap,
        )  # fmt: skip
        out[rows], lse[:, rows] = part[0], sums[0]
    return out, lse


def _sequences(q, k_cache, block_table, cache_seqlens, cu_seqlens_q):
    """(number, rows of q, length, pages, which of them are missing or None) of each sequence that has a query."""
    (num_pages, page_size), total = k_cache.shape[:2], len(q)
    starts = range(total + 1) if cu_seqlens_q is None else cu_seqlens_q.tolist()
    capacity = block_table.shape[1] * page_size
    absent = (block_table < 0) | (block_table >= num_pages)
    suspicious = bool(absent.any())  # unused entries may be anything
    for b, length in enumerate(cache_seqlens.tolist()):
        length = min(max(length, 0), capacity)
        first, last = (min(max(start, 0), total) for start in starts[b : b + 2])
        if first < last:
            used = slice(0, -(-length // page_size))
            missing = absent[b, used] if suspicious and bool(absent[b, used].any()) else None
            yield b, slice(first, last), length, block_table[b, used], missing


def _single_queries(q, k_cache, v_cache, sequences, scale, out, lse):
    """Fill out and lse of sequences with one query, many by few calls; return the sequences that are left."""
    left, group, pages_of_group = [], [], 0
    most = 0 if invariance.enabled() else GATHERED // max(k_cache[:1].numel(), 1)  # 0: each by itself
    for sequence in sequences:
        _, rows, length, pages, missing = sequence
        if rows.stop - rows.start > 1 or not length or missing is not None:
            left.append(sequence)
            continue
        if group and pages_of_group + len(pages) > most:
            left += _decode(q, k_cache, v_cache, group, scale, out, lse)
            group, pages_of_group = [], 0
        group.append(sequence)
        pages_of_group += len(pages)
    return left + _decode(q, k_cache, v_cache, group, scale, out, lse) if group else left


def _decode(q, k_cache, v_cache, group, scale, out, lse):
    """Fill out and lse of a group of sequences; return it where torch's kernel leaves a doubt, which lse = 0 is."""
    _, rows, lengths, pages, _ = zip(*group)
    heads, (page_size, kv_heads) = q.shape[1], k_cache.shape[1:3]
    sizes = [size for length, used in zip(lengths, pages) for size in (length, len(used) * page_size - length)]
    rows, pages = torch.tensor([one.start for one in rows]), torch.cat(pages)
    keys, values = (
        cache.index_select(0, pages).flatten(0, 1).transpose(0, 1)[None].split(sizes, 2)[::2]
        for cache in (k_cache, v_cache)
    )
    queries = q[rows]
    ways = queries[:, :, None].split(1), queries.unflatten(1, (kv_heads, heads // kv_heads)).split(1)
    together = [shares_reading(heads, kv_heads, length, q.shape[2]) for length in lengths]
    parts = [_attend(ways[way][b], keys[b], values[b], 0.0, False, scale=scale) for b, way in enumerate(together)]
    sums = torch.cat([sums.flatten(1) for _, sums in parts])
    if not sums.all():
        return list(group)
    out[rows] = torch.cat([part.flatten(1, 2) for part, _ in parts])
    lse[:, rows] = sums.T
    return []


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
