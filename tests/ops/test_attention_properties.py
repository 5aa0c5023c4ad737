"""attention: identities that need no reference, on every implementation."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fusedops import attention, merge_attention
from fusedops.ops.attention import reference
from fusedops.testing import assert_accurate
from tests.ops.attention_problems import ALL_OPTIONS, EVERY_OPTION, FEATURES, Problem, problems, qkv
from tests.ops.common import DTYPES, EMULATED, FUSED, IMPLEMENTATIONS, using

INF, NAN = float("inf"), float("nan")
EVERY_IMPLEMENTATION = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
EMULATED_TOO = pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS, *EMULATED])
DECODING = [name for name in ALL_OPTIONS if name != "window"]  # a key to the right is not there yet when decoding


def run(*tensors, **options):
    return attention(*tensors, return_lse=True, **options)


def assert_same(found, wanted):
    """Bitwise equal, NaN at the same places."""
    for a, b in zip(found, wanted, strict=True):
        assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) and torch.equal(a.isnan(), b.isnan())


@EVERY_IMPLEMENTATION
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@EVERY_OPTION
def test_constant_values_come_out_unchanged(implementation, dtype, options):
    q, k, _ = qkv(2, 21, 37, dtype=dtype)
    v = torch.full((2, 37, 1, 24), 0.75, dtype=dtype)
    with using(implementation):
        out, lse = run(q, k, v, **options)
    share = 1.0
    if "sinks" in options:  # the sink keeps the rest of each row
        share = 1.0 - torch.exp(options["sinks"][:, None] - lse).transpose(1, 2)[..., None].double()
    assert_accurate(out, 0.75 * share * torch.ones(out.shape, dtype=torch.float64))


@EVERY_IMPLEMENTATION
@pytest.mark.parametrize("hidden", ["later", "before the window", "bool", "additive", "per head"])
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_hidden_keys_change_nothing(implementation, hidden, bad):
    """Bitwise: NaN and infinity in keys that no query, or that only later queries, may look at."""
    q, k, v = qkv(2, 40, 70, seed=3)
    options, rows, keys = {}, slice(None), slice(50, 60)
    if hidden == "later":
        options, rows = {"causal": True}, slice(0, 20)  # query 19 stands at 49
    elif hidden == "before the window":
        options, rows = {"window_size": (4, -1)}, slice(34, None)  # query 34 stands at 64
    else:
        visible = torch.ones(2, 2 if hidden == "per head" else 1, 1, 70, dtype=torch.bool)
        visible[..., 50:60] = False
        options["mask"] = torch.where(visible, 0.25, -INF) if hidden == "additive" else visible
    spoiled = k.clone()
    spoiled[:, keys] = bad
    with using(implementation):
        wanted, found = run(q, k, v, **options), run(q, spoiled, v, **options)
    assert_same([found[0][:, rows], found[1][..., rows]], [wanted[0][:, rows], wanted[1][..., rows]])


@EMULATED_TOO
@pytest.mark.parametrize("hidden", ["past the causal end", "before the window", "bool", "additive"])
@pytest.mark.parametrize("bad", [NAN, INF])
def test_unseen_values_change_nothing(implementation, hidden, bad):
    """B06: 0 * NaN is NaN (Dao-AILab/flash-attention#1745): values of keys that no query of the batch sees."""
    q, k, v = qkv(2, 40, 70, seed=4)
    keys = slice(10, 20)
    if hidden == "past the causal end":
        options, keys = {"window_size": (-1, 0)}, slice(70, 70)
        k, v = (t[:, :60].contiguous() for t in (k, v))
        k, v = (torch.cat((t, t.new_full((2, 10, *t.shape[2:]), bad)), 1)[:, :60] for t in (k, v))
    elif hidden == "before the window":
        options = {"window_size": (5, -1)}  # query 0 stands at 30
    else:
        visible = torch.ones(2, 1, 1, 70, dtype=torch.bool)
        visible[..., keys] = False
        options = {"mask": visible if hidden == "bool" else torch.where(visible, 0.5, -INF)}
    spoiled = v.clone()
    spoiled[:, keys] = bad
    with using(implementation):
        assert_same(run(q, k, spoiled, **options), run(q, k, v, **options))


@EMULATED_TOO
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_visible_nan_damages_its_own_rows_alone(implementation, dtype):
    q, k, v = qkv(2, 37, 37, dtype=dtype, seed=5)
    q[0, 7, 1], k[1, 30, 0, 3] = NAN, NAN
    with using(implementation):
        out, lse = run(q, k, v, causal=True)
        first, _ = run(q[:, :1], k[:, :1].fill_(NAN), v[:, :1])
    damaged = torch.zeros(2, 2, 37, dtype=torch.bool)
    damaged[0, 1, 7] = damaged[1, :, 30:] = True
    assert torch.equal(lse.isnan(), damaged)
    assert torch.equal(out.isnan(), damaged.transpose(1, 2)[..., None].expand(out.shape))
    assert first.isnan().all(), "a row whose only key is NaN"


@EVERY_IMPLEMENTATION
@given(data=st.data())
def test_halves_recombine(implementation, data):
    """The keys in two parts, the sinks counted in one of them, joined by `merge_attention`."""
    problem = data.draw(problems(torch.float32, ("scores", "masks"), max_pairs=1000))
    problem.options.pop("alibi_slopes", None)  # positions count from the last key, and each half has its own
    cut = data.draw(st.integers(0, problem.k.shape[1]))
    options = dict(problem.options)
    mask = options.pop("mask", None)
    halves = []
    with using(implementation):
        for keys in (slice(0, cut), slice(cut, None)):
            part = mask if mask is None or mask.shape[-1] == 1 else mask[..., keys]
            halves += run(problem.q, problem.k[:, keys], problem.v[:, keys], mask=part, **options)
            options.pop("sinks", None)
        problem.check(*merge_attention(*halves))


@EVERY_IMPLEMENTATION
@pytest.mark.parametrize("name", DECODING)
def test_prefill_equals_decode(implementation, name):
    """B34: position by position, with window and softcap (vllm-project/vllm#3385, huggingface/transformers#29623)."""
    options = ALL_OPTIONS[name]
    q, k, v = qkv(1, 19, 19, seed=6)
    options = {**options, "causal": True}
    with using(implementation):
        whole, whole_lse = run(q, k, v, **options)
        for i in range(19):
            out, lse = run(q[:, i : i + 1], k[:, : i + 1], v[:, : i + 1], **options)
            assert_accurate(out, whole[:, i : i + 1].double(), name=f"out of position {i}")
            torch.testing.assert_close(lse[..., 0], whole_lse[..., i], rtol=1e-5, atol=1e-5)


@EVERY_IMPLEMENTATION
@pytest.mark.parametrize("num_queries, num_keys", [(5, 5), (3, 70), (70, 70), (9, 4)])
def test_window_counts_its_keys(implementation, num_queries, num_keys):
    """B34: the number of keys of each query by brute force; equal scores make exp(lse) that number."""
    _, k, v = qkv(1, 1, num_keys, heads=1, seed=7)
    q = torch.zeros(1, num_queries, 1, 16)
    sizes = sorted({1, 2, 3, 15, 16, 17, 31, 32, 33, 63, 64, 65, num_keys - 1, num_keys, num_keys + 1})
    cases = [((size - 1, 0), causal) for size in sizes for causal in (False, True)]
    cases += [((-1, 0), False), ((-1, 1), False), ((0, -1), False), ((0, 2), False), ((2, 1), True), ((-1, -1), True)]
    with using(implementation):
        for (left, right), causal in cases:
            lse = run(q, k, v, window_size=(left, right), causal=causal)[1][0, 0]
            for i, found in enumerate(lse.exp().tolist()):
                position = i + num_keys - num_queries
                seen = [
                    j for j in range(num_keys)
                    if (left < 0 or j >= position - left) and (right < 0 or j <= position + right)
                    and not (causal and j > position)
                ]  # fmt: skip
                assert math.isclose(found, len(seen), rel_tol=1e-5, abs_tol=0.0), (left, right, causal, i)


@pytest.mark.parametrize("implementation", FUSED)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(data=st.data())
def test_layout_and_repetition_do_not_matter(implementation, dtype, data):
    problem = data.draw(problems(dtype, FEATURES, max_pairs=1000, hot=False))
    tensors = problem.q, problem.k, problem.v
    before = [t.clone() for t in tensors]
    mask = problem.options.get("mask")
    whole = {} if mask is None else {"mask": mask.contiguous()}
    with using(implementation):
        first, again = problem.run(), problem.run()
        copies = run(*(t.contiguous() for t in tensors), **{**problem.options, **whole})
    assert_same(again, first)
    assert_same(copies, first)
    assert all(torch.equal(old, new) for old, new in zip(before, tensors, strict=True))
    assert first[0].is_contiguous() and first[1].is_contiguous() and first[1].dtype == torch.float32


def elsewhere(tensor, place):
    """The numbers of [1, S, H, D] at another place of memory."""
    if place == "one element further":
        flat = torch.zeros(tensor.numel() + 1, dtype=tensor.dtype)
        flat[1:] = tensor.flatten()
        return flat[1:].view(tensor.shape)
    dim = {"wider rows": 3, "more heads": 2}[place]
    shape = list(tensor.shape)
    shape[dim] += 3
    wide = torch.zeros(shape, dtype=tensor.dtype)
    return wide.narrow(dim, 0, tensor.shape[dim]).copy_(tensor)


@pytest.mark.parametrize("implementation", FUSED)
@pytest.mark.parametrize("place", ["one element further", "wider rows", "more heads"])
@pytest.mark.parametrize("rows, keys, kv_heads, dim", [(1, 5, 1, 8), (1, 40, 2, 64), (33, 33, 4, 64), (7, 40, 2, 24)])
def test_unaligned_rows_change_no_bit(implementation, place, rows, keys, kv_heads, dim):
    """Forward and gradients; on some CPUs torch's products add in another order where rows are not aligned."""
    tensors = qkv(1, rows, keys, heads=4, kv_heads=kv_heads, head_dim=dim, seed=21)
    with using(implementation):
        wanted = run(*tensors)
        grads = torch.autograd.grad(attention(*(t.requires_grad_() for t in tensors)).sum(), tensors)
        for i in range(3):
            moved = [t.detach().clone() for t in tensors]
            moved[i] = elsewhere(moved[i], place)
            assert_same(run(*moved), wanted)
            found = torch.autograd.grad(attention(*(t.requires_grad_() for t in moved)).sum(), moved)
            assert_same(found, grads)


@pytest.mark.parametrize("implementation", FUSED)
@EVERY_OPTION
def test_rows_do_not_depend_on_what_stands_beside_them(implementation, options):
    """Other batches, other queries and heads of other key heads may hold anything."""
    q, k, v = qkv(3, 33, 40, heads=2, kv_heads=2, seed=8)
    with using(implementation):
        wanted = run(q, k, v, **options)
        others = [t.clone() for t in (q, k, v)]
        for tensor in others:
            tensor[[0, 2]] = NAN
            tensor[1, :, 1] = INF
        others[0][1, 20:, 0] = NAN
        found = run(*others, **options)
    assert_same([found[0][1, :20, 0], found[1][1, 0, :20]], [wanted[0][1, :20, 0], wanted[1][1, 0, :20]])


@EVERY_IMPLEMENTATION
@pytest.mark.parametrize("group", [1, 5, 8, 16])
def test_heads_read_their_own_key_head(implementation, group):
    """Equal to the call on expanded keys and values, and each group to the call on its own head."""
    q, k, v = qkv(1, 9, 20, heads=2 * group, kv_heads=2, seed=9)
    expanded = [t.repeat_interleave(group, 2) for t in (k, v)]
    with using(implementation):
        out, wanted = attention(q, k, v), attention(q, *expanded)
        second = attention(q[:, :, group:], k[:, :, 1:], v[:, :, 1:])
    torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out[:, :, group:], second, rtol=1e-5, atol=1e-5)


