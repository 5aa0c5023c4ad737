"""The tests of attention can fail: wrong versions of it, which the comparison with the truth must reject."""

import pytest
import torch

from fusedops import attention
from fusedops.testing import assert_faults_rejected
from fusedops.testing.faults import Fault, standard_faults
from tests.ops.attention_problems import Problem, qkv

INF = float("inf")


def problems(dtype):
    """Every option that a fault may damage, at head dims on both sides of a kernel's tile."""
    sinks, slopes = torch.tensor([1.0, -0.5, 0.3, 2.0]), torch.tensor([0.5, 0.2, 0.1, 0.05])
    mask = torch.ones(2, 1, 9, 21, dtype=torch.bool)
    mask[0, :, 4] = mask[1, :, :, 13:] = False
    cases = [
        (72, {"causal": True}), (80, {"window_size": (3, 2)}), (96, {"softcap": 1.5, "mask": mask}),
        (104, {"sinks": sinks, "causal": True}), (16, {"alibi_slopes": slopes}), (40, {"softmax_scale": 0.7}),
    ]  # fmt: skip
    return [
        Problem(*qkv(2, 9, 21, heads=4, kv_heads=2, head_dim=dim, dtype=dtype, seed=dim), options)
        for dim, options in cases
    ]


def model(
    q, k, v, fault="", *, return_lse=True, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
    sinks=None, alibi_slopes=None, mask=None,
):  # fmt: skip
    """attention in plain float32 with one fault of the kind that kernels have."""
    heads, group, head_dim = q.shape[2], q.shape[2] // k.shape[2], q.shape[3]
    pick = torch.arange(heads) % k.shape[2] if fault == "wrong key head" else torch.arange(heads) // group
    queries, keys, values = (t.float().transpose(1, 2) for t in (q, k[:, :, pick], v[:, :, pick]))
    if fault == "head dims beyond 64 left out of the scores":
        queries = queries[..., :64] if head_dim > 64 else queries
        keys = keys[..., :64] if head_dim > 64 else keys
    scale = head_dim**-0.5 if softmax_scale is None or fault == "softmax_scale ignored" else softmax_scale
    scores = queries @ keys.mT * scale
    if fault == "scores rounded to 16 bits":
        scores = scores.bfloat16().float()
    if softcap and fault not in ("softcap after mask", "softcap ignored"):
        scores = softcap * torch.tanh(scores / softcap)
    offset = 0 if fault == "first query at the first key" else k.shape[1] - q.shape[1]
    distance = torch.arange(k.shape[1]) - torch.arange(q.shape[1])[:, None] - offset
    if alibi_slopes is not None:
        away = distance if fault == "alibi without its absolute value" else distance.abs()
        scores = scores - alibi_slopes[:, None, None] * away * (-1 if fault == "alibi added" else 1)
    left, right = window_size[0], 0 if causal else window_size[1]
    right += {"mask one further": 1, "mask one short": -1}.get(fault, 0) * (right >= 0)
    left += {"window one longer": 1, "window one shorter": -1}.get(fault, 0) * (left >= 0)
    visible = mask if mask is not None and fault != "mask ignored" else torch.ones(distance.shape, dtype=torch.bool)
    visible = visible & (distance <= right) if right >= 0 or causal else visible
    visible = visible & (distance >= -left) if left >= 0 else visible
    scores = scores.masked_fill(~visible, -1e4 if fault == "hidden by a finite number" else -INF)
    if softcap and fault == "softcap after mask":
        scores = softcap * torch.tanh(scores / softcap)
    if fault == "last key dropped":
        scores[..., -1] = -INF
    top = scores.amax(-1, keepdim=True).clamp(min=-1e30)
    weights = torch.exp(scores - top)
    if fault == "first block not rescaled":
        weights[..., :16] = torch.exp(scores[..., :16] - scores[..., :16].amax(-1, keepdim=True).clamp(min=-1e30))
    total = weights.sum(-1, keepdim=True)
    if fault == "padded keys counted":  # known bug B33
        total = total + 11 * torch.exp(-top)
    if sinks is not None and fault != "sink left out of the denominator":
        total = total + torch.exp(sinks[:, None, None] * (scale if fault == "sink scaled" else 1.0) - top)
    if fault == "weights rounded to 16 bits":
        weights = weights.bfloat16().float()
    out = (weights @ values / total.clamp(min=1e-38)).transpose(1, 2)
    if fault == "stale accumulator beyond 64" and out.shape[-1] > 64:
        out[..., 64:] = out.roll(1, 1)[..., 64:]
    if fault == "values not weighed down by the sink" and sinks is not None:
        out = out * (total / weights.sum(-1, keepdim=True)).transpose(1, 2)
    lse = (top + total.log()).squeeze(-1)
    lse = lse * {"lse in base 2": 1.4426950408889634}.get(fault, 1.0) - (fault == "lse of a mean") * 3.044522437723423
    return out.to(q.dtype), lse.masked_fill(lse < -1e29, -INF)


FAULTS = """scores rounded to 16 bits; weights rounded to 16 bits; mask one further; mask one short; window one longer;
window one shorter; first query at the first key; last key dropped; softcap after mask; softcap ignored; mask ignored;
sink left out of the denominator; sink scaled; values not weighed down by the sink; wrong key head;
stale accumulator beyond 64; head dims beyond 64 left out of the scores; first block not rescaled; padded keys counted;
hidden by a finite number; alibi added; alibi without its absolute value; softmax_scale ignored; lse in base 2;
lse of a mean"""
NAMES = [name.strip() for name in FAULTS.split(";")]
SEEN_IN_FLOAT32_ALONE = ("weights rounded to 16 bits",)  # what a kernel of 16 bits may do


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_planted_faults_are_rejected(dtype):
    cases = problems(dtype)

    def check(candidate):
        for case in cases:
            case.check(*candidate(case.q, case.k, case.v, **case.options))

    def correct(q, k, v, **options):
        return attention(q, k, v, return_lse=True, **options)

    check(model)  # without a fault it is right, so what is rejected is the fault
    names = [name for name in NAMES if dtype == torch.float32 or name not in SEEN_IN_FLOAT32_ALONE]
    faults = [Fault(name, lambda *args, name=name, **kw: model(*args, fault=name, **kw)) for name in names]
    assert_faults_rejected(check, correct, faults + standard_faults(correct, output=0))


@pytest.mark.parametrize("fault", ["stale accumulator beyond 64", "head dims beyond 64 left out of the scores"])
@pytest.mark.parametrize("head_dim", [72, 80, 96, 104])
def test_each_head_dim_shows_its_faults(head_dim, fault):
    problem = Problem(*qkv(1, 9, 21, head_dim=head_dim))
    problem.check(*model(problem.q, problem.k, problem.v))
    with pytest.raises(AssertionError):
        problem.check(*model(problem.q, problem.k, problem.v, fault=fault))
