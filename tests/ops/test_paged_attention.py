"""paged_attention: accuracy over all implementations, and identities that need no reference."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fusedops import attention, attention_varlen, merge_attention, paged_attention
from tests.ops.common import DTYPES, FUSED, IMPLEMENTATIONS, using
from tests.ops.paged_problems import CACHES, INF, LAYOUTS, NAN, PAGE_SIZES, packed_bits, paged_problems, problem

MANY = 2 * settings.default.max_examples  # times three caches and three dtypes: 450 cases in the interpreter
EVERY_IMPLEMENTATION = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
EVERY_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)
EVERY_CACHE = pytest.mark.parametrize("cache", CACHES)
MIXED = [(1, 45), (5, 21), (1, 1), (7, 7), (0, 9)]
OPTIONS = {
    "plain": {},
    "window": {"window_size": (6, 0), "sinks": torch.tensor([0.5, -1.0])},
    "scores": {"softcap": 3.0, "alibi_slopes": torch.tensor([0.3, 0.05])},
}
EVERY_OPTION = pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))


def assert_same(found, wanted):
    """Bitwise equal, NaN at the same places."""
    for a, b in zip(found, wanted, strict=True):
        assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) and torch.equal(a.isnan(), b.isnan())


# ---- accuracy


@EVERY_CACHE
@EVERY_DTYPE
@pytest.mark.parametrize("implementation", ["torch", "reference"])
@given(data=st.data())
def test_accuracy(implementation, dtype, cache, data):
    found, place = data.draw(paged_problems(dtype, cache))
    with using(implementation):
        out, lse = found.run(**place)
    found.check(out, lse)


@EVERY_CACHE
@EVERY_DTYPE
@settings(max_examples=MANY)
@given(data=st.data())
def test_accuracy_of_the_kernels(dtype, cache, data):
    found, place = data.draw(paged_problems(dtype, cache, max_keys=40, max_queries=6))
    splits = data.draw(st.sampled_from([None, None, 1, 2, 5]))
    with using("triton"):
        out, lse = found.run(**place, num_splits=splits)
    found.check(out, lse)


# ---- properties


@EVERY_IMPLEMENTATION
@EVERY_OPTION
@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_where_the_pages_lie_changes_no_bit(implementation, page_size, options):
    """Any order of pages, any page size, any layout of the pool, and whatever lies in unused memory."""
    found = problem(MIXED, seed=3, **options)
    with using(implementation):
        wanted = found.run(page_size=16, seed=0, filling=0.0)
        for seed, layout in enumerate(LAYOUTS, 1):
            assert_same(found.run(page_size=page_size, seed=seed, layout=layout, spare=seed), wanted)


@EVERY_OPTION
@EVERY_DTYPE
@pytest.mark.parametrize("implementation", FUSED)
def test_pages_equal_contiguous_keys_bitwise(implementation, dtype, options):
    """`attention` of each sequence by itself, in the same implementation; lengths for which neither splits its keys."""
    found = problem([(1, 13), (4, 29), (3, 3)], dtype, seed=4, **options)
    with using(implementation):
        out, lse = found.run(page_size=8, seed=5)
        first = 0
        for (num_queries, num_keys), start in zip(found.lengths, found.starts.tolist()):
            rows, keys = slice(start, start + num_queries), slice(first, first + num_keys)
            whole = found.q[rows][None], found.keys[keys][None], found.values[keys][None]
            part, sums = attention(*whole, causal=True, return_lse=True, **options)
            assert torch.equal(out[rows], part[0]) and torch.equal(lse[:, rows], sums[0])
            first += num_keys


@pytest.mark.parametrize("threads", [1, 4])
def test_decoding_on_a_cpu_shares_readings_as_contiguous_keys_do(monkeypatch, threads):
    """Where heads run as queries of one head depends on each sequence alone: 13 keys never do, 900 do on one thread."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    found = problem([(1, 13), (1, 900)], heads=12, kv_heads=3, seed=6)
    with using("torch"):
        out, lse = found.run(page_size=16, seed=5)
        for row, keys in enumerate((slice(0, 13), slice(13, 913))):
            whole = found.q[row][None, None], found.keys[keys][None], found.values[keys][None]
            part, sums = attention(*whole, causal=True, return_lse=True)
            assert torch.equal(out[row], part[0, 0]) and torch.equal(lse[:, row], sums[0, :, 0])


@EVERY_DTYPE
@EVERY_IMPLEMENTATION
def test_pages_equal_packed_keys(implementation, dtype):
    found = problem(MIXED, dtype, heads=4, kv_heads=2, seed=5)
    keys = [num_keys for _, num_keys in found.lengths]
    starts_k = torch.tensor([0, *keys], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    with using(implementation):
        found.check(*found.run())
        packed = found.q, found.keys, found.values, found.starts, starts_k, 7, 45
        found.check(*attention_varlen(*packed, causal=True, return_lse=True))


@EVERY_OPTION
@EVERY_CACHE
@pytest.mark.parametrize("implementation", FUSED)
def test_chunks_equal_the_whole(implementation, cache, options):
    """A prompt of 37 tokens at once, in chunks, and token by token. The kernels give the same bits."""
    whole = problem([(37, 37)], seed=6, cache=cache, **options)
    args, kwargs = whole.call(page_size=8, seed=1)
    with using(implementation):
        wanted = paged_attention(*args, return_lse=True, num_splits=1, **kwargs)
        for sizes in ([16, 16, 5], [30, 7], [1] * 37):
            first, parts = 0, []
            for size in sizes:
                rows = args[0][first : first + size]
                first += size
                kwargs |= {"cu_seqlens_q": torch.tensor([0, size], dtype=torch.int32), "max_seqlen_q": size}
                lengths = torch.tensor([first], dtype=torch.int32)
                parts.append(paged_attention(rows, *args[1:4], lengths, return_lse=True, num_splits=1, **kwargs))
            found = [torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts], 1)]
            whole.check(*found)
            if implementation == "triton":
                assert_same(found, wanted)


