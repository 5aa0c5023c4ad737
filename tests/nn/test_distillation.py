"""kl_distillation_loss: the plain formula in float64, its gradients, its memory, and what is refused."""

import functools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as plain
from hypothesis import given
from hypothesis import strategies as st

import fusedops.nn.functional as F
from fusedops import counters
from fusedops.nn import distillation
from fusedops.nn.distillation import kl_distillation_loss
from fusedops.testing import assert_faults_rejected, make_tensor, strategies
from fusedops.testing.faults import Fault
from tests.ops.common import DTYPES, assert_compiles, assert_rejected, gradients

ROOT = Path(__file__).resolve().parents[2]
MIB = 1 << 20


def operands(shape=(6,), V=50, H=16, Ht=24, dtype=torch.float32, seed=0, layout="contiguous"):
    """hidden, weight, teacher_hidden, teacher_weight, bias, teacher_bias; logits are of size 1."""
    hidden = make_tensor((*shape, H), dtype, seed=seed, layout=layout)
    teacher = make_tensor((*shape, Ht), dtype, seed=seed + 1)
    weight = make_tensor((V, H), dtype, seed=seed + 2, magnitude=H**-0.5, layout=layout)
    teacher_weight = make_tensor((V, Ht), dtype, seed=seed + 3, magnitude=Ht**-0.5)
    bias, teacher_bias = (make_tensor((V,), dtype, seed=seed + 4 + i, magnitude=0.5) for i in range(2))
    return hidden, weight, teacher, teacher_weight, bias, teacher_bias


def loss_of(hidden, weight, teacher_hidden, teacher_weight, bias=None, teacher_bias=None, **options):
    return kl_distillation_loss(
        hidden, weight, teacher_hidden, teacher_weight, bias=bias, teacher_bias=teacher_bias, **options
    )


def formula(hidden, weight, teacher_hidden, teacher_weight, bias=None, teacher_bias=None, temperature=1.0, keep=None):
    """The loss of each token by torch's own functions, from logits that are stored."""
    logits = plain.linear(hidden, weight, bias) / temperature
    teacher = plain.linear(teacher_hidden, teacher_weight, teacher_bias) / temperature
    losses = plain.kl_div(logits.log_softmax(-1), teacher.softmax(-1), reduction="none").sum(-1)
    return losses if keep is None else torch.where(keep, losses, 0)


def lost_by_sums(wide, temperature):
    """What a loss may be off by: exponents are sums of H float32 products, and differ by some of the largest's size."""
    largest = max((one.abs().max() for one in (wide[0] @ wide[1].T, wide[2] @ wide[3].T) if one.numel()), default=0.0)
    terms = max(wide[0].shape[-1], wide[2].shape[-1])
    return torch.finfo(torch.float32).eps * (4 + terms**0.5) * float(1 + largest / temperature)


def assert_within(out, truth, lost):
    """`out` is `truth` but for an absolute error and one rounding to its dtype."""
    allowed = lost + torch.finfo(out.dtype).eps * truth.abs() + torch.finfo(out.dtype).tiny
    distance = (out.double() - truth).abs()
    assert bool((distance <= allowed).all()), f"off by up to {(distance / allowed).max().item():.3g} times the most"


# ---- accuracy


