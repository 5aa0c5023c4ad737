"""The rows of a paged cache against tensors side by side, and what its operators are called with."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fusedops
from fusedops._core import env
from fusedops.ops.attention import reference
from fusedops.patch import PagedCache, masks, paged_states
from tests.patch.test_attention import assert_close, only_attention, padded
from tests.patch.tiny_models import fill, tiny, tokens

transformers = pytest.importorskip("transformers")

LAYERS, HEADS, KV_HEADS, DIM = 2, 4, 2, 16  # of a tiny llama
UNFIT = {"padding after a token", "a window across padding", "a mask that hides tokens of the cache"}


class Dense:
    """What a cache must hold: every column's keys and values, which of them are padding, and whose were kept."""

    def __init__(self, batch):
        self.states = [torch.zeros(2, batch, KV_HEADS, 0, DIM) for _ in range(LAYERS)]
        self.real = self.kept = torch.zeros(batch, 0, dtype=torch.bool)

    @property
    def batch(self):
        return len(self.real)

    def add(self, layer, states):
        self.states[layer] = torch.cat((self.states[layer], states), 3)

    def select(self, rows):
        self.states = [states[:, rows] for states in self.states]
        self.real, self.kept = self.real[rows], self.kept[rows]

    def crop(self, columns):
        self.states = [states[:, :, :, :columns] for states in self.states]
        self.real, self.kept = self.real[:, :columns], self.kept[:, :columns]

    def attention(self, layer, query, window):
        """(out, who must agree): of all queries, with the padding hidden; those that are padding see nothing."""
        key, value = self.states[layer]
        queries, length = query.shape[2], key.shape[2]
        seen = masks.densely(None, query, key, True) & self.real[:, None, None]
        columns = torch.arange(length)
        if window:
            seen = seen & (columns > columns[length - queries :, None] - window)
        q, k, v = (states.transpose(1, 2) for states in (query, key, value))
        return reference.attention(q, k, v, None, None, seen, None, None, None, 0.3, False, -1, -1, 0.0)[0]


def short(real, window):
    """The mask that our mask function makes of a padding mask."""
    length = real.shape[1]
    rows = length + min(window or length, length)
    return real.byte()[:, None, None].expand(-1, 1, rows, -1).contiguous().view(masks.SHORT)


def add(cache, dense, count, real, how, window):
    """One forward: layer 0 is attended to, gathered or not read; the layers after it are attended to."""
    dense.real = torch.cat((dense.real, real), 1)
    kept = torch.ones_like(real) if how != "attend" else real
    dense.kept = torch.cat((dense.kept, kept), 1)
    mask = short(dense.real, window)
    for layer in range(LAYERS):
        states = torch.randn(2, dense.batch, KV_HEADS, count, DIM)
        dense.add(layer, states)
        key, value = cache.update(*states, layer)
        assert key.shape == value.shape == dense.states[layer][0].shape
        if layer or how == "attend":
            query = torch.randn(dense.batch, HEADS, count, DIM)
            try:
                out = paged_states.attend(query, key, value, mask, 0.3, None, None, True)
            except NotImplementedError as error:
                assert str(error) in UNFIT
            else:
                expected = dense.attention(layer, query, window).masked_fill(~real[:, :, None, None], 0)
                torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
        if layer or how != "nobody":
            assert_gathered(key + 0, value + 0, dense, layer)


def assert_gathered(key, value, dense, layer):
    """The very bits; 0 for padding without a page."""
    for found, states in zip((key, value), dense.states[layer], strict=True):
        assert torch.equal(found, states.masked_fill(~dense.kept[:, None, :, None], 0))


