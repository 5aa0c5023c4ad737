"""The tests of int8_matmul and fp8_matmul can fail: wrong versions, which the comparison with the truth must reject."""

import pytest
import torch
import torch.nn.functional as F

from fusedops import fp8_matmul, int8_matmul
from fusedops.testing import assert_accurate, assert_faults_rejected
from fusedops.testing.faults import Fault, standard_faults
from tests.ops.common import DTYPES
from tests.ops.matmul_problems import call_of

WRONG_ARGUMENTS = {
    "scale_a one percent larger": lambda a, b, s, t: (a, b, s * 1.01, t),
    "scale_a one percent smaller": lambda a, b, s, t: (a, b, s * 0.99, t),
    "scale_b one percent larger": lambda a, b, s, t: (a, b, s, t * 1.01),
    "scale_a of the next row": lambda a, b, s, t: (a, b, s.roll(1, 0), t),
    "scale_b of the next row": lambda a, b, s, t: (a, b, s, t.roll(1, 0)),
    "scales swapped": lambda a, b, s, t: (
        a, b, t[: s.numel()].view_as(s), s.flatten().repeat(t.numel())[: t.numel()].contiguous()
    ),
    "scale_a ignored": lambda a, b, s, t: (a, b, torch.ones_like(s), t),
    "scale_b ignored": lambda a, b, s, t: (a, b, s, torch.ones_like(t)),
    "scale_a applied twice": lambda a, b, s, t: (a, b, s * s, t),
    "scale of the first row for all": lambda a, b, s, t: (a, b, s[:1].expand_as(s).contiguous(), t),
    "last k dropped": lambda a, b, s, t: (a[:, :-1], b[:, :-1], s, t),
    "first block of k dropped": lambda a, b, s, t: (a[:, 128:], b[:, 128:], s[:, 1:] if s.dim() == 2 else s, t),
    "first block of k counted twice": lambda a, b, s, t: (
        *(torch.cat((x[:, :128], x), 1) for x in (a, b)), torch.cat((s[:, :1], s), 1) if s.dim() == 2 else s, t
    ),
    "a negated": lambda a, b, s, t: (a, b, -s, t),
    "rows of b shifted": lambda a, b, s, t: (a, b.view(torch.uint8).roll(1, 0).view(b.dtype), s, t),
}  # fmt: skip
WRONG_OPTIONS = {
    "bias twice": lambda options: options | {"bias": 2 * options["bias"]},
    "bias lost": lambda options: options | {"bias": None},
    "bias of the next column": lambda options: options | {"bias": options["bias"].roll(1)},
    "residual lost": lambda options: options | {"residual": None},
    "residual twice": lambda options: options | {"residual": 2 * options["residual"]},
    "activation lost": lambda options: options | {"activation": None},
    "another activation": lambda options: options | {"activation": "silu"},
}


def model(a, b, scale_a, scale_b, *, bias, out_dtype, activation, residual, fault):
    """The product of integers in float64 and what follows, with one fault of the kind that kernels have."""
    acc = a.double() @ b.double().T
    if fault == "sums in 8 bits":
        acc = acc.to(torch.int64).to(torch.int8).double()
    if fault == "sums in 16 bits":
        acc = acc.to(torch.int64).to(torch.int16).double()
    if fault == "sums saturate at 16 bits":
        acc = acc.clamp(-(2**15), 2**15 - 1)
    if fault == "sums rounded to bfloat16":
        acc = acc.bfloat16().double()
    if fault == "codes without a sign":
        acc = a.view(torch.uint8).double() @ b.double().T
    bias, residual = bias.double(), residual.double()
    if fault == "bias before the scales":
        acc, bias = acc + bias, 0.0
    x = acc * scale_a.double()[:, None] * scale_b.double() + bias
    if fault == "residual before the activation":
        x, residual = x + residual, 0.0
    if fault == "rounded before the residual":
        x = x.bfloat16().double()
    return (F.gelu(x) + residual).to(out_dtype)


FAULTS_OF_KERNELS = (
    "sums in 8 bits", "sums in 16 bits", "sums saturate at 16 bits", "sums rounded to bfloat16", "codes without a sign",
    "bias before the scales", "residual before the activation", "rounded before the residual",
)  # fmt: skip


def problem(op, dtype):
    """Few rows of a, with everything that can be wrong; float8 with scales of blocks of a."""
    kinds = ("row", "row") if op == "int8_matmul" else ("block", "row")
    call = call_of(op, 5, 77, 300, kinds, 3, dtype, dtype, "gelu", True)
    size = 300**0.5 * 100**2
    a, b, scale_a, scale_b = call.args
    call.args = a, b, scale_a / size, 4 * scale_b  # activations differ around 1
    call.options |= {name: call.options[name] / min(size, 1e4) for name in ("bias", "residual")}
    return call


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", [int8_matmul, fp8_matmul], ids=lambda op: op.__name__)
def test_planted_faults_are_rejected(op, dtype):
    call = problem(op.__name__, dtype)

    def check(candidate):
        assert_accurate(candidate(*call.args, **call.options), call.truth(), zeros=False)

    def of_arguments(change):
        return lambda *args, **options: op(*change(*args), **options)

    def of_options(change):
        return lambda *args, **options: op(*args, **change(options))

    faults = [Fault(name, of_arguments(change)) for name, change in WRONG_ARGUMENTS.items()]
    faults += [Fault(name, of_options(change)) for name, change in WRONG_OPTIONS.items()]
    if op is int8_matmul and dtype == torch.float32:
        for name in FAULTS_OF_KERNELS:
            faults.append(Fault(name, lambda *args, name=name, **options: model(*args, fault=name, **options)))
        check(lambda *args, **options: model(*args, fault="none", **options))
    assert_faults_rejected(check, op, [*faults, *standard_faults(op)])
