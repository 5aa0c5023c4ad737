"""Faults that attention kernels of others had, each with its thread, looked for in every implementation."""

import pytest
import torch

from fusedops import attention, attention_varlen, merge_attention
from fusedops.testing import assert_accurate, make_tensor
from fusedops.testing.inputs import huge_stride_rows
from tests.ops.attention_problems import Problem, packed_lengths, qkv
from tests.ops.common import DTYPES, FUSED, IMPLEMENTATIONS, gradients, using

INF, NAN = float("inf"), float("nan")
EVERY_IMPLEMENTATION = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


def packed(pairs, dtype=torch.float32, head_dim=16, **options):
    """A packed problem of (queries, keys) pairs, with NaN beside every operand's rows."""
    shapes = [(sum(pair[side] for pair in pairs), heads, head_dim) for side, heads in ((0, 2), (1, 1), (1, 1))]
    tensors = [make_tensor(shape, dtype, seed=seed, layout="padded") for seed, shape in enumerate(shapes)]
    return Problem(*tensors, options, packed_lengths(pairs))


def assert_gradients(implementation, problem, rtol=1e-4):
    """Finite, and those of the reference in float64."""
    tensors = problem.q, problem.k, problem.v
    out, lse = problem.truth()
    grads = make_tensor(out.shape, problem.q.dtype, seed=5), make_tensor(lse.shape, torch.float32, seed=6)
    with using(implementation):
        found = gradients(lambda *t: Problem(*t, problem.options, problem.lengths).run(), tensors, grads)
    wide = Problem(*(t.double() for t in tensors), problem.options, problem.lengths)
    expected = gradients(
        lambda *t: Problem(*t, wide.options, wide.lengths).truth(),
        (wide.q, wide.k, wide.v),
        [g.double() for g in grads],
    )
    for result, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(result.double(), wanted, rtol=rtol, atol=rtol)


@EVERY_IMPLEMENTATION
@pytest.mark.parametrize("causal", [False, True])
def test_b01_ragged_keys_leave_no_nan_in_dq(implementation, causal):
    """B01: Dao-AILab/flash-attention#443, #334: dq read elements beyond seqlen_k; many queries, few ragged keys."""
    problem = packed([(70, 3), (66, 13), (5, 1)], causal=causal)
    with using(implementation):
        problem.check(*problem.run())
    assert_gradients(implementation, problem)


@EVERY_IMPLEMENTATION
@pytest.mark.parametrize("causal", [False, True])
def test_b01_what_lies_beyond_the_keys_of_a_sequence(implementation, causal):
    """B01: the same where NaN stands there: the next sequence's keys and values."""
    problem = packed([(70, 3), (66, 13), (5, 40)], causal=causal)
    grad = make_tensor(problem.q.shape, torch.float32, seed=5)

    def run(*tensors):
        return Problem(*tensors, problem.options, problem.lengths).run()[0]

    with using(implementation):
        wanted = gradients(run, (problem.q, problem.k, problem.v), grad)
        problem.k[16:], problem.v[16:] = NAN, NAN
        found = gradients(run, (problem.q, problem.k, problem.v), grad)
    for result, clean, rows in zip(found, wanted, (136, 16, 16), strict=True):
        assert torch.equal(result[:rows], clean[:rows])


@EVERY_IMPLEMENTATION
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_queries, num_keys", [(70, 5), (33, 32), (20, 1)])
def test_b02_causal_rows_before_the_first_key(implementation, dtype, num_queries, num_keys):
    """B02: Dao-AILab/flash-attention#1778, MinghuasLab/flash-attention-npu#120: more queries than keys."""
    problem = Problem(*qkv(1, num_queries, num_keys, dtype=dtype), {"causal": True})
    empty = num_queries - num_keys
    with using(implementation):
        out, lse = problem.run()
    assert not out[:, :empty].any() and lse[..., :empty].isneginf().all()
    assert lse[..., empty:].isfinite().all()
    problem.check(out, lse)
    if dtype == torch.float32:
        assert_gradients(implementation, problem)


@EVERY_IMPLEMENTATION
def test_b03_two_empty_sets_merge_to_an_empty_set(implementation):
    """B03: flashinfer-ai/flashinfer#4051, #4484, vllm-project/vllm#39148, #28181: -inf - -inf is NaN."""
    out, lse = torch.full((2, 5, 3, 16), NAN), torch.full((2, 3, 5), -INF)
    full, full_lse = attention(*qkv(2, 5, 7, heads=3), return_lse=True)
    with using(implementation):
        merged, total = merge_attention(out, lse, out, lse)
        right, right_lse = merge_attention(out, lse, full, full_lse)
        left, left_lse = merge_attention(full, full_lse, out, lse)
    assert not merged.any() and total.isneginf().all()
    assert torch.equal(right, full) and torch.equal(left, full)
    assert torch.equal(right_lse, full_lse) and torch.equal(left_lse, full_lse)


