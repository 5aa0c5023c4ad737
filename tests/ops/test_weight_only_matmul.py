"""weight_only_matmul: int8, float8 and 4-bit weights with scales of every kind."""

import importlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import fusedops
from fusedops import weight_only_matmul
from fusedops.ops.weight_only_matmul import _torch
from fusedops.testing import assert_accurate, make_tensor, strategies
from tests.ops.common import DTYPES, EMULATED, EVERY_KERNEL, IMPLEMENTATIONS, using
from tests.ops.weight_problems import FP8, INF, KINDS, NAN, budget_of, ints, spread, truth_of, weight_of

ACTIVATIONS = (None, "silu", "gelu", "gelu_tanh", "relu")
EVERY_IMPLEMENTATION = pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS, *EMULATED])


# ---- accuracy


@EVERY_IMPLEMENTATION
@given(
    sizes=st.tuples(st.integers(0, 6), st.integers(1, 70), st.one_of(st.integers(1, 300), st.sampled_from([32, 256]))),
    kind=st.sampled_from(KINDS), group=st.sampled_from([32, 64, 128]), dtype=strategies.dtypes(), data=st.data(),
)  # fmt: skip
def test_accuracy(implementation, sizes, kind, group, dtype, data):
    M, N, K = sizes
    seed = data.draw(strategies.seeds())
    values, scale, zero = weight_of(kind, N, K, group, seed)
    magnitude = data.draw(strategies.magnitudes())
    x = make_tensor((M, K), dtype, seed=seed, magnitude=magnitude, layout=data.draw(strategies.layouts()))
    if data.draw(st.booleans()):
        values, pad = spread(values, 3), 1
        scale = spread(scale, pad) if scale.dim() == 2 else scale
    scale = scale.to(data.draw(st.sampled_from([dtype, torch.float32])))
    options = {"zero": zero, "activation": data.draw(st.sampled_from(ACTIVATIONS))}
    options["gated"] = gated = N % 2 == 0 and options["activation"] is not None and magnitude <= 1.0
    if data.draw(st.booleans()):
        options["bias"] = make_tensor((N,), data.draw(st.sampled_from([dtype, torch.float32])), seed=seed + 5)
    if data.draw(st.booleans()):
        width, layout = N // (1 + gated), data.draw(strategies.layouts())
        options["residual"] = make_tensor((M, width), dtype, seed=seed + 6, layout=layout)
    with using(implementation):
        out = weight_only_matmul(x, values, scale, **options)
    truth = truth_of(x, values, scale, **options)
    assert out.is_contiguous() and out.dtype == dtype
    budget = budget_of(implementation, x, values, scale, zero, truth, options.get("bias"), options["activation"])
    assert_accurate(out, truth, budget=budget, zeros=False)  # terms that are rounded may cancel


@EVERY_IMPLEMENTATION
@pytest.mark.parametrize("kind", ["int8 row", "fp8 block", "int4 group"])
def test_whole_numbers_are_exact(implementation, kind):
    """In every dtype: sums of whole numbers, halved; bias and residual too."""
    for dtype, (M, N, K) in zip(DTYPES, ((3, 40, 200), (2, 130, 70), (1, 33, 160))):
        values, scale, zero = weight_of(kind, N, K, seed=3, codes=1)
        x, bias, residual = (ints(shape, -1, 1, i, dtype) for i, shape in enumerate(((M, K), (N,), (M, N))))
        options = {"zero": zero, "bias": bias, "activation": "relu", "residual": residual}
        with using(implementation):
            out = weight_only_matmul(x, values, scale, **options)
        assert torch.equal(out, truth_of(x, values, scale, **options).to(dtype)), dtype


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", ["int8 row", "int8 block", "fp8 row", "int4 group"])
def test_every_epilogue_is_exact_where_it_can_be(kind, implementation):
    """At multiples of 128 every activation gives its argument or 0. Of pairs the gates are such, the ups small."""
    stored, granularity = kind.split()
    values, scale, _ = weight_of(kind, 18, 40, seed=3, codes=None if stored == "int4" else 2)
    scale, ups = torch.full_like(scale, 128.0), torch.tensor([1.0, 1 / 128]).repeat(9)
    zero = None if stored != "int4" else torch.full_like(scale, 7 * 16, dtype=torch.uint8)
    residual = ints((3, 18), -9, 9, 2)
    for dtype in DTYPES:
        x = ints((3, 40), -1, 1, 1, dtype)
        tables = {"zero": zero, "bias": (128 * torch.arange(-9, 9)).to(dtype), "residual": residual.to(dtype)}
        with using(implementation):
            for activation in ACTIVATIONS:
                options = {**tables, "activation": activation}
                out = weight_only_matmul(x, values, scale, **options)
                assert torch.equal(out, truth_of(x, values, scale, **options).to(dtype)), (dtype, activation)
                if activation is None or granularity == "block":
                    continue
                paired = scale * (ups if scale.dim() == 1 else ups[:, None])
                options |= {"gated": True, "residual": options["residual"][:, 9:]}
                out = weight_only_matmul(x, values, paired, **options)
                assert torch.equal(out, truth_of(x, values, paired, **options).to(dtype)), (dtype, activation)


