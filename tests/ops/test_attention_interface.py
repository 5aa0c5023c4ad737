"""The attentions: what they refuse, and what torch asks of a registered operator."""

import pytest
import torch

from fusedops import attention, attention_varlen, merge_attention
from fusedops._core import env
from fusedops._core.register import operators
from fusedops.testing import make_tensor
from tests.ops.attention_problems import ALL_OPTIONS, Problem, packed_lengths, qkv
from tests.ops.common import DTYPES, assert_compiles, assert_fake_like_real, assert_rejected, opcheck

# ---- rejects

Q, K, V = torch.ones(2, 3, 4, 8), torch.ones(2, 5, 2, 8), torch.ones(2, 5, 2, 16)
Q8, K8, V8 = (t.to(torch.float8_e4m3fn) for t in (Q, K, V))
TQ, TK, TV = torch.ones(6, 4, 8), torch.ones(10, 2, 8), torch.ones(10, 2, 16)
CQ, CK = torch.tensor([0, 3, 6], dtype=torch.int32), torch.tensor([0, 5, 10], dtype=torch.int32)
LENGTHS = CQ, CK, 3, 5
OUT, LSE = torch.ones(2, 3, 4, 8), torch.ones(2, 4, 3)
WANTS_GRAD = torch.ones(4, requires_grad=True)
REJECTS = [
    (lambda: attention(None, K, V), TypeError, "attention: q must be a torch.Tensor, got NoneType"),
    (lambda: attention(Q[0], K, V), ValueError, r"q must have shape \[B, Sq, H, D\], got \[3, 4, 8\]"),
    (lambda: attention(Q, K[:1], V), ValueError, r"k must have shape .* with B=2, D=8, got \[1, 5, 2, 8\]"),
    (lambda: attention(Q, K, V[:, :4]), ValueError, r"v must have shape .* got \[2, 4, 2, 16\]"),
    (lambda: attention(Q, K, V[:, :, :1]), ValueError, r"v must have shape .* with .*Hk=2.*got \[2, 5, 1, 16\]"),
    (lambda: attention(Q, K[..., :4], V), ValueError, r"k must have shape .* got \[2, 5, 2, 4\]"),
    (lambda: attention(Q, *[t[:, :, :1].expand(2, 5, 3, 8) for t in (K, K)]), ValueError, "divides H=4, got 3"),
    (lambda: attention(Q, K[:, :, :0], V[:, :, :0]), ValueError, "divides H=4, got 0"),
    (lambda: attention(Q.to("meta"), K, V), ValueError, "attention: k must be on meta, got cpu"),
    (lambda: attention(Q.double(), K, V), TypeError, "q must be float16, bfloat16, float32 or float8_e4m3fn, got"),
    (lambda: attention(Q, K.half(), V), TypeError, "k must be float32, got float16"),
    (lambda: attention(Q8, K8, V), TypeError, "v must be float8_e4m3fn, got float32"),
    (lambda: attention(Q.transpose(2, 3).contiguous().transpose(2, 3), K, V), ValueError, "q must have a contiguous"),
    (lambda: attention(*qkv(1, 3, 3, head_dim=12)), NotImplementedError, "D must be a multiple of 8 up to 256, or"),
    (lambda: attention(*qkv(1, 3, 3, head_dim=264)), NotImplementedError, "MAX_D = 512, got 264"),
    (lambda: attention(*qkv(1, 3, 3, head_dim=520)), NotImplementedError, "D must be .* got 520"),
    (lambda: attention(*qkv(1, 3, 3, value_dim=20)), NotImplementedError, "Dv must be .* got 20"),
    (lambda: attention(Q[..., :0], K[..., :0], V), NotImplementedError, "D must be .* got 0"),
    (lambda: attention(Q, K, V, softmax_scale="1"), TypeError, "softmax_scale must be a number, got str"),
    (lambda: attention(Q, K, V, softmax_scale=float("nan")), ValueError, "softmax_scale must be finite, got nan"),
    (lambda: attention(Q, K, V, softcap=-1.0), ValueError, r"softcap must be finite and at least 0 .* got -1"),
    (lambda: attention(Q, K, V, softcap=None), TypeError, "softcap must be a number, got NoneType"),
    (lambda: attention(Q, K, V, causal=1), TypeError, "causal must be a bool, got int"),
    (lambda: attention(Q, K, V, window_size=3), TypeError, r"window_size must be a pair \(left, right\), got 3"),
    (lambda: attention(Q, K, V, window_size=(1, 2, 3)), TypeError, r"window_size must be a pair .* got \(1, 2, 3\)"),
    (lambda: attention(Q, K, V, window_size=(-2, 0)), ValueError, r"window_size must hold -1 \(no bound\) .* got -2"),
    (lambda: attention(Q, K, V, window_size=(1.5, 0)), TypeError, "window_size must hold integers, got float"),
    (lambda: attention(Q, K, V, sinks=torch.ones(2)), ValueError, r"sinks must have shape \[H\] = \[4\], got \[2\]"),
    (lambda: attention(Q, K, V, sinks=torch.ones(4).half()), TypeError, "sinks must be float32, got float16"),
    (lambda: attention(Q, K, V, sinks=[1.0] * 4), TypeError, "sinks must be a torch.Tensor, got list"),
    (lambda: attention(Q, K, V, sinks=torch.ones(4, device="meta")), ValueError, "sinks must be on cpu, got meta"),
    (lambda: attention(Q, K, V, alibi_slopes=torch.ones(3, 4)), ValueError,
     r"alibi_slopes must have shape \[H\] or \[B, H\] = \[4\] or \[2, 4\], got \[3, 4\]"),
    (lambda: attention(Q, K, V, alibi_slopes=torch.ones(4).half()), TypeError, "alibi_slopes must be float32, got"),
    (lambda: attention(Q, K, V, alibi_slopes=WANTS_GRAD), NotImplementedError, "alibi_slopes must not require a grad"),
    (lambda: attention(Q, K, V, mask=[True]), TypeError, "mask must be a torch.Tensor, got list"),
    (lambda: attention(Q, K, V, mask=torch.ones(3, 4)), ValueError,
     r"mask must broadcast to \[B, H, Sq, Sk\] = \[2, 4, 3, 5\], got \[1, 1, 3, 4\]"),
    (lambda: attention(Q, K, V, mask=torch.ones(1, 2, 1, 3, 5)), ValueError, r"mask must broadcast .* got \[1, 2, 1"),
    (lambda: attention(Q, K, V, mask=torch.ones(3, 5).int()), TypeError, "mask must be bool or float32, got int32"),
    (lambda: attention(Q, K, V, mask=torch.ones(3, 5, device="meta")), ValueError, "mask must be on cpu, got meta"),
    (lambda: attention(Q, K, V, mask=torch.ones(3, 5, requires_grad=True)), NotImplementedError, "mask must not"),
    (lambda: attention(Q, K, V, q_scale=torch.ones(1, 4)), ValueError, "q_scale must be None unless q is float8"),
    (lambda: attention(Q8, K8, V8, k_scale=torch.ones(1, 4)), ValueError,
     r"k_scale must have shape \[B or 1, Hk\] = \[2, 2\] or \[1, 2\], got \[1, 4\]"),
    (lambda: attention(Q8, K8, V8, v_scale=torch.ones(2, 2).half()), TypeError, "v_scale must be float32, got float16"),
    (lambda: attention(Q8.requires_grad_(), K8, V8), NotImplementedError, "q must not require a gradient in float8"),
    (lambda: attention_varlen(TQ, TK, TV, CQ, CK[:2], 3, 5), ValueError,
     r"cu_seqlens_k must have shape \[B\+1\] with B\+1=3, got \[2\]"),
    (lambda: attention_varlen(TQ, TK, TV, CQ[:0], CK[:0], 3, 5), ValueError, "cu_seqlens_q must have at least one"),
    (lambda: attention_varlen(TQ, TK, TV, CQ.long(), CK, 3, 5), TypeError, "cu_seqlens_q must be int32, got int64"),
    (lambda: attention_varlen(TQ, TK, TV, CQ, CK.to("meta"), 3, 5), ValueError, "cu_seqlens_k must be on cpu, got"),
    (lambda: attention_varlen(TQ, TK, TV, CQ, CK, 3.0, 5), TypeError, "max_seqlen_q must be an integer, got float"),
    (lambda: attention_varlen(TQ, TK, TV, CQ, CK, 3, -5), ValueError, "max_seqlen_k must be at least 0, got -5"),
    (lambda: attention_varlen(TQ, TK[:, :1], TV, *LENGTHS), ValueError, r"attention_varlen: v must have shape .*Hk=1"),
    (lambda: attention_varlen(TQ, TK, TV, *LENGTHS, alibi_slopes=torch.ones(3, 4)), ValueError, r"got \[3, 4\]"),
    (lambda: attention_varlen(TQ, TK, TV, *LENGTHS, mask=None), TypeError, "mask"),
    (lambda: merge_attention(OUT, LSE, OUT, None), TypeError, "lse_b must be a torch.Tensor, got None"),
    (lambda: merge_attention(OUT, LSE.mT, OUT, LSE), ValueError, r"lse_a must have shape \[..., H, S\] .* got"),
    (lambda: merge_attention(OUT, LSE, OUT[:1], LSE), ValueError, r"out_b must have shape .* got \[1, 3, 4, 8\]"),
    (lambda: merge_attention(OUT, LSE, OUT.half(), LSE), TypeError, "out_b must be float32, got float16"),
    (lambda: merge_attention(OUT, LSE.half(), OUT, LSE), TypeError, "lse_a must be float32, got float16"),
    (lambda: merge_attention(OUT.double(), LSE, OUT, LSE), TypeError, "out_a must be float16, bfloat16 or"),
]  # fmt: skip


