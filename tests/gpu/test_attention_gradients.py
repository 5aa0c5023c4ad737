"""Attention's gradients on a GPU, against float64 on the device, and both passes under a graph and on a side stream."""

import functools

import pytest
import torch

from fusedops import attention, attention_varlen
from fusedops._core.explain import operator_call
from fusedops.ops.attention import reference
from fusedops.testing import assert_accurate
from tests.gpu.common import needs_gpu, randn, sized, wide
from tests.gpu.test_attention import BF16, FP16, FP32, OPTIONS, SK, SQ, packed, qkv, with_tensors
from tests.ops.common import using

pytestmark = pytest.mark.gpu

PLACE_OF_SINKS = {"attention": 3, "attention_varlen": 7}  # among the registered operator's arguments


def gradients(function, args, options, grad):
    """(dq, dk, dv), and the gradient of sinks where there are any."""
    wanted = [t.detach().requires_grad_() for t in args[:3]]
    leaves, options = tuple(wanted), dict(options)
    if "sinks" in options:
        options["sinks"] = options["sinks"].detach().requires_grad_()
        wanted.append(options["sinks"])
    return torch.autograd.grad(function(*leaves, *args[3:], **options), wanted, grad)


def true_gradients(function, args, options, grad):
    """The same in float64, through the reference."""
    operator, values = operator_call(function, *args, **options)
    values = [wide(value) for value in values]
    places = [0, 1, 2] + ([PLACE_OF_SINKS[operator.name]] if "sinks" in options else [])
    wanted = [values[place].requires_grad_() for place in places]
    out, _ = getattr(reference, operator.name)(*values)
    return torch.autograd.grad(out, wanted, grad.double())


def check_gradients(function, args, options):
    """In float32, where a fault stands far above a correct kernel; two calls agree bit by bit."""
    grad = randn(*args[0].shape[:-1], args[2].shape[-1], dtype=FP32, seed=50)
    with using("triton"):
        found = gradients(function, args, options, grad)
        again = gradients(function, args, options, grad)
    for name, one, other, true in zip(
        ("dq", "dk", "dv", "dsinks"), found, again, true_gradients(function, args, options, grad), strict=False
    ):
        assert_accurate(one, true, name=name, zeros=False)
        assert torch.equal(one, other)


GRADIENT_OPTIONS = sized(
    [name for name in OPTIONS if name not in ("negative scale", "window of one")],
    ["causal window", "sinks", "bool mask of each head", "everything"],
)


@pytest.mark.parametrize("name", GRADIENT_OPTIONS)
def test_gradients(name):
    check_gradients(attention, qkv(2, (SQ, SK), (8, 2), (64, 64), FP32), with_tensors(OPTIONS[name], name, FP32))


@pytest.mark.parametrize("options", [{"causal": True}, {"sinks": (8,), "window_size": (31, 5)}])
def test_gradients_of_packed_sequences(options):
    check_gradients(attention_varlen, packed(dim=64, dtype=FP32), with_tensors(options, "varlen", FP32))


def modelled_gradients(q, k, v, grad):
    """Causal gradients as exact as a kernel may be that rounds weights and products to the dtype before they meet."""
    dtype, group = q.dtype, q.shape[2] // k.shape[2]

    def rounded(x):
        return x.to(dtype).double()

    queries, keys, values, grads = (t.double().transpose(1, 2) for t in (q, k, v, grad))
    keys, values = (t.repeat_interleave(group, 1) for t in (keys, values))
    scale = q.shape[-1] ** -0.5
    scores = queries @ keys.mT * scale
    hidden = torch.ones_like(scores[0, 0], dtype=torch.bool).triu(1 + k.shape[1] - q.shape[1])
    weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
    delta = (rounded(rounded(weights) @ values) * grads).sum(-1, keepdim=True)
    of_scores = rounded(weights * (grads @ values.mT - delta))
    dq, dk, dv = of_scores @ keys * scale, of_scores.mT @ queries * scale, rounded(weights).mT @ grads
    dk, dv = (t.unflatten(1, (-1, group)).sum(2) for t in (dk, dv))
    return tuple(rounded(t).transpose(1, 2) for t in (dq, dk, dv))


@pytest.mark.parametrize("dim", sized([64, 80, 128, 256], [64, 80]))
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_gradients_in_16_bits(dtype, dim):
    """No further from the truth than twice what the roundings that a kernel may make cost, and one more rounding."""
    args = qkv(2, sized((200, 257), (3, 17)), (4, 2), (dim, dim), dtype)
    grad = randn(*args[0].shape, dtype=dtype, seed=50)
    with using("triton"):
        found = gradients(attention, args, {"causal": True}, grad)
        again = gradients(attention, args, {"causal": True}, grad)
    true = true_gradients(attention, args, {"causal": True}, grad)
    for name, one, other, exact, model in zip(
        ("dq", "dk", "dv"), found, again, true, modelled_gradients(*args, grad), strict=True
    ):
        one_rounding = torch.finfo(dtype).eps * exact.abs().max()
        assert (one - exact).abs().max() <= 2 * (model - exact).abs().max() + one_rounding, name
        assert (one - exact).norm() <= 2 * (model - exact).norm(), name
        assert torch.equal(one, other), name


# ---- graphs and streams


def captured(function, *args):
    """A CUDA graph of one call, and its outputs."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function(*args)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = function(*args)
    return graph, outs


def both_passes(q, k, v):
    with torch.enable_grad():
        return gradients(attention, (q, k, v), {"causal": True}, torch.ones_like(q))


@needs_gpu
@pytest.mark.parametrize("function", [both_passes, functools.partial(attention, return_lse=True)])
@pytest.mark.parametrize("lengths", [(1, 8192), (300, 300)])
def test_graph_replay_equals_eager(function, lengths):
    args = qkv(1, lengths, (8, 2), (128, 128))
    graph, outs = captured(function, *args)
    for old, new in zip(args, qkv(1, lengths, (8, 2), (128, 128), seed=7), strict=True):
        old.copy_(new)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(outs, function(*args), strict=True))


@needs_gpu
@pytest.mark.parametrize("lengths", [(1, 8192), (300, 300)])
def test_both_passes_run_on_the_current_stream(lengths):
    """B40, B41: a delayed producer on a side stream."""
    args = qkv(1, lengths, (8, 2), (128, 128))
    expected = both_passes(*args)
    late = [torch.full_like(t, float("nan")) for t in args]
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(50_000_000)
        for target, source in zip(late, args, strict=True):
            target.copy_(source)
        found = both_passes(*late)
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