@EVERY_IMPLEMENTATION
def test_a_batch_of_one_token_each_needs_no_starts(implementation):
    found = problem([(1, 9), (1, 40), (1, 0)], seed=7)
    with using(implementation):
        assert_same(found.run(varlen=False), found.run(varlen=True))


@EVERY_IMPLEMENTATION
@pytest.mark.parametrize("bad", [NAN, INF])
def test_visible_nan_damages_its_own_sequence_alone(implementation, bad):
    found = problem(MIXED, seed=8)
    with using(implementation):
        wanted = found.run()
        found.keys[50] = bad  # token 5 of the second sequence
        out, lse = found.run()
    damaged = slice(1, 6)
    assert out[damaged].isnan().all()
    keep = [0, *range(6, 14)]
    assert torch.equal(out[keep], wanted[0][keep]) and torch.equal(lse[:, keep], wanted[1][:, keep])


@EVERY_IMPLEMENTATION
def test_inputs_are_left_alone(implementation):
    found = problem(MIXED, seed=9, cache="int8")
    args, kwargs = found.call()
    before = [t.clone() for t in args]
    with using(implementation):
        paged_attention(*args, **kwargs)
    assert all(torch.equal(a, b) for a, b in zip(args, before))


@pytest.mark.parametrize("implementation", FUSED)
def test_constant_values_come_out_unchanged(implementation):
    found = problem(MIXED, seed=10)
    found.values = torch.full_like(found.values, 0.75)
    with using(implementation):
        out, _ = found.run()
    torch.testing.assert_close(out, torch.full_like(out, 0.75), rtol=1e-6, atol=0.0)


@EVERY_IMPLEMENTATION
def test_a_shared_prefix_and_the_rest_recombine(implementation):
    """Two sequences that share pages, in two calls: the prefix for all queries at once, then what each has alone."""
    found = problem([(1, 32), (1, 32)], seed=11)
    found.keys[32:48], found.values[32:48] = found.keys[:16], found.values[:16]
    (q, k_cache, v_cache, table, _), _ = found.call(page_size=16)
    table[1, 0] = table[0, 0]
    lengths = torch.tensor([32, 32], dtype=torch.int32)
    with using(implementation):
        found.check(*paged_attention(q, k_cache, v_cache, table, lengths, return_lse=True))
        prefix = paged_attention(
            q, k_cache, v_cache, table[:1], torch.tensor([16], dtype=torch.int32), causal=False, max_seqlen_q=2,
            cu_seqlens_q=torch.tensor([0, 2], dtype=torch.int32), return_lse=True,
        )  # fmt: skip
        alone = paged_attention(q, k_cache, v_cache, table[:, 1:], lengths - 16, return_lse=True)
        found.check(*merge_attention(*prefix, *alone))


# ---- drafts in a tree


def tree_of(parents):
    """[n, n] bool: each node sees itself and its ancestors."""
    allowed = torch.eye(len(parents), dtype=torch.bool)
    for node, parent in enumerate(parents):
        if parent >= 0:
            allowed[node] |= allowed[parent]
    return allowed


@EVERY_IMPLEMENTATION
@pytest.mark.parametrize("num_nodes", [3, 9, 31, 33, 40])
def test_a_tree_gives_each_path_what_it_would_get_alone(implementation, num_nodes):
    """Every node's row equals that of a sequence which has only the node's path after the context."""
    context, parents = 21, [-1, *((node - 1) // 2 for node in range(1, num_nodes))]
    found = problem([(num_nodes, context + num_nodes), (1, 5)], seed=12, causal=False)
    allowed = tree_of(parents)
    other = torch.zeros(1, num_nodes, dtype=torch.bool)
    other[0, 0] = True
    found.options["tree_mask"] = packed_bits(torch.cat((allowed, other)))
    with using(implementation):
        out, lse = found.run(page_size=8)
    found.check(out, lse)
    for node in range(num_nodes):
        path = torch.cat((torch.arange(context), context + allowed[node].nonzero()[:, 0]))
        alone = attention(found.q[node][None, None], found.keys[path][None], found.values[path][None], return_lse=True)
        torch.testing.assert_close(out[node], alone[0][0, 0])
        torch.testing.assert_close(lse[:, node], alone[1][0, :, 0])


@EVERY_IMPLEMENTATION
def test_a_chain_is_the_causal_mask(implementation):
    """All bits set under `causal`, bits beyond the sequence set too; a row without bits sees the context alone."""
    found = problem([(5, 30), (33, 40)], seed=13)
    with using(implementation):
        wanted = found.run()
        everything = torch.full((38, 2), -1, dtype=torch.int32)
        assert_same(found.run(tree_mask=everything), wanted)
        nothing = found.run(tree_mask=torch.zeros_like(everything))
        before = problem([(5, 25), (33, 7)], seed=13, causal=False)
        before.q, before.keys = found.q, torch.cat((found.keys[:25], found.keys[30:37]))
        before.values = torch.cat((found.values[:25], found.values[30:37]))
        before.check(*nothing)


def test_bits_are_counted_from_the_lowest():
    allowed = torch.zeros(1, 40, dtype=torch.bool)
    allowed[0, [0, 5, 31, 32]] = True
    assert packed_bits(allowed).tolist() == [[1 + 32 - 2**31, 1]]
