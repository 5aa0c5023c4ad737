"""The paged cache against a plain dict of lists: no page leaks, no token is lost, nobody reads another's tokens."""

import random
import re
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from fusedops import attention, paged_attention, write_kv_cache
from fusedops.kv_cache import OutOfPages, PagedKVCache


def small(num_pages=12, page_size=8, **options):
    return PagedKVCache(2, num_pages, page_size, 1, 8, dtype=torch.float32, **options)


class Model:
    """A cache beside what it should hold. A token's key and value are its id and its position."""

    def __init__(self, num_pages, page_size):
        self.cache = small(num_pages, page_size)
        self.held = {}  # sequence to its tokens
        self.named = set()  # sequences whose ids the cache knows

    def write(self, slots, tokens, positions):
        for layer in range(2):
            for data, factor in ((self.cache.k, 1), (self.cache.v, -1)):
                flat = data[layer].view(-1, 1, 8)
                flat[slots] = (factor * (torch.tensor(tokens) * 1000.0 + torch.tensor(positions) + layer / 2))[
                    :, None, None
                ]

    def read(self, sequence):
        slots = self.cache.slots(sequence)
        return [self.cache.k[layer].view(-1, 8)[slots, 0].tolist() for layer in range(2)], [
            self.cache.v[layer].view(-1, 8)[slots, 7].tolist() for layer in range(2)
        ]

    def start(self, tokens, named):
        sequence, length = self.cache.allocate(tokens if named else None)
        assert length % self.cache.page_size == 0 and length <= max(len(tokens) - 1, 0)
        self.held[sequence] = list(tokens[:length])
        if named:
            self.named.add(sequence)
        return self.append([sequence], [tokens[length:]])

    def append(self, sequences, tokens):
        """Append and write; where pages are short nothing may have changed. Returns whether it went."""
        before = {sequence: self.cache.block_table([sequence]).tolist() for sequence in self.held}
        named = all(sequence in self.named for sequence in sequences)
        try:
            if named:
                slots = self.cache.append(sequences, tokens=tokens)
            else:
                slots = self.cache.append(sequences, [len(one) for one in tokens])
                self.named -= set(sequences)
        except OutOfPages:
            assert before == {sequence: self.cache.block_table([sequence]).tolist() for sequence in self.held}
            return False
        positions = [
            position
            for sequence, one in zip(sequences, tokens)
            for position in range(len(self.held[sequence]), len(self.held[sequence]) + len(one))
        ]
        assert len(set(slots.tolist())) == len(slots)
        self.write(slots, [token for one in tokens for token in one], positions)
        for sequence, one in zip(sequences, tokens):
            self.held[sequence] += one
        return True

    def fork(self, sequence, length):
        made = self.cache.fork(sequence, length)
        self.held[made] = self.held[sequence][:length]
        if sequence in self.named:
            self.named.add(made)

    def truncate(self, sequence, length):
        self.cache.truncate(sequence, length)
        del self.held[sequence][length:]

    def free(self, sequence, discard=False):
        (self.cache.discard if discard else self.cache.free)(sequence)
        del self.held[sequence]
        self.named.discard(sequence)

    def check(self):
        self.cache.check()
        for sequence, tokens in self.held.items():
            keys, values = self.read(sequence)
            for layer in range(2):
                expected = [token * 1000.0 + position + layer / 2 for position, token in enumerate(tokens)]
                assert keys[layer] == expected and values[layer] == [-value for value in expected]
        stats = self.cache.stats()
        assert stats.tokens == sum(map(len, self.held.values())) and 0 <= stats.waste < 1
        assert stats.pages_used + stats.pages_kept <= stats.num_pages


