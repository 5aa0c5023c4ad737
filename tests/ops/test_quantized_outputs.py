"""rms_norm_quantized, add_rms_norm_quantized, silu_mul_quantized."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fusedops
from fusedops import quantize_fp8, quantize_int8
from fusedops.ops.gated_activation import reference as gated
from fusedops.ops.rms_norm import reference as norms
from fusedops.testing import assert_faults_rejected, make_tensor, strategies
from fusedops.testing.faults import Fault, argument_faults, standard_faults
from tests.ops.common import (
    DTYPES,
    EMULATED,
    FUSED,
    IMPLEMENTATIONS,
    assert_compiles,
    assert_fake_like_real,
    assert_rejected,
    opcheck,
    using,
)

INT8, E4M3, E5M2 = torch.int8, torch.float8_e4m3fn, torch.float8_e5m2
NAN, INF = float("nan"), float("inf")
NORM_OPTIONS = st.fixed_dictionaries({
    "eps": st.sampled_from([1e-6, 1e-5, 0.5]),
    "weight_offset": st.sampled_from([0.0, 1.0]),
    "rounding": st.sampled_from(["once", "llama"]),
})  # fmt: skip


@dataclass(frozen=True)
class Pair:
    """An operator that quantises, the one that does not, its meaning, and how it is called.

    Attributes:
        fused: The quantising operator.
        plain: The same without quantising.
        meaning: The plain operator's reference.
        num_rows: Number of arguments ``[..., N]``; norms have a weight behind them.
        options: What to draw.
    """

    fused: object
    plain: object
    meaning: object
    num_rows: int
    options: object

    @property
    def has_weight(self):
        return self.plain is not fusedops.silu_mul

    def arguments(self, shape, dtype, seed, layout="contiguous", magnitude=1.0):
        rows = [
            make_tensor(shape, dtype, seed=seed + i, layout=layout, magnitude=magnitude) for i in range(self.num_rows)
        ]
        return [*rows, make_tensor(shape[-1:], dtype, seed=seed + 9)] if self.has_weight else rows

    def truth(self, args, **options):
        """The plain result in float64, rounded to the dtype of the data as the contract says."""
        options = {"eps": 1e-6, **options} if self.has_weight else options
        out = self.meaning(*(arg.double() for arg in args), **options, round_to=args[0].dtype)
        return (out[0] if isinstance(out, tuple) else out).to(args[0].dtype).double()


PAIRS = {
    "rms_norm_quantized": Pair(fusedops.rms_norm_quantized, fusedops.rms_norm, norms.rms_norm, 1, NORM_OPTIONS),
    "add_rms_norm_quantized": Pair(
        fusedops.add_rms_norm_quantized, fusedops.add_rms_norm, norms.add_rms_norm, 2, NORM_OPTIONS
    ),
    "silu_mul_quantized": Pair(fusedops.silu_mul_quantized, fusedops.silu_mul, gated.silu_mul, 2, st.just({})),
}
EVERY_PAIR = pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)
EVERY_IMPLEMENTATION = pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS, *EMULATED])
EVERY_FUSED = pytest.mark.parametrize("implementation", [*FUSED, *EMULATED])


def assert_same(found, wanted):
    """Equal codes, scales and sums; NaN is equal to NaN."""
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a.float(), b.float(), rtol=0, atol=0, equal_nan=True)


def two_calls(pair, args, dtype, **options):
    out = pair.plain(*args, **options)
    out, rest = (out[0], out[1:]) if isinstance(out, tuple) else (out, ())
    codes = quantize_int8(out) if dtype == INT8 else quantize_fp8(out, dtype=dtype)
    return *codes, *rest


def assert_codes(values, scale, truth, dtype):
    """Scales as the largest value says, and codes within half a step, but for what `dtype` leaves of the truth."""
    epsilon = max(torch.finfo(dtype).eps, 1e-6)
    largest = 127.0 if values.dtype == INT8 else torch.finfo(values.dtype).max
    top = truth.abs().amax(-1)
    assert scale.isfinite().all() and (scale > 0).all()
    assert ((scale.double() * largest - top).abs() <= 4 * epsilon * top + largest * 2.0**-126).all(), "scales are wrong"
    steps = scale.double()[..., None]
    if values.dtype != INT8:
        mantissa, least = (3, 2.0**-9) if values.dtype == E4M3 else (2, 2.0**-16)
        binade = torch.exp2(torch.floor(torch.log2((truth / steps).abs())) - mantissa)
        steps = steps * binade.clamp(min=least)
    error = (values.double() * scale.double()[..., None] - truth).abs()
    assert (error <= steps * 0.501 + 4 * epsilon * truth.abs()).all(), "codes are wrong"


# ---- accuracy


@EVERY_PAIR
@EVERY_IMPLEMENTATION
@given(
    shape=strategies.row_shapes(6, 300),
    dtype=strategies.dtypes(),
    code=st.sampled_from([INT8, E4M3, E5M2]),
    draws=st.data(),
    seed=strategies.seeds(),
)
def test_equal_to_the_two_calls(implementation, pair, shape, dtype, code, draws, seed):
    """Bit by bit, and the arguments are left as they were."""
    layout, options = draws.draw(strategies.layouts(len(shape))), draws.draw(pair.options)
    args = pair.arguments(shape, dtype, seed, layout, draws.draw(strategies.magnitudes()))
    before = [arg.clone() for arg in args]
    with using(implementation):
        found = pair.fused(*args, dtype=code, **options)
        wanted = two_calls(pair, args, code, **options)
    assert_same(found, wanted)
    assert_same(args, before)
    assert found[0].dtype == code and found[1].dtype == torch.float32 and all(t.is_contiguous() for t in found)


@EVERY_PAIR
@EVERY_FUSED
@given(
    shape=strategies.row_shapes(6, 300, min_rows=1),
    dtype=strategies.dtypes(),
    code=st.sampled_from([INT8, E4M3, E5M2]),
    options=st.data(),
    seed=strategies.seeds(),
)
def test_accuracy(implementation, pair, shape, dtype, code, options, seed):
    options = options.draw(pair.options)
    args = pair.arguments(shape, dtype, seed)
    with using(implementation):
        values, scale, *_ = pair.fused(*args, dtype=code, **options)
    assert_codes(values, scale, pair.truth(args, **options), dtype)


@EVERY_PAIR
@pytest.mark.parametrize("n", [16384, 16385, 65536])
@EVERY_FUSED
def test_long_rows(implementation, n, pair):
    """Both sides of the longest row that one program holds, and MAX_N."""
    args = pair.arguments((2, n), torch.bfloat16, seed=n)
    code = E4M3 if n % 2 else INT8
    with using(implementation):
        found, wanted = pair.fused(*args, dtype=code), two_calls(pair, args, code)
    assert_same(found, wanted)
    assert_codes(*found[:2], pair.truth(args), torch.bfloat16)


# ---- properties


@EVERY_PAIR
@EVERY_IMPLEMENTATION
@pytest.mark.parametrize("code", [INT8, E4M3], ids=str)
def test_rows_of_zeros(implementation, code, pair):
    """B35: pytorch/ao#4713: a scale of 0 made NaN of rows of 0."""
    args = pair.arguments((3, 40), torch.float16, seed=0)
    for rows in args[: pair.num_rows]:
        rows[1] = 0.0
    with using(implementation):
        values, scale, *_ = pair.fused(*args, dtype=code)
    assert not values[1].float().any() and scale[1] == 2.0**-126
    assert values[0].float().any() and scale.isfinite().all()