@EVERY_IMPLEMENTATION
def test_exact_scalings(implementation):
    """Values times a power of two, and a sink as one more key without a value."""
    q, k, v = qkv(1, 9, 20, seed=10)
    sinks = torch.tensor([0.7, -2.0])
    bias = torch.cat((sinks[None, :, None, None], torch.zeros(1, 2, 1, 20)), -1)
    extra = [torch.cat((torch.zeros_like(t[:, :1]), t), 1) for t in (k, v)]
    with using(implementation):
        assert torch.equal(attention(q, k, v * 8), attention(q, k, v) * 8)
        found, wanted = run(q, k, v, sinks=sinks), run(q, *extra, mask=bias)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@EVERY_IMPLEMENTATION
@pytest.mark.parametrize("sizes", [(0, 3, 4), (2, 0, 4), (2, 3, 0), (2, 0, 0)])
@pytest.mark.parametrize("sinks", [None, torch.tensor([0.5, -0.25])])
def test_empty(implementation, sizes, sinks):
    q, k, v = (t.requires_grad_() for t in qkv(*sizes))
    with using(implementation):
        out, lse = run(q, k, v, sinks=sinks, causal=True)
        grads = torch.autograd.grad(out.sum() + lse.nan_to_num(0, 0, 0).sum(), (q, k, v))
    assert out.shape == q.shape and lse.shape == (sizes[0], 2, sizes[1])
    assert not out.any() and not any(grad.any() for grad in grads)
    wanted = torch.tensor([-INF, -INF]) if sinks is None else sinks
    assert torch.equal(lse, wanted[None, :, None].expand(lse.shape))


