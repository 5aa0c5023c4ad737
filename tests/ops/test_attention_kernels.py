"""The forward kernels of attention: many blocks, splits and merging, packed heads, ranges of blocks, unused memory."""

from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given
from hypothesis import strategies as st

from fusedops import attention, attention_varlen, merge_attention
from fusedops._core.tl import key_range, tanh
from fusedops.ops.attention import _triton as kernels
from fusedops.ops.attention import reference
from fusedops.ops.attention._triton.backward import query_range
from fusedops.testing import assert_accurate, make_tensor
from fusedops.testing.inputs import huge_stride_rows
from tests.ops.attention_problems import Problem, packed_lengths, packed_problems, problems, qkv
from tests.ops.common import DTYPES, EMULATED, EVERY_KERNEL, using

LSE_EMPTY = float("-inf")
EVERYTHING = ("bounds", "scores", "masks")
OPTIONS = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window_size": (9, 3)},
    "scores": {"causal": True, "softcap": 2.0, "sinks": torch.tensor([0.5, -1.0, 2.0, LSE_EMPTY]),
               "alibi_slopes": torch.tensor([0.1, 0.0, 0.3, 0.2])},
    "bool mask": {"mask": make_tensor((1, 4, 5, 50), torch.float32, seed=9) > 0.5},
    "additive mask": {"mask": make_tensor((1, 1, 5, 50), torch.float32, seed=9), "sinks": torch.ones(4)},
}  # fmt: skip


def force_tile(monkeypatch, **changes):
    """Make every launch use a tile with these fields."""
    original = kernels.default
    monkeypatch.setattr(kernels, "default", lambda *args: replace(original(*args), **changes))


def force_splits(monkeypatch, number):
    monkeypatch.setattr(kernels, "num_splits", lambda *args: number)


# ---- tiles of 16 keys: every loop of the kernel runs more than once, and splits end inside of every range


@pytest.fixture
def small_tiles(monkeypatch):
    force_tile(monkeypatch, block_m=16, block_n=16)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(data=st.data())
def test_many_small_blocks(dtype, data):
    problem = data.draw(problems(dtype, EVERYTHING, max_pairs=4000, head_dims=(8, 40, 72)))
    with pytest.MonkeyPatch.context() as patch, using("triton"):
        force_splits(patch, data.draw(st.sampled_from([1, 1, 2, 3, 8])))
        out, lse = problem.run()
    problem.check(out, lse)


@pytest.mark.usefixtures("small_tiles")
@given(data=st.data())
def test_many_small_blocks_of_packed_sequences(data):
    problem = data.draw(packed_problems(torch.float32))
    with pytest.MonkeyPatch.context() as patch, using("triton"):
        force_splits(patch, data.draw(st.sampled_from([1, 2, 5])))
        out, lse = problem.run()
    problem.check(out, lse)


@pytest.mark.parametrize(
    "options",
    [{"window_size": (48, -1)}, {"window_size": (-1, 3)}, {"alibi_slopes": torch.tensor([0.1, 0.0, 0.3, 0.2])}],
    ids=["left", "right", "alibi"],
)
def test_the_last_pair_that_counts(options):
    """Bounds that hide one pair of a query and a key; ALiBi of keys on both sides of their query."""
    problem = Problem(*qkv(1, 5, 50, heads=4, kv_heads=2), options)
    with using("triton"):
        problem.check(*problem.run())


# ---- splits of the keys


@EVERY_KERNEL
@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("number", [2, 3, 7])
def test_any_number_of_splits(implementation, monkeypatch, number, name):
    """B03, B04: splits without a visible key (flashinfer-ai/flashinfer#4051, vllm-project/vllm#49294)."""
    problem = Problem(*qkv(1, 5, 50, heads=4, kv_heads=2), OPTIONS[name])
    force_splits(monkeypatch, number)
    with using(implementation):
        out, lse = problem.run()
        again = problem.run()
    problem.check(out, lse)
    assert torch.equal(out, again[0]) and torch.equal(lse, again[1])


