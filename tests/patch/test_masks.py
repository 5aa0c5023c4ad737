"""The short masks mean what transformers' dense masks mean, and cost nothing where nothing is hidden."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fusedops.ops.attention import reference
from fusedops.patch import masks

masking = pytest.importorskip("transformers.masking_utils")

CAUSAL = masking.causal_mask_function
window = masking.sliding_window_causal_mask_function
PACKED = masking.packed_sequence_mask_function(torch.tensor([[0, 0, 0, 1, 1]]))
LATER = "q_offset" in masking.sdpa_mask.__code__.co_varnames  # than transformers 5.0, which has cache_position


def arguments(queries, keys, first, **others):
    """A mask of one sequence, in the spelling of this release."""
    positions = spellings(queries, first)[0]
    return {"batch_size": 1, "kv_length": keys, "mask_function": CAUSAL, **positions, **others}


def spellings(queries, first):
    """The ways in which this release of transformers gives the positions of the queries, last that of static caches."""
    if not LATER:
        return [{"cache_position": torch.arange(first, first + queries)}]
    return [{"q_length": queries, "q_offset": offset} for offset in (first, torch.tensor(first))]


def drawn_keys(draw, batch, queries, past):
    """Where the keys begin and how many there are; which are padding; the window."""
    offset = draw(st.integers(0, past))
    unused = draw(st.integers(0, 3))
    padded = draw(st.sampled_from(["none", "no key", "left", "right", "holes", "short"]))
    seen = torch.ones(batch, past + queries, dtype=torch.bool)
    for row in range(batch if padded in ("left", "right", "holes") else 0):
        hidden = draw(st.integers(0, past + queries - 1))
        end = past + queries
        places = {"left": slice(hidden), "right": slice(end - hidden, end), "holes": slice(hidden, hidden + 2)}
        seen[row, places[padded]] = False
    width = draw(st.sampled_from([0, 1, 3, past + queries, 99]))
    return {
        "batch_size": batch,
        "kv_length": past + queries - offset + unused,
        "kv_offset": offset,
        "attention_mask": None if padded == "none" else seen[:, : -1 if padded == "short" and queries > 1 else None],
        "mask_function": window(width) if width else CAUSAL,
    }


@st.composite
def requests(draw):
    """What transformers passes to a mask function."""
    queries, past = draw(st.sampled_from([1, 2, 5])), draw(st.integers(0, 6))
    positions = draw(st.sampled_from(spellings(queries, past)))
    return {**drawn_keys(draw, draw(st.integers(1, 2)), queries, past), **positions}


@given(requests(), st.integers(0, 2**20))
def test_short_masks_mean_the_dense_ones(request, seed):
    """As the dense mask that eager attention gets, and as what our operator is given, every mask is the stock one."""
    mask = masks.make_mask(**request)
    expected = masking.sdpa_mask(**request, allow_is_causal_skip=False)
    queries, keys = expected.shape[2:]
    is_static = isinstance(request.get("q_offset"), torch.Tensor)
    assert mask is None or mask.dtype == masks.SHORT or is_static
    if mask is not None and mask.dtype == torch.bool:
        assert torch.equal(mask, expected)
        return
    seeded = torch.Generator().manual_seed(seed)
    q = torch.randn(request["batch_size"], queries, 2, 8, generator=seeded)
    k, v = (torch.randn(request["batch_size"], keys, 2, 8, generator=seeded) for _ in "kv")
    dense = masks.densely(mask, q.transpose(1, 2), k.transpose(1, 2), True)
    assert torch.equal(dense.expand(expected.shape), expected)

    truth = reference.attention(q, k, v, None, None, expected, *[None] * 3, 0.3, False, -1, -1, 0.0)[0]
    padding, left = None, -1
    if mask is not None:
        k, v, padding, left = masks.unfold(mask, k.transpose(1, 2), v.transpose(1, 2))
        k, v = k.transpose(1, 2), v.transpose(1, 2)
    out = reference.attention(q, k, v, None, None, padding, *[None] * 3, 0.3, True, left, -1, 0.0)[0]
    torch.testing.assert_close(out, truth)


def test_nothing_is_made_where_nothing_is_hidden():
    assert masks.make_mask(**arguments(5, 9, 4)) is None
    assert masks.make_mask(**arguments(5, 9, 4, attention_mask=torch.ones(1, 9, dtype=torch.bool))) is None
    assert masks.make_mask(**arguments(5, 9, 4, mask_function=window(9))) is None


def test_what_short_masks_hold():
    """One row of keys in memory, whatever the window; no element at all without padding; four dimensions for all."""
    seen = torch.ones(2, 9, dtype=torch.bool)
    seen[0, :3] = False
    mask = masks.make_mask(**arguments(9, 9, 0, attention_mask=seen))
    assert mask.shape == (2, 1, 18, 9) and mask.untyped_storage().nbytes() == 18
    mask = masks.make_mask(**arguments(9, 9, 0, attention_mask=seen, mask_function=window(4)))
    assert mask.shape == (2, 1, 13, 9) and mask.untyped_storage().nbytes() == 18
    mask = masks.make_mask(**arguments(5, 100, 3))
    assert mask.shape == (1, 0, 16, 8) and mask.numel() == 0


@pytest.mark.parametrize(
    ("function", "options"),
    [
        (masking.and_masks(PACKED, CAUSAL), {}),
        (masking.and_masks(CAUSAL, lambda b, h, q, kv: kv != 1), {}),
        (masking.and_masks(CAUSAL, lambda b, h, q, kv: kv != 1), {"use_vmap": True}),
        (masking.or_masks(CAUSAL, lambda b, h, q, kv: kv == 4), {}),
        (masking.chunked_causal_mask_function(2, torch.zeros(1, dtype=int)), {}),
        (masking.bidirectional_mask_function, {}),
        (CAUSAL, {"allow_is_causal_skip": False}),  # a compiled decoding step wants one shape
    ],
    ids=["packed", "and", "vmap", "or", "chunked", "bidirectional", "fixed shape"],
)
def test_everything_else_is_dense(function, options):
    """A mask that the short form cannot hold is never shortened."""
    given = arguments(5, 5, 0, mask_function=function, **options)
    mask = masks.make_mask(**given)
    assert mask.dtype == torch.bool
    assert torch.equal(mask, masking.sdpa_mask(**{**given, "allow_is_causal_skip": False}))


def test_a_model_that_computes_with_its_mask():
    """What is meant for a dense mask raises with a short one, of every query and window."""
    seen = torch.ones(1, 9, dtype=torch.bool)
    seen[0, :3] = False
    for queries in range(1, 10):
        dense = torch.ones(1, 1, queries, 9, dtype=torch.bool)
        for width in (1, queries - 1, 5, 99):
            for padding in (None, seen):
                given = arguments(queries, 9, 9 - queries, attention_mask=padding, mask_function=window(width))
                mask = masks.make_mask(**given)
                if mask is not None and queries > 1:
                    with pytest.raises(RuntimeError, match="must match"):
                        mask & dense
                    assert mask.shape[2] not in (1, queries)


def test_static_cache_with_padding():
    """transformers makes these masks contiguous, so they are dense."""
    seen = torch.ones(1, 5, dtype=torch.bool)
    seen[0, 0] = False
    if LATER:
        given = {**arguments(5, 9, 0, attention_mask=seen), "q_offset": torch.tensor(0)}
        assert masks.make_mask(**given).dtype == torch.bool
        assert masks.make_mask(**{**given, "attention_mask": None}).dtype == masks.SHORT


def test_queries_that_do_not_fit():
    """Keys that end before the last query: nothing is assumed."""
    mask = masks.make_mask(**arguments(3, 4, 5))
    assert mask.dtype == torch.bool and mask.shape == (1, 1, 3, 4)
