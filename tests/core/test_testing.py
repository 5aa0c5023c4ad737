"""The testing tools themselves: does the oracle accept what is right, and reject everything else?"""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fusedops import testing
from fusedops.testing import Budget, Fault, assert_accurate, assert_faults_rejected, errors, make_tensor, strategies

ROOT = Path(__file__).resolve().parents[2]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LAYOUTS = ("contiguous", "padded", "sliced", "offset:3", "transposed", "expanded", "strided")


def scale_and_add(x, weight):
    """A two-output function to plant faults in: rows scaled to unit mean square times a weight, and a sum."""
    rows = x.double()
    out = rows / (rows.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight.double()
    return out.to(x.dtype), x + weight


@given(strategies.dtypes(), strategies.row_shapes(), strategies.magnitudes(), strategies.seeds(), st.data())
def test_one_rounding_of_the_truth_is_always_accepted(dtype, shape, magnitude, seed, data):
    specials = data.draw(strategies.specials(dtype))
    truth = make_tensor(shape, torch.float64, seed=seed, magnitude=magnitude, specials=specials)
    measured = assert_accurate(truth.to(dtype), truth)
    assert measured == errors(truth.to(dtype), truth)


@pytest.mark.parametrize("dtype", DTYPES)
def test_errors_are_counted_in_epsilons(dtype):
    truth = torch.ones(64, dtype=torch.float64)
    out = truth.to(dtype)
    out[5] += torch.finfo(dtype).eps
    measured = errors(out, truth)
    assert measured.peak == pytest.approx(1.0) and measured.rms == pytest.approx(1 / 8)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 4096])
def test_beyond_the_budget_is_rejected(dtype, size):
    truth = make_tensor((size,), torch.float64, seed=1, magnitude=1.0)
    budget = Budget.for_dtype(dtype)
    factor = 1.0 + 1.2 * max(budget.rms, 0.6 if size == 1 else 0.0) * torch.finfo(dtype).eps
    with pytest.raises(AssertionError, match=r"y: rms .* epsilons of torch\.\w+; worst at \(\d+,\): got "):
        assert_accurate((truth * factor).to(dtype), truth * (2.0 - factor), name="y")


def test_a_single_wrong_element_is_named():
    truth = make_tensor((4, 5, 6), torch.float64, seed=2)
    out = truth.float()
    out[2, 3, 4] += 0.01
    with pytest.raises(AssertionError, match=r"worst at \(2, 3, 4\)"):
        assert_accurate(out, truth)


@pytest.mark.parametrize(
    ("truth", "out", "message"),
    [
        (1.0, math.nan, "NaN at 1 places, expected at 0"),
        (math.nan, 1.0, "NaN at 0 places, expected at 1"),
        (math.inf, -math.inf, r"\+inf at 0 places, expected at 1"),
        (1.0, -math.inf, "-inf at 1 places, expected at 0"),
        (math.inf, 65504.0, r"\+inf at 0 places, expected at 1"),
        (1.0, 0.0, "exact zero at 1 places, expected at 0"),
        (0.0, 1e-5, "exact zero at 0 places, expected at 1"),
    ],
)
def test_classes_are_compared_first(truth, out, message):
    rest = torch.linspace(1, 2, 7, dtype=torch.float64)
    wanted = torch.cat([rest, torch.tensor([truth], dtype=torch.float64)])
    found = torch.cat([rest, torch.tensor([out], dtype=torch.float64)]).half()
    with pytest.raises(AssertionError, match=message):
        assert_accurate(found, wanted)


def test_zeros_may_be_left_to_luck():
    truth = torch.tensor([1.0, 0.0], dtype=torch.float64)
    out = torch.tensor([1.0, 1e-8])
    with pytest.raises(AssertionError, match="exact zero"):
        assert_accurate(out, truth)
    assert_accurate(out, truth, zeros=False)


