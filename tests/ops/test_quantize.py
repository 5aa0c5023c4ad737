"""quantize_int8, quantize_fp8."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fusedops
from fusedops import quantize_fp8, quantize_int8
from fusedops.ops.quantize import GRANULARITIES, reference
from fusedops.testing import assert_faults_rejected, formats, make_tensor, strategies
from fusedops.testing.faults import Fault
from fusedops.testing.inputs import huge_stride_rows
from tests.ops.common import DTYPES, EMULATED, FUSED, IMPLEMENTATIONS, using

INT8, E4M3, E5M2 = torch.int8, torch.float8_e4m3fn, torch.float8_e5m2
LARGEST = {INT8: 127.0, E4M3: 448.0, E5M2: 57344.0}
NAN, INF = float("nan"), float("inf")
EVERY_IMPLEMENTATION = pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS, *EMULATED])
EVERY_FUSED = pytest.mark.parametrize("implementation", [*FUSED, *EMULATED])
EVERY_CODE = pytest.mark.parametrize("code", LARGEST, ids=str)
EVERY_GRANULARITY = pytest.mark.parametrize("granularity", GRANULARITIES)


def quantize(x, code, granularity="row", scale=None):
    if code == INT8:
        return quantize_int8(x, granularity=granularity, scale=scale)
    return quantize_fp8(x, granularity=granularity, dtype=code, scale=scale)


def bits(values):
    """Codes as integers; every NaN is one code, whose sign is nobody's promise."""
    return torch.where(values.float().isnan(), 127, values.view(torch.int8))


def assert_same(found, wanted):
    """Equal codes, and equal scales bit by bit."""
    for (values, scale), (other, other_scale) in ((found, wanted),):
        assert values.shape == other.shape and scale.shape == other_scale.shape
        assert torch.equal(bits(values), bits(other)), "codes differ"
        torch.testing.assert_close(scale, other_scale, rtol=0, atol=0, equal_nan=True)


def real(values, scale, granularity="row"):
    """What the codes stand for, in float64."""
    return values.double() * reference._spread(scale, values.shape, granularity).double()


# ---- accuracy