@pytest.mark.parametrize("mask", [torch.zeros(1, 1, 1, 40, dtype=torch.bool), torch.full((1, 1, 1, 40), LSE_EMPTY)])
@pytest.mark.parametrize("number", [1, 3])
def test_no_visible_key_in_any_split(monkeypatch, number, mask):
    q, k, v = qkv(1, 4, 40)
    force_splits(monkeypatch, number)
    with using("triton"):
        out, lse = attention(q, k, v, mask=mask, return_lse=True)
        sunk, sunk_lse = attention(q, k[:, :0], v[:, :0], sinks=torch.tensor([1.5, -2.0]), return_lse=True)
    assert not out.any() and bool((lse == LSE_EMPTY).all())
    assert not sunk.any() and torch.allclose(sunk_lse, torch.tensor([1.5, -2.0])[None, :, None].expand(1, 2, 4))


@EVERY_KERNEL
def test_hot_scores_lose_nothing_between_splits(implementation, monkeypatch):
    """Scores of several hundred: the parts are joined by their maxima, never by a rounded lse."""
    q, k, v = qkv(1, 1, 64, head_dim=64)
    problem = Problem(q * 12, k * 12, v)
    force_tile(monkeypatch, block_n=16)
    force_splits(monkeypatch, 4)
    with using(implementation):
        problem.check(*problem.run())


# ---- merge


@EVERY_KERNEL
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_merge(implementation, dtype):
    """B03: two empty states give an empty one; what an empty state holds is not looked at."""
    outs = [make_tensor((2, 5, 3, 24), dtype, seed=seed, layout="padded") for seed in (0, 1)]
    lses = [make_tensor((2, 3, 5), torch.float32, seed=seed, magnitude=20.0) for seed in (2, 3)]
    lses[0][0, :, :3] = LSE_EMPTY
    lses[1][0, :, 2:] = LSE_EMPTY
    outs[0][0, :3] = float("nan")
    with using(implementation):
        out, lse = merge_attention(outs[0], lses[0], outs[1], lses[1])
    doubles = (t.double() for pair in zip(outs, lses) for t in pair)
    truth, lse_truth = reference.merge_attention(*doubles)
    assert_accurate(out, truth, zeros=False)
    assert_accurate(lse, lse_truth, name="lse", zeros=False)
    assert not out[0, 2].any() and bool((lse[0, :, 2] == LSE_EMPTY).all())
    assert torch.equal(out[0, :2], outs[1][0, :2]) and torch.equal(lse[0, :, :2], lses[1][0, :, :2])


def test_merge_of_packed_and_of_strided_states():
    out = make_tensor((6, 2, 8), torch.float32, seed=0)
    lse = make_tensor((6, 2), torch.float32, seed=1).T
    with using("triton"):
        joined, joined_lse = merge_attention(out, lse, out, lse)
    torch.testing.assert_close(joined, out)
    torch.testing.assert_close(joined_lse, lse + 2.0**0.5 - 2.0**0.5 + torch.log(torch.tensor(2.0)))


@pytest.mark.parametrize("cut", [0, 1, 16, 29, 40])
def test_halves_merge_to_the_whole(cut):
    q, k, v = qkv(2, 3, 40, heads=4, kv_heads=2)
    with using("triton"):
        parts = [attention(q, k[:, keys], v[:, keys], return_lse=True) for keys in (slice(cut), slice(cut, None))]
        out, lse = merge_attention(*parts[0], *parts[1])
    Problem(q, k, v).check(out, lse)


