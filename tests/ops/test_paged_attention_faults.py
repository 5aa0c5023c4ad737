"""The tests of paged attention can fail: wrong versions of it, which the comparison with the truth must reject."""

import pytest
import torch

from fusedops import paged_attention
from fusedops.testing import assert_faults_rejected
from fusedops.testing.faults import Fault, standard_faults
from tests.ops.common import DTYPES
from tests.ops.paged_problems import INF, packed_bits, problem

LENGTHS = [(3, 37), (1, 20), (5, 5)]


def cases(dtype):
    """Every option that a fault may damage, on pages of 8."""
    tree = torch.ones(9, 5, dtype=torch.bool).tril()
    tree[2, 1] = tree[8, 1:3] = False
    options = [
        {}, {"window_size": (6, 0)}, {"softcap": 1.5}, {"sinks": torch.tensor([1.0, -0.5, 0.3, 2.0])},
        {"alibi_slopes": torch.tensor([0.5, 0.2, 0.1, 0.05])}, {"softmax_scale": 0.7},
        {"tree_mask": packed_bits(tree)}, {"causal": False},
    ]  # fmt: skip
    found = [problem(LENGTHS, dtype, 4, 2, 24, seed, **each) for seed, each in enumerate(options)]
    found += [problem(LENGTHS, dtype, 4, 2, 24, 20, cache="int8"), problem(LENGTHS, dtype, 4, 2, 24, 21, cache="fp8")]
    return [*found, problem(LENGTHS, dtype, 4, 2, 24, 22, cache="int8", kinds=("head", "head"))]


def model(
    q, k_cache, v_cache, table, seqlens, fault="", *, cu_seqlens_q=None, max_seqlen_q=None, softmax_scale=None,
    causal=True, window_size=(-1, -1), softcap=0.0, sinks=None, alibi_slopes=None, k_scale=None, v_scale=None,
    tree_mask=None, return_lse=True,
):  # fmt: skip
    """paged_attention in plain float32 with one fault of the kind that kernels have."""
    outs, lses, starts = [], [], cu_seqlens_q.tolist()
    page_size = k_cache.shape[1]
    for b in range(len(table)):
        rows, length = slice(starts[b], starts[b + 1]), int(seqlens[b])
        pages = table[0 if fault == "table of the first sequence" else b, : -(-length // page_size)].long()
        if fault == "pages in order":
            pages = pages.sort()[0]
        if fault == "last page lost" and len(pages) > 1:
            pages = torch.cat((pages[:-1], pages[:1]))
        gathered = []
        for cache, scale in ((k_cache, k_scale), (v_cache, v_scale)):
            if scale is not None and fault == "scales ignored":
                scale = torch.full_like(scale, 0.01)
            if scale is not None and fault == "scales of another head":
                scale = scale.flip(-1)
            if scale is not None and fault == "scales one percent larger":
                scale = scale * 1.01
            if scale is not None and fault == "scales of the next slot" and scale.dim() == 3:
                scale = scale.roll(1, 1).nan_to_num(0.01)
            real = cache[pages].float()
            if scale is not None:
                real = real * (scale[pages][..., None] if scale.dim() == 3 else scale.reshape(-1, 1))
            real = real.flatten(0, 1)
            gathered.append((real.roll(1, 0) if fault == "slots shifted" else real)[:length].nan_to_num(0.0))
        keys, values = gathered
        heads, group = q.shape[1], q.shape[1] // keys.shape[1]
        pick = torch.arange(heads) % keys.shape[1] if fault == "wrong key head" else torch.arange(heads) // group
        queries, keys, values = (t.float().transpose(0, 1) for t in (q[rows], keys[:, pick], values[:, pick]))
        scale = q.shape[2] ** -0.5 if softmax_scale is None or fault == "softmax_scale ignored" else softmax_scale
        scores = queries @ keys.mT * scale
        if fault == "scores rounded to 16 bits":
            scores = scores.bfloat16().float()
        if softcap and fault != "softcap ignored":
            scores = softcap * torch.tanh(scores / softcap)
        context = 0 if fault == "first query at the first key" else length - queries.shape[1]
        place = torch.arange(length) - context
        distance = place - torch.arange(queries.shape[1])[:, None]
        if alibi_slopes is not None:
            scores = scores - alibi_slopes[:, None, None] * distance.abs() * (-1 if fault == "alibi added" else 1)
        visible = distance <= (1 if fault == "mask one further" else -1 if fault == "mask one short" else 0)
        visible = visible if causal else torch.ones_like(visible)
        left = window_size[0] + {"window one longer": 1, "window one shorter": -1}.get(fault, 0)
        visible = visible & (distance >= -left) if window_size[0] >= 0 and fault != "window ignored" else visible
        if tree_mask is not None and fault != "tree ignored":
            words = tree_mask[rows].roll(1, 0) if fault == "tree of the next query" else tree_mask[rows]
            bit = (place + 1 if fault == "tree one bit further" else place).clamp(0, 31)
            visible = visible & ((place < 0) | ((words[:, :1] >> bit) & 1).bool())
        scores = scores.masked_fill(~visible, -INF)
        if fault == "one part of the keys lost" and length > 16:
            scores[..., 8:16] = -INF
        top = scores.amax(-1, keepdim=True).clamp(min=-1e30)
        weights = torch.exp(scores - top)
        total = weights.sum(-1, keepdim=True)
        if sinks is not None and fault != "sink left out":
            total = total + torch.exp(sinks[:, None, None] - top)
        if fault == "slack counted":
            total = total + torch.exp(-top)
        outs.append((weights @ values / total.clamp(min=1e-38)).transpose(0, 1))
        lses.append((top + total.log()).squeeze(-1) * (1.442695 if fault == "lse in base 2" else 1.0))
    lse = torch.cat(lses, 1)
    return torch.cat(outs).to(q.dtype), lse.masked_fill(lse < -1e29, -INF)


FAULTS = """table of the first sequence; pages in order; last page lost; scales ignored; scales of another head;
scales one percent larger; scales of the next slot; slots shifted; wrong key head; softmax_scale ignored;
scores rounded to 16 bits; softcap ignored; first query at the first key; alibi added; mask one further; mask one short;
window one longer; window one shorter; window ignored; tree ignored; tree of the next query; tree one bit further;
one part of the keys lost; sink left out; slack counted; lse in base 2"""
NAMES = [name.strip() for name in FAULTS.split(";")]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_planted_faults_are_rejected(dtype):
    calls = [(case, *case.call(page_size=8, seed=1, varlen=True)) for case in cases(dtype)]

    def check(candidate):
        for case, args, kwargs in calls:
            case.check(*candidate(*args, **kwargs))

    def correct(*args, **kwargs):
        return paged_attention(*args, return_lse=True, **kwargs)

    check(model)  # without a fault it is right, so what is rejected is the fault
    faults = [Fault(name, lambda *args, name=name, **kw: model(*args, fault=name, **kw)) for name in NAMES]
    assert_faults_rejected(check, correct, faults + standard_faults(correct, output=0))