@EVERY_IMPLEMENTATION
@pytest.mark.parametrize("dtype", DTYPES[::2], ids=str)
def test_every_code_is_exact(implementation, dtype):
    """Denormal float8 numbers, both zeros and NaN included; every 4-bit code less every zero, in sixteenths."""
    x = torch.tensor([[1.0], [-2.0]], dtype=dtype)
    with using(implementation):
        codes = torch.arange(256, dtype=torch.uint8).view(-1, 1)
        for values in (codes.view(torch.int8), codes.view(FP8)):
            out = weight_only_matmul(x, values, torch.tensor(0.5))
            expected = (values.double() * 0.5).T * x.double()
            torch.testing.assert_close(out, expected.to(dtype), rtol=0, atol=0, equal_nan=True)
        pairs = torch.arange(16, dtype=torch.uint8).repeat_interleave(16)
        values, zero = (pairs * 17).view(-1, 1).expand(256, 8).contiguous(), torch.arange(256, dtype=torch.uint8)
        eye = torch.eye(16, dtype=dtype)[:2]
        for shift in range(0, 256, 15):  # of 16 different zeros to a code, and of others each time
            zeros = zero.roll(shift)
            out = weight_only_matmul(eye, values, torch.ones(256, 1), zero=zeros.view(-1, 1))
            assert torch.equal(out, (pairs - zeros / 16).to(dtype).expand(2, 256))
        out = weight_only_matmul(eye, values, torch.ones(256, 1))
    assert torch.equal(out, (pairs.int() - 8).to(dtype).expand(2, 256))


@pytest.mark.parametrize("implementation, K", [("torch", 131_072), ("triton", 16_384)])
def test_long_sums_of_the_largest_codes_are_exact(implementation, K):
    """B39: ModelTC/LightX2V#896: sums of -128 that did not fit their accumulator."""
    values = torch.full((2, K), -128, dtype=torch.int8)
    with using(implementation):
        out = weight_only_matmul(torch.ones(1, K, dtype=torch.bfloat16), values, torch.ones(2))
    assert torch.equal(out, torch.full((1, 2), -128.0 * K).bfloat16())


@pytest.mark.parametrize("kind", ["fp8 row", "fp8 block"])
def test_bits_of_float8_where_the_hardware_does_not_convert_them(kind, monkeypatch):
    from fusedops.ops.weight_only_matmul import _triton

    monkeypatch.setattr(_triton, "MIN_FP8_CAPABILITY", 1000)
    values, scale, _ = weight_of(kind, 40, 200, seed=5)
    x = make_tensor((2, 200), torch.float16, seed=1)
    with using("triton"):
        assert_accurate(weight_only_matmul(x, values, scale), truth_of(x, values, scale))


# ---- properties


