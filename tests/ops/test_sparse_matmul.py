"""sparse_matmul: results and identities."""

import pytest
import torch
from hypothesis import given, settings

import fusedops
from fusedops import sparse_matmul
from fusedops._core.checks import ACTIVATIONS
from fusedops.ops.sparse_matmul import MAX_K_INT8
from fusedops.testing import assert_accurate, make_tensor
from tests.ops.common import DTYPES, EMULATED, FUSED, IMPLEMENTATIONS, using
from tests.ops.sparse_problems import (
    CODES,
    EVERY_DTYPE,
    FP8,
    IS_DEEP,
    Call,
    call_of,
    calls,
    integers,
    masked,
    misplaced,
    ways,
)

EVERY_IMPLEMENTATION = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
COMPILED_TOO = pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS, *(EMULATED if IS_DEEP else ())])
EACH_DTYPE = pytest.mark.parametrize("dtype", EVERY_DTYPE, ids=str)
NAN = float("nan")


# ---- accuracy


@pytest.mark.parametrize("implementation", FUSED)
@given(call=calls())
def test_accuracy(implementation, call):
    with using(implementation):
        out = call.run()
    truth = call.truth()
    assert out.shape == truth.shape and out.dtype == call.out_dtype() and out.is_contiguous()
    # Terms cancel, and activations vanish where exp does.
    assert_accurate(out, truth, budget=call.budget(truth), zeros=False)


@EACH_DTYPE
@pytest.mark.parametrize(("rows", "implementation"), ways(5, 70))
def test_small_integers_are_the_dense_product(rows, implementation, dtype):
    """Their sums are exact in every order, so the dense product of the masked weight is met in every bit."""
    a, weight = integers((rows, 300), dtype, 1), masked(integers((130, 300), dtype, 2), 3)
    options = {"bias": integers((130,), torch.float32, 4, 9), "activation": "relu"}
    if dtype in CODES:
        options |= {"out_dtype": torch.float32, "scale_b": torch.tensor([0.25, 1.0]).repeat(65)}
        options["scale_a"] = torch.tensor([0.5, 2.0, 4.0]).repeat(rows)[:rows]
    call = Call(a, weight, options)
    with using(implementation):
        assert torch.equal(call.run(), call.truth().to(call.out_dtype()))
        del options["activation"], options["bias"]
        assert torch.equal(call.run(), call.truth().to(call.out_dtype()))


@EACH_DTYPE
@EVERY_IMPLEMENTATION
@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
def test_every_epilogue_is_exact_where_it_can_be(activation, implementation, dtype):
    """At multiples of 128 every activation gives its argument or 0."""
    whole = 1 if dtype in CODES else 8
    a = integers((3, 40), torch.float32, 1).mul(whole).to(dtype)
    weight = masked(integers((18, 40), torch.float32, 2).mul(2 * whole), 3).to(dtype)
    for out_dtype in DTYPES if dtype in CODES else (dtype,):
        options = {"bias": (128 * torch.arange(-9, 9)).to(out_dtype), "activation": activation, "out_dtype": out_dtype}
        if dtype in CODES:
            options |= {"scale_a": torch.tensor([16.0, 64.0, 128.0]), "scale_b": torch.full((18,), 8.0)}
        call = Call(a, weight, options)
        with using(implementation):
            assert torch.equal(call.run(), call.truth().to(out_dtype))


@COMPILED_TOO
def test_sums_of_int8_are_exact(implementation):
    """B39: ModelTC/LightX2V#896, tile-ai/tilelang#2172: sums kept in 8 bits; here as large as MAX_K_INT8 allows."""
    depth = MAX_K_INT8 if implementation in ("torch", "reference") else 4096
    weight = torch.zeros(3, depth, dtype=torch.int8)
    for places, row, value in (((0, 1), 0, -128), ((0, 3), 1, 127), ((2, 3), 2, 1)):
        for place in places:
            weight[row, place::4] = value
    call = Call(torch.full((2, depth), -128, dtype=torch.int8), weight, {"out_dtype": torch.float32})
    with using(implementation):
        assert torch.equal(call.run(), torch.tensor([8192.0, -8128.0, -64.0]).mul(depth).expand(2, 3))


# ---- properties


@EACH_DTYPE
@COMPILED_TOO
def test_a_weight_of_ones_at_every_place_picks_columns(implementation, dtype):
    """A one in each row and column: the result is a itself, in whatever order; each place of metadata is tried."""
    order = torch.randperm(130, generator=torch.Generator().manual_seed(0))
    weight = torch.zeros(130, 130)
    weight[torch.arange(130), order] = 1.0
    call = Call(make_tensor((7, 130), dtype, seed=1, magnitude=100.0 if dtype in CODES else 1.0), weight.to(dtype))
    with using(implementation):
        out = call.run(**({"out_dtype": torch.float16} if dtype in CODES else {}))
    assert torch.equal(out.double(), call.a[:, order].double())


