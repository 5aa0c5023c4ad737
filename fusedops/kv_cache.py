"""A paged cache of keys and values: sequences grow page by page, share prefixes, and give everything back."""

from dataclasses import dataclass, field

import torch

from fusedops._core.page_pool import Chain, OutOfPages, PagePool

__all__ = ["CacheStats", "OutOfPages", "PagedKVCache"]


@dataclass(frozen=True)
class CacheStats:
    """What a cache holds.

    Attributes:
        num_pages: Pages of the pool.
        pages_used: Pages that at least one sequence holds.
        pages_kept: Pages that no sequence holds and that can still be found by their content.
        tokens: Tokens of all sequences, a shared one counted once for each sequence that has it.
        slots_filled: Slots of used pages that hold a token, a shared one counted once.
        waste: Share of the used pages' slots that hold no token; 0 where no page is used.
        bytes_used: Bytes of the used pages, keys and values of all layers.
    """

    num_pages: int
    pages_used: int
    pages_kept: int
    tokens: int
    slots_filled: int
    waste: float
    bytes_used: int


@dataclass
class _Sequence:
    pages: list = field(default_factory=list)
    length: int = 0
    tokens: list | None = None  # ids, where the caller gives them
    published: int = 0  # pages that have been made findable
    chain: Chain | None = None  # of those