@given(
    shape=st.sampled_from([(), (1,), (7,), (2, 5), (3, 1, 4), (0,), (2, 0)]), V=st.integers(1, 200),
    H=st.integers(1, 70), dtype=strategies.dtypes(), temperature=st.sampled_from([1, 0.5, 3.0]),
    biased=st.booleans(), parts=st.sampled_from([None, 2, 3, 7, 200]), seed=strategies.seeds(),
)  # fmt: skip
def test_losses_and_gradients_are_those_of_the_formula(shape, V, H, dtype, temperature, biased, parts, seed):
    """16-bit gradients are those of the float32 formula, rounded once."""
    chunk = parts and -(-V // parts)
    given_ = operands(shape, V, H, dtype=dtype, seed=seed)[: 6 if biased else 4]
    wide = [tensor.double() for tensor in given_]
    truth = formula(*wide, temperature=temperature)
    losses = loss_of(*given_, temperature=temperature, chunk=chunk, reduction="none")
    assert losses.dtype == torch.float32 and losses.shape == shape
    lost = lost_by_sums(wide, temperature)
    assert_within(losses, truth, lost)
    grad = make_tensor(shape, torch.float32, seed=seed + 9)
    trained = (0, 1, 4) if biased else (0, 1)

    def gradients_of(function, tensors, grad, **options):
        def call(*leaves):
            whole = list(tensors)
            for i, leaf in zip(trained, leaves, strict=True):
                whole[i] = leaf
            return function(*whole, temperature=temperature, **options)

        return gradients(call, [tensors[i] for i in trained], grad)

    found = gradients_of(loss_of, given_, grad, reduction="none", chunk=chunk)
    wanted = gradients_of(formula, wide, grad.double())
    sent = lost * grad.abs().max() / temperature if grad.numel() else 0.0  # p - q is as exact as its exponents
    factors = wide[1].abs().sum(0).max(), wide[0].abs().sum(), math.prod(shape)
    for out, right, of, factor in zip(found, wanted, (given_[i] for i in trained), factors, strict=False):
        assert out.dtype == of.dtype and out.shape == of.shape
        assert_within(out, right, sent * factor)


def test_gradcheck():
    tensors = [tensor.double() for tensor in operands((2, 3), 11, 4, 5)]
    labels = torch.tensor([[0, -100, 5], [-100, 2, 3]])
    leaves = [tensors[i].requires_grad_() for i in (0, 1, 4)]
    for reduction in ("batchmean", "mean", "sum", "none"):

        def call(hidden, weight, bias, reduction=reduction):
            return loss_of(
                hidden, weight, *tensors[2:4], bias, tensors[5], labels=labels, chunk=4, temperature=1.5,
                reduction=reduction,
            )  # fmt: skip

        assert torch.autograd.gradcheck(call, leaves)
    assert torch.autograd.gradcheck(
        lambda logits: kl_distillation_loss(logits, None, tensors[2] @ tensors[3].T, None, chunk=3),
        make_tensor((2, 3, 11), torch.float64, seed=3).requires_grad_(),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reductions(dtype):
    tensors = operands((4, 3), 30, dtype=dtype)
    losses = loss_of(*tensors, reduction="none", chunk=7)
    assert torch.equal(loss_of(*tensors, reduction="sum", chunk=7), losses.sum())
    assert torch.equal(loss_of(*tensors, chunk=7), losses.sum() / 12)
    assert torch.equal(loss_of(*tensors, chunk=7, reduction="mean"), losses.sum() / 12)
    usual = plain.kl_div(
        plain.linear(tensors[0].float(), tensors[1].float(), tensors[4].float()).log_softmax(-1).flatten(0, 1),
        plain.linear(tensors[2].float(), tensors[3].float(), tensors[5].float()).softmax(-1).flatten(0, 1),
        reduction="batchmean",
    )  # fmt: skip
    torch.testing.assert_close(loss_of(*tensors), usual)


# ---- properties


def test_equal_models_lose_exactly_nothing():
    hidden, weight = operands(V=300)[:2]
    for chunk in (1, 7, 300):
        losses = kl_distillation_loss(hidden, weight, hidden, weight, reduction="none", chunk=chunk)
        assert torch.equal(losses, torch.zeros(6))
        call = functools.partial(loss_of, teacher_hidden=hidden, teacher_weight=weight, chunk=chunk)
        assert not any(one.any() for one in gradients(call, (hidden, weight), None))


def test_it_is_of_the_teacher_from_the_student():
    """Not the other way round: of p = (1, 0) and q = (1/2, 1/2) it is log 2, and infinite the other way."""
    sure, even = torch.tensor([[0.0, -torch.inf]]), torch.tensor([[0.0, 0.0]])
    for chunk in (1, 2):
        assert kl_distillation_loss(even, None, sure, None, chunk=chunk).item() == pytest.approx(0.6931472)
        assert kl_distillation_loss(sure, None, even, None, chunk=chunk).item() == torch.inf
        assert kl_distillation_loss(sure, None, sure, None, chunk=chunk).item() == 0


def test_large_logits_do_not_overflow_and_a_common_shift_is_nothing():
    logits, teacher = (make_tensor((5, 64), torch.float32, seed=seed, magnitude=4.0).round() for seed in (0, 1))
    first = kl_distillation_loss(logits, None, teacher, None, reduction="none", chunk=10)
    moved = kl_distillation_loss(logits + 4096, None, teacher - 2048, None, reduction="none", chunk=10)
    assert torch.equal(first, moved) and bool((first > 0).all())
    up, down = torch.arange(64.0)[None] * 1e4, torch.arange(64.0)[None] * -1e4  # each part beyond the one before
    assert kl_distillation_loss(up, None, down, None, chunk=8).item() == 63e4
    assert kl_distillation_loss(down, None, up, None, chunk=8).item() == 63e4


def test_logits_are_taken_as_they_are():
    tensors = operands((2, 3), 40)[:4]
    logits, teacher = tensors[0] @ tensors[1].T, tensors[2] @ tensors[3].T
    before = logits.clone(), teacher.clone()
    wanted = loss_of(*tensors, reduction="none", chunk=9, temperature=2.0)
    for given_ in ((logits, None, teacher, None), (logits, None, *tensors[2:]), (*tensors[:2], teacher, None)):
        found = kl_distillation_loss(*given_, reduction="none", chunk=9, temperature=2.0)
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    assert torch.equal(logits, before[0]) and torch.equal(teacher, before[1])


def test_tokens_that_do_not_count_change_nothing():
    tensors = list(operands((2, 4), 30))
    labels = torch.arange(8).view(2, 4)
    labels[0, 1:3] = labels[1, 3] = -100
    keep = labels != -100
    tensors[0][~keep], tensors[2][~keep] = float("nan"), float("inf")

    def call(hidden, weight, bias, **options):
        return loss_of(hidden, weight, *tensors[2:4], bias, tensors[5], chunk=7, **options)

    leaves = tensors[0], tensors[1], tensors[4]
    shorter = loss_of(tensors[0][keep], tensors[1], tensors[2][keep], *tensors[3:], chunk=7)
    torch.testing.assert_close(call(*leaves, labels=labels), shorter)
    assert torch.equal(call(*leaves, labels=labels, reduction="none") == 0, ~keep)
    other = torch.where(keep, labels, -1)
    assert torch.equal(call(*leaves, labels=other, ignore_index=-1), call(*leaves, labels=labels))
    assert call(*leaves, labels=labels, ignore_index=-1).isnan()
    dh, dw, db = gradients(lambda *leaves: call(*leaves, labels=labels), leaves, None)
    assert not dh[~keep].any() and dh[keep].all() and dw.isfinite().all() and db.isfinite().all()
    everything = torch.full((2, 4), -100)
    assert call(*leaves, labels=everything).item() == 0
    assert not any(one.any() for one in gradients(lambda *leaves: call(*leaves, labels=everything), leaves, None))


def test_the_teacher_gets_no_gradient_and_frozen_parameters_none():
    tensors = [tensor.requires_grad_() for tensor in operands()]
    tensors[1].requires_grad_(False)
    loss_of(*tensors).backward()
    assert [tensor.grad is None for tensor in tensors] == [False, True, True, True, False, True]


def test_autocast_and_the_counters_are_left_alone():
    tensors = operands((4,), 60)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = loss_of(*tensors, chunk=16)
    assert torch.equal(inside, loss_of(*tensors, chunk=16)) and not counters()


def test_the_usual_part_is_bounded():
    """Few tokens take wide parts, many take narrow ones, and none is wider than asked for or below 256."""
    widths = []
    right = distillation._logits

    def watched(hidden, weight, bias, part, dtype):
        widths.append((hidden.shape[0], part.stop - part.start))
        return right(hidden, weight, bias, part, dtype)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distillation, "_logits", watched)
        for tokens in (1, 4096, 16384):
            kl_distillation_loss(*operands((tokens,), 600, 1, 1)[:4])
    assert {width for tokens, width in widths if tokens == 1} == {600}
    assert {width for tokens, width in widths if tokens == 4096} == {512, 88}
    assert {width for tokens, width in widths if tokens == 16384} == {256, 88}


def test_on_cuda_16_bits_are_multiplied_as_they_are(monkeypatch):
    """As if on a GPU: every product is of bfloat16 with a float32 result; what is sent back is rounded once more."""
    seen = []

    def product(a, b, out_dtype):
        seen.append((a.dtype, b.dtype, out_dtype))
        return torch.matmul(a.float(), b.float())

    tensors = operands((5,), 100, dtype=torch.bfloat16)[:4]

    def call(hidden, weight):
        return loss_of(hidden, weight, *tensors[2:], chunk=64, reduction="sum")

    usual = gradients(call, tensors[:2], None)
    monkeypatch.setattr(distillation, "_is_narrow", lambda a, b: a.dtype == b.dtype == torch.bfloat16)
    monkeypatch.setattr(torch, "mm", product)
    found = gradients(call, tensors[:2], None)
    assert seen == [(torch.bfloat16, torch.bfloat16, torch.float32)] * 12  # 2 parts, 2 products forward and 4 backward
    for out, right in zip(found, usual, strict=True):
        assert out.dtype == torch.bfloat16 and float((out - right).norm() / right.norm()) < 2**-8


# ---- memory

CODE = """
import json, resource, sys
import torch
from fusedops.nn import distillation
from fusedops.nn.distillation import kl_distillation_loss
tokens, vocabulary = json.loads(sys.argv[1])

def call(tokens):
    hidden, teacher = (torch.randn(tokens, 32, requires_grad=True) for _ in range(2))
    weight = torch.randn(vocabulary, 32, requires_grad=True)
    kl_distillation_loss(hidden, weight, teacher, weight.detach()).backward()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

before = call(8)
print(call(tokens) - before)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="resource is of POSIX systems")
def test_peak_memory_is_far_below_the_logits():
    """Forward and backward: 512 tokens of 100,000 words are 195 MiB of logits in float32 for each model."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", CODE, json.dumps([512, 100_000])], env=environment, capture_output=True, text=True,
        timeout=300, check=True,
    )  # fmt: skip
    logits = 512 * 100_000 * 4
    assert int(done.stdout) < 0.4 * logits, f"{int(done.stdout) / MIB:.0f} MiB"