OPERATIONS = st.lists(
    st.one_of(
        st.tuples(
            st.just("add"), st.sampled_from([1, 1, 2, 9]), st.sampled_from(["attend", "attend", "gather", "nobody"])
        ),
        st.tuples(st.just("add"), st.sampled_from([1, 3]), st.just("attend")),
        st.tuples(st.just("reorder"), st.none(), st.none()),
        st.tuples(st.just("keep"), st.none(), st.none()),
        st.tuples(st.just("repeat"), st.integers(1, 2), st.none()),
        st.tuples(st.just("crop"), st.integers(0, 12), st.booleans()),
    ),
    min_size=6,
    max_size=14,
)


@pytest.fixture(scope="module")
def patched_llama():
    model = tiny("llama")
    only_attention(model)
    return model


@given(
    page_size=st.sampled_from([1, 8, 16]), operations=OPERATIONS, left=st.booleans(), window=st.sampled_from([0, 0, 5]),
    seed=st.integers(0, 1000),
)  # fmt: skip
def test_against_dense_tensors(patched_llama, page_size, operations, left, window, seed):
    """Whatever happens to the batch, the cache holds what dense tensors hold, and every page is accounted for."""
    torch.manual_seed(seed)
    cache = PagedCache(patched_llama, num_pages=600, page_size=page_size)
    cache.pages.k.fill_(float("nan"))
    cache.pages.v.fill_(float("nan"))
    dense = Dense(3)
    for name, number, how in [("add", 7, "attend"), *operations]:
        length, rows = dense.real.shape[1], range(dense.batch)
        if name == "add":
            real = torch.rand(dense.batch, number) > 0.3
            if left:  # padding before the first token alone, a row of padding among it
                real = torch.arange(length, length + number) >= torch.tensor([5, 0, 11]).repeat(9)[: dense.batch, None]
            add(cache, dense, number, real, how, window)
        elif name == "crop":
            kept = max(length - number, 0)
            cache.crop(kept if how and kept else -number)
            dense.crop(kept)
        elif length:
            chosen = {
                "reorder": torch.randint(dense.batch, (dense.batch,)).tolist(),
                "keep": torch.randperm(dense.batch)[: 1 + seed % dense.batch].tolist(),
                "repeat": [row for row in rows for _ in range(number or 1)][:8],
            }[name]
            if name == "repeat" and len(chosen) == number * dense.batch:
                cache.batch_repeat_interleave(number)
            else:
                (cache.reorder_cache if name == "reorder" else cache.batch_select_indices)(torch.tensor(chosen))
            dense.select(chosen)
        cache.pages.check()
        assert cache.get_seq_length() == dense.real.shape[1]
        assert [cache.pages.length(one) for one in cache._rows.sequences] in ([], dense.kept.sum(1).tolist())
    cache.reset()
    assert cache.stats().pages_used == 0


def prefill(model, cache, ids, mask, **options):
    with torch.no_grad():
        return model(ids, attention_mask=mask, past_key_values=cache, use_cache=True, **options).logits


def test_decoding_calls_have_the_same_shapes_and_addresses(patched_llama, monkeypatch):
    """The table is written where a row takes a page, and only there."""
    ids, mask = padded("left", (20, 13, 6))
    cache = PagedCache(patched_llama, num_pages=40, page_size=8, max_length=64)
    seen, tables = [], []

    def record(function, places):
        def called(*args, **options):
            seen.append(
                [(args[place].shape, args[place].data_ptr()) for place in places] + [options.get("max_seqlen_q")]
            )
            return function(*args, **options)

        return called

    prefill(patched_llama, cache, ids, mask)
    monkeypatch.setattr(paged_states, "paged_attention", record(paged_states.paged_attention, (1, 2, 3, 4)))
    monkeypatch.setattr(paged_states, "write_kv_cache", record(paged_states.write_kv_cache, (2, 3, 4)))
    for _ in range(20):
        mask = torch.cat((mask, torch.ones(3, 1, dtype=torch.long)), 1)
        version, before = cache._rows.table._version, cache.pages.lengths(cache._rows.sequences)
        prefill(patched_llama, cache, ids[:, :1], mask)
        tables.append((cache._rows.table._version != version, bool((before % 8 == 0).any())))
    assert len(seen) == 20 * 2 * LAYERS
    assert all(call == seen[number % (2 * LAYERS)] for number, call in enumerate(seen))
    assert all(changed == new_page for changed, new_page in tables) and {changed for changed, _ in tables} == {0, 1}
    table = cache._rows.table
    assert table.shape == (3, 8) and torch.equal(table[:, :5], cache.pages.block_table(cache._rows.sequences, 5))