class PagedKVCache:
    """Keys and values of many sequences in pages of one pool, for all layers at once.

    A page holds `page_size` tokens of one sequence, in every layer. A sequence takes pages as it grows, so at most one
    page of each is partly filled. Sequences with a common start can share its pages; who writes into a shared page gets
    a copy first. Whole pages can be found again by their content after their sequence is gone, until they are needed.

    The cache decides where tokens lie; what lies there is written by `fusedops.write_kv_cache` with the slots that
    `append` returns, and read by `fusedops.paged_attention` with `block_table` and `lengths`.

    Args:
        num_layers: Layers of the model.
        num_pages: Pages of the pool; it never grows.
        page_size: Tokens of a page: 1, or a multiple of 8 up to 256.
        num_kv_heads, head_dim: Hk and D.
        value_dim: Dv; None is `head_dim`.
        max_length: Tokens that one sequence may have; None is as many as the pool holds.
        dtype, device: Of the stored keys and values.

    Attributes:
        k: ``[num_layers, num_pages, page_size, Hk, D]``; ``k[layer]`` is a layer's `k_cache`.
        v: ``[num_layers, num_pages, page_size, Hk, Dv]``.

    Raises:
        ValueError: a size is not positive, or page_size is none of the above.

    From: Kwon et al., "Efficient Memory Management for Large Language Model Serving with PagedAttention", 2023,
        https://arxiv.org/abs/2309.06180
    """

    def __init__(
        self, num_layers, num_pages, page_size, num_kv_heads, head_dim, *, value_dim=None, max_length=None,
        dtype=torch.bfloat16, device=None,
    ):  # fmt: skip
        sizes = {"num_layers": num_layers, "num_pages": num_pages, "num_kv_heads": num_kv_heads, "head_dim": head_dim}
        for name, size in {**sizes, "value_dim": value_dim or head_dim, "max_length": max_length or 1}.items():
            if not isinstance(size, int) or size < 1:
                raise ValueError(f"PagedKVCache: {name} must be a positive integer, got {size!r}")
        if page_size != 1 and (page_size not in range(8, 257) or page_size % 8):
            raise ValueError(f"PagedKVCache: page_size must be 1 or a multiple of 8 up to 256, got {page_size!r}")
        self.page_size = page_size
        self.max_length = min(max_length or num_pages * page_size, num_pages * page_size)
        shape = num_layers, num_pages, page_size, num_kv_heads
        self.k = torch.zeros(*shape, head_dim, dtype=dtype, device=device)
        self.v = torch.zeros(*shape, value_dim or head_dim, dtype=dtype, device=device)
        self._pool = PagePool(num_pages)
        self._sequences = {}
        self._next = 0

    # ---- sequences

    def allocate(self, tokens=None):
        """Begin a sequence.

        Args:
            tokens: Ids of its first tokens, to look for whole pages that hold them already. At least one token is left
                to compute, so that the model has logits to go on from.

        Returns:
            ``(sequence, length)``: its number, and how many tokens are there already, 0 without `tokens`. The caller
            appends the others.
        """
        made = _Sequence()
        if tokens is not None:
            made.tokens = []
            self._find_prefix(made, _ids(tokens))
        return self._add(made), made.length

    def _find_prefix(self, sequence, tokens):
        size = self.page_size
        for start in range(0, (len(tokens) - 1) // size * size, size):
            chain = Chain.after(sequence.chain, tokens[start : start + size])
            page = self._pool.find(chain)
            if page is None:
                break
            self._pool.hold(page)
            sequence.pages.append(page)
            sequence.chain = chain
        sequence.published = len(sequence.pages)
        sequence.length = sequence.published * size
        sequence.tokens = tokens[: sequence.length]

    def fork(self, sequence, length=None):
        """Begin a sequence that has the first `length` tokens of another (None: all), without copying them."""
        source = self._get("fork", sequence)
        length = source.length if length is None else length
        if not 0 <= length <= source.length:
            raise ValueError(f"PagedKVCache.fork: length must be in 0 ... {source.length}, got {length}")
        made = _Sequence(source.pages[: self._pages_for(length)], length)
        for page in made.pages:
            self._pool.hold(page)
        if source.tokens is not None:
            made.tokens = source.tokens[:length]
        self._rewind(made, source)
        return self._add(made)

    def free(self, *sequences):
        """End sequences. Pages that nobody else has come back; whole ones stay findable until they are needed."""
        for sequence in sequences:
            self._get("free", sequence)
        if len(set(sequences)) != len(sequences):
            raise ValueError("PagedKVCache.free: a sequence is named twice")
        for sequence in sequences:
            ended = self._sequences.pop(sequence)
            self._publish(ended)
            self._pool.release(ended.pages)

    def discard(self, *sequences):
        """End sequences whose last tokens may not have been written, after an error: nothing new becomes findable."""
        for sequence in sequences:
            self._get("discard", sequence)
        for sequence in set(sequences):
            self._pool.release(self._sequences.pop(sequence).pages)

    def append(self, sequences, counts=None, *, tokens=None):
        """Make room for more tokens at the end of sequences: of all, or where pages are short, of none.

        A page that others share is copied first (all layers). Whole pages of earlier calls become findable: by now
        their keys and values have been written.

        Args:
            sequences: Numbers of different sequences.
            counts: How many tokens for each.
            tokens: In place of `counts`: a list of ids for each.

        Returns:
            int64 ``[sum of counts]`` on the cache's device: the slots of the new tokens, sequence after sequence, as
            `write_kv_cache` takes them.

        Raises:
            OutOfPages: the pool has too few pages; no sequence has changed.
            ValueError: a sequence does not exist or is named twice, or would pass `max_length`.
        """
        ids = None if tokens is None else [_ids(one) for one in tokens]
        counts = [len(one) for one in ids] if counts is None and ids is not None else list(counts)
        found = [self._get("append", sequence) for sequence in sequences]
        self._check_append(found, sequences, counts, ids)
        for sequence in found:
            self._publish(sequence)
        needed = [self._pages_for(one.length + count) - len(one.pages) for one, count in zip(found, counts)]
        tails = [one.pages[-1] if count and one.length % self.page_size else None for one, count in zip(found, counts)]
        copies = self._copies_needed(tails)
        fresh = iter(self._pool.take(sum(needed) + sum(copies)))
        self._open_tails(found, tails, copies, fresh)
        slots = []
        for index, (one, count) in enumerate(zip(found, counts)):
            one.pages += [next(fresh) for _ in range(needed[index])]
            slots += [self._slot(one, position) for position in range(one.length, one.length + count)]
            if one.tokens is not None:
                one.tokens = one.tokens + ids[index] if ids is not None else None
            one.length += count
        return torch.tensor(slots, dtype=torch.int64, device=self.k.device)

    def truncate(self, sequence, length):
        """Forget the tokens of a sequence from `length` on, such as drafts that were refused."""
        cut = self._get("truncate", sequence)
        if not 0 <= length <= cut.length:
            raise ValueError(f"PagedKVCache.truncate: length must be in 0 ... {cut.length}, got {length}")
        keep = self._pages_for(length)
        self._pool.release(cut.pages[keep:])
        cut.pages = cut.pages[:keep]
        cut.length = length
        if cut.tokens is not None:
            cut.tokens = cut.tokens[:length]
        self._rewind(cut, cut)

    # ---- what operators read

    def length(self, sequence):
        """Tokens of a sequence."""
        return self._get("length", sequence).length

    def lengths(self, sequences):
        """Tokens of sequences: int32 ``[B]``, the `cache_seqlens` of `paged_attention`."""
        values = [self._get("lengths", sequence).length for sequence in sequences]
        return torch.tensor(values, dtype=torch.int32, device=self.k.device)

    def block_table(self, sequences, width=None):
        """Pages of sequences: int32 ``[B, width]``; None is what the longest needs. Entries past an end are 0."""
        rows = [self._get("block_table", sequence).pages for sequence in sequences]
        longest = max(map(len, rows), default=0)
        width = longest if width is None else width
        if width < longest:
            raise ValueError(f"PagedKVCache.block_table: width must be at least {longest}, got {width}")
        table = [row + [0] * (width - len(row)) for row in rows]
        return torch.tensor(table, dtype=torch.int32, device=self.k.device).reshape(len(rows), width)

    def slots(self, sequence):
        """The slots of all tokens of a sequence, in order: int64 ``[length]``."""
        one = self._get("slots", sequence)
        values = [self._slot(one, position) for position in range(one.length)]
        return torch.tensor(values, dtype=torch.int64, device=self.k.device)

    def stats(self):
        """What the cache holds now, as `CacheStats`."""
        filled = {}
        for one in self._sequences.values():
            for index, page in enumerate(one.pages):
                filled[page] = max(filled.get(page, 0), min(one.length - index * self.page_size, self.page_size))
        slots = len(filled) * self.page_size
        page_bytes = sum(x[:, 0].numel() * x.element_size() for x in (self.k, self.v))
        return CacheStats(
            num_pages=self._pool.num_pages,
            pages_used=len(filled),
            pages_kept=self._pool.kept,
            tokens=sum(one.length for one in self._sequences.values()),
            slots_filled=sum(filled.values()),
            waste=1 - sum(filled.values()) / slots if slots else 0.0,
            bytes_used=len(filled) * page_bytes,
        )

    def drop_unused(self):
        """Forget the content of every page that no sequence holds."""
        self._pool.drop_kept()

    def check(self):
        """AssertionError unless every page is accounted for; for tests and for the suspicious."""
        self._pool.check([one.pages for one in self._sequences.values()])
        for one in self._sequences.values():
            assert len(one.pages) == self._pages_for(one.length), "pages of a sequence"
            assert one.tokens is None or len(one.tokens) == one.length, "tokens of a sequence"

    # ---- inside

    def _add(self, sequence):
        number = self._next
        self._next += 1
        self._sequences[number] = sequence
        return number

    def _get(self, method, sequence):
        try:
            return self._sequences[sequence]
        except (KeyError, TypeError):
            raise ValueError(f"PagedKVCache.{method}: there is no sequence {sequence!r}") from None

    def _check_append(self, found, sequences, counts, ids):
        if len(set(sequences)) != len(found) or len(counts) != len(found) or (ids and len(ids) != len(found)):
            raise ValueError("PagedKVCache.append: each sequence must be named once, with one count or list of tokens")
        for one, sequence, count in zip(found, sequences, counts):
            if count < 0:
                raise ValueError(f"PagedKVCache.append: counts must not be negative, got {count}")
            if one.length + count > self.max_length:
                raise ValueError(
                    f"PagedKVCache.append: sequence {sequence} would have {one.length + count} tokens, "
                    f"at most {self.max_length} are allowed"
                )

    def _pages_for(self, tokens):
        return -(-tokens // self.page_size)

    def _slot(self, sequence, position):
        return sequence.pages[position // self.page_size] * self.page_size + position % self.page_size

    def _copies_needed(self, tails):
        """Which partly filled pages are copied before they are written: those that somebody else holds too.

        Where all holders of a page append in one call, the last of them stays in it.
        """
        waiting = {page: tails.count(page) for page in tails}
        copies = []
        for page in tails:
            waiting[page] -= 1
            copies.append(page is not None and (waiting[page] > 0 or self._pool.count(page) > tails.count(page)))
        return copies

    def _open_tails(self, found, tails, copies, fresh):
        for one, page, copy in zip(found, tails, copies):
            if copy:
                made, filled = next(fresh), one.length % self.page_size
                for data in (self.k, self.v):
                    data[:, made, :filled] = data[:, page, :filled]
                one.pages[-1] = made
                self._pool.release([page])
            elif page is not None:
                self._pool.forget(page)

    def _publish(self, sequence):
        """Make whole pages findable, where the token ids are known."""
        if sequence.tokens is None:
            return
        size = self.page_size
        for index in range(sequence.published, sequence.length // size):
            sequence.chain = Chain.after(sequence.chain, sequence.tokens[index * size : (index + 1) * size])
            self._pool.publish(sequence.pages[index], sequence.chain)
            sequence.published = index + 1

    def _rewind(self, sequence, source):
        """Set what has been published of a sequence to what its length still covers of the source."""
        chain, published = source.chain, source.published
        while published > sequence.length // self.page_size:
            chain, published = chain.before, published - 1
        sequence.chain, sequence.published = chain, published


def _ids(tokens):
    return tokens.tolist() if isinstance(tokens, torch.Tensor) else list(tokens)
