"""attention_varlen and merge_attention."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fusedops import attention, attention_varlen, merge_attention
from fusedops.ops.attention import reference
from fusedops.testing import assert_accurate, make_tensor, strategies
from tests.ops.attention_problems import ALL_OPTIONS, EVERY_OPTION, Problem, packed_lengths, packed_problems, qkv
from tests.ops.common import DTYPES, EMULATED, FUSED, IMPLEMENTATIONS, gradients, using

INF, NAN = float("inf"), float("nan")
EVERY_IMPLEMENTATION = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
EMULATED_TOO = pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS, *EMULATED])


def packed(pairs, heads=2, kv_heads=1, head_dim=16, dtype=torch.float32, seed=0, **options):
    """A packed problem of (queries, keys) pairs."""
    totals = [sum(pair[side] for pair in pairs) for side in (0, 1)]
    q, k, v = (t[0] for t in qkv(1, *totals, heads, kv_heads, head_dim, dtype, seed))
    return Problem(q, k, v, options, packed_lengths(pairs))


# ---- accuracy


@EMULATED_TOO
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(data=st.data())
def test_accuracy(implementation, dtype, data):
    problem = data.draw(packed_problems(dtype))
    with using(implementation):
        problem.check(*problem.run())


@EVERY_IMPLEMENTATION
@EVERY_OPTION
def test_each_sequence_is_attention_of_its_own(implementation, options):
    """Forward and backward, sequence by sequence, those without queries or keys among them."""
    pairs = [(5, 9), (0, 4), (17, 17), (3, 0), (9, 4), (1, 20)]
    problem = packed(pairs, head_dim=24, seed=1, **options)
    grads = make_tensor(problem.q.shape, torch.float32, seed=4), make_tensor((2, len(problem.q)), torch.float32, seed=5)
    tensors = problem.q, problem.k, problem.v, problem.options.get("sinks")

    def whole(q, k, v, sinks):
        return Problem(q, k, v, {**options, "sinks": sinks}, problem.lengths).run()

    def one_by_one(q, k, v, sinks):
        starts_q, starts_k = (starts.tolist() for starts in problem.lengths[:2])
        parts = [
            attention(
                q[None, starts_q[b] : starts_q[b + 1]], k[None, starts_k[b] : starts_k[b + 1]],
                v[None, starts_k[b] : starts_k[b + 1]], return_lse=True, **{**options, "sinks": sinks},
            )
            for b in range(len(pairs))
        ]  # fmt: skip
        return torch.cat([out[0] for out, _ in parts]), torch.cat([lse[0] for _, lse in parts], 1)

    with using(implementation):
        found, found_grads = whole(*tensors), gradients(whole, tensors, grads)
    with using("reference"):
        wanted, wanted_grads = one_by_one(*tensors), gradients(one_by_one, tensors, grads)
    for a, b in zip((*found, *found_grads), (*wanted, *wanted_grads), strict=True):
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@EMULATED_TOO
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(max_examples=2 * settings.default.max_examples)
@given(data=st.data())
def test_merge_accuracy(implementation, dtype, data):
    shape = data.draw(st.sampled_from([(3, 2, 8), (2, 5, 3, 16), (17, 2, 40), (1, 1, 1, 72), (0, 2, 8), (2, 0, 2, 8)]))
    seed = data.draw(strategies.seeds())
    *leading, length, heads, _ = shape
    outs = [make_tensor(shape, dtype, seed=seed + i, layout=data.draw(strategies.layouts(len(shape)))) for i in (0, 1)]
    empty_rows = st.sampled_from([(), (-INF,), (-INF, -INF, -INF)])
    lses = [
        make_tensor((*leading, heads, length), torch.float32, seed=seed + i, specials=data.draw(empty_rows),
                    magnitude=data.draw(st.sampled_from([1, 50])))
        for i in (2, 3)
    ]  # fmt: skip
    for out, lse in zip(outs, lses):  # what a set without keys left behind is not looked at
        if out.numel() and 0 not in out.stride():
            out.masked_fill_(lse.isneginf().mT[..., None], NAN)
    with using(implementation):
        out, lse = merge_attention(outs[0], lses[0], outs[1], lses[1])
    wide = [t.double() for pair in zip(outs, lses) for t in pair]
    truth, lse_truth = reference.merge_attention(*wide)
    assert_accurate(out, truth, zeros=False)
    assert_accurate(lse, lse_truth, zeros=False)


# ---- properties


@EVERY_IMPLEMENTATION
def test_one_sequence_never_reaches_another(implementation):
    """Bitwise, whatever stands in the others, and however long the longest is said to be."""
    problem = packed([(20, 30), (21, 25), (9, 40)], seed=2, causal=True)
    with using(implementation):
        out, lse = problem.run()
        for tensor, rows in ((problem.q, slice(20, 41)), (problem.k, slice(30, 55)), (problem.v, slice(30, 55))):
            kept = tensor[rows].clone()
            tensor.fill_(NAN)
            tensor[rows] = kept
        found, found_lse = problem.run()
    assert torch.equal(found[20:41], out[20:41]) and torch.equal(found_lse[:, 20:41], lse[:, 20:41])


@EVERY_IMPLEMENTATION
@pytest.mark.parametrize("name", list(ALL_OPTIONS))
def test_equal_lengths_are_a_batch(implementation, name):
    q, k, v = qkv(3, 10, 18, seed=3)
    lengths = packed_lengths([(10, 18)] * 3)
    with using(implementation):
        out, lse = attention(q, k, v, return_lse=True, **ALL_OPTIONS[name])
        flat = attention_varlen(*(t.flatten(0, 1) for t in (q, k, v)), *lengths, return_lse=True, **ALL_OPTIONS[name])
    torch.testing.assert_close(flat[0].view(out.shape), out, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(flat[1].view(2, 3, 10).transpose(0, 1), lse, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("implementation", FUSED)
@given(data=st.data())
def test_layout_and_repetition_do_not_matter(implementation, data):
    problem = data.draw(packed_problems(torch.float32, max_length=20))
    tensors = problem.q, problem.k, problem.v
    with using(implementation):
        first, again = problem.run(), problem.run()
        copies = Problem(*(t.contiguous() for t in tensors), problem.options, problem.lengths).run()
    for a, b, c in zip(first, again, copies, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


@EVERY_IMPLEMENTATION
def test_tables_have_a_row_for_each_sequence(implementation):
    slopes = torch.tensor([[0.5, 0.1], [2.0, 0.0]])
    problem = packed([(4, 9), (9, 4)], alibi_slopes=slopes, seed=6)
    with using(implementation):
        problem.check(*problem.run())


@EVERY_IMPLEMENTATION
def test_merging_is_symmetric_and_weighs_by_lse(implementation):
    out_a, out_b = torch.ones(2, 3, 1, 8), torch.full((2, 3, 1, 8), 3.0)
    lse = torch.zeros(2, 1, 3)
    with using(implementation):
        out, total = merge_attention(out_a, lse, out_b, lse + torch.tensor(3.0).log())
        swapped, _ = merge_attention(out_b, lse + torch.tensor(3.0).log(), out_a, lse)
        huge, _ = merge_attention(out_a, lse + 3e4, out_b, lse - 3e4)
    torch.testing.assert_close(out, torch.full_like(out, 2.5))
    torch.testing.assert_close(total, torch.full_like(total, 4.0).log())
    assert torch.equal(out, swapped) and torch.equal(huge, out_a)


@EVERY_IMPLEMENTATION
def test_no_sequence_at_all(implementation):
    problem = packed([])
    with using(implementation):
        out, lse = problem.run()
    assert out.shape == (0, 2, 16) and lse.shape == (2, 0)


@EVERY_IMPLEMENTATION
def test_no_sequence_at_all_has_gradients(implementation):
    q, k, v, sinks = (t.requires_grad_() for t in (torch.zeros(0, 2, 16), *torch.zeros(2, 0, 1, 16), torch.ones(2)))
    starts = torch.zeros(1, dtype=torch.int32)
    with using(implementation):
        attention_varlen(q, k, v, starts, starts, 0, 0, sinks=sinks).sum().backward()
    assert [t.grad.shape for t in (q, k, v)] == [t.shape for t in (q, k, v)]
    assert sinks.grad.tolist() == [0.0, 0.0]