def test_near_the_thresholds_either_class_is_accepted():
    overflow = torch.tensor([65520.0 - 1e-3, 1.0], dtype=torch.float64)
    assert_accurate(torch.tensor([math.inf, 1.0]).half(), overflow)
    assert_accurate(torch.tensor([65504.0, 1.0]).half(), overflow)
    underflow = torch.tensor([4e-8, 1.0], dtype=torch.float64)
    assert_accurate(torch.tensor([0.0, 1.0]).half(), underflow)
    assert_accurate(torch.tensor([6e-8, 1.0]).half(), underflow)
    far_above = torch.tensor([70000.0, 1.0], dtype=torch.float64)
    with pytest.raises(AssertionError, match="inf"):
        assert_accurate(torch.tensor([65504.0, 1.0]).half(), far_above)


def test_extreme_magnitudes_neither_overflow_nor_vanish():
    for scale in (1e300, 1e-300):
        truth = torch.tensor([scale, 2 * scale], dtype=torch.float64)
        measured = errors(truth * (1 + 2**-40), truth)
        assert measured.peak == pytest.approx(2.0**12, rel=1e-3) == measured.rms


def test_empty_and_integer_outputs():
    assert assert_accurate(torch.empty(0, 4), torch.empty(0, 4, dtype=torch.float64)) == testing.Errors(0.0, 0.0)
    codes = torch.arange(-4, 4, dtype=torch.int8)
    assert_accurate(codes, codes)
    with pytest.raises(AssertionError):
        assert_accurate(codes, codes.roll(1))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.ones(2), torch.ones(3).double()), ValueError, r"out has shape \[2\], truth \[3\]"),
        ((torch.ones(2), torch.ones(2)), TypeError, "truth must be float64, got torch.float32"),
        (([1.0], torch.ones(1).double()), TypeError, "out must be a tensor, got list"),
        ((torch.ones(1).double(), torch.ones(1).double()), TypeError, "float64 has no default budget"),
    ],
)
def test_accuracy_rejects(arguments, error, message):
    with pytest.raises(error, match=message):
        assert_accurate(*arguments)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float8_e4m3fn, torch.int8, torch.bool])
def test_layouts_hold_the_same_values(dtype, layout):
    plain = make_tensor((4, 5, 7), dtype, seed=3, magnitude=9)
    placed = make_tensor((4, 5, 7), dtype, seed=3, magnitude=9, layout=layout)
    expected = plain[:1].expand(4, 5, 7) if layout == "expanded" else plain
    assert placed.shape == plain.shape and placed.dtype == dtype and bool((placed.float() == expected.float()).all())
    strides = {
        "contiguous": (35, 7, 1), "padded": (50, 10, 1), "sliced": (70, 14, 1), "offset:3": (35, 7, 1),
        "transposed": (7, 28, 1), "expanded": (0, 7, 1), "strided": (70, 14, 2),
    }  # fmt: skip
    assert placed.stride() == strides[layout]
    assert placed.storage_offset() == (3 if layout == "offset:3" else 0)


@pytest.mark.parametrize("layout", ["padded", "sliced", "offset:3", "strided"])
def test_memory_around_a_view_is_poisoned(layout):
    for dtype in DTYPES:
        placed = make_tensor((4, 7), dtype, seed=4, layout=layout)
        memory = torch.empty(0, dtype=dtype).set_(placed.untyped_storage())
        assert int(memory.isnan().sum()) == memory.numel() - 28 > 0 and not placed.isnan().any()
    codes = make_tensor((4, 7), torch.int8, seed=4, magnitude=5, layout=layout)
    assert int((torch.empty(0, dtype=torch.int8).set_(codes.untyped_storage()) == -128).sum()) > 0


def test_values_come_from_the_seed_alone():
    state = torch.get_rng_state()
    first, second, other = (make_tensor((64,), torch.float32, seed=seed) for seed in (5, 5, 6))
    assert torch.equal(first, second) and not torch.equal(first, other)
    assert torch.equal(state, torch.get_rng_state())


