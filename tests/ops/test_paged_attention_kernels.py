"""The kernels of paged attention: many blocks, the shares of the keys, joining, and launches within every device."""

import heapq
import itertools
from dataclasses import replace

import pytest
import torch
import triton.language as tl
from hypothesis import given
from hypothesis import strategies as st

from fusedops import paged_attention
from fusedops._core.device import INTERPRETER, MIN_CAPABILITY, TARGETS
from fusedops.ops.paged_attention import _triton as kernels
from fusedops.ops.paged_attention._triton import schedule
from fusedops.testing import assert_accurate
from tests.ops.common import DTYPES, using
from tests.ops.paged_problems import CACHES, INF, packed_bits, paged_problems, problem

TRITON_TARGETS = [target for target in TARGETS.values() if target.capability >= MIN_CAPABILITY]


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of 16 keys and parts of one block and more: every loop runs more than once, and sequences are split."""
    original = kernels.default
    monkeypatch.setattr(kernels, "default", lambda *args: replace(original(*args), block_m=16, block_n=16))
    monkeypatch.setattr(kernels, "MIN_SPLIT_KEYS", 16)
    monkeypatch.setattr(schedule, "MIN_SPLIT_KEYS", tl.constexpr(16))


def force_extra(monkeypatch, number):
    monkeypatch.setattr(kernels, "extra_slots", lambda *args: number)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("cache", CACHES)
@given(data=st.data())
def test_many_small_blocks_and_parts(cache, data):
    dtype = data.draw(st.sampled_from(DTYPES))
    found, place = data.draw(paged_problems(dtype, cache, max_keys=50, max_queries=5))
    with pytest.MonkeyPatch.context() as patch, using("triton"):
        force_extra(patch, data.draw(st.sampled_from([1, 2, 5, 9])))
        out, lse = found.run(**place, num_splits=data.draw(st.sampled_from([None, None, 3])))
    found.check(out, lse)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("number", [1, 3, 9])
@pytest.mark.parametrize(
    "options", [{}, {"window_size": (20, 0), "sinks": torch.tensor([0.5, -1.0])}], ids=["", "window"]
)
def test_any_number_of_parts(number, options):
    """B03, B04, B08: parts without a visible key; a number that is given, and one that the lengths give."""
    found = problem([(1, 100), (1, 5), (1, 0), (1, 33)], seed=1, **options)
    with using("triton"):
        wanted = found.run(num_splits=number)
        found.check(*wanted)
        again = found.run(num_splits=number, page_size=8, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(wanted, again))


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("page_size", [1, 8, 64, 256])
def test_page_size_changes_no_bit_of_the_same_split(monkeypatch, page_size):
    found = problem([(1, 100), (3, 60), (1, 17)], seed=2)
    force_extra(monkeypatch, 5)
    with using("triton"):
        assert all(map(torch.equal, found.run(page_size=page_size, seed=4), found.run(page_size=16)))


# ---- batch invariance


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("number", [1, 4])
@pytest.mark.parametrize("hostile", [[(1, 200)], [(13, 30)], [(1, 3)] * 5, [(0, 50), (1, 0)]], ids=str)
def test_a_row_does_not_know_its_batch(hostile, number):
    """B53: vllm-project/vllm#51902, #51187, #36488, #35404, #53430: tiles and splits that follow other requests."""
    own = [(1, 75), (2, 41)]
    found = problem([*own, *hostile], seed=5)
    with using("triton"):
        out, lse = found.run(num_splits=number)
        (q, *caches, table, seqlens), kwargs = found.call()
        kwargs |= {"cu_seqlens_q": kwargs.get("cu_seqlens_q", found.starts)[:3], "max_seqlen_q": 2}
        alone, alone_lse = paged_attention(
            q[:3], *caches, table[:2], seqlens[:2], return_lse=True, num_splits=number, **kwargs
        )
    assert torch.equal(out[:3], alone) and torch.equal(lse[:, :3], alone_lse)


# ---- the schedule