@pytest.mark.parametrize("call, error, message", REJECTS)
def test_rejects(call, error, message):
    assert_rejected(call, error, message)


@pytest.mark.parametrize(
    "starts_q, starts_k, longest, message",
    [
        ([0, 4, 3], [0, 5, 10], 5, r"cu_seqlens_q must rise from 0 to 6, got \[0, 4, 3\]"),
        ([1, 3, 6], [0, 5, 10], 5, "cu_seqlens_q must rise from 0 to 6"),
        ([0, 3, 6], [0, 5, 11], 6, "cu_seqlens_k must rise from 0 to 10"),
        ([0, 3, 6], [0, 7, 10], 5, "max_seqlen_k must be at least the longest length 7, got 5"),
    ],
)
def test_level_2_reads_the_lengths(starts_q, starts_k, longest, message):
    starts = [torch.tensor(starts, dtype=torch.int32) for starts in (starts_q, starts_k)]
    with env.override("FUSEDOPS_VALIDATE", "2"):
        for _ in range(2):  # also where a call of the same signature has passed
            with pytest.raises(ValueError, match=message):
                attention_varlen(TQ, TK, TV, *starts, 4, longest)
            attention_varlen(TQ, TK, TV, CQ, CK, 4, max(longest, 5))


def test_a_refused_call_is_refused_again_after_a_good_one():
    """The memory of checked signatures tells a bad option from a good one."""
    for _ in range(2):
        attention(Q, K, V, causal=True)
        with pytest.raises(ValueError, match="softcap"):
            attention(Q, K, V, causal=True, softcap=-1.0)
        with pytest.raises(NotImplementedError, match="alibi_slopes must not require"):
            attention(Q, K, V, alibi_slopes=WANTS_GRAD)
        with torch.no_grad():
            attention(Q, K, V, alibi_slopes=WANTS_GRAD)


