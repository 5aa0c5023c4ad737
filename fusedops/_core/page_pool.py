"""Which page of a pool belongs to whom: reference counts, pages found again by content, and what is given up first."""

from collections import OrderedDict
from dataclasses import dataclass


class OutOfPages(RuntimeError):
    """A cache has too few free pages for a request; nothing was changed."""


@dataclass(frozen=True)
class Chain:
    """Content of a whole page with all that stands before it: equal chains hold equal keys and values.

    Attributes:
        before: The chain of the page before, None for the first page.
        tokens: The page's token ids.
        digest: Hash of both, computed once.
    """

    before: "Chain | None"
    tokens: tuple
    digest: int

    @classmethod
    def after(cls, before, tokens):
        """The chain that `tokens` make behind `before`."""
        tokens = tuple(tokens)
        return cls(before, tokens, hash((None if before is None else before.digest, tokens)))

    def __hash__(self):
        return self.digest

    def __eq__(self, other):
        """Compare contents page by page: equal hashes alone would let one prompt read another's cache."""
        mine, others = self, other
        while mine is not others:
            if mine is None or others is None or mine.digest != others.digest or mine.tokens != others.tokens:
                return False
            mine, others = mine.before, others.before
        return True


class PagePool:
    """Hands out page numbers below `num_pages`.

    A page is *free*, *held* (by as many holders as its count says) or *kept*: held by nobody, but findable by its
    content until the page is needed for something else, the one that was released first going first.
    """

    def __init__(self, num_pages):
        self.num_pages = num_pages
        self._free = list(range(num_pages - 1, -1, -1))
        self._counts = [0] * num_pages
        self._kept = OrderedDict()  # page to None, the next to go first
        self._chains = {}  # page to Chain
        self._pages = {}  # Chain to page

    @property
    def available(self):
        """Pages that can be taken: the free ones and the kept ones."""
        return len(self._free) + len(self._kept)

    @property
    def kept(self):
        """Pages that nobody holds and that can be found by content."""
        return len(self._kept)

    @property
    def held(self):
        """Pages that somebody holds."""
        return self.num_pages - self.available

    def count(self, page):
        """How many hold a page."""
        return self._counts[page]

    def take(self, number):
        """Take `number` pages for one holder. OutOfPages: there are not so many; none was taken."""
        if number > self.available:
            raise OutOfPages(
                f"kv_cache: {number} pages are needed and {self.available} of {self.num_pages} can be had; "
                "free a sequence or make the cache larger"
            )
        pages = []
        for _ in range(number):
            page = self._free.pop() if self._free else self._give_up()
            self._counts[page] = 1
            pages.append(page)
        return pages

    def hold(self, page):
        """One more holder for a page that is held or kept."""
        self._kept.pop(page, None)
        self._counts[page] += 1

    def release(self, pages):
        """One holder fewer for each page; of kept ones the last goes first, so that prefixes stay findable."""
        for page in reversed(pages):
            self._counts[page] -= 1
            if self._counts[page] == 0:
                if page in self._chains:
                    self._kept[page] = None
                else:
                    self._free.append(page)

    def publish(self, page, chain):
        """Make a held page findable by content. Where another page has that content already, it stays the one."""
        if page not in self._chains and chain not in self._pages:
            self._chains[page] = chain
            self._pages[chain] = page

    def find(self, chain):
        """The page with a content, or None."""
        return self._pages.get(chain)

    def forget(self, page):
        """A page's content is about to change: nobody may find it by the old one."""
        chain = self._chains.pop(page, None)
        if chain is not None:
            del self._pages[chain]

    def drop_kept(self):
        """Free every page that nobody holds."""
        while self._kept:
            self._free.append(self._give_up())

    def _give_up(self):
        page, _ = self._kept.popitem(last=False)
        self.forget(page)
        return page

    def check(self, holders):
        """AssertionError unless the pool's books agree with the pages of all holders, given as lists of pages."""
        counts = [0] * self.num_pages
        for pages in holders:
            for page in pages:
                counts[page] += 1
        assert counts == self._counts, "counts of holders"
        free, kept = set(self._free), set(self._kept)
        assert len(free) == len(self._free) and not free & kept, "a page is free twice"
        assert free | kept == {page for page, count in enumerate(counts) if count == 0}, "a page is lost"
        assert kept <= set(self._chains) and not free & set(self._chains), "a free page can be found"
        assert {chain: page for page, chain in self._chains.items()} == self._pages, "content and pages"