@EVERY_PAIR
@EVERY_IMPLEMENTATION
@pytest.mark.parametrize("bad", [NAN, INF])
def test_a_bad_value_damages_its_own_row_alone(implementation, bad, pair):
    args = pair.arguments((4, 33), torch.bfloat16, seed=1)
    clean = [arg.clone() for arg in args]
    args[0][2, 5] = bad
    with using(implementation):
        found, wanted = pair.fused(*args), pair.fused(*clean)
    assert not (found[0][2].double() * found[1][2].double()).isfinite().any()
    keep = [0, 1, 3]
    assert_same([part[keep] for part in found], [part[keep] for part in wanted])


@EVERY_PAIR
@EVERY_FUSED
def test_a_row_does_not_depend_on_its_neighbours(implementation, pair):
    args = pair.arguments((9, 200), torch.float32, seed=2)
    weight = args[pair.num_rows :]
    with using(implementation):
        found = pair.fused(*args)
        alone = pair.fused(*(arg[4:5] for arg in args[: pair.num_rows]), *weight)
    assert_same([part[4:5] for part in found], alone)


@EVERY_PAIR
@EVERY_IMPLEMENTATION
@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (0,)])
def test_empty(implementation, shape, pair):
    with using(implementation):
        values, scale, *_ = pair.fused(*pair.arguments(shape, torch.float32, seed=0))
    assert values.shape == shape and scale.shape == shape[:-1] and (scale == 2.0**-126).all()