@EVERY_IMPLEMENTATION
@pytest.mark.parametrize("num_keys", [1, 65, 127, 200, 513])
def test_b03_parts_of_the_keys_without_any_visible_one(implementation, num_keys):
    """B03, B04: few queries and long keys are cut into parts; some or all of these hold hidden keys only."""
    q, k, v = qkv(1, 1, num_keys)
    nobody = torch.zeros(1, 1, 1, num_keys, dtype=torch.bool)
    last = nobody.clone()
    last[..., -1] = True
    with using(implementation):
        out, lse = attention(q, k, v, mask=nobody, return_lse=True)
        one, one_lse = attention(q, k, v, mask=last, return_lse=True)
        Problem(q, k, v).check(*attention(q, k, v, return_lse=True))
    assert not out.any() and lse.isneginf().all()
    torch.testing.assert_close(one, v[:, -1:].expand(one.shape))
    torch.testing.assert_close(one_lse[0, :, 0], q[0, 0] @ k[0, -1, 0] * 0.25)


@EVERY_IMPLEMENTATION
def test_b05_operands_that_share_memory(implementation):
    """B05: local-inference-lab/vllm#468: the merge wrote an lse that other blocks still read, at head dim 192."""
    out = make_tensor((40, 3, 192), torch.float32, seed=0)
    lse = make_tensor((3, 40), torch.float32, seed=1)
    before = out.clone(), lse.clone()
    with using(implementation):
        merged, total = merge_attention(out, lse, out, lse)
        x = make_tensor((1, 20, 2, 16), torch.float32, seed=2)
        shared, apart = attention(x, x, x, causal=True), attention(x, x.clone(), x.clone(), causal=True)
    torch.testing.assert_close(merged, out)
    torch.testing.assert_close(total, lse + torch.tensor(2.0).log())
    assert torch.equal(out, before[0]) and torch.equal(lse, before[1]) and torch.equal(shared, apart)


EMPTY_AT = {
    "first": [(0, 5), (7, 0), (9, 9)],
    "middle": [(6, 4), (0, 3), (5, 0), (0, 0), (3, 8)],
    "last": [(4, 4), (3, 0), (0, 2)],
    "no keys at all": [(3, 0), (5, 0)],
    "no queries at all": [(0, 3), (0, 4)],
    "nothing": [(0, 0), (0, 0)],
}


@EVERY_IMPLEMENTATION
@pytest.mark.parametrize("pairs", EMPTY_AT.values(), ids=list(EMPTY_AT))
def test_b09_sequences_without_queries_or_keys(implementation, pairs):
    """B09: Dao-AILab/flash-attention#2562, #2568, #2421, #1713: hang, illegal access, NaN in dk and dv."""
    problem = packed(pairs, causal=True)
    with using(implementation):
        problem.check(*problem.run())
    assert_gradients(implementation, problem)


@EVERY_IMPLEMENTATION
@pytest.mark.parametrize("pairs", [[(1, 4), (0, 3), (1, 1), (1, 0)], [(0, 1), (1, 1), (0, 0)]])
def test_b10_one_query_at_most_and_rows_of_none(implementation, pairs):
    """B10: Dao-AILab/flash-attention#1537: max_seqlen 1 took the decoding path, which assumed one query for each."""
    problem = packed(pairs, causal=True)
    assert problem.lengths[2] == 1
    with using(implementation):
        problem.check(*problem.run())


@EVERY_IMPLEMENTATION
@pytest.mark.parametrize("num_keys", [32767, 32768, 32769, 131072])
def test_b11_more_keys_than_int16_counts(implementation, num_keys):
    """B11: facebookresearch/xformers#719: positions beyond 32,768 were cast to int16."""
    q, k, v = qkv(1, 1, num_keys, heads=1, head_dim=8, dtype=torch.float16)
    k[:, -1] = q[:, 0, 0] * 8  # the last key decides
    problem = Problem(q, k, v, {"causal": True, "window_size": (num_keys - 2, 0)})
    with using(implementation):
        problem.check(*problem.run())


@EVERY_IMPLEMENTATION
def test_b11_more_queries_than_int16_counts(implementation):
    q, k, v = qkv(1, 32770, 40, heads=1, head_dim=8, dtype=torch.float16)
    problem = Problem(q, k, v, {"causal": True})
    with using(implementation):
        problem.check(*problem.run())


def far(tensor):
    """[2, S, H, D] whose batches lie more than 2**31 elements apart; the values are those given."""
    rows = huge_stride_rows(tensor.reshape(2, -1), last_offset=2**31 + 1)
    return rows.unflatten(1, tensor.shape[1:])


@pytest.mark.parametrize("implementation", FUSED)
def test_b12_offsets_beyond_int32(implementation):
    """B12: triton-lang/triton#832, #1058: offsets in int32 whatever the size; each operand and the mask in turn."""
    q, k, v = qkv(2, 3, 5, dtype=torch.float16)
    mask = make_tensor((2, 2, 3, 5), torch.float16, seed=3)
    with using(implementation):
        wanted = attention(q, k, v, mask=mask)
        assert torch.equal(attention(far(q), k, v, mask=mask), wanted)
        assert torch.equal(attention(q, far(k), v, mask=mask), wanted)
        assert torch.equal(attention(q, k, far(v), mask=mask), wanted)
        assert torch.equal(attention(q, k, v, mask=far(mask)), wanted)