@EVERY_KERNEL
@pytest.mark.parametrize("kind", ["int8 row", "int4 group"])
def test_parts_of_long_rows(implementation, kind):
    """Rows long enough that their sums are cut into parts."""
    values, scale, zero = weight_of(kind, 20, 1100, seed=2)
    x = make_tensor((2, 1100), torch.bfloat16, seed=1)
    explained = fusedops.explain("weight_only_matmul", x, values, scale, zero=zero, target="sm_90a")
    assert "splits=1" not in explained.config
    with using(implementation):
        out = weight_only_matmul(x, values, scale, zero=zero)
    assert_accurate(out, truth_of(x, values, scale, zero))


@pytest.mark.parametrize("implementation", EMULATED)
@pytest.mark.parametrize("rows", [(1, 40), (70, 130)])
def test_a_row_does_not_depend_on_its_batch(implementation, rows):
    """Bitwise, among few rows and among many, with every tile there is."""
    few, many = rows
    values, scale, _ = weight_of("int8 row", 140, 70, seed=4)
    x = make_tensor((many, 70), torch.bfloat16, seed=1)
    with using(implementation):
        assert torch.equal(weight_only_matmul(x[:few], values, scale), weight_only_matmul(x, values, scale)[:few])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("bad", [NAN, INF])
def test_a_bad_value_damages_its_own_row_or_column_alone(implementation, bad):
    for kind in ("int8 row", "int4 group", "fp8 group"):
        values, scale, zero = weight_of(kind, 9, 64, seed=1)
        x = make_tensor((4, 64), torch.float32, seed=2)
        with using(implementation):
            clean = weight_only_matmul(x, values, scale, zero=zero)
            x[2, 5], scale[3] = bad, bad
            out = weight_only_matmul(x, values, scale, zero=zero)
        keep = torch.ones(4, 9, dtype=torch.bool)
        keep[2], keep[:, 3] = False, False
        assert torch.equal(out[keep], clean[keep])
        assert not out[:, 3].isfinite().any() and not out[2].isfinite().all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_scales_multiply(implementation, kind):
    """Doubled they double the result; one for all is one for each row; x is not changed, more dimensions are rows."""
    values, scale, zero = weight_of(kind, 20, 96, seed=6)
    x = make_tensor((2, 3, 96), torch.float32, seed=7, layout="transposed")
    before = x.clone()
    with using(implementation):
        out = weight_only_matmul(x, values, scale, zero=zero)
        assert torch.equal(weight_only_matmul(x, values, scale * 2, zero=zero), out * 2)
        flat = weight_only_matmul(x.reshape(6, 96), values, scale, zero=zero)
        torch.testing.assert_close(flat.view(2, 3, 20), out)
        if scale.dim() == 0:
            for same in (scale.view(1), scale.expand(20), scale.repeat(20)):
                assert torch.equal(weight_only_matmul(x, values, same), out)
    assert torch.equal(x, before) and out.count_nonzero() > 100


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", ["int8 block", "fp8 block"])
def test_several_blocks_of_rows_and_columns(implementation, kind):
    values, scale, _ = weight_of(kind, 300, 140, seed=6)
    x = make_tensor((2, 140), torch.float32, seed=7)
    with using(implementation):
        assert_accurate(weight_only_matmul(x, values, scale), truth_of(x, values, scale))


@EVERY_KERNEL
@pytest.mark.parametrize("K", [70, 1100])
def test_residuals_and_x_in_wider_buffers(implementation, K):
    """Whose slack is NaN; with long rows the parts' sum reads the residual."""
    values, scale, _ = weight_of("int8 row", 20, K, seed=6)
    x, residual = (make_tensor((3, size), torch.bfloat16, seed=size, layout="padded") for size in (K, 20))
    with using(implementation):
        out = weight_only_matmul(x, values, scale, residual=residual)
        assert torch.equal(out, weight_only_matmul(x.contiguous(), values, scale, residual=residual.contiguous()))
    assert_accurate(out, truth_of(x, values, scale, residual=residual))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_tables_of_any_strides(implementation):
    """B25: pytorch/FBGEMM#2713: nonsense for operands in another order."""
    values, scale, zero = weight_of("int4 group", 20, 100, seed=6)
    x = make_tensor((3, 100), torch.float32, seed=7)
    with using(implementation):
        out = weight_only_matmul(x, values, scale, zero=zero)
        other = weight_only_matmul(x, values, scale.T.contiguous().T, zero=zero.T.contiguous().T)
        rows = weight_only_matmul(x, values.repeat_interleave(2, 0)[::2], scale, zero=zero)
        assert torch.equal(out, other) and torch.equal(out, rows)
    with pytest.raises(ValueError, match="values must have a contiguous last dimension"):
        weight_only_matmul(x, values.T.contiguous().T, scale, zero=zero)