def test_rows_that_begin_alike_share_pages(patched_llama):
    """Repeating a row copies nothing; going on copies the one page that is partly filled."""
    cache = PagedCache(patched_llama, num_pages=40, page_size=8)
    prefill(patched_llama, cache, tokens(1, 20), None)
    before = cache.pages.k[:, cache._rows.table[0, :3]].clone()
    cache.batch_repeat_interleave(4)
    assert cache.stats().pages_used == 3
    found = prefill(patched_llama, cache, tokens(4, 1), None)
    assert cache.stats().pages_used == 2 + 4
    for row in range(4):
        pages = cache._rows.table[row, :3]
        assert torch.equal(cache.pages.k[:, pages].flatten(1, 2)[:, :20], before.flatten(1, 2)[:, :20])
    cache.reorder_cache(torch.tensor([3, 3, 0, 0]))
    assert cache.stats().pages_used == 2 + 2
    cache.batch_select_indices(torch.tensor([False, True, False, True]))
    assert len(cache._rows.sequences) == 2 and cache.stats().pages_used == 2 + 2
    expected = patched_llama(torch.cat((tokens(1, 20).expand(4, -1), tokens(4, 1)), 1)).logits[:, -1:]
    assert_close(found, expected.detach())


def test_cut_back_into_a_page_that_is_shared(patched_llama):
    """Two rows that went on alone share a page again, and the next token of one is not the other's."""
    cache, ids = PagedCache(patched_llama, num_pages=40, page_size=8), tokens(1, 16).expand(2, -1)
    prefill(patched_llama, cache, ids[:1], None)
    cache.batch_repeat_interleave(2)
    prefill(patched_llama, cache, tokens(2, 1), None)
    cache.crop(-5)
    assert cache.stats().pages_used == 2
    found = [prefill(patched_llama, cache, tokens(2, 1, seed), None) for seed in (1, 2)]
    assert cache.stats().pages_used == 3
    expected = prefill(patched_llama, None, torch.cat((ids[:, :12], tokens(2, 1, 1), tokens(2, 1, 2)), 1), None)
    assert_close(torch.cat(found, 1), expected[:, -2:])


def test_gathered_rows(patched_llama):
    """Neighbours after a repetition, and 0 for padding, also in a row without any token yet."""
    cache = PagedCache(patched_llama, num_pages=20, page_size=8)
    cache.pages.k.fill_(float("nan"))
    cache.pages.v.fill_(float("nan"))
    dense = Dense(3)
    real = torch.arange(5) >= torch.tensor([[0], [3], [5]])
    add(cache, dense, 5, real, "attend", 0)
    cache.batch_repeat_interleave(2)
    dense.select([0, 0, 1, 1, 2, 2])
    add(cache, dense, 1, torch.tensor([[True], [True], [True], [False], [True], [False]]), "attend", 0)


def test_rows_that_wait_while_another_goes_on(patched_llama):
    """They still share a page, which is copied when they go on, too."""
    ids = torch.cat((tokens(1, 12).expand(3, -1), tokens(3, 2)), 1)
    mask = torch.ones(3, 14, dtype=torch.long)
    mask[1:, 12] = 0
    found = []
    for cache in (transformers.DynamicCache(), PagedCache(patched_llama, num_pages=20, page_size=8)):
        prefill(patched_llama, cache, ids[:1, :12], None)
        cache.batch_repeat_interleave(3)
        prefill(patched_llama, cache, ids[:, 12:13], mask[:, :13])
        found.append(prefill(patched_llama, cache, ids[:, 13:], mask))
    assert_close(found[1], found[0])
    assert cache.stats().pages_used == 1 + 3