# ---- torch


def arguments(dtype=torch.float32, name="plain", **sizes):
    """Positional arguments of the registered operator, operands laid out as a model has them: heads outside."""
    q, k, v = qkv(2, 5, 7, dtype=dtype, **sizes)
    q, k, v = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v))
    return Problem(q, k, v, ALL_OPTIONS[name]).positional()


def packed_arguments(dtype=torch.float32, name="plain"):
    q, k, v = (t[0] for t in qkv(1, 8, 9, dtype=dtype))
    return Problem(q, k, v, ALL_OPTIONS[name], packed_lengths([(5, 4), (3, 5)])).positional()


def backward_arguments(args, with_lse=True):
    """Those of the backward operator that belongs to the forward one's."""
    name = "attention" if args[0].dim() == 4 else "attention_varlen"
    out, lse = operators()[name](*args)
    grad_lse = make_tensor(lse.shape, torch.float32, seed=1) if with_lse else None
    return make_tensor(out.shape, out.dtype, seed=0), grad_lse, *args[:3], out, lse, *args[3:]


@pytest.mark.parametrize("name", ["plain", "sliding", "alibi"])
@pytest.mark.parametrize("grad", [False, True])
def test_opcheck(name, grad):
    for operator, args in (("attention", arguments(name=name)), ("attention_varlen", packed_arguments(name=name))):
        opcheck(f"{operator}_backward", *backward_arguments(args))
        opcheck(operator, *(t.requires_grad_(grad) for t in args[:3]), *args[3:])
    out, lse = attention(Q, K, V, return_lse=True)
    opcheck("merge_attention", out, lse, out * 2, lse + 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "padded", "sliced", "expanded"])
def test_fake_strides_are_the_real_ones(dtype, layout):
    """B56: an output's strides under tracing are those of the real call (pytorch/pytorch#182328)."""
    sizes = (5, 4), (7, 2), (7, 2)
    q, k, v = (make_tensor((2, n, heads, 16), dtype, seed=n, layout=layout) for n, heads in sizes)
    args = Problem(q, k, v, {"causal": True, "sinks": torch.ones(4, dtype=dtype)}).positional()
    assert_fake_like_real("attention", *args)
    assert_fake_like_real("attention_backward", *backward_arguments(args))
    flat = Problem(q[0], k[0], v[0], {}, packed_lengths([(2, 3), (3, 4)])).positional()
    assert_fake_like_real("attention_varlen", *flat)
    assert_fake_like_real("attention_varlen_backward", *backward_arguments(flat, with_lse=False))
    lse = make_tensor((2, 4, 5), torch.float32, seed=0, layout=layout)
    assert_fake_like_real("merge_attention", q, lse, q, lse)