def test_specials_and_magnitude():
    x = make_tensor((100,), torch.float16, seed=7, magnitude=1e6, specials=(math.nan, math.inf, -0.0))
    assert int(x.isnan().sum()) == 1 and int(x.isinf().sum()) == 1 and int((x == 0).sum()) == 1
    assert float(x[x.isfinite()].abs().max()) == 65504.0
    assert make_tensor((2,), torch.float32, seed=8, specials=(1.0, 2.0, 3.0)).sort()[0].tolist() == [1.0, 2.0]
    assert make_tensor((0, 4), torch.float32, seed=8, specials=(1.0,), layout="padded").shape == (0, 4)


@pytest.mark.parametrize(
    ("shape", "layout", "message"),
    [
        ((4, 4), "transposed", "at least 3 dimensions, got"),
        ((4,), "expanded", "at least 2 dimensions, got"),
        ((4,), "offset:x", "offset:<elements>"),
        ((4,), "diagonal", "got 'diagonal'"),
    ],
)
def test_make_tensor_rejects(shape, layout, message):
    with pytest.raises(ValueError, match=message):
        make_tensor(shape, torch.float32, seed=0, layout=layout)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float8_e4m3fn, torch.float8_e5m2])
def test_special_values_and_hostile_rows_survive_the_dtype(dtype):
    values = testing.special_values(dtype)
    stored = torch.tensor(values, dtype=torch.float64).to(dtype).double()
    assert torch.equal(stored.nan_to_num(7.0), torch.tensor(values, dtype=torch.float64).nan_to_num(7.0))
    rows = testing.hostile_rows(33, dtype)
    assert len(rows) == (10 if dtype == torch.float8_e4m3fn else 12)
    assert all(row.shape == (33,) and row.dtype == dtype for row in rows.values())
    assert int((rows["one-hot"].double() != 0).sum()) == 1 and float(rows["denormal"].double().min()) > 0


def test_strides_beyond_int32_cost_little_memory():
    values = make_tensor((3, 64), torch.bfloat16, seed=9)
    far = testing.huge_stride_rows(values, last_offset=2**32)
    assert torch.equal(far, values) and far.stride() == (2**31, 1)
    far[2] += 1
    assert torch.equal(far[2], values[2] + 1) and torch.equal(far[:2], values[:2])
    with pytest.raises(ValueError, match="at least 128, got 100"):
        testing.huge_stride_rows(values, last_offset=100)
    with pytest.raises(ValueError, match="rows >= 2"):
        testing.huge_stride_rows(values[:1])


@given(strategies.row_shapes(max_rows=6, max_n=70, min_rows=1), st.data())
def test_strategies_stay_inside_their_bounds(shape, data):
    layout = data.draw(strategies.layouts(len(shape)))
    x = data.draw(strategies.tensors(shape, torch.float16, special=True))
    assert 1 <= math.prod(shape[:-1]) <= 6 and 1 <= shape[-1] <= 70
    assert x.shape == shape and x.stride(-1) == 1
    assert make_tensor(shape, torch.float32, seed=data.draw(strategies.seeds()), layout=layout).shape == shape
    assert all(math.isfinite(value) for value in data.draw(strategies.specials(torch.float16, finite=True)))


def test_strategies_reach_empty_batches_edges_and_every_layout():
    seen_shapes, seen_layouts = set(), set()

    @given(strategies.row_shapes(max_rows=3, max_n=20), strategies.layouts(3))
    def collect(shape, layout):
        seen_shapes.add(shape)
        seen_layouts.add(layout.split(":")[0])

    for _ in range(4):
        collect()
    assert any(0 in shape for shape in seen_shapes) and {len(shape) for shape in seen_shapes} == {2, 3}
    assert seen_layouts == {"contiguous", "padded", "sliced", "expanded", "transposed", "offset"}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("output", [0, 1, None])