# ---- rejects

HIDDEN, WEIGHT, TEACHER, TEACHER_WEIGHT, BIAS, _ = operands()


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"hidden": [1.0]}, TypeError, "hidden must be a torch.Tensor, got list"),
        ({"hidden": HIDDEN.int()}, TypeError, "hidden must be float16, bfloat16, float32 or float64, got int32"),
        ({"weight": WEIGHT[:, :3]}, ValueError, r"weight must have shape \[V, H\] with H=16, got \[50, 3\]"),
        ({"weight": WEIGHT.to("meta")}, ValueError, "weight must be on cpu, got meta"),
        ({"teacher_weight": TEACHER_WEIGHT[:9]}, ValueError, r"teacher_weight must have shape \[V, Ht\] with V=50"),
        ({"teacher_hidden": TEACHER[:5]}, ValueError, r"teacher_hidden must have shape .* got \[5, 24\]"),
        ({"bias": BIAS[:3]}, ValueError, r"bias must have shape \[V\] with V=50, got \[3\]"),
        ({"weight": None, "hidden": HIDDEN @ WEIGHT.T, "bias": BIAS}, ValueError, "bias must be None beside logits"),
        ({"weight": None}, ValueError, r"teacher_weight must have shape \[V, Ht\] with V=16, .*got \[50, 24\]"),
        ({"labels": torch.zeros(5, dtype=torch.int64)}, ValueError, r"labels must have shape \[...\] with ...=\[6\]"),
        ({"labels": torch.zeros(6)}, TypeError, "labels must be integers, got float32"),
        ({"labels": torch.ones(6, dtype=torch.bool)}, TypeError, "labels must be integers, got bool"),
        ({"ignore_index": None}, TypeError, "ignore_index must be an integer, got NoneType"),
        ({"temperature": 0}, ValueError, "temperature must be finite and above 0, got 0"),
        ({"temperature": float("inf")}, ValueError, "temperature must be finite and above 0, got inf"),
        ({"temperature": "1"}, TypeError, "temperature must be a number, got str"),
        ({"reduction": "average"}, ValueError, "reduction must be one of 'batchmean', 'mean', 'sum', 'none', got"),
        ({"chunk": 0}, ValueError, "chunk must be at least 1, got 0"),
        ({"chunk": 1.5}, TypeError, "chunk must be None or an integer, got float"),
        ({"weight": WEIGHT[:0], "teacher_weight": TEACHER_WEIGHT[:0]}, ValueError, "at least one entry, got V=0"),
    ],
)  # fmt: skip
def test_rejects(changed, error, message):
    arguments = {"hidden": HIDDEN, "weight": WEIGHT, "teacher_hidden": TEACHER, "teacher_weight": TEACHER_WEIGHT}
    assert_rejected(lambda: kl_distillation_loss(**(arguments | changed)), error, "kl_distillation_loss: .*" + message)


