"""sparse_matmul by mma.sp, as nvcc compiles it, on the CPU: exact, within budget, under every schedule."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fusedops
from fusedops._core.checks import ACTIVATIONS, FLOATS
from fusedops._core.device import TARGETS
from fusedops.ops.sparse_matmul import _cuda
from fusedops.ops.sparse_matmul._cuda import mma
from fusedops.testing import assert_accurate, ptx, strategies
from tests.ops.common import using
from tests.ops.sparse_problems import Call, call_of, integers, masked, misplaced

pytestmark = pytest.mark.emulated

KERNEL = "emulate-sm_80"
DTYPES = tuple(mma.NAMES)
EACH_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=mma.NAMES.get)
TILES = pytest.mark.parametrize("tile", mma.candidates(), ids=lambda tile: f"{tile.block_n}x{tile.block_m}")
SIZES = [(65, 1, 1), (66, 131, 197), (130, 136, 264), (257, 300, 640), (1, 40, 64)]


def whole(dtype, M, N, K, **options):
    """A call whose sums are exact."""
    if dtype == torch.int8:
        options.setdefault("out_dtype", torch.float32)
    return Call(integers((M, K), dtype, 0, 3), masked(integers((N, K), dtype, 1, 3)), options)


def assert_exact(call):
    with using(KERNEL):
        out = call.run()
    assert torch.equal(out, call.truth().to(call.out_dtype()))


def assert_within_budget(call):
    """Activations vanish where exp does, so zeros may differ."""
    with using(KERNEL):
        out = call.run()
    truth = call.truth()
    assert out.dtype == call.out_dtype() and out.is_contiguous()
    assert_accurate(out, truth, budget=call.budget(truth), zeros=False)


def only(monkeypatch, tile):
    """The launcher takes this tile for any call, of few rows too."""
    monkeypatch.setattr(mma, "default", lambda *asked: tile)
    monkeypatch.setattr(_cuda, "FEW_ROWS", 0)


@TILES
@EACH_DTYPE
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_small_integers_are_exact(sizes, dtype, tile, monkeypatch):
    only(monkeypatch, tile)
    assert_exact(whole(dtype, *sizes))


@EACH_DTYPE
@pytest.mark.parametrize("start, pad", [(0, 8), (1, 15), (3, 2)])
def test_rows_of_a_that_lie_apart(start, pad, dtype):
    """Around them is what would be seen in every result; some rows are at multiples of 16 bytes and some are not."""
    call = whole(dtype, 66, 40, 200 - dtype.itemsize)
    M, K = call.a.shape
    around = torch.full((M, start + K + pad), 127 if dtype == torch.int8 else torch.nan).to(dtype)
    assert_exact(Call(around[:, start : start + K].copy_(call.a), call.weight, call.options))


@EACH_DTYPE
def test_every_schedule_gives_the_same_right_bits(dtype):
    with ptx.diverted(schedules="all"):
        assert_exact(whole(dtype, 70, 131, 453))


@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
@EACH_DTYPE
def test_bias_and_activation(dtype, activation):
    assert_within_budget(call_of(dtype, 65, 40, 72, bias=torch.float32, activation=activation))


@pytest.mark.parametrize("out_dtype", FLOATS)
@pytest.mark.parametrize("scales", [("row", "one"), ("row", "row"), ("one", "row"), ("one", None)])
def test_scales_and_results_of_int8(scales, out_dtype):
    """40 columns leave in vectors of 16 bytes, 41 one by one."""
    for columns in (40, 41):
        assert_within_budget(call_of(torch.int8, 65, columns, 72, 0, out_dtype, out_dtype, scales=scales))


def test_sums_of_int8_beyond_float32_are_rounded_once():
    """-128 times -128 two thousand times, and an odd number that float32 cannot keep beside it."""
    a = torch.full((65, 4096), -128, dtype=torch.int8)
    a[:, 0] = 1
    weight = masked(torch.full((8, 4096), -128, dtype=torch.int8))
    weight[:, :4] = torch.tensor([1, 0, 0, 0])
    call = Call(a, weight, {"out_dtype": torch.float32})
    assert bool((call.truth() > 2**24).all() and (call.truth() % 2 == 1).all())
    assert_exact(call)


@given(
    sizes=st.tuples(st.integers(65, 300), st.integers(1, 300), st.integers(1, 400)),
    dtype=st.sampled_from(DTYPES),
    bias=st.sampled_from([None, torch.float32]),
    activation=st.sampled_from([None, *ACTIVATIONS]),
    scales=st.sampled_from([("row", "row"), ("one", "row"), ("row", None)]),
    layout=strategies.layouts(2),
    seed=strategies.seeds(),
)
def test_drawn_cases(sizes, dtype, bias, activation, scales, layout, seed):
    options = {"bias": bias, "activation": activation, "scales": scales, "layout": layout}
    assert_within_budget(call_of(dtype, *sizes, seed, **options))


@EACH_DTYPE
def test_batch_invariant_rows_have_the_same_bits_alone(dtype):
    call = call_of(dtype, 80, 40, 200, bias=torch.float32, scales=("one", "row"))
    with fusedops.batch_invariant(), using(KERNEL):
        assert _cuda.supports(call.a[:1], *call.args[1:], None, None, None, call.out_dtype(), None) is None
        together = call.run()
        call.args = call.a[5:6], *call.args[1:]
        alone = call.run()
    assert torch.equal(together[5:6], alone)


def test_what_is_not_supported_is_named():
    a, values, metadata = whole(torch.bfloat16, 65, 8, 64).args
    rest = (None, None, None, torch.bfloat16, None)
    assert _cuda.supports(a, values, metadata, *rest) is None
    assert "more than 64 rows, got 64" in _cuda.supports(a[:64], values, metadata, *rest)
    assert "got float32" in _cuda.supports(a.float(), values.float(), metadata, *rest)


@EACH_DTYPE
def test_compressed_weights_that_start_anywhere(dtype):
    call = whole(dtype, 65, 8, 64)
    call.args = call.a, *(misplaced(stored, 1) for stored in call.args[1:])
    assert_exact(call)


@pytest.mark.parametrize("target", ["sm_80", "sm_86", "sm_89", "sm_90a", "sm_120"])
def test_every_default_fits_its_gpu(target):
    device_limits = TARGETS[target]
    for rows in (65, 128, 129, 1000, 4096, 100_000):
        for columns in (1, 4096, 28672):
            tile = mma.default(rows, columns, device_limits)
            assert tile in mma.candidates()
            assert all(tile.shared_bytes(dtype.itemsize) <= device_limits.shared_memory for dtype in DTYPES)
    # Many tiles; half of one in nine and of one in two empty; few tiles.
    sizes = [(4096, 4096), (1088, 28672), (192, 128_000), (65, 512)]
    chosen = [mma.default(*size, device_limits) for size in sizes]
    assert chosen == [mma.LARGE, mma.LARGE, mma.SMALL, mma.SMALL]