def test_the_oracle_rejects_every_standard_fault(dtype, output):
    x, weight = make_tensor((5, 37), dtype, seed=10), make_tensor((37,), dtype, seed=11)
    truth = scale_and_add(x.double(), weight.double())

    def check(candidate):
        for value, wanted, name in zip(candidate(x, weight), truth, ("out", "h"), strict=True):
            assert_accurate(value, wanted, name=name)

    faults = testing.standard_faults(scale_and_add, output=output)
    faults += testing.argument_faults(scale_and_add, 1, "weight")
    assert len({fault.name for fault in faults}) == len(faults) >= 25
    assert_faults_rejected(check, scale_and_add, faults)


def test_a_weak_check_is_exposed():
    x = make_tensor((5, 37), torch.bfloat16, seed=12)

    def allclose(candidate):
        torch.testing.assert_close(candidate(x), x * 2, rtol=1e-2, atol=1e-1)

    double = [Fault("correct after all", lambda x: x * 2), *testing.standard_faults(lambda x: x * 2)]
    with pytest.raises(AssertionError, match=r"planted faults survive: correct after all; .*scaled \+1%") as raised:
        assert_faults_rejected(allclose, lambda x: x * 2, double)
    assert "all zeros" not in str(raised.value)


def test_faults_reject_misuse():
    def never(candidate):
        raise AssertionError("no")

    def crash(x):
        raise KeyError("missing")

    one = Fault("one", lambda x: x)
    with pytest.raises(AssertionError, match="rejects the correct implementation: no"):
        assert_faults_rejected(never, torch.neg, [one], minimum=1)
    with pytest.raises(ValueError, match="at least 15, got 1"):
        assert_faults_rejected(never, torch.neg, [one])
    with pytest.raises(ValueError, match="got twice: one"):
        assert_faults_rejected(never, torch.neg, [one, one], minimum=2)
    with pytest.raises(RuntimeError, match="'crash' crashed instead"):
        assert_faults_rejected(lambda candidate: candidate(1), lambda x: x, [Fault("crash", crash)], minimum=1)


def test_option_fault_overrides_a_keyword():
    fault = testing.option_fault(torch.sum, "dim ignored", dim=0)
    x = make_tensor((3, 4), torch.float32, seed=13)
    assert torch.equal(fault.wrong(x, dim=1), x.sum(0))


def test_timing_ranks_and_counts_calls():
    calls = []
    small, large = torch.ones(64, 64), torch.ones(512, 512)
    candidates = {"small": lambda tag: (calls.append(tag), small @ small), "large": lambda tag: large @ large}
    arguments = testing.rotating(lambda index: (index,), bytes_per_call=2**26)
    timings = testing.compare(candidates, arguments=arguments, rounds=5, round_seconds=0.004)
    assert list(timings) == ["small", "large"] and set(calls) == {0, 1}
    for timing in timings.values():
        assert 0 < timing.low <= timing.median <= timing.high and timing.rounds == 5
    assert timings["small"].median < timings["large"].median


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rounds": 4}, "rounds must be at least 5, got 4"),
        ({"arguments": []}, "must not be empty"),
        ({"graph": True}, "graph must be used with a CUDA device, got cpu"),
    ],
)
def test_timing_rejects(options, message):
    with pytest.raises(ValueError, match=message):
        testing.compare({"nothing": lambda: None}, **options)


@pytest.mark.gpu
@pytest.mark.parametrize("graph", [False, True])
def test_timing_on_a_gpu(graph):
    arguments = testing.rotating(lambda index: (torch.rand(2**20, device="cuda"),), bytes_per_call=2**23)
    candidates = {"once": torch.neg, "twice": lambda x: x.neg().neg()}
    timings = testing.compare(candidates, arguments=arguments, device="cuda", graph=graph)
    assert 0 < timings["once"].median < timings["twice"].median


def test_importing_testing_needs_torch_alone():
    code = """
import sys, torch
before = set(sys.modules)
import fusedops.testing
from fusedops.testing import Budget, Fault, compare, make_tensor, strategies, interpreter
new = {name.split(".")[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)
print(sorted(new))
"""
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == "['fusedops']"
    assert set(dir(testing)) >= {"Budget", "assert_accurate", "interpreter"}
