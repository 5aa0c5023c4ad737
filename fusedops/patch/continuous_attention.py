"""Attention on the paged cache of transformers' continuous batching.

A forward of the engine has the new tokens of all requests in one row, and keyword arguments that say what belongs to
whom: running sums of lengths, where each new key is written (`write_index`), and where the keys of each request lie
(`read_index`, a place for each token; or `block_table`, a page for each `tokens_per_page` of them). Layers with full
attention write to the pages and attend to them where they lie. Layers with a sliding window have ring buffers, whose
tokens do not lie in their order: the cache gathers those.

Everything but the write stays on the device, and shapes follow from shapes: a captured CUDA graph may be replayed.
"""

import torch

from fusedops._core import env
from fusedops.ops.attention import attention_varlen
from fusedops.ops.paged_attention import paged_attention
from fusedops.ops.write_kv_cache import MAX_PAGE, STEP_PAGE, write_kv_cache

STEP = "fusedops_step"  # the keyword argument that hands a Step to all layers
SLIDING = "sliding_attention"


class Step:
    """What the layers of one forward share, computed by the first of each kind.

    Lengths and pages change from forward to forward, so a Step must not outlive the one that it was made for.

    Attributes:
        groups: {index of the allocator: Group}; inside an object, which the compiler does not look into.
    """

    __slots__ = ("groups",)

    def __init__(self):
        self.groups = {}