# ---- faults, torch


def test_planted_faults_are_rejected():
    tensors = operands((9,), 80)
    truth = formula(*(tensor.double() for tensor in tensors))

    lost = lost_by_sums([tensor.double() for tensor in tensors], 1.0)

    def check(candidate):
        assert_within(candidate(*tensors), truth, lost)

    def right(*tensors):
        return loss_of(*tensors, reduction="none", chunk=11)

    def swapped(h, w, th, tw, b, tb):
        return right(th, tw, h, w, tb, b)

    faults = [
        Fault("the other way round", swapped),
        Fault("last entry lost", lambda h, w, th, tw, b, tb: right(h, w[:-1], th, tw[:-1], b[:-1], tb[:-1])),
        Fault("no bias", lambda h, w, th, tw, b, tb: right(h, w, th, tw, None, tb)),
        Fault("temperature 1 % off", lambda *tensors: loss_of(*tensors, reduction="none", temperature=1.01)),
        Fault("logits rounded", lambda h, *others: right(h.bfloat16().float(), *others)),
        Fault("tokens moved", lambda *tensors: right(*tensors).roll(1)),
    ]
    assert_faults_rejected(check, right, faults, minimum=6)


def test_torch():
    tensors = operands((4,), 30)
    labels = torch.tensor([1, -100, 2, 3])

    def call(hidden, weight):
        return F.kl_distillation_loss(hidden, weight, *tensors[2:4], labels=labels, chunk=8) * 2

    assert_compiles(call, tensors[:2], backend="eager")
    assert F.kl_distillation_loss is kl_distillation_loss