def parts_by_hand(lengths, extra, block_n, least):
    """Parts of each sequence of one query, as the module's docstring says."""
    blocks = [-(-num_keys // block_n) for num_keys in lengths]
    share = max(-(-sum(blocks) // extra), least // block_n)
    return [max(-(-count // share), 1) for count in blocks]


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("lengths", [[200], [160, 16, 16, 16], [0, 0, 100], [33] * 6, [1, 199]], ids=str)
@pytest.mark.parametrize("extra", [1, 4, 11])
def test_the_slots_are_shared_out_by_work(monkeypatch, lengths, extra):
    """What each program wrote shows which slots there were: those of the sequences that are cut, and no other."""
    force_extra(monkeypatch, extra)
    parts = parts_by_hand(lengths, extra, 16, 16)
    assert sum(parts) <= extra + len(lengths)
    seen = {}
    run_combine = kernels._run_combine

    def watch(grid, tensors, *rest):
        seen["l"] = tensors[4][:, 1].clone()
        run_combine(grid, tensors, *rest)

    monkeypatch.setattr(kernels, "_run_combine", watch)
    found = problem([(1, number) for number in lengths], heads=1, seed=6)
    with using("triton"):
        found.check(*found.run())
    written = ~seen["l"].isnan()
    expected = [count > 1 for count in parts for _ in range(count)]
    assert written.tolist() == expected + [False] * (extra + len(lengths) - len(expected))


def finished(lengths, parts, places):
    """When the last part ends, in keys, if each place takes the next part as soon as it is free."""
    free = [0] * places
    for length, count in zip(lengths, parts):
        for _ in range(count):
            heapq.heapreplace(free, free[0] + -(-length // count))
    return max(free)


@pytest.mark.parametrize("kv_heads", [1, 4, 8])
def test_a_skewed_batch_is_cut_where_its_keys_are(kv_heads):
    """One sequence of 128k keys and 31 of 4k end as an even batch of as many keys does."""
    target = TARGETS["sm_90a"]
    extra = kernels.extra_slots(32, kv_heads, 131072, target)
    skewed, even = [131072] + [4096] * 31, [(131072 + 31 * 4096) // 32] * 32
    parts = [parts_by_hand(lengths, extra, 64, 256) for lengths in (skewed, even)]
    places = 2 * target.sm_count // kv_heads
    ends = [finished(*batch, places) for batch in zip((skewed, even), parts)]
    assert ends[0] <= 1.15 * ends[1] and finished(skewed, [1] * 32, places) > 10 * ends[0]
    assert all(sum(counts) <= extra + 32 for counts in parts)


def test_extra_slots_follow_what_the_host_knows():
    """No more than fill the device, none where a table holds few keys or programs are many; never from lengths."""
    target = TARGETS["sm_90a"]
    for batch, kv_heads, capacity in itertools.product((1, 7, 64, 1024, 1025), (1, 4, 8), (16, 256, 257, 8192, 131072)):
        extra = kernels.extra_slots(batch, kv_heads, capacity, target)
        assert (extra == 0) == (batch > 1024 or capacity <= 256)
        assert extra * kv_heads <= 4 * 2 * target.sm_count + kv_heads
        assert extra <= batch * -(-capacity // 256)


def test_grids_do_not_depend_on_lengths_or_pages():
    """What a CUDA graph keeps is the launch: it must be the same for all values in device memory (B48)."""
    grids = []
    original = kernels._run_attention

    def watch(grid, tensors, numbers, constants, *rest):
        grids.append((grid, numbers, tuple(constants.items()), *rest))
        original(grid, tensors, numbers, constants, *rest)

    with pytest.MonkeyPatch.context() as patch, using("triton"):
        patch.setattr(kernels, "_run_attention", watch)
        for seed, lengths in enumerate(([9, 300], [300, 1], [0, 0])):
            found = problem([(1, number) for number in lengths], seed=seed)
            q, k, v, table, seqlens = found.call(page_size=8)[0]
            pool = [torch.cat((t, t.new_zeros(60 - len(t), *t.shape[1:]))) for t in (k, v)]
            wide = torch.cat((table, table.new_full((2, 40), -7)), 1)[:, :40].contiguous()
            found.check(*paged_attention(q, *pool, wide, seqlens, return_lse=True))
    assert grids[0] == grids[1] == grids[2] and "auto" in str(grids[0])


# ---- configurations


@pytest.mark.parametrize("target", TRITON_TARGETS, ids=lambda target: target.arch)
def test_tiles_fit_every_target(target):
    """B57: a default configuration never asks for more shared memory than there is."""
    sizes = (1, 16, 17, 64, 4096), (8, 64, 80, 128, 192, 256, 512), (16, 128, 512), (2, 4), (1, 2, 4)
    shapes = itertools.product(*sizes, (False, True), (False, True))
    for num_rows, dim, dim_v, itemsize, cache_itemsize, window, tree in shapes:
        kinds = itemsize, cache_itemsize, window, tree
        tile = kernels.default(num_rows, dim, dim_v, *kinds, target)
        assert kernels.shared_bytes(tile, *kinds, target) <= target.shared_memory
        assert tile.block_d >= dim and tile.block_dv >= dim_v and min(tile.block_m, tile.block_n) >= 16
        assert tile.num_stages >= 1 and tile.num_warps in (4, 8)


def test_a_fixed_number_of_splits_fixes_the_tile():
    for longest in (1, 7, 300):
        q, cache = torch.empty(300, 8, 64), torch.empty(4, 16, 2, 64)
        table = torch.empty(3, 40, dtype=torch.int32)
        args = q, cache, cache, table, None, None, longest, *[None] * 5, 0.1, True, -1, -1, 0.0
        tiles = [kernels.config("paged_attention", INTERPRETER, *args, number) for number in (1, 5)]
        assert {(tile.block_m, tile.block_n) for tile in tiles} == {(32, 32)}
        assert [(tile.splits, tile.num_splits) for tile in tiles] == [("none", 1), ("fixed", 5)]


def test_tree_words_of_many_drafts():
    """More new tokens than a tile has rows, and bits in three words."""
    num_queries = 70
    allowed = torch.rand(num_queries, num_queries, generator=torch.Generator().manual_seed(0)) > 0.5
    found = problem([(num_queries, 100)], seed=7, causal=False, tree_mask=packed_bits(allowed))
    with using("triton"):
        found.check(*found.run())


def test_hot_scores_lose_nothing_between_parts():
    """Scores of several hundred: the parts are joined by their maxima, never by a rounded lse."""
    found = problem([(1, 64)], head_dim=64, seed=8)
    found.q, found.keys = found.q * 12, found.keys * 12
    with using("triton"):
        out, lse = found.run(num_splits=4)
    assert_accurate(out, found.truth()[0], zeros=False)
    assert (lse > -INF).all()