class Machine(RuleBasedStateMachine):
    @initialize(num_pages=st.integers(1, 12), page_size=st.sampled_from([1, 8]))
    def begin(self, num_pages, page_size):
        self.model = Model(num_pages, page_size)

    def pick(self, data):
        held = sorted(self.model.held)
        return data.draw(st.sampled_from(held)) if held else None

    # Few different ids and long common starts, so that prefixes are found.
    @rule(start=st.integers(0, 25), tail=st.lists(st.integers(0, 1), max_size=5), named=st.booleans())
    def start(self, start, tail, named):
        tokens = [0] * start + tail
        if len(tokens) <= self.model.cache.max_length:
            self.model.start(tokens, named)

    @rule(data=st.data(), lengths=st.lists(st.integers(0, 12), min_size=1, max_size=3))
    def append(self, data, lengths):
        held = sorted(self.model.held)[: len(lengths)]
        room = self.model.cache.max_length
        if held and all(len(self.model.held[s]) + n <= room for s, n in zip(held, lengths)):
            self.model.append(
                held, [data.draw(st.lists(st.integers(0, 1), min_size=n, max_size=n)) for n in lengths[: len(held)]]
            )

    @rule(data=st.data())
    def fork(self, data):
        sequence = self.pick(data)
        if sequence is not None and len(self.model.held) < 8:
            self.model.fork(sequence, data.draw(st.integers(0, len(self.model.held[sequence]))))

    @rule(data=st.data())
    def truncate(self, data):
        sequence = self.pick(data)
        if sequence is not None:
            self.model.truncate(sequence, data.draw(st.integers(0, len(self.model.held[sequence]))))

    @rule(data=st.data(), discard=st.booleans())
    def free(self, data, discard):
        sequence = self.pick(data)
        if sequence is not None:
            self.model.free(sequence, discard)

    @rule()
    def drop_unused(self):
        self.model.cache.drop_unused()

    @invariant()
    def books_agree(self):
        if hasattr(self, "model"):
            self.model.check()

    def teardown(self):
        if hasattr(self, "model"):
            self.model.cache.free(*self.model.held)
            self.model.cache.check()
            assert self.model.cache.stats().pages_used == 0


Machine.TestCase.settings = settings(max_examples=60, stateful_step_count=40)
TestMachine = Machine.TestCase


def test_ten_thousand_operations_leak_nothing():
    draw = random.Random(0)
    model = Model(24, 8)
    for step in range(10_000):
        kind = draw.choice(("start", "append", "append", "append", "fork", "truncate", "free"))
        held = sorted(model.held)
        if kind == "start" or not held:
            if len(held) < 12:
                tail = [draw.randint(0, 1) for _ in range(draw.randint(0, 9))]
                model.start([0] * draw.randint(0, 30) + tail, draw.random() < 0.8)
        elif kind == "append":
            chosen = draw.sample(held, draw.randint(1, min(3, len(held))))
            model.append(chosen, [[draw.randint(0, 1) for _ in range(draw.randint(0, 12))] for _ in chosen])
        elif kind == "fork" and len(held) < 12:
            sequence = draw.choice(held)
            model.fork(sequence, draw.randint(0, len(model.held[sequence])))
        elif kind == "truncate":
            sequence = draw.choice(held)
            model.truncate(sequence, draw.randint(0, len(model.held[sequence])))
        else:
            model.free(draw.choice(held), draw.random() < 0.2)
        if step % 20 == 0:
            model.check()
    model.cache.free(*model.held)
    model.held.clear()
    model.check()
    assert model.cache.stats().pages_used == 0


def test_a_system_prompt_is_stored_once():
    prompt = list(range(1000))
    cache = PagedKVCache(1, 1200, 16, 1, 8, dtype=torch.float32)
    first, length = cache.allocate(prompt + [7])
    assert length == 0
    cache.append([first], tokens=[prompt + [7]])
    cache.append([first], tokens=[[8]])
    requests = []
    for request in range(31):
        sequence, length = cache.allocate(prompt + [request + 1000])
        assert length == 992  # 62 whole pages
        cache.append([sequence], tokens=[(prompt + [request + 1000])[length:]])
        requests.append(sequence)
    assert cache.stats().pages_used == 62 + 32  # and one page of its own for each
    cache.free(first, *requests)
    assert cache.stats().pages_used == 0 and cache.stats().pages_kept == 62


def test_equal_hashes_are_not_equal_content(monkeypatch):
    from fusedops._core import page_pool

    monkeypatch.setattr(page_pool, "hash", lambda value: 1, raising=False)
    cache = small()
    one, _ = cache.allocate([1] * 9)
    cache.append([one], tokens=[[1] * 9])
    cache.free(one)
    assert cache.allocate([2] * 9)[1] == 0
    assert cache.allocate([1] * 9)[1] == 8


def filled(cache, tokens):
    """A sequence with these tokens, all of its whole pages findable."""
    sequence, length = cache.allocate(tokens)
    cache.append([sequence], tokens=[tokens[length:]])
    cache.append([sequence], tokens=[[]])
    return sequence


def test_a_page_that_is_found_is_not_changed_by_its_old_holder():
    cache = small()
    one = filled(cache, [1] * 8)
    cache.truncate(one, 4)
    cache.append([one], tokens=[[2]])
    assert cache.allocate([1] * 9)[1] == 0


def test_one_token_is_left_to_compute():
    cache = small()
    filled(cache, [1] * 16)
    assert cache.allocate([1] * 16)[1] == 8 and cache.allocate([1] * 17)[1] == 16


def test_the_end_of_a_prefix_is_given_up_before_its_start():
    cache = small(num_pages=3)
    cache.free(filled(cache, [1] * 24))
    filled(cache, [2] * 8)
    assert cache.allocate([1] * 25)[1] == 16


