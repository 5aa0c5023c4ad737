"""generate() with a paged cache gives the tokens of the default cache, and takes the pages that its tokens need."""

import pytest
import torch

from fusedops.patch import PagedCache
from fusedops.patch.paged_states import NewStates
from tests.patch.test_attention import LENGTH, only_attention, padded
from tests.patch.tiny_models import FAMILIES, tiny, tokens

transformers = pytest.importorskip("transformers")

NEW = 9
NUM_PAGES = 200
# what pages cannot express: queries of padding on the right, and then windows, which count columns
AFTER, ACROSS = "padding after a token", "a window across padding"
WINDOWED = ("mistral", "gemma2", "gpt_oss")

WAYS = {
    "one row": {},
    "left padding": {},
    "right padding": {},
    "beams": {"num_beams": 3},
    "samples": {"do_sample": True, "top_k": 20, "num_return_sequences": 2},
    "chunked prefill": {"prefill_chunk_size": 6},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "assistant": {},
}
CASES = [(family, "left padding") for family in FAMILIES] + [("mistral", "right padding")]
CASES += [(family, way) for family in ("llama", "gemma2", "gpt_oss") for way in WAYS if way != "left padding"]


def call(way, family):
    """(ids, options of generate) of a way to generate."""
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, **WAYS[way]}
    if way in ("prompt lookup", "assistant"):
        ids = tokens(1, 6).repeat(1, 4)
        mask = torch.ones_like(ids)
    elif way == "one row":
        ids, mask = padded("left", (LENGTH,))
    elif way == "right padding":  # the last query's window reaches a token: without one, eager attention has a mean
        ids, mask = padded("right", (LENGTH, 17, 14))
    else:
        ids, mask = padded("left")
    if way == "assistant":
        options["assistant_model"] = tiny(family, num_hidden_layers=1, layer_types=None)
    return ids, {**options, "attention_mask": mask}


def hostile(model, page_size, **options):
    """A cache with NaN wherever nothing was written, and the pages of somebody else in it."""
    cache = PagedCache(model, num_pages=NUM_PAGES, page_size=page_size, **options)
    cache.pages.k.fill_(float("nan"))
    cache.pages.v.fill_(float("nan"))
    others = [cache.pages.allocate()[0] for _ in range(3)]
    cache.pages.append(others, [page_size + 1] * 3)
    cache.pages.free(others.pop(1))  # so that free pages lie between
    return cache, others


def assert_untouched(cache, others):
    cache.pages.check()
    pages = torch.cat([cache.pages.block_table([other])[0] for other in others])
    for data in (cache.pages.k, cache.pages.v):
        assert data[:, pages].isnan().all()


def pages_of(lengths, page_size):
    return sum(-(-length // page_size) for length in lengths)


@pytest.fixture
def gathered(monkeypatch):
    """The layers whose keys and values were gathered."""
    seen, gather = [], NewStates.gather
    monkeypatch.setattr(NewStates, "gather", lambda new: seen.append(new.layer) or gather(new))
    return seen


@pytest.mark.parametrize(("family", "way"), CASES)
def test_tokens(family, way, gathered):
    """Any attention, and ours, which gathers nothing; page sizes take turns."""
    page_size = (1, 8, 16)[CASES.index((family, way)) % 3]
    model = tiny(family)
    ids, options = call(way, family)
    torch.manual_seed(0)
    expected = model.generate(ids, **options).tolist()
    reasons = ({AFTER, ACROSS} if family in WINDOWED else {AFTER}) if way == "right padding" else set()
    for patched in (False, True):
        handle = only_attention(model) if patched else None
        cache, others = hostile(model, page_size)
        torch.manual_seed(0)
        assert model.generate(ids, past_key_values=cache, **options).tolist() == expected
        assert_untouched(cache, others)
        assert bool(gathered) == (not patched or way == "right padding")
        if patched and reasons == {AFTER}:
            assert gathered == [0, 0, 1, 1]  # keys and values of the prompt; not of what was generated
        gathered.clear()
    assert {reason for _, reason in handle.fallbacks()} == reasons
    cache.pages.free(*others)
    if "padding" in way:  # the last token is not in the cache
        lengths = [int(length) + NEW - 1 for length in options["attention_mask"].sum(1)]
        assert cache.stats().pages_used == pages_of(lengths, page_size)
    cache.reset()
    assert cache.stats().pages_used == 0