def on_codes(correct, change):
    def faulty(*args):
        values, *rest = correct(*args)
        return change(values), *rest

    return faulty


def last_column_zero(values):
    values = values.clone()
    values[..., -1] = 0
    return values


CHANGES = {
    "codes one higher": lambda values: values.clamp(max=126) + 1,
    "codes negated": torch.neg,
    "codes halved": lambda values: values // 2,
    "last column of codes is 0": last_column_zero,
    "columns of codes moved": lambda values: values.roll(1, -1),
    "rows of codes swapped": lambda values: values.flip(0),
    "codes of 7 bits": lambda values: values // 2 * 2,
    "codes never written": lambda values: torch.full_like(values, -128),
}


@EVERY_PAIR
def test_planted_faults_are_rejected(pair):
    args = pair.arguments((3, 20, 77), torch.float32, seed=4)
    truth = pair.truth(args)

    def check(candidate):
        values, scale, *rest = candidate(*args)
        assert_codes(values, scale, truth, torch.float32)
        assert not rest or torch.equal(rest[0], args[0] + args[1])

    faults = [Fault(name, on_codes(pair.fused, change)) for name, change in CHANGES.items()]
    same_sign = ("sign lost",)  # scales are positive
    faults += [f for f in standard_faults(pair.fused, output=1) if f.name not in same_sign]
    names = ("x", "residual") if pair.has_weight else ("gate", "up")
    for i, name in enumerate([*names[: pair.num_rows], *(["weight"] if pair.has_weight else [])]):
        faults += argument_faults(pair.fused, i, name)
    if pair.num_rows == 1:  # a norm takes the size of its row away
        faults = [fault for fault in faults if fault.name != "x scaled +1%"]
    if pair.has_weight:
        faults.append(Fault("eps of 0.1", lambda *args: pair.fused(*args, 0.1)))
        faults.append(Fault("weight with 1 added", lambda *args: pair.fused(*args, weight_offset=1.0)))
    assert_faults_rejected(check, pair.fused, faults, minimum=30)


# ---- rejects