@pytest.mark.parametrize("K", [1, 15, 31, 33, 100])
def test_short_and_odd_rows_in_bfloat16_on_the_cpu(K):
    """torch's product with int8 weights reads whole vectors of 16: beyond the end of such rows."""
    values, scale, _ = weight_of("int8 row", 33, K, seed=1)
    x = make_tensor((3, K), torch.bfloat16, seed=1)
    with using("torch"):
        assert_accurate(weight_only_matmul(x, values, scale), truth_of(x, values, scale))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_rows_of_zeros(implementation):
    """B35: pytorch/ao#4713: a scale of 0 became NaN. Zero codes are zeros, and so are codes that are their zero."""
    x = make_tensor((2, 64), torch.float32, seed=0)
    with using(implementation):
        for values in (torch.zeros(3, 64, dtype=torch.int8), torch.zeros(3, 64).to(FP8)):
            assert not weight_only_matmul(x, values, torch.full((3,), 2.0**-126)).any()
        quantised = fusedops.quantize_int4(torch.zeros(3, 64))
        assert not weight_only_matmul(x, quantised[0], quantised[1], zero=quantised[2]).any()


@pytest.mark.parametrize("kind", KINDS)
def test_memory_on_the_cpu_is_not_that_of_the_expanded_weight(kind):
    N, K = 2048, 512
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.dtype == torch.float32:
                largest = max(largest, out.untyped_storage().nbytes())
            return out

    values, scale, zero = weight_of(kind, N, K)
    for dtype in (torch.float32, torch.bfloat16):
        with Watch():  # around the composition itself: of an operator a mode sees the outside alone
            _torch.weight_only_matmul(torch.ones(1, K, dtype=dtype), values, scale, zero, None, None, None)
    assert 0 < largest <= N * K * 4 // 4


@pytest.mark.parametrize("offset", [1, 8, 15, 16, 31])
def test_operands_anywhere_in_memory(offset):
    """torch's product with int8 weights ends the process where an operand is not aligned to its vectors."""
    x, values = ints((3, 64), -2, 2, 0, torch.bfloat16), ints((5, 64), -2, 2, 1, torch.int8)
    scale = torch.ones(5, dtype=torch.bfloat16)
    expected = x.float() @ values.float().T  # at most 256, which bfloat16 has
    for shifted in (("x",), ("values",), ("x", "values")):
        operands = {"x": x, "values": values}
        for name in shifted:
            tensor = operands[name]
            operands[name] = tensor.new_empty(tensor.numel() + offset)[offset:].view(tensor.shape).copy_(tensor)
        with using("torch"):
            assert torch.equal(weight_only_matmul(**operands, scale=scale).float(), expected)


@pytest.mark.emulated
@pytest.mark.parametrize("tile", [(64, 64, 4), (128, 128, 8)], ids=str)
@pytest.mark.parametrize("kind", ["int8 row", "fp8 row", "int4 symmetric"])
def test_products_are_waited_for_before_their_weights_are_overwritten(kind, tile, monkeypatch):
    """Hopper's many rows: weights lie in registers, which products read until they are waited for (the emulator looks).

    A product that is left running into the next step was a fault with both formats of 8 bits.
    """
    kernels = importlib.import_module("fusedops.ops.weight_only_matmul._triton")
    block_m, block_n, num_warps = tile
    monkeypatch.setattr(kernels, "default", lambda *_: kernels.WeightOnlyConfig(block_m, block_n, 64, 1, num_warps, 3))
    values, scale, zero = weight_of(kind, 96, 256, group=64)
    x = make_tensor((65, 256), torch.bfloat16, seed=1)
    with using("emulate-sm_90a"):
        out = weight_only_matmul(x, values, scale, zero=zero)
    assert_accurate(out, truth_of(x, values, scale, zero))