@EVERY_FUSED
@given(
    shape=strategies.row_shapes(6, 300, min_rows=1),
    dtype=strategies.dtypes(),
    code=st.sampled_from(list(LARGEST)),
    granularity=st.sampled_from(GRANULARITIES),
    draws=st.data(),
    seed=strategies.seeds(),
)
def test_every_bit_is_the_reference_s(implementation, shape, dtype, code, granularity, draws, seed):
    layout, magnitude = draws.draw(strategies.layouts(len(shape))), draws.draw(strategies.magnitudes())
    specials = draws.draw(strategies.specials(dtype))
    x = make_tensor(shape, dtype, seed=seed, magnitude=magnitude, layout=layout, specials=specials)
    before = x.clone()
    with using(implementation):
        found = quantize(x, code, granularity)
        given_scale = make_tensor(found[1].shape, torch.float32, seed=seed + 1, magnitude=0.01).abs() + 1e-6
        values, same = quantize(x, code, granularity, scale=given_scale)
        one, _ = quantize(x, code, granularity, scale=given_scale.new_full((1,), 0.02))
    assert_same(found, reference._quantized(x, granularity, code))
    assert same is given_scale
    assert_same((values, same), (reference.quantize_scaled(x, given_scale, granularity, code), given_scale))
    assert torch.equal(bits(one), bits(reference.quantize_scaled(x, torch.tensor(0.02), granularity, code)))
    torch.testing.assert_close(x, before, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@EVERY_CODE
@EVERY_IMPLEMENTATION
def test_casts_of_every_16_bit_number(implementation, code, dtype):
    """By a definition that is not torch's: nearest, ties to even, cut at the largest number of the format."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    with using(implementation):
        values, _ = quantize(x, code, scale=torch.ones(()))
        halves, _ = quantize(x, code, scale=torch.full((1,), 2.0))
    for found, factor in ((values, 1.0), (halves, 0.5)):
        assert np.array_equal(bits(found).numpy().view(np.uint8), defined((x.float() * factor).numpy(), code))


def defined(numbers, code):
    """Codes as bytes, by numpy."""
    if code == INT8:
        return np.rint(np.clip(np.nan_to_num(numbers, nan=0.0), -127, 127)).astype(np.int8).view(np.uint8)
    found = formats.encode(numbers, formats.FLOAT8_E4M3FN if code == E4M3 else formats.FLOAT8_E5M2)
    return np.where(np.isnan(numbers), 127, found).astype(np.uint8)


@EVERY_CODE
@EVERY_IMPLEMENTATION
def test_casts_of_ties_and_their_neighbours(implementation, code):
    """float32 has numbers just beside the middle of two codes, which rounding through 16 bits would get wrong."""
    codes = torch.arange(128, dtype=torch.uint8).view(code).float()
    codes = codes[codes.isfinite()]
    middle = (codes[1:] + codes[:-1]) / 2
    x = torch.cat([middle, torch.nextafter(middle, torch.tensor(INF)), torch.nextafter(middle, torch.tensor(0.0))])
    x = torch.cat([x, -x, codes, codes[-1:] * 1.5])
    with using(implementation):
        values, _ = quantize(x, code, scale=torch.ones(()))
    assert np.array_equal(bits(values).numpy().view(np.uint8), defined(x.numpy(), code))


@EVERY_CODE
@EVERY_GRANULARITY
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("implementation", FUSED)
def test_errors_are_at_most_half_a_step_and_balanced(implementation, dtype, granularity, code):
    x = (2 * torch.rand(40, 300, generator=torch.Generator().manual_seed(1)) - 1).to(dtype)
    with using(implementation):
        values, scale = quantize(x, code, granularity)
    error, x = real(values, scale, granularity) - x.double(), x.double()
    scale = reference._spread(scale, x.shape, granularity).double()
    mantissa, least = {INT8: (0, 1.0), E4M3: (3, 2.0**-9), E5M2: (2, 2.0**-16)}[code]
    step = torch.maximum(torch.exp2(torch.floor(torch.log2((x / scale).abs())) - mantissa), torch.tensor(least))
    step = scale * (least if code == INT8 else step)
    assert (error.abs() <= step * 0.5 * (1 + 1e-4)).all()
    outwards = (error * x.sign() > 0).double().mean() - (error * x.sign() < 0).double().mean()
    assert abs(outwards) < 5 / x.numel() ** 0.5  # five deviations of fair coins


@pytest.mark.parametrize("n", [16384, 16385, 40000])
@EVERY_FUSED
def test_long_rows(implementation, n):
    """Both sides of the longest row that one program holds."""
    x = make_tensor((2, n), torch.bfloat16, seed=n)
    with using(implementation):
        found = quantize_int8(x), quantize_fp8(x)
    for result, code in zip(found, (INT8, E4M3)):
        assert_same(result, reference._quantized(x, "row", code))


@EVERY_FUSED
@pytest.mark.parametrize("layout", ["contiguous", "padded"])
@pytest.mark.parametrize("place", [0, 2047, 2048, 32767, 32768, 70001, -1])
def test_the_largest_value_is_found_wherever_it_is(implementation, layout, place):
    """Each program of the search takes several tiles."""
    x = make_tensor((37, 1999), torch.float32, seed=3, layout=layout)
    x[place // 1999 if place >= 0 else -1, place % 1999 if place >= 0 else -1] = -77.0
    with using(implementation):
        values, scale = quantize_int8(x, granularity="tensor")
    assert_same((values, scale), reference._quantized(x, "tensor", INT8))
    assert scale == torch.tensor(77.0) / 127 and values.min() == -127


# ---- properties


@EVERY_IMPLEMENTATION
@EVERY_CODE
@EVERY_GRANULARITY
def test_zeros_have_codes_of_zero_and_a_finite_scale(implementation, granularity, code):
    """B35: pytorch/ao#4713, huggingface/kernels-community#681: a scale of 0 made NaN of rows of 0."""
    x = torch.zeros(130 if granularity == "block_2d" else 9, 140)
    x[1:3, 4] = 1e-44  # its quotient by 127 is 0
    if granularity in ("row", "block"):
        x[7] = 1.0
    with using(implementation):
        values, scale = quantize(x, code, granularity)
    keep = torch.arange(len(x)) != 7
    assert not values.float()[keep].any()
    assert ((scale[keep] if granularity in ("row", "block") else scale) == 2.0**-126).all()


@EVERY_IMPLEMENTATION
@pytest.mark.parametrize("code", [INT8, E4M3], ids=str)
@EVERY_GRANULARITY
@pytest.mark.parametrize("bad", [NAN, -INF])
def test_a_bad_value_damages_what_shares_its_scale_alone(implementation, granularity, code, bad):
    clean = make_tensor((260 if granularity == "block_2d" else 5, 290), torch.bfloat16, seed=0)
    x = clean.clone()
    x[3, 130] = bad
    with using(implementation):
        (values, scale), (other, other_scale) = quantize(x, code, granularity), quantize(clean, code, granularity)
    damaged = ~scale.isfinite()
    assert damaged.sum() == 1 and (scale[damaged].isnan() if bad != bad else scale[damaged] == INF).all()
    inside = reference._spread(damaged, x.shape, granularity).expand_as(x)
    assert torch.equal(bits(values)[~inside], bits(other)[~inside])
    assert torch.equal(scale[~damaged], other_scale[~damaged])
    assert not real(values, scale, granularity)[inside].isfinite().any()
    assert code != INT8 or not values[inside].any()


@EVERY_FUSED
@EVERY_CODE
@given(
    shape=strategies.row_shapes(6, 300, min_rows=1),
    granularity=st.sampled_from(GRANULARITIES),
    exponent=st.integers(-40, 40),
    seed=strategies.seeds(),
)
def test_exact_identities(implementation, code, shape, granularity, exponent, seed):
    """Of -x, of x times a power of two, of what the codes stand for, and of the scale given back."""
    x = make_tensor(shape, torch.float32, seed=seed)
    with using(implementation):
        values, scale = quantize(x, code, granularity)
        assert_same(quantize(x * 2.0**exponent, code, granularity), (values, scale * 2.0**exponent))
        assert_same(quantize(x, code, granularity, scale=scale), (values, scale))
        negated, _ = quantize(-x, code, granularity)
        again, scale_again = quantize(real(values, scale, granularity).float(), code, granularity)
    assert torch.equal(negated.double(), -values.double())
    assert torch.equal(again.float(), values.float())  # the scale's own roundings may leave its last bit
    torch.testing.assert_close(scale_again, scale, rtol=1.2e-7, atol=0)


@EVERY_FUSED
@given(
    dtype=strategies.dtypes(),
    layout=strategies.layouts(3),
    granularity=st.sampled_from(GRANULARITIES),
    seed=strategies.seeds(),
)
def test_layout_and_neighbours_do_not_matter(implementation, dtype, layout, granularity, seed):
    x = make_tensor((3, 2, 200), dtype, seed=seed, layout=layout)
    with using(implementation):
        found = quantize_int8(x, granularity=granularity)
        assert_same(found, quantize_int8(x.contiguous(), granularity=granularity))
        if granularity != "tensor":
            assert_same(quantize_int8(x[1:2], granularity=granularity), tuple(part[1:2] for part in found))


@EVERY_FUSED
@pytest.mark.parametrize("code", [INT8, E4M3], ids=str)
def test_granularities_of_the_same_numbers_agree(implementation, code):
    x = make_tensor((2, 128, 256), torch.float32, seed=5)
    squares = x.unflatten(1, (1, 128)).unflatten(3, (2, 128)).transpose(2, 3)
    with using(implementation):
        blocks, wide = quantize(x, code, "block"), quantize(x.view(2, 128, 2, 128), code)
        tensor, flat = quantize(x, code, "tensor"), quantize(x.flatten(), code)
        two, rows = quantize(x, code, "block_2d"), quantize(squares.flatten(3), code)
    assert_same(blocks, (wide[0].view(x.shape), wide[1]))
    assert_same(tensor, (flat[0].view(x.shape), flat[1]))
    assert_same(two, (rows[0].unflatten(3, (128, 128)).transpose(2, 3).reshape(x.shape), rows[1]))


@EVERY_FUSED
@pytest.mark.parametrize("last_offset", [2**31 - 1, 2**31, 2**31 + 1])
def test_offsets_beyond_int32(implementation, last_offset):
    values = make_tensor((2, 48), torch.float16, seed=0)
    far = huge_stride_rows(values, last_offset=last_offset)
    with using(implementation):
        for granularity in GRANULARITIES:
            assert_same(quantize_int8(far, granularity=granularity), quantize_int8(values, granularity=granularity))


def test_sizes_beyond_int32():
    """B19: vllm-project/vllm-gguf-plugin#127: a size of 64 bits was narrowed to 32 on its way to the kernel."""
    x = torch.empty(2, 2**31 + 8, device="meta", dtype=torch.bfloat16)
    values, scale = quantize_fp8(x, granularity="block")
    assert values.shape == x.shape and scale.shape == (2, 2**24 + 1)
    told = fusedops.explain("quantize_int8", x, target="sm_90a")
    assert told.bytes == 3 * x.numel() + 8 and told.backend == "triton"


@EVERY_IMPLEMENTATION
@EVERY_GRANULARITY
@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (2, 0, 130), (0, 0)])
def test_empty(implementation, granularity, shape):
    with using(implementation):
        values, scale = quantize_int8(torch.zeros(shape), granularity=granularity)
        given_scale, _ = quantize_int8(torch.zeros(shape), granularity=granularity, scale=torch.ones(()))
    assert values.shape == given_scale.shape == shape
    assert (scale == 2.0**-126).all() and scale.numel() == (scale.dim() == 0 or shape[0] * len(scale[:1].flatten()))