@pytest.mark.parametrize("implementation", FUSED)
@settings(max_examples=settings.default.max_examples // 3)
@given(call=calls())
def test_strides_and_addresses_change_nothing(implementation, call):
    """Memory between the rows of a holds NaN; compressed weights may start anywhere in theirs."""
    before = [x.clone() for x in call.args]
    plain = [x.clone(memory_format=torch.contiguous_format) for x in call.args]
    with using(implementation):
        assert torch.equal(call.run(), sparse_matmul(*plain, **call.options))
    for x, kept in zip(call.args, before, strict=True):
        assert torch.equal(*(t.view(torch.uint8) if t.element_size() == 1 else t for t in (x, kept)))


@EACH_DTYPE
@EVERY_IMPLEMENTATION
def test_results_are_the_same_from_run_to_run(implementation, dtype):
    """B37: pytorch/pytorch#155333: 2:4 products that were wrong, and not the same twice."""
    call = call_of(dtype, 33, 65, 300)
    with using(implementation):
        first = call.run()
        assert all(torch.equal(call.run(), first) for _ in range(3))


@EVERY_IMPLEMENTATION
def test_scales_multiply(implementation):
    """Each of them, by a power of two, in every shape that it may have; None is 1."""
    call = call_of(torch.int8, (2, 3), 9, 100, out_dtype=torch.float32, scales=(None, None))
    ones = {"scale_a": [(), (1,), (6,), (2, 3)], "scale_b": [(), (1,), (9,)]}
    with using(implementation):
        plain = call.run()
        for name, shapes in ones.items():
            for shape in shapes:
                assert torch.equal(call.run(**{name: torch.full(shape, 4.0)}), 4 * plain)
        powers = 2.0 ** torch.arange(6)
        by_row = call.run(scale_a=powers.view(2, 3))
        assert torch.equal(by_row, plain * powers.view(2, 3, 1)) and torch.equal(call.run(scale_a=powers), by_row)


@EACH_DTYPE
@COMPILED_TOO
@pytest.mark.parametrize("rows", [1, 70], ids=["few rows", "tiles"])
def test_nothing_is_rounded_before_the_end(rows, implementation, dtype):
    """Half a step of the result's dtype from the sum, the other half from a bias of float32: together a whole one."""
    out_dtype = torch.bfloat16 if dtype in CODES else dtype
    half = torch.finfo(out_dtype).eps / 2
    weight = torch.zeros(3, 70)
    weight[:, 66] = 1.0
    call = Call(torch.ones(rows, 70).to(dtype), weight.to(dtype), {"bias": torch.full((3,), 1.0 + half)})
    if dtype in CODES:
        call.options["scale_b"] = torch.tensor(half)
    else:
        call.args = call.a * half, *call.args[1:]
    if dtype == torch.float32:
        call.options["bias"] = torch.ones(3)
        call.args = call.a * 2 * half, *call.args[1:]
    with using(implementation):
        assert torch.equal(call.run(), torch.full((rows, 3), 1.0 + 2 * half, dtype=out_dtype))


@EACH_DTYPE
@EVERY_IMPLEMENTATION
def test_empty_and_single(implementation, dtype):
    with using(implementation):
        assert call_of(dtype, 0, 7, 20).run().shape == (0, 7)
        assert call_of(dtype, (3, 0), 7, 20).run().shape == (3, 0, 7)
        call = call_of(dtype, (), 7, 20, scales=("one", "row"))
        assert call.run().shape == (7,)
        assert_accurate(call.run(), call.truth(), zeros=False)


@EVERY_IMPLEMENTATION
def test_what_is_no_number_stays_in_its_row(implementation):
    call = call_of(torch.float32, 6, 20, 70)
    with using(implementation):
        clean = call.run()
        call.a[2, 5], call.a[4, 69] = NAN, float("inf")
        found = call.run()
        assert torch.equal(found[[0, 1, 3, 5]], clean[[0, 1, 3, 5]])
        hit = call.weight[:, 5] != 0
        assert hit.any() and found[2, hit].isnan().all()


@pytest.mark.parametrize("dtype", EVERY_DTYPE if IS_DEEP else [torch.float32, torch.bfloat16, FP8], ids=str)
@pytest.mark.parametrize(("rows", "implementation"), ways(3, 70))
def test_metadata_of_any_bits_stays_in_its_row(rows, implementation, dtype):
    """What `compress_24` cannot have written has no meaning, but reads and writes nothing outside: rows beside it."""
    if implementation.startswith("emulate"):
        rows = min(rows, 64)  # more are multiplied by mma.sp, of which the emulator reports such metadata
    call = call_of(dtype, rows, 70, 200)
    a, values, metadata = call.args
    broken = metadata.clone()
    broken[[3, 40]] = torch.randint(0, 256, (2, metadata.shape[1]), generator=torch.Generator().manual_seed(0)).byte()
    broken[41], broken[42] = 0xFF, 0
    others = [row for row in range(70) if row not in (3, 40, 41, 42)]
    with using(implementation):
        assert torch.equal(sparse_matmul(a, values, broken, **call.options)[:, others], call.run()[:, others])


def test_what_was_decompressed_is_what_is_multiplied():
    """The two ways through the format agree with the reference of each other, at an odd address as well."""
    for dtype in EVERY_DTYPE:
        call = call_of(dtype, 4, 33, 77)
        for offset in (0, 1):
            values, metadata = (misplaced(x, offset) for x in call.args[1:])
            dense = fusedops.decompress_24(values, metadata, in_features=77)
            assert torch.equal(dense.double(), call.weight.double())
            assert torch.equal(sparse_matmul(call.a, values, metadata, **call.options), call.run())


@EACH_DTYPE
def test_torch_works_on_the_weight_in_parts(dtype, monkeypatch):
    """Of two rows of the weight, and of one in the end."""
    call = call_of(dtype, 4, 33, 77)
    monkeypatch.setattr("fusedops.ops.sparse_matmul._torch.CHUNK", 2 * 77)
    with using("torch"):
        assert_accurate(call.run(), call.truth(), zeros=False)