def test_on_the_triton_kernels():
    """What a GPU would run, interpreted: a padded prompt, a chunk, and one token; window and sinks among it."""
    model = tiny("gpt_oss")
    ids, mask = padded("left", (20, 13, 4))
    sizes = (13, 6, 1)
    found = []
    for backend in ("auto", "triton"):
        handle = only_attention(model) if backend == "triton" else None
        cache, start, outs = PagedCache(model, num_pages=40, page_size=8), 0, []
        fusedops.reset_counters()
        for size in sizes:
            stop = start + size
            with env.override("FUSEDOPS_BACKEND", backend):
                outs.append(prefill(model, cache, ids[:, start:stop], mask[:, :stop]))
            start = stop
        found.append(torch.cat(outs, 1)[mask.bool()])
    assert_close(found[1], found[0])
    assert handle.fallbacks() == {}
    assert fusedops.counters() == {("write_kv_cache", "triton"): 6, ("paged_attention", "triton"): 6}


@pytest.mark.parametrize("patched", [False, True])
def test_a_copy_goes_on_alone(patched):
    """As prompts are kept for several continuations."""
    model = tiny("gemma2")
    ids = tokens(1, 20)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    longer = [torch.cat((ids, tokens(1, 3, seed)), 1) for seed in (1, 2)]
    expected = [model.generate(one, attention_mask=torch.ones_like(one), **options).tolist() for one in longer]
    handle = only_attention(model) if patched else None
    cache = PagedCache(model, num_pages=20, page_size=8)
    prefill(model, cache, ids, None)
    for one, truth in zip(longer, expected, strict=True):
        mask = torch.ones_like(one)
        found = model.generate(one, attention_mask=mask, past_key_values=copy.deepcopy(cache), **options)
        assert found.tolist() == truth
    assert cache.get_seq_length() == 20
    assert handle is None or handle.fallbacks() == {}


def test_one_cache_for_a_conversation():
    """generate goes on where it stopped, also where the model was patched for one turn."""
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    model = tiny("llama")
    ids, mask = padded("left", (20, 13, 6))
    found = []
    for cache in (transformers.DynamicCache(), PagedCache(model, num_pages=40, page_size=8)):
        conversation, seen = ids, mask
        for turn in range(3):
            handle = only_attention(model) if turn == 1 and isinstance(cache, PagedCache) else None
            conversation = model.generate(conversation, attention_mask=seen, past_key_values=cache, **options)
            if handle is not None:
                handle.undo()
            conversation = torch.cat((conversation, tokens(3, 2, turn)), 1)
            seen = torch.nn.functional.pad(seen, (0, conversation.shape[1] - seen.shape[1]), value=1)
        found.append(conversation.tolist())
    assert found[0] == found[1]


def test_layers_that_attend_to_the_keys_of_another():
    """Gemma 3n's later layers have no keys of their own: they read the other's pages, in the same forward."""
    options = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2}
    options |= {"hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": 128, "laurel_rank": 8}
    config = transformers.Gemma3nTextConfig(
        vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, num_kv_shared_layers=2, altup_num_inputs=2, pad_token_id=0,
        activation_sparsity_pattern=[0.0] * 4, **options,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    model = fill(model.eval(), centre=0.0)
    ids, mask = padded("left", (20, 13))
    options = {"attention_mask": mask, "max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    expected = model.generate(ids, **options).tolist()
    handle = only_attention(model)
    cache = PagedCache(model, num_pages=20, page_size=8)
    assert model.generate(ids, past_key_values=cache, **options).tolist() == expected
    assert handle.fallbacks() == {} and handle.report.counts["attention"] == 4
    assert cache.stats().tokens == 25 + 18