def wrong(change=lambda x: x, scales=lambda s: s, codes=lambda v, s, dtype: v, by=None):
    """A faulty quantisation: of other numbers, with other scales, with other codes, or with its own arithmetic."""

    def faulty(x, dtype):
        values, scale = reference._quantized(change(x), "row", dtype)
        if by is not None:
            values = by((x.float() / scale[:, None]), dtype)
        return codes(values, scale, dtype), scales(scale)

    return faulty


def as_code(rounded, dtype):
    return rounded.to(dtype) if dtype != INT8 else rounded.clamp(-128, 127).to(INT8)


FAULTS = {
    "scale one percent larger": wrong(scales=lambda s: s * 1.01),
    "scale one percent smaller": wrong(scales=lambda s: s * 0.99),
    "scales of other rows": wrong(scales=lambda s: s.roll(1)),
    "scale is its reciprocal": wrong(scales=lambda s: 1 / s),
    "scale rounded to 16 bits": wrong(scales=lambda s: s.bfloat16().float()),
    "scale of a row of zeros is 0": wrong(scales=lambda s: torch.where(s < 1e-30, 0.0, s)),
    "one scale for all rows": lambda x, dtype: (
        reference._quantized(x, "tensor", dtype)[0], reference._quantized(x, "tensor", dtype)[1].expand(len(x))
    ),
    "negative values not looked at": lambda x, dtype: (
        (s := reference._quantized(x.clamp(min=0), "row", dtype)[1]),
        (reference.quantize_scaled(x, s, "row", dtype), s),
    )[1],
    "last column not looked at": lambda x, dtype: (
        (s := reference._quantized(x[:, :-1], "row", dtype)[1]),
        (reference.quantize_scaled(x, s, "row", dtype), s),
    )[1],
    "cut off instead of rounded": wrong(by=lambda x, dtype: as_code(x.trunc(), dtype)),
    "rounded down": wrong(by=lambda x, dtype: as_code(x.floor(), dtype)),
    "halves away from zero": wrong(by=lambda x, dtype: as_code((x.abs() + 0.5).floor() * x.sign(), dtype)),
    "wraps beyond the range": wrong(by=lambda x, dtype: as_code(
        torch.where(x.abs() > 126.5, -x, x).round(), dtype
    )),
    "codes one higher": wrong(by=lambda x, dtype: as_code(x.round() + 1, dtype)),
    "codes negated": wrong(change=torch.neg),
    "last column of codes is 0": wrong(change=lambda x: torch.cat((x[:, :-1], 0 * x[:, :1]), 1)),
    "columns moved by one": wrong(change=lambda x: x.roll(1, 1)),
    "rows swapped": wrong(change=lambda x: x.flip(0)),
    "through bfloat16": wrong(change=lambda x: x.bfloat16().float()),
    "range of 128": wrong(
        scales=lambda s: s * (127 / 128), by=lambda x, dtype: as_code((x * 128 / 127).round(), dtype)
    ),
}  # fmt: skip


@EVERY_CODE
def test_planted_faults_are_rejected(code):
    x = make_tensor((5, 77), torch.float32, seed=0, magnitude=3.0)
    x[1] = 0.0
    x[2, -1] = 20.0
    x[3, :7] = torch.tensor([-LARGEST[code], 0.5, 1.5, 2.5, -0.5, -1.5, 126.5])
    x[3, 7:] = 1.0
    x[4, 0] = -30.0

    def check(candidate):
        assert_same(candidate(x, code), reference._quantized(x, "row", code))

    assert_faults_rejected(check, quantize, [Fault(name, fault) for name, fault in FAULTS.items()])
