"""Each kernel as it is compiled for sm_80 and sm_90a, in every order of its threads: no report, and the same bits."""

import pytest
import torch

import fusedops
from fusedops.testing import make_tensor, ptx
from tests.ops.common import EMULATED, using
from tests.ops.test_rotary import angles

pytestmark = pytest.mark.emulated

DTYPE = torch.bfloat16


def leaf(*shape, seed=0):
    return make_tensor(shape, DTYPE, seed=seed).requires_grad_()


def heads(length, count, seed, dim=64):
    return leaf(1, length, count, dim, seed=seed)


def attend(queries, keys, **options):
    """Two query heads for one of the keys."""
    q, k, v = heads(queries, 2, 0), heads(keys, 1, 1), heads(keys, 1, 2)
    return fusedops.attention(q, k, v, **options), (q, k, v)


def norm(function, *more):
    x, weight = leaf(3, 300), leaf(300, seed=1)
    return function(x, weight, *more), (x, weight)


def gate(function, **options):
    a, b = leaf(3, 300), leaf(3, 300, seed=1)
    return function(a, b, **options), (a, b)


def rotate():
    q, k = heads(5, 4, 0), heads(5, 2, 1)
    return torch.cat(fusedops.rotary(q, k, *angles(5, 64, DTYPE)), 2), (q, k)


def merge():
    outs, lses = zip(*(attend(5, 20 + i, return_lse=True)[0] for i in range(2)))
    with torch.no_grad():
        return fusedops.merge_attention(outs[0], lses[0], outs[1], lses[1])[0], ()


def packed():
    q, k, v = (make_tensor((70, 2, 64), DTYPE, seed=i) for i in range(3))
    starts = torch.tensor([0, 33, 70], dtype=torch.int32)
    return fusedops.attention_varlen(q, k, v, starts, starts, 37, 37, causal=True), ()


CALLS = {
    "rms_norm": lambda: norm(fusedops.rms_norm),
    "layer_norm": lambda: norm(fusedops.layer_norm, torch.zeros(300, dtype=DTYPE)),
    "silu_mul": lambda: gate(fusedops.silu_mul),
    "gelu_mul": lambda: gate(fusedops.gelu_mul, approximate="tanh"),
    "rotary": rotate,
    "attention": lambda: attend(70, 150, causal=True),
    "attention, many options": lambda: attend(33, 40, window_size=(20, 3), softcap=5.0, sinks=torch.zeros(2)),
    "attention with a mask": lambda: attend(20, 40, mask=torch.rand(1, 2, 20, 40) > 0.3),
    "attention of one query over many keys": lambda: attend(1, 600),
    "merge_attention": merge,
    "attention_varlen": packed,
}


@pytest.mark.parametrize("implementation", EMULATED)
@pytest.mark.parametrize("name", CALLS)
def test_every_schedule_gives_the_same_bits(name, implementation):
    """Forward and, where there is one, backward."""
    with ptx.diverted(schedules="all"), using(implementation):
        out, inputs = CALLS[name]()
        if inputs:
            grads = torch.autograd.grad(out, inputs, torch.ones_like(out))
            assert all(grad.isfinite().all() for grad in grads)
    assert out.isfinite().all() and out.count_nonzero() > 0