def test_fake_of_fp8():
    args = Problem(Q8.detach(), K8, V8, {"q_scale": torch.ones(1, 4)}).positional()
    fakes = torch.ops.fusedops.attention.default(*(a.to("meta") if isinstance(a, torch.Tensor) else a for a in args))
    assert fakes[0].dtype == torch.bfloat16 and fakes[1].dtype == torch.float32


@pytest.mark.parametrize("name", list(ALL_OPTIONS))
def test_torch_compile(name):
    def function(q, k, v):
        out, lse = attention(q * 2, k, v, return_lse=True, **ALL_OPTIONS[name])
        return merge_attention(out, lse, out + 1, lse)

    assert_compiles(function, arguments()[:3], qkv(1, 9, 12, head_dim=24), qkv(3, 4, 4, head_dim=32))


def test_torch_compile_of_masks_lengths_and_gradients():
    def masked(q, k, v, mask):
        return attention(q, k, v, mask=mask, window_size=(q.shape[1], 0))

    q, k, v = qkv(2, 5, 7)
    assert_compiles(masked, (q, k, v, torch.ones(2, 1, 1, 7) > 0), (*qkv(2, 6, 9), torch.ones(2, 1, 1, 9) > 0))

    def packed(q, k, v, starts_q, starts_k, longest):
        return attention_varlen(q, k, v, starts_q, starts_k, longest, longest, causal=True)

    flat = [t[0] for t in qkv(1, 8, 9)]
    assert_compiles(packed, (*flat, *packed_lengths([(5, 4), (3, 5)])[:2], 5))
    leaves = [t.requires_grad_() for t in (q, k, v)]
    compiled = torch.compile(
        lambda q, k, v: attention(q, k, v, causal=True, return_lse=True), fullgraph=True, dynamic=True
    )
    grads = [make_tensor((2, 5, 2, 16), torch.float32, seed=1), make_tensor((2, 2, 5), torch.float32, seed=2)]
    found = torch.autograd.grad(compiled(*leaves), leaves, grads)
    wanted = torch.autograd.grad(attention(*leaves, causal=True, return_lse=True), leaves, grads)
    torch.testing.assert_close(found, wanted)
    (alone,) = torch.autograd.grad(compiled(*leaves)[1], leaves[0], grads[1])
    (expected,) = torch.autograd.grad(attention(*leaves, causal=True, return_lse=True)[1], leaves[0], grads[1])
    torch.testing.assert_close(alone, expected)


@pytest.mark.parametrize("num_queries, num_keys", [(5, 5), (3, 8), (8, 3), (1, 6), (6, 1), (0, 4), (4, 0)])
def test_cost_counts_the_pairs_that_are_seen(num_queries, num_keys):
    """Operations by brute force; bytes are those of all operands and results, once."""
    q, k, v = qkv(2, num_queries, num_keys, heads=4, kv_heads=2, head_dim=8, value_dim=16)
    for causal in (False, True):
        for window in ((-1, -1), (0, 0), (2, 1), (-1, 0), (1, -1), (9, 9)):
            args = Problem(q, k, v, {"causal": causal, "window_size": window}).positional()
            left, right = window[0], 0 if causal else window[1]
            distances = [j - i - num_keys + num_queries for i in range(num_queries) for j in range(num_keys)]
            seen = [d for d in distances if (left < 0 or d >= -left) and (right < 0 or d <= right)]
            moved, operations = operators()["attention"].cost(*args)
            assert operations == 2 * 2 * 4 * len(seen) * (8 + 16)
            assert moved == 4 * (q.numel() + k.numel() + v.numel() + 2 * 4 * num_queries * (16 + 1))


def test_no_second_derivative_and_none_of_the_merge():
    q, k, v = (t.requires_grad_() for t in qkv(1, 3, 3))
    out, lse = attention(q, k, v, return_lse=True)
    (dq,) = torch.autograd.grad(out.sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="attention_backward: the result must not be differentiated"):
        dq.sum().backward()
    merged, _ = merge_attention(*attention(q, k, v, return_lse=True), out.detach(), lse.detach())
    with pytest.raises(NotImplementedError, match="merge_attention: the result must not be differentiated"):
        merged.sum().backward()