X, W = torch.ones(3, 8), torch.ones(8)
norm, add_norm, silu = (
    PAIRS["rms_norm_quantized"].fused,
    PAIRS["add_rms_norm_quantized"].fused,
    fusedops.silu_mul_quantized,
)
REJECTS = [
    (lambda: norm([1.0], W), TypeError, "rms_norm_quantized: x must be a torch.Tensor, got list"),
    (lambda: norm(X, W, dtype=torch.int16), TypeError, "dtype must be int8 or float8_e4m3fn or float8_e5m2, got int16"),
    (lambda: norm(X, W[:7]), ValueError, r"rms_norm_quantized: weight must have shape \[N\] with N=8, got \[7\]"),
    (lambda: norm(X.double(), W), TypeError, "x must be float16, bfloat16 or float32, got float64"),
    (lambda: norm(X, W.half()), TypeError, "weight must be float32, got float16"),
    (lambda: norm(X.mT, torch.ones(3)), ValueError, "x must have a contiguous last dimension"),
    (lambda: norm(X, W, -1.0), ValueError, "rms_norm_quantized: eps must be finite and at least 0, got -1.0"),
    (lambda: norm(X, W, rounding="twice"), ValueError, "rounding must be one of 'once', 'llama', got 'twice'"),
    (lambda: norm(torch.ones(1, 65537), None), NotImplementedError, "N must be at most MAX_N = 65536, got 65537"),
    (lambda: add_norm(X, X[:2], W), ValueError, r"add_rms_norm_quantized: residual must have shape .* got \[2, 8\]"),
    (lambda: add_norm(X, X.half(), W), TypeError, "add_rms_norm_quantized: residual must be float32, got float16"),
    (lambda: add_norm(X, X, W, dtype="int8"), TypeError, "add_rms_norm_quantized: dtype must be .* got int8"),
    (lambda: silu(X, X[0]), ValueError, r"silu_mul_quantized: up must have shape .* got \[8\]"),
    (lambda: silu(X, X.half()), TypeError, "silu_mul_quantized: up must be float32, got float16"),
    (lambda: silu(X, X, dtype=torch.float16), TypeError, "silu_mul_quantized: dtype must be .* got float16"),
    (lambda: silu(X.mT, X.mT), ValueError, "silu_mul_quantized: gate must have a contiguous last dimension"),
    (lambda: silu(X, X.to("meta")), ValueError, "silu_mul_quantized: up must be on cpu, got meta"),
]  # fmt: skip


@pytest.mark.parametrize("call, error, message", REJECTS)
def test_rejects(call, error, message):
    assert_rejected(call, error, message)


# ---- torch


def test_opcheck():
    x = make_tensor((3, 2, 37), torch.float32, seed=0).transpose(0, 1)
    opcheck("rms_norm_quantized", x, None, 1e-6, 0.0, "once", INT8)
    opcheck("add_rms_norm_quantized", x, x * 2, torch.ones(37), 1e-6, 1.0, "llama", E4M3)
    opcheck("silu_mul_quantized", x, x * 2, INT8)


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "padded"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fake_strides_are_the_real_ones(dtype, layout):
    x, residual = (make_tensor((3, 2, 37), dtype, seed=i, layout=layout) for i in range(2))
    options = None, 1e-6, 0.0, "once", E4M3
    assert_fake_like_real("rms_norm_quantized", x, *options)
    assert_fake_like_real("add_rms_norm_quantized", x, residual, *options)
    assert_fake_like_real("silu_mul_quantized", x, residual, INT8)


def test_torch_compile():
    def function(x, y, weight):
        codes, scale, h = fusedops.add_rms_norm_quantized(x, y * 2, weight)
        return codes, scale, h + 1, *norm(x, weight), *silu(x, y)

    torch.manual_seed(0)
    assert_compiles(function, *((torch.randn(n, 40), torch.randn(n, 40), torch.randn(40)) for n in (4, 6)))


def test_cost_counts_every_byte():
    assert fusedops.explain("rms_norm_quantized", X, W).bytes == 24 * (4 + 1) + 8 * 4 + 3 * 4
    assert fusedops.explain("add_rms_norm_quantized", X, X, W).bytes == 24 * (4 + 4 + 4 + 1) + 8 * 4 + 3 * 4
    assert fusedops.explain("silu_mul_quantized", X, X).bytes == 24 * (4 + 4 + 1) + 3 * 4