def test_content_after_a_truncation_is_found_as_what_it_is():
    cache = small()
    one = filled(cache, [1] * 24)
    cache.truncate(one, 12)
    cache.append([one], tokens=[[2] * 12])
    cache.free(one)
    assert cache.allocate([1] * 12 + [2] * 13)[1] == 24
    assert cache.allocate([1] * 25)[1] == 8  # its second page was written over


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda cache: PagedKVCache(1, 4, 4, 1, 8), "page_size must be 1 or a multiple of 8 up to 256, got 4"),
        (lambda cache: PagedKVCache(0, 4, 8, 1, 8), "num_layers must be a positive integer, got 0"),
        (lambda cache: cache.append([5], [1]), "append: there is no sequence 5"),
        (lambda cache: cache.append([0, 0], [1, 1]), "each sequence must be named once"),
        (lambda cache: cache.append([0], [1, 2]), "each sequence must be named once, with one count"),
        (lambda cache: cache.append([0], [-1]), "counts must not be negative, got -1"),
        (lambda cache: cache.append([0], [21]), "sequence 0 would have 21 tokens, at most 20 are allowed"),
        (lambda cache: cache.fork(0, 1), r"fork: length must be in 0 \.\.\. 0, got 1"),
        (lambda cache: cache.truncate(0, 1), r"truncate: length must be in 0 \.\.\. 0, got 1"),
        (lambda cache: cache.free(0, 0), "free: a sequence is named twice"),
        (lambda cache: cache.free([0]), r"free: there is no sequence \[0\]"),
        (lambda cache: cache.block_table([0], width=-1), "width must be at least 0, got -1"),
    ],
)
def test_what_is_wrong_is_refused(call, message):
    cache = small(max_length=20)
    cache.allocate()
    with pytest.raises(ValueError, match=message):
        call(cache)
    cache.check()


def test_out_of_pages_says_what_is_needed_and_changes_nothing():
    cache = small(num_pages=3)
    one, _ = cache.allocate()
    two, _ = cache.allocate()
    cache.append([one], [10])
    with pytest.raises(OutOfPages, match="2 pages are needed and 1 of 3 can be had"):
        cache.append([one, two], [7, 3])
    assert cache.length(one) == 10 and cache.length(two) == 0
    cache.check()
    assert cache.append([one], [6]).tolist() == cache.slots(one)[10:].tolist()


def test_tables_are_what_the_operators_take():
    cache = small()
    sequences = [cache.allocate()[0] for _ in range(3)]
    cache.append(sequences, [0, 9, 8])
    table, lengths = cache.block_table(sequences, width=4), cache.lengths(sequences)
    assert table.dtype == lengths.dtype == torch.int32 and table.shape == (3, 4)
    assert lengths.tolist() == [0, 9, 8] and cache.block_table([]).shape == (0, 0)
    assert cache.stats().waste == pytest.approx(1 - 17 / 24)
    assert cache.stats().bytes_used == 3 * 8 * 8 * 4 * 2 * 2


def test_the_example_of_the_docs(capsys):
    """The cache's own example in docs/kv_cache.md, as it stands there."""
    text = (Path(__file__).resolve().parents[2] / "docs" / "kv_cache.md").read_text()
    (example,) = re.findall(r"^```python\n([^`]*cache = PagedKVCache.*?)^```", text, re.DOTALL | re.MULTILINE)
    names = {}
    exec(compile(example, "kv_cache.md", "exec"), names)
    assert names["there"] == 32 and names["slots"].tolist() == list(range(40))
    assert names["lengths"].tolist() == [41, 32] and "pages_used=3" in capsys.readouterr().out


def test_written_and_read_by_the_operators():
    """What the operators see through slots, table and lengths is what each sequence holds."""
    cache = PagedKVCache(1, 12, 8, 2, 16, dtype=torch.float32)
    sequences, lengths = [cache.allocate()[0] for _ in range(3)], [11, 1, 17]
    k, v, q = (torch.randn(sum(lengths), 2, 16) for _ in range(3))
    write_kv_cache(k, v, cache.k[0], cache.v[0], cache.append(sequences, lengths))
    last = torch.tensor(lengths).cumsum(0) - 1
    out = paged_attention(q[last], cache.k[0], cache.v[0], cache.block_table(sequences), cache.lengths(sequences))
    starts = [0, *(last + 1).tolist()]
    for row, (begin, end) in enumerate(zip(starts, starts[1:])):
        alone = attention(q[None, end - 1 : end], k[None, begin:end], v[None, begin:end])
        torch.testing.assert_close(out[row], alone[0, 0])