# ---- grouped heads


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_grouped_heads_equal_repeated_ones(name, kv_heads):
    q, k, v = qkv(1, 5, 50, heads=4, kv_heads=kv_heads)
    repeated = (t.repeat_interleave(4 // kv_heads, 2) for t in (k, v))
    with using("triton"):
        grouped = attention(q, k, v, **OPTIONS[name], return_lse=True)
        alone = attention(q, *repeated, **OPTIONS[name], return_lse=True)
    for shared, own in zip(grouped, alone, strict=True):  # the interpreter's products depend on the place in the tile
        torch.testing.assert_close(shared, own, rtol=1e-6, atol=1e-6)


def test_heads_with_masks_of_their_own_do_not_share_a_tile():
    """NaN in v at a key that one head sees stays with that head, though both read the same v."""
    q, k, v = qkv(1, 3, 20)
    mask = torch.ones(1, 2, 1, 20, dtype=torch.bool)
    mask[0, 1, 0, 7] = False
    with using("triton"):
        clean = attention(q, k, v, mask=mask)
        v[0, 7] = float("nan")
        out = attention(q, k, v, mask=mask)
    assert out[:, :, 0].isnan().all() and torch.equal(out[:, :, 1], clean[:, :, 1])


# ---- ranges of blocks


@triton.jit
def _ranges(
    cases_ptr, found_ptr, num_cases,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, OF_KEYS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    for case in range(num_cases):
        first = tl.load(cases_ptr + 6 * case)
        last = tl.load(cases_ptr + 6 * case + 1)
        Sq = tl.load(cases_ptr + 6 * case + 2)
        Sk = tl.load(cases_ptr + 6 * case + 3)
        left = tl.load(cases_ptr + 6 * case + 4)
        right = tl.load(cases_ptr + 6 * case + 5)
        if OF_KEYS:
            a, b, c, d = key_range(first, last, Sq, Sk, left, right, HAS_LEFT, HAS_RIGHT, BLOCK)
        else:
            a, b, c, d = query_range(first, last, Sq, Sk, left, right, HAS_LEFT, HAS_RIGHT, BLOCK)
        tl.store(found_ptr + 4 * case, a)
        tl.store(found_ptr + 4 * case + 1, b)
        tl.store(found_ptr + 4 * case + 2, c)
        tl.store(found_ptr + 4 * case + 3, d)


@pytest.mark.parametrize("of_keys", [True, False])
@pytest.mark.parametrize("has_left, has_right", [(False, False), (False, True), (True, False), (True, True)])
@pytest.mark.parametrize("block", [1, 4, 16])
def test_ranges_of_blocks(block, has_left, has_right, of_keys):
    """Against the visible pairs, counted: nothing outside the range is seen, every pair of the whole blocks is."""
    generator = torch.Generator().manual_seed(block)
    sizes = torch.randint(1, 40, (60, 2), generator=generator)
    windows = torch.randint(0, 30, (60, 2), generator=generator)
    limit = sizes[:, :1] if of_keys else sizes[:, 1:]
    ends = (torch.rand(60, 2, generator=generator) * limit).int().sort(1).values
    cases = torch.cat((ends, sizes, windows), 1).int()
    found = torch.zeros(60, 4, dtype=torch.int32)
    _ranges[(1,)](cases, found, 60, HAS_LEFT=has_left, HAS_RIGHT=has_right, OF_KEYS=of_keys, BLOCK=block)
    num_whole = 0
    for case, (start, full_start, full_end, end) in zip(cases.tolist(), found.tolist(), strict=True):
        first, last, num_queries, num_keys, left, right = case
        distance = torch.arange(num_keys) - torch.arange(num_queries)[:, None] - (num_keys - num_queries)
        visible = torch.ones_like(distance, dtype=torch.bool)
        visible &= (distance >= -left) if has_left else visible
        visible &= (distance <= right) if has_right else visible
        seen = visible[first : last + 1] if of_keys else visible[:, first : last + 1].T
        assert start <= full_start <= full_end <= end or (start >= end and full_start == full_end == start)
        assert start % block == full_start % block == full_end % block == 0
        assert not seen[:, :start].any() and not seen[:, end:].any()
        assert seen[:, full_start:full_end].all() and full_end <= max(seen.shape[1], full_start)
        whole = [n for n in range(0, seen.shape[1] - block + 1, block) if seen[:, n : n + block].all()]
        assert whole == list(range(full_start, full_end, block)), "a whole block takes the slow way"
        num_whole += len(whole)
    assert num_whole > 0


@triton.jit
def _tanh_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(out_ptr + offs, tanh(tl.load(x_ptr + offs)))


def test_tanh():
    """Relative to each value, also near 0, where a softcap works most of the time, and where its formula changes."""
    x = torch.cat((torch.linspace(-12, 12, 3900), torch.logspace(-30, 2, 189), torch.tensor([0.55, -0.55, 0.0])))
    x = torch.cat((x, torch.tensor([float("inf"), -float("inf"), float("nan"), -1e-40])))
    out = torch.empty_like(x)
    _tanh_kernel[(1,)](x, out, BLOCK=4096)
    truth = torch.tanh(x.double())
    error = ((out.double() - truth) / truth).abs() / torch.finfo(torch.float32).eps
    assert error[truth.isfinite() & (truth != 0)].max() < 2.0
    assert torch.equal(out.isnan(), truth.isnan()) and torch.equal(out == 0, truth == 0)


# ---- what is not there


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("number", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nan_in_unused_memory_changes_nothing(monkeypatch, dtype, number):
    """B06: hidden keys and their values, the slack of rows, and what lies behind the last key."""
    force_splits(monkeypatch, number)
    num_queries, num_keys = 7, 45
    clean = qkv(1, num_queries, num_keys, heads=2, kv_heads=1, head_dim=24, dtype=dtype)
    dirty = [make_tensor(t.shape, dtype, seed=i, layout="padded") for i, t in enumerate(clean)]
    mask = torch.ones(1, 1, 1, num_keys, dtype=torch.bool)
    mask[..., 10:17] = False
    cases = [{"window_size": (5, 0)}, {"causal": True, "window_size": (2, -1)}, {"mask": mask}]
    cases += [{"mask": torch.zeros(mask.shape, dtype=dtype).masked_fill_(~mask, LSE_EMPTY), "causal": True}]
    hidden = [slice(0, num_keys - num_queries - 5), slice(0, num_keys - num_queries - 2), *[slice(10, 17)] * 2]
    for options, keys in zip(cases, hidden, strict=True):
        q, k, v = (t.clone() if t is dirty[0] else t for t in dirty)
        k, v = (make_tensor(t.shape, dtype, seed=i, layout="padded") for i, t in ((1, clean[1]), (2, clean[2])))
        k[:, keys] = float("nan")
        v[:, keys] = float("nan")
        with using("triton"):
            expected = attention(*clean, **options, return_lse=True)
            found = attention(q, k, v, **options, return_lse=True)
        assert expected[0].isfinite().all()
        assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


@pytest.mark.usefixtures("small_tiles")
def test_sequences_do_not_touch_each_other():
    q, k, v = (t[0] for t in qkv(1, 60, 60, heads=2, head_dim=24))
    lengths = packed_lengths([(20, 33), (0, 7), (17, 0), (23, 20)])
    with using("triton"):
        expected = attention_varlen(q, k, v, *lengths, causal=True, return_lse=True)
        k[33:], v[33:] = float("nan"), float("nan")
        found = attention_varlen(q, k, v, *lengths, causal=True, return_lse=True)
    assert expected[0].isfinite().all()
    assert torch.equal(found[0][:20], expected[0][:20]) and torch.equal(found[1][:, :20], expected[1][:, :20])
    assert not found[0][20:37].any() and bool((found[1][:, 20:37] == LSE_EMPTY).all())


@pytest.mark.parametrize("options", [{}, {"causal": True, "softcap": 3.0}, {"mask": OPTIONS["additive mask"]["mask"]}])
def test_nan_in_sight_reaches_its_row(options):
    """The maximum of a row drops a NaN; its weight must not."""
    q, k, v = qkv(1, 5, 50, heads=4, kv_heads=2)
    q[0, 3, 1] = float("nan")
    with using("triton"):
        out, lse = attention(q, k, v, **options, return_lse=True)
    assert out[0, 3, 1].isnan().all() and lse[0, 1, 3].isnan()
    assert out.isnan().sum() == out.shape[-1] and lse.isnan().sum() == 1


@pytest.mark.parametrize("head_dim", [72, 80, 96, 104])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_repeatable(dtype, head_dim):
    """B32: head dims between powers of two, four times (Dao-AILab/flash-attention#2896)."""
    problem = Problem(*qkv(1, 9, 70, head_dim=head_dim, dtype=dtype), {"causal": True})
    with using("triton"):
        results = [problem.run() for _ in range(4)]
    problem.check(*results[0])
    assert all(torch.equal(a, b) for again in results[1:] for a, b in zip(again, results[0]))


def test_masks_of_the_most_negative_number_are_no_infinities():
    """Where all keys of a row are masked by finfo.min, as Hugging Face does, they count alike."""
    q, k, v = qkv(1, 2, 6)
    mask = torch.full((1, 1, 2, 6), torch.finfo(torch.float32).min)
    problem = Problem(q, k, v, {"mask": mask})
    with using("triton"):
        out, lse = problem.run()
    torch.testing.assert_close(out, v.mean(1, keepdim=True).expand_as(out))
    assert lse.isfinite().all()


def test_tiles_that_span_more_than_int32_offsets():
    """B12, B17: rows of one tile further apart than 2**31 elements (triton-lang/triton#832)."""
    near = make_tensor((3, 16), torch.float16, seed=1), make_tensor((3, 16), torch.float16, seed=2)
    far = [huge_stride_rows(t, last_offset=2**31 + 2)[None, :, None] for t in near]
    q = make_tensor((1, 3, 1, 16), torch.float16, seed=0)
    mask = make_tensor((3, 3), torch.float16, seed=3)
    far_mask = huge_stride_rows(mask, last_offset=2**31 + 2)
    with using("triton"):
        expected = attention(q, *(t[None, :, None] for t in near), mask=mask[None, None])
        assert torch.equal(attention(q, *far, mask=far_mask[None, None]), expected)


@pytest.mark.parametrize("softmax_scale", [0.0, -0.5])
def test_scales_that_do_not_keep_the_order(softmax_scale):
    problem = Problem(*qkv(1, 5, 50), {"softmax_scale": softmax_scale, "causal": True})
    with using("triton"):
        out, lse = attention(problem.q, problem.k, problem.v, **problem.options, return_lse=True)
    args = (t.double() for t in (problem.q, problem.k, problem.v))
    truth, lse_truth = reference.attention(*args, *[None] * 6, softmax_scale, True, -1, -1, 0.0)
    assert_accurate(out, truth, zeros=False)
    assert_accurate(lse, lse_truth, name="lse", zeros=False)


# ---- float8


@pytest.mark.parametrize("implementation", ["triton", EMULATED[-1]])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("number", [1, 2])
def test_float8(implementation, monkeypatch, number, scaled):
    q, k, v = (t.to(torch.float8_e4m3fn) for t in qkv(2, 5, 70, heads=4, kv_heads=2, head_dim=40))
    options = {"causal": True, "softcap": 4.0}
    if scaled:
        options |= {name: make_tensor((rows, heads), torch.float32, seed=rows).abs() + 0.1
                    for name, rows, heads in (("q_scale", 2, 4), ("k_scale", 1, 2), ("v_scale", 2, 2))}  # fmt: skip
    force_splits(monkeypatch, number)
    problem = Problem(q, k, v, options)
    with using(implementation):
        out, lse = problem.run()
    assert out.dtype == torch.bfloat16
    doubles = problem.positional(torch.Tensor.double)
    truth, lse_truth = reference.attention(*doubles)
    assert_accurate(out, truth.double(), zeros=False)
    assert_accurate(lse, lse_truth, name="lse", zeros=False)