class Group:
    """Lengths and places of one forward's tokens, for the layers of one allocator.

    The tokens that the engine pads a batch with belong to no request. They get one more sequence, without keys, so that
    their attention is 0 and not what was left in memory.

    Attributes:
        cu_seqlens_q, cu_seqlens_k: int32 ``[B + 2]``; with a block table ``[B + 1]``.
        max_seqlen_q, max_seqlen_k: Python integers.
        page_size: Tokens of a page, as the operators take it.
        slots: int64, the place of each new token; -1 for padding.
        table, lengths: Page ids and lengths for `paged_attention`; None where nothing is read from the cache.
    """

    def __init__(self, allocator, total, given):
        self.page_size = operator_page_size(allocator.tokens_per_page)
        self.cu_seqlens_q = given["cu_seq_lens_q"]
        self.cu_seqlens_k = given["cu_seq_lens_k"][allocator.layer_type]
        self.max_seqlen_q = given["max_length_q"]
        self.max_seqlen_k = given["max_length_k"][allocator.layer_type]
        self.table = self.lengths = None
        lengths = self.cu_seqlens_k.diff()
        if given.get("block_table") is not None:
            self._read_table(given["block_table"][allocator.index], lengths, allocator.tokens_per_page)
            return
        self.slots = given["write_index"][allocator.index]
        read_index = given["read_index"][allocator.index]
        if read_index.numel() and allocator.layer_type != SLIDING:
            self.lengths = torch.nn.functional.pad(lengths, (0, 1))
            self.table = self._pages_of(read_index)
        self.cu_seqlens_q = torch.nn.functional.pad(self.cu_seqlens_q, (0, 1), value=total)
        self.cu_seqlens_k = torch.cat((self.cu_seqlens_k, self.cu_seqlens_k[-1:]))

    def _read_table(self, table, lengths, tokens_per_page):
        """One new token for each request, the last; rows of padding have no length and -1 for pages."""
        last = (lengths - 1).clamp(min=0)
        page = table.gather(1, (last // tokens_per_page).long()[:, None])[:, 0].long()
        self.slots = torch.where(lengths > 0, page * tokens_per_page + last % tokens_per_page, -1)
        parts = tokens_per_page // self.page_size
        if parts > 1:
            table = table[:, :, None] * parts + torch.arange(parts, dtype=table.dtype, device=table.device)
            table = table.flatten(1)
        self.table, self.lengths = table, lengths

    def _pages_of(self, read_index):
        """int32 ``[B + 1, pages]``: a page begins at every token whose number is a multiple of its size."""
        firsts = torch.arange(0, self.max_seqlen_k, self.page_size, dtype=torch.int32, device=read_index.device)
        places = (self.cu_seqlens_k[:, None] + firsts).clamp_(max=read_index.numel() - 1)
        return (read_index[places] // self.page_size).to(torch.int32)


def operator_page_size(tokens_per_page):
    """The largest page that the operators take and that divides the engine's; where they differ, views are finer."""
    sizes = range(min(MAX_PAGE, tokens_per_page) // STEP_PAGE * STEP_PAGE, 0, -STEP_PAGE)
    return next((size for size in sizes if tokens_per_page % size == 0), 1)


def takes(cache):
    """Whether this is a cache of continuous batching as `Call` knows it."""
    return hasattr(cache, "layer_to_allocator")


class Call:
    """One call of the attention function on a paged cache.

    Args:
        module: The attention; its `layer_idx` names the layer.
        key, value: ``[1, Hk, T, D]``, of the new tokens.
        given: The keyword arguments that the engine gave the model.
    """

    def __init__(self, module, key, value, given):
        self.layer = module.layer_idx
        self.allocator = given["cache"].layer_to_allocator[self.layer]
        self.key, self.value = (tensor[0].transpose(0, 1) for tensor in (key, value))
        self.given = given
        groups = given[STEP].groups if STEP in given else {}
        if self.allocator.index not in groups:
            groups[self.allocator.index] = Group(self.allocator, key.shape[2], given)
        self.group = groups[self.allocator.index]
        self._gathered = None

    def attend(self, query, scaling, softcap, sinks):
        """``[1, T, H, Dv]``; raises what the operators raise for operands that they do not take."""
        options = {"softmax_scale": scaling, "softcap": softcap or 0.0, "sinks": sinks}
        q = query[0].transpose(0, 1)
        if self.allocator.layer_type == SLIDING:
            keys, values = self._gather()
            return self._attend_to(q, keys, values, (self.allocator.sliding_window - 1, 0), options)
        group = self.group
        pages = [self._in_pages(cache) for cache in self.allocator.get_cache_for_block_table(self.layer)]
        write_kv_cache(self.key, self.value, *pages, group.slots)
        if group.table is None:
            return self._attend_to(q, self.key, self.value, (-1, -1), options)
        if self.given.get("block_table") is None:
            options |= {"cu_seqlens_q": group.cu_seqlens_q, "max_seqlen_q": group.max_seqlen_q}
        return paged_attention(q, *pages, group.table, group.lengths, **options)[None]

    def _in_pages(self, cache):
        size = self.group.page_size
        return cache if cache.shape[1] == size else cache.view(-1, size, *cache.shape[2:])

    def _attend_to(self, q, keys, values, window_size, options):
        """Attention to keys of all requests, one after another."""
        group = self.group
        if env.validate() == 2:  # which reads lengths on the host anyway, and wants no key without a sequence
            total = int(group.cu_seqlens_k[-1])
            keys, values = keys[:total], values[:total]
        lengths = group.cu_seqlens_q, group.cu_seqlens_k, group.max_seqlen_q, group.max_seqlen_k
        return attention_varlen(q, keys, values, *lengths, causal=True, window_size=window_size, **options)[None]

    def _gather(self):
        """(keys, values) ``[Tk, Hk, D]`` after the write; only once, for a ring buffer forgets what it overwrites."""
        if self._gathered is None:
            places = (self.given[name][self.allocator.index] for name in ("read_index", "write_index"))
            self._gathered = self.allocator.update(self.key, self.value, self.layer, *places)
        return self._gathered

    def dense(self):
        """(key, value, mask) for functions that know no pages: ``[1, Hk, Tk, D]`` and boolean ``[1, 1, T, Tk]``."""
        if self.given.get("block_table") is not None:
            raise NotImplementedError(
                "patch: the model's own attention cannot take over in a batch with a block table; pass "
                "ContinuousBatchingConfig(max_blocks_per_request=0), or undo() before generate_batch"
            )
        keys, values = self._gather()
        (owner_q, position_q), (owner_k, position_k) = (
            _positions(lengths, tensor.shape[0])
            for lengths, tensor in ((self.given["cu_seq_lens_q"], self.key), (self.group.cu_seqlens_k[:-1], keys))
        )
        distance = position_q[:, None] - position_k
        mask = (owner_q[:, None] == owner_k) & (distance >= 0)
        if self.allocator.layer_type == SLIDING:
            mask &= distance < self.allocator.sliding_window
        mask |= ~mask.any(-1, keepdim=True)  # of padding: a row that sees nothing is NaN
        return (*(tensor.transpose(0, 1)[None] for tensor in (keys, values)), mask[None, None])


def _positions(cu_seqlens, total):
    """(sequence of each token, its position counted back from the sequence's end)."""
    places = torch.arange(total, dtype=cu_seqlens.dtype, device=cu_seqlens.device)
    owners = torch.searchsorted(cu_seqlens[1:].contiguous(), places, right=True)
    ends = torch.nn.functional.pad(cu_seqlens[1:], (0, 1), value=total)
    return owners, places - ends[owners]
