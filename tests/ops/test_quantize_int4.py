"""quantize_int4: codes, scales and zeros of groups."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fusedops
from fusedops import quantize_int4
from fusedops.ops.quantize_int4 import reference
from fusedops.ops.weight_only_matmul.reference import dequantized
from fusedops.testing import Fault, assert_faults_rejected, make_tensor, strategies
from tests.ops.common import (
    DTYPES,
    EMULATED,
    IMPLEMENTATIONS,
    assert_compiles,
    assert_fake_like_real,
    assert_rejected,
    opcheck,
    using,
)

EVERY_IMPLEMENTATION = pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS, *EMULATED])
NAN, INF = float("nan"), float("inf")


def real(quantised, K):
    values, scale, zero = quantised
    return dequantized(values, scale.double(), zero, K, torch.float64)


def steps(weight, group):
    """For each element half of its group's even step, in float64."""
    N, K = weight.shape
    padded = torch.nn.functional.pad(weight.double(), (0, -K % group)).view(N, -(-K // group), group)
    half = (padded.amax(-1).clamp(min=0) - padded.amin(-1).clamp(max=0)) / 30
    return half.repeat_interleave(group, 1)[:, :K]


def assert_within_half_a_step(quantised, weight, group):
    """Half a step, a step that is rounded up, and what float32 loses; zeros of the pad, and zeros in range."""
    values, scale, zero = quantised
    N, K = weight.shape
    assert values.dtype == zero.dtype == torch.uint8 and scale.dtype == weight.dtype
    assert values.shape == (N, -(-K // 2)) and scale.shape == zero.shape == (N, -(-K // group))
    error = (real(quantised, K) - weight.double()).abs()
    least = 2.0**-24 if weight.dtype == torch.float16 else 2.0**-126
    rounding = torch.finfo(weight.dtype).eps if weight.dtype != torch.float32 else 1e-6
    bound = (steps(weight, group) * (1 + rounding)).clamp(min=least) + least
    assert (error <= bound * (1 + 1e-6)).all()
    assert (zero <= 240).all() and (scale > 0).all() and scale.isfinite().all()
    assert K % 2 == 0 or not (values[:, -1] >> 4).any()


# ---- accuracy


@EVERY_IMPLEMENTATION
@given(
    shape=st.tuples(st.integers(0, 5), st.integers(1, 300)), group=st.sampled_from([32, 64, 128]),
    dtype=strategies.dtypes(), data=st.data(),
)  # fmt: skip
def test_accuracy(implementation, shape, group, dtype, data):
    """The very bits of the reference, and half a step."""
    weight = make_tensor(
        shape, dtype, seed=data.draw(strategies.seeds()), magnitude=data.draw(strategies.magnitudes()),
        layout=data.draw(strategies.layouts()), specials=data.draw(strategies.specials(torch.float16, finite=True)),
    )  # fmt: skip
    with using(implementation):
        found = quantize_int4(weight, group_size=group)
    for tensor, wanted in zip(found, reference.quantize_int4(weight, group), strict=True):
        assert tensor.is_contiguous() and torch.equal(tensor, wanted)
    assert_within_half_a_step(found, weight, group)


def test_planted_faults_are_rejected():
    weights = [make_tensor((4, 100), dtype, seed=1, magnitude=0.1) for dtype in DTYPES]

    def check(candidate):
        for weight in weights:
            assert_within_half_a_step(candidate(weight), weight, 32)
            shifted = weight.abs() + 0.5  # 0 is an end of the range
            assert_within_half_a_step(candidate(shifted), shifted, 32)

    def correct(weight):
        return quantize_int4(weight)

    def changed(values=lambda v: v, scale=lambda s: s, zero=lambda z: z):
        def wrong(weight):
            found = correct(weight)
            return values(found[0]), scale(found[1]), zero(found[2])

        return wrong

    def code(change):
        """Both codes of every byte."""
        return lambda v: change(v & 15).clamp(0, 15) | (change(v >> 4).clamp(0, 15) << 4)

    faults = {
        "halves swapped": changed(values=lambda v: (v << 4) | (v >> 4)),
        "codes one more": changed(values=code(lambda c: c.int() + 1)),
        "codes one less": changed(values=code(lambda c: c.int() - 1)),
        "codes reversed": changed(values=code(lambda c: 15 - c.int())),
        "signed codes": changed(values=lambda v: v ^ 0x88), "lower halves only": changed(values=lambda v: v & 15),
        "even codes only": changed(values=lambda v: v & 0xEE), "rows shifted": changed(values=lambda v: v.roll(1, 0)),
        "pairs shifted": changed(values=lambda v: v.roll(1, 1)), "no codes": changed(values=torch.zeros_like),
        "scale three percent more": changed(scale=lambda s: s * 1.03),
        "scale three percent less": changed(scale=lambda s: s * 0.97),
        "scale of 16 steps": changed(scale=lambda s: s * 15 / 16),
        "scale of another group": changed(scale=lambda s: s.roll(1, 1)),
        "zero one code more": changed(zero=lambda z: z + 16),
        "zero in whole codes": changed(zero=lambda z: z // 16 * 16), "zero in codes": changed(zero=lambda z: z // 16),
        "zero ignored": changed(zero=torch.zeros_like),
        "zero of another group": changed(zero=lambda z: z.roll(1, 1)),
        "zero always 8": changed(zero=lambda z: torch.full_like(z, 128)),
        "groups of 64 in the tables of 32": lambda w: [
            t if t.dtype == torch.uint8 and t.shape[1] == 50 else t.repeat_interleave(2, 1)[:, :4]
            for t in quantize_int4(w, group_size=64)
        ],
    }  # fmt: skip
    assert_faults_rejected(check, correct, [Fault(name, wrong) for name, wrong in faults.items()])


# ---- properties


@EVERY_IMPLEMENTATION
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_eighths_of_the_largest_come_back_without_an_error(implementation, dtype):
    """What another program stored as (code - 8) * step or, with a negative step, its mirror image."""
    codes = torch.randint(0, 16, (4, 96), generator=torch.Generator().manual_seed(0))
    codes[:, ::32] = 0
    step = torch.tensor([0.25, -1.0, 2.0**-9, -4.0]).view(4, 1)
    weight = ((codes - 8) * step).to(dtype)
    with using(implementation):
        found = quantize_int4(weight)
        again = quantize_int4(real(found, 96).to(dtype))
    assert torch.equal(real(found, 96), weight.double())
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


@EVERY_IMPLEMENTATION
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_steps_from_a_least_value_come_back(implementation, dtype):
    """What was stored as code * step + least: exactly where its zero is in sixteenths, else but for half of one."""
    codes = torch.randint(0, 16, (4, 96), generator=torch.Generator().manual_seed(0))
    codes[:, ::32], codes[:, 1::32] = 0, 15
    step = torch.tensor([0.25, 1.0, 2.0**-9, 4.0]).view(4, 1)
    with using(implementation):
        for zero, error in ((7 + 5 / 16, 0.0), (0.125, 0.0), (14.5, 0.0), (6.78, 1 / 32)):
            weight = ((codes - zero) * step).to(dtype)
            found = quantize_int4(weight)
            assert torch.equal(found[2], torch.full((4, 3), round(zero * 16), dtype=torch.uint8))
            away = (real(found, 96) - weight.double()).abs() / step
            assert away.max() <= error + (0 if not error else 16 * torch.finfo(dtype).eps)


@EVERY_IMPLEMENTATION
def test_a_zero_stays_a_zero(implementation):
    """Groups with a 0 among others have a zero that is a whole code, however much better one between two would be."""
    codes = torch.randint(0, 16, (6, 64), generator=torch.Generator().manual_seed(0)).float()
    codes[:, ::32], codes[:, 1::32] = 0, 15
    weight = codes - torch.tensor([7.5, 6.3, 3.4, 0.5, 14.5, 8.5]).view(6, 1)
    weight[:, 5] = 0.0
    with using(implementation):
        found = quantize_int4(weight)
    assert not real(found, 64)[:, 5].any()
    assert not (found[2][:, 0] % 16).any() and (found[2][:, 1] % 16).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_quantising_again_changes_nothing(implementation):
    """Up to the last bit of a scale, whose multiples float32 rounds; of two grids with all values either will do."""
    weight = make_tensor((6, 100), torch.float32, seed=3)
    with using(implementation):
        found = real(quantize_int4(weight), 100)
        again = real(quantize_int4(found.float()), 100)
    torch.testing.assert_close(again, found, rtol=1e-6, atol=0)


@EVERY_IMPLEMENTATION
def test_zeros_and_values_that_are_no_numbers(implementation):
    """B35: a group of zeros has a finite scale; NaN and infinity stay in their group."""
    weight = make_tensor((5, 96), torch.float32, seed=4)
    with using(implementation):
        clean = real(quantize_int4(weight), 96)
        weight[0], weight[1, 40], weight[2, 70], weight[3, 0] = 0.0, NAN, INF, 1e-44
        found = quantize_int4(weight)
    out = real(found, 96)
    assert not out[0].any() and found[1][0].isfinite().all() and (found[1][0] > 0).all()
    bad = torch.zeros(5, 3, dtype=torch.bool)
    bad[1, 1], bad[2, 2] = True, True
    assert torch.equal(~found[1].isfinite(), bad)
    keep = ~bad.repeat_interleave(32, 1)
    keep[0], keep[3, :32] = False, False
    assert torch.equal(out[keep], clean[keep]) and not out[bad.repeat_interleave(32, 1)].isfinite().any()


# ---- rejects

REJECTS = [
    (lambda: quantize_int4([1]), TypeError, "quantize_int4: weight must be a torch.Tensor, got list"),
    (lambda: quantize_int4(torch.ones(4)), ValueError, r"weight must have shape \[N, K\], got \[4\]"),
    (lambda: quantize_int4(torch.ones(4, 8).double()), TypeError, "weight must be float16, bfloat16 or float32"),
    (lambda: quantize_int4(torch.ones(8, 4).T), ValueError, "weight must have a contiguous last dimension"),
    (lambda: quantize_int4(torch.ones(4, 0)), ValueError, r"weight must have at least one column, got \[4, 0\]"),
    (lambda: quantize_int4(torch.ones(4, 8), group_size=16), ValueError, "group_size must be one of 32, 64, 128, got"),
    (lambda: quantize_int4(torch.ones(4, 8), group_size=True), ValueError, "group_size must be one of .* got True"),
]  # fmt: skip


@pytest.mark.parametrize("call, error, message", REJECTS)
def test_rejects(call, error, message):
    assert_rejected(call, error, message)


# ---- torch


def test_torch():
    weight = make_tensor((3, 70), torch.float32, seed=0, layout="padded")
    opcheck("quantize_int4", weight, 32)
    assert_fake_like_real("quantize_int4", weight, 64)
    assert_compiles(lambda w: quantize_int4(w), (weight,), (torch.randn(5, 33),))
    told = fusedops.explain("quantize_int4", weight)
    assert told.bytes == 3 * 70 * 4 + 3 * (35 + 3 * 5)