@EVERY_IMPLEMENTATION
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_hostile_scores(implementation, dtype):
    """All equal, one far above the others, all far below zero: no overflow, and the softmax is what it is."""
    q, k, v = qkv(1, 4, 33, dtype=dtype, seed=11)
    largest = torch.zeros(1, 4, 2, 16, dtype=dtype)
    largest[..., 0] = 100.0
    keys = torch.zeros(1, 33, 1, 16, dtype=dtype)
    with using(implementation):
        assert_accurate(attention(largest, keys, v), v.double().mean(1, keepdim=True).expand(1, 4, 2, 16))
        keys[:, 20, :, 0] = 100.0
        assert torch.equal(attention(largest, keys, v), v[:, 20:21].expand(1, 4, 2, 16))
        keys[:] = -100.0
        out, lse = run(largest, keys, v)
        assert_accurate(out, v.double().mean(1, keepdim=True).expand(1, 4, 2, 16))
        torch.testing.assert_close(lse, torch.full_like(lse, -2500.0 + math.log(33)))


@EVERY_IMPLEMENTATION
@pytest.mark.parametrize("scale", [-0.2, 0.0])
@EVERY_OPTION
def test_scales_that_are_not_positive(implementation, scale, options):
    """A hidden score stays hidden: -inf times such a scale is +inf or NaN."""
    problem = Problem(*qkv(1, 17, 17, seed=12), {**options, "softmax_scale": scale})
    with using(implementation):
        problem.check(*problem.run())


@pytest.mark.parametrize("num_keys", [127, 300])
@pytest.mark.parametrize("bad", [None, "q", "k", "v"])
def test_decoding_where_heads_share_keys(monkeypatch, num_keys, bad):
    """On a CPU the heads of one key head are rows of one head where that pays; each has its own result all the same."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    q, k, v = qkv(2, 1, num_keys, 12, 3, 64, seed=3)
    if bad is not None:
        {"q": q, "k": k, "v": v}[bad][1, 0, 2] = math.nan
    args = [None] * 6 + [0.2, True, -1, -1, 0.0]
    expected, expected_lse = reference.attention(q.double(), k.double(), v.double(), *args)
    with using("torch"):
        out, lse = attention(q, k, v, softmax_scale=0.2, causal=True, return_lse=True)
    assert_accurate(out, expected)
    assert_accurate(lse, expected_lse)