@pytest.mark.parametrize("implementation", FUSED)
def test_b12_packed_offsets_beyond_int32(implementation):
    """B12: tokens of one packed sequence, more than 2**31 elements apart."""
    q, k, v = (t[0] for t in qkv(1, 2, 2, dtype=torch.float16))
    lengths = packed_lengths([(2, 2)])
    with using(implementation):
        wanted = attention_varlen(q, k, v, *lengths)
        spread = [far(t[:, None])[:, 0] for t in (q, k, v)]
        assert torch.equal(attention_varlen(*spread, *lengths), wanted)


@pytest.mark.parametrize("implementation", FUSED)
def test_b17_gradients_with_huge_strides(implementation):
    """B17: Dao-AILab/flash-attention#1500, #2260, #2611: overflow before the cast; dout was not contiguous."""
    q, k, v = qkv(2, 3, 5, dtype=torch.float16)
    grad = make_tensor((2, 3, 2, 16), torch.float16, seed=4)

    def run(*tensors):
        return attention(*tensors, causal=True)

    with using(implementation):
        wanted = gradients(run, (q, k, v), grad)
        found = gradients(run, (q, k, v), far(grad))
        leaves = [far(t).requires_grad_() for t in (q, k, v)]
        spread = torch.autograd.grad(run(*leaves), leaves, far(grad))
        expanded = gradients(run, (q, k, v), grad[:, :1, :1].expand(grad.shape))
        plain = gradients(run, (q, k, v), grad[:, :1, :1].expand(grad.shape).contiguous())
    for a, b, c in zip(found, spread, wanted, strict=True):
        assert torch.equal(a, c) and torch.equal(b, c)
    assert all(torch.equal(a, b) for a, b in zip(expanded, plain, strict=True))


@pytest.mark.parametrize("implementation", FUSED)
def test_b24_slices_of_a_packed_projection(implementation):
    """B24: ModelTC/LightLLM#1467, vllm-project/vllm#28103, #36551: q, k, v are views of one buffer, heads outside."""
    together = make_tensor((2, 20, 4 + 2 + 2, 24), torch.float32, seed=0)
    views = together.split((4, 2, 2), 2)
    outside = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in views]
    reversed_batch = [t.flip(0).contiguous()[[1, 0]] for t in views]
    short = [torch.cat((t, t), 3)[..., ::1].narrow(3, 24, 24) for t in views]
    mask = make_tensor((1, 1, 20, 40), torch.float32, seed=1)
    with using(implementation):
        wanted = attention(*(t.contiguous() for t in views), mask=mask[..., ::2].contiguous())
        for tensors in (views, outside, reversed_batch, short):
            assert torch.equal(attention(*tensors, mask=mask[..., ::2]), wanted)


@pytest.mark.parametrize("implementation", FUSED)
@pytest.mark.parametrize("head_dim", [8, 16, 40, 72, 80, 96, 104, 128, 192, 256, 512])
def test_b32_head_dims_between_powers_of_two(implementation, head_dim):
    """B32: triton-lang/triton#621, Dao-AILab/flash-attention#2896, turboderp-org/exllamav3#316: only 64 of them were
    used, stale accumulators at 72 and 104, another result at each run."""
    problem = Problem(*qkv(1, 17, 33, head_dim=head_dim), {"causal": True})
    with using(implementation):
        runs = [problem.run() for _ in range(4)]
    problem.check(*runs[0])
    assert all(torch.equal(run[0], runs[0][0]) and torch.equal(run[1], runs[0][1]) for run in runs)


@EVERY_IMPLEMENTATION
@pytest.mark.parametrize("num_keys", [1, 7, 17, 33, 65, 100])
def test_b33_padded_keys_add_nothing_to_the_sum(implementation, num_keys):
    """B33: verl-project/verl#5349: exp(0) of the padding is seen only where all real scores lie far below zero."""
    q, k, v = qkv(1, 3, num_keys)
    q, k = q.abs() + 1, -k.abs() - 1
    problem = Problem(q, k, v, {"softmax_scale": 1.0})
    with using(implementation):
        out, lse = problem.run()
    assert lse.max() < -16
    problem.check(out, lse)


@EVERY_IMPLEMENTATION
@pytest.mark.parametrize("size", [1, 2, 3, 31, 32, 33, 63, 64, 65])
@pytest.mark.parametrize("causal", [False, True])
def test_b34_windows_of_every_size(implementation, size, causal):
    """B34: vllm-project/vllm#3385, huggingface/transformers#29623, #39408, #40163, ModelTC/LightLLM#1311, #1312,
    zml/zml#763: W keys are W keys; the prefill and the decoding of the same position agree."""
    problem = Problem(*qkv(1, 66, 66), {"window_size": (size - 1, 0), "causal": causal})
    with using(implementation):
        out, lse = problem.run()
        last, _ = attention(problem.q[:, -1:], problem.k[:, -size:], problem.v[:, -size:], return_lse=True)
    problem.check(out, lse)
    assert_accurate(out[:, -1:], last.double())
