"""The repaired interpreter against torch's own casts and arithmetic, and the faults that it repairs."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from fusedops.testing import assert_accurate, formats, interpreter, make_tensor
from fusedops.testing.formats import BFLOAT16, FLOAT8_E4M3FN, FLOAT8_E5M2, FLOAT16, FLOAT32

FLOAT8 = [(torch.float8_e4m3fn, FLOAT8_E4M3FN), (torch.float8_e5m2, FLOAT8_E5M2)]
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore:tl.make_block_ptr is deprecated")
TORCH_FORMATS = [(torch.bfloat16, BFLOAT16), *FLOAT8]


@pytest.fixture(autouse=True)
def repaired():
    interpreter.install()
    yield
    interpreter.install()


@triton.jit
def _cast_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + offs, tl.load(x_ptr + offs).to(out_ptr.dtype.element_ty))


@triton.jit
def _cast_to_zero_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs)
    tl.store(out_ptr + offs, tl.cast(x, out_ptr.dtype.element_ty, fp_downcast_rounding="rtz"))


@triton.jit
def _arithmetic_kernel(x_ptr, y_ptr, out_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    x, y = tl.load(x_ptr + offs), tl.load(y_ptr + offs)
    tl.store(out_ptr + offs, x + y)
    tl.store(out_ptr + BLOCK + offs, x - y)
    tl.store(out_ptr + 2 * BLOCK + offs, x * y)
    tl.store(out_ptr + 3 * BLOCK + offs, x / y)
    tl.store(out_ptr + 4 * BLOCK + offs, -x)
    tl.store(out_ptr + 5 * BLOCK + offs, tl.abs(x))
    tl.store(out_ptr + 6 * BLOCK + offs, tl.where(x < y, x, y))
    tl.store(out_ptr + 7 * BLOCK + offs, tl.maximum(x, y))
    tl.store(out_ptr + 8 * BLOCK + offs, x * 3 + 1.5)
    tl.store(out_ptr + 9 * BLOCK + offs, tl.exp(x.to(tl.float32)).to(tl.bfloat16))
    tl.store(out_ptr + 10 * BLOCK + offs, tl.fma(x, y, y))


@triton.jit
def _compare_kernel(x_ptr, y_ptr, out_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    x, y = tl.load(x_ptr + offs), tl.load(y_ptr + offs)
    both = (x < y) & (x <= y)
    tl.store(out_ptr + offs, both.to(tl.int32))
    tl.store(out_ptr + BLOCK + offs, (x > y).to(tl.int32))
    tl.store(out_ptr + 2 * BLOCK + offs, (x >= y).to(tl.int32))
    tl.store(out_ptr + 3 * BLOCK + offs, (x == y).to(tl.int32))
    tl.store(out_ptr + 4 * BLOCK + offs, (x != y).to(tl.int32))


@triton.jit
def _constants_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(out_ptr + offs, tl.load(x_ptr + offs, mask=offs < n, other=3))
    tl.store(out_ptr + BLOCK + offs, tl.load(x_ptr + offs, mask=offs < n, other=-float("inf")))
    tl.store(out_ptr + 2 * BLOCK + offs, tl.full((BLOCK,), 2.7, tl.bfloat16))
    tl.store(out_ptr + 3 * BLOCK + offs, tl.zeros((BLOCK,), tl.bfloat16))
    tl.store(out_ptr + 4 * BLOCK + offs, offs.to(tl.bfloat16))
    tl.store(out_ptr + 5 * BLOCK + offs, (offs < n).to(tl.bfloat16))
    tl.store(out_ptr + 6 * BLOCK + offs, tl.load(x_ptr + offs, mask=offs < n, other=0).to(tl.int32))


@triton.jit
def _first_of_larger(a, b):
    return tl.where(a > b, a, b)


@triton.jit
def _sum_of_two(a, b):
    return a + b


@triton.jit
def _reduce_kernel(x_ptr, out_ptr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    rows, columns = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    x = tl.load(x_ptr + rows[:, None] * COLUMNS + columns[None, :])
    tl.store(out_ptr + rows, tl.reduce(x, 1, _first_of_larger))
    tl.store(out_ptr + ROWS + rows, tl.max(x, 1))
    tl.store(out_ptr + 2 * ROWS + rows, tl.min(x, 1))
    tl.store(out_ptr + 3 * ROWS + rows, tl.sum(x, 1))
    tl.store(out_ptr + 4 * ROWS + rows, tl.reduce(x, 1, _sum_of_two))
    tl.store(out_ptr + 5 * ROWS + rows, tl.sum(x.to(tl.float32), 1))


@triton.jit
def _dot_kernel(a_ptr, b_ptr, out_ptr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    rows, columns, inner = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    a = tl.load(a_ptr + rows[:, None] * K + inner[None, :])
    b = tl.load(b_ptr + inner[:, None] * N + columns[None, :])
    acc = tl.zeros((M, N), tl.float32)
    acc = tl.dot(a, b, acc)
    tl.store(out_ptr + rows[:, None] * N + columns[None, :], acc)


@triton.jit
def _add_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs)
    tl.store(out_ptr + offs, x + x)


@triton.jit
def _atomic_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.atomic_add(out_ptr + offs, tl.load(x_ptr + offs))


@triton.jit
def _number_of_two_kernel(x_ptr, y_ptr, out_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    x, y = tl.load(x_ptr + offs), tl.load(y_ptr + offs)
    tl.store(out_ptr + offs, tl.maximum(x, y))
    tl.store(out_ptr + BLOCK + offs, tl.minimum(x, y))
    tl.store(out_ptr + 2 * BLOCK + offs, tl.clamp(x, -1.0, 1.0))
    tl.store(out_ptr + 3 * BLOCK + offs, tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL))


@triton.jit
def _nan_padding_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    block = tl.make_block_ptr(x_ptr, (n,), (1,), (0,), (BLOCK,), (0,))
    tl.store(out_ptr + tl.arange(0, BLOCK), tl.load(block, boundary_check=(0,), padding_option="nan"))


def cast(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Cast in a kernel, in few programs."""
    block = min(1 << 17, 1 << (x.numel() - 1).bit_length())
    padded = torch.zeros(-(-x.numel() // block) * block, dtype=x.dtype)
    padded[: x.numel()] = x
    out = torch.empty(padded.shape, dtype=dtype)
    _cast_kernel[(padded.numel() // block,)](padded, out, BLOCK=block)
    return out[: x.numel()]


def same_bits(out: torch.Tensor, expected: torch.Tensor) -> bool:
    """Equal bit by bit, where any NaN equals any other."""
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[out.element_size()]
    nans = out.float().isnan() & expected.float().isnan()
    return bool((nans | (out.view(integer) == expected.view(integer))).all()) and out.dtype == expected.dtype


def around_bfloat16() -> torch.Tensor:
    """Each bfloat16 number as float32, its neighbours, the tie above it and the tie's neighbours."""
    codes = torch.arange(1 << 16, dtype=torch.int64) << 16
    steps = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    bits = (codes[:, None] + steps).flatten()
    return (bits - (bits >= 1 << 31) * (1 << 32)).to(torch.int32).view(torch.float32)


def around_float8(dtype: torch.dtype) -> torch.Tensor:
    """Each float8 number and each tie as float32 with its neighbours, and numbers far outside."""
    values = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    finite = values[values.isfinite()].unique()
    ties = (finite[1:] + finite[:-1]) / 2
    exact = torch.cat([values, ties, torch.tensor([464.0, 465.0, 480.0, 61440.0, 61441.0, 1e6, 3e38, 1e-9, 1e-40])])
    exact = torch.cat([exact, -exact])
    below, above = (torch.nextafter(exact, torch.tensor(side)) for side in (-torch.inf, torch.inf))
    return torch.cat([exact, below, above])


@pytest.mark.parametrize(("dtype", "source"), TORCH_FORMATS)
def test_decoding_every_pattern_equals_torch(dtype, source):
    codes = np.arange(1 << source.bits, dtype=f"uint{source.bits}")
    expected = torch.from_numpy(codes).view(dtype).float()
    assert same_bits(torch.from_numpy(formats.decode(codes, source)), expected)


def test_cast_to_bfloat16_equals_torch():
    x = around_bfloat16()
    assert same_bits(cast(x, torch.bfloat16), x.to(torch.bfloat16))


def test_cast_from_bfloat16_equals_torch():
    x = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)
    assert same_bits(cast(x, torch.float32), x.float())
    assert same_bits(cast(x, torch.float16), x.to(torch.float16))


def test_cast_from_float64_rounds_once():
    ties_in_float32 = np.array([1 + 2**-8 + 2**-40, 1 + 2**-8 - 2**-40, -(1 + 2**-8 + 2**-40)])
    encoded = formats.encode(ties_in_float32, BFLOAT16)
    assert formats.decode(encoded, BFLOAT16).tolist() == [1 + 2**-7, 1.0, -(1 + 2**-7)]


@pytest.mark.parametrize(("dtype", "target"), FLOAT8)
def test_cast_to_float8_equals_torch_and_saturates(dtype, target):
    x = around_float8(dtype)
    largest = torch.finfo(dtype).max
    expected = x.clamp(-largest, largest).to(dtype)
    assert same_bits(cast(x, dtype), expected)
    assert same_bits(torch.from_numpy(formats.encode(x.numpy(), target)).view(dtype), expected)
    wide = torch.tensor([torch.inf, -torch.inf, 1e30, -1e30])
    assert cast(wide, dtype).float().tolist() == [largest, -largest, largest, -largest]


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_cast_from_float8_and_between_narrow_formats_equals_torch(dtype):
    x = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(dtype)
    for wide in (torch.float32, torch.float16, torch.bfloat16):
        assert same_bits(cast(x, wide), x.to(wide))
    brain = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)
    largest = torch.finfo(dtype).max
    assert same_bits(cast(brain, dtype), brain.float().clamp(-largest, largest).to(dtype))


def test_cast_to_float16_equals_torch():
    x = torch.cat([around_bfloat16(), make_tensor((50_000,), torch.float32, seed=1, magnitude=1e-5)])
    assert same_bits(cast(x, torch.float16), x.to(torch.float16))


@pytest.mark.parametrize(("dtype", "target"), [(torch.bfloat16, BFLOAT16), (torch.float16, FLOAT16)])
def test_rounding_towards_zero_never_grows(dtype, target):
    specials = (65519.0, -1e-7, 3.4e38, torch.inf, torch.nan)
    x = make_tensor((4096,), torch.float32, seed=2, magnitude=3.0, specials=specials)
    out = torch.empty(4096, dtype=dtype)
    _cast_to_zero_kernel[(1,)](x, out, BLOCK=4096)
    finite = x.isfinite()
    nearest = x.to(dtype)
    grown = nearest.float().abs() > x.abs()
    step_back = torch.nextafter(nearest.double(), torch.zeros((), dtype=torch.float64))
    expected = torch.from_numpy(formats.encode(step_back.numpy(), target, toward_zero=True)).view(dtype)
    expected = torch.where(grown & finite, expected, nearest)
    assert same_bits(out, expected)
    assert bool((out.float().abs() <= x.abs())[finite].all()) and bool(grown.any())


def test_bfloat16_arithmetic_equals_torch():
    specials = (torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 1e-40, 3e38)
    x = make_tensor((256,), torch.bfloat16, seed=3, specials=specials)
    y = make_tensor((256,), torch.bfloat16, seed=4, specials=specials)
    out = torch.empty(11, 256, dtype=torch.bfloat16)
    _arithmetic_kernel[(1,)](x, y, out, BLOCK=256)
    fused = x.double() * y.double() + y.double()
    expected = [
        *(x + y, x - y, x * y, x / y, 0.0 - x, x.abs(), torch.where(x < y, x, y), torch.fmax(x, y)),
        *(x * 3 + 1.5, x.float().exp().bfloat16(), fused.bfloat16()),
    ]
    for index, row in enumerate(expected):
        assert same_bits(out[index], row), f"row {index}"


def test_bfloat16_comparisons_equal_torch():
    x = make_tensor((256,), torch.bfloat16, seed=5, specials=(torch.nan, torch.inf, 0.0))
    y = torch.where(torch.arange(256) % 3 == 0, x, make_tensor((256,), torch.bfloat16, seed=6))
    out = torch.empty(5, 256, dtype=torch.int32)
    _compare_kernel[(1,)](x, y, out, BLOCK=256)
    assert torch.equal(out.bool(), torch.stack([x < y, x > y, x >= y, x == y, x != y]))


def test_bfloat16_constants_masks_and_integers():
    x = make_tensor((32,), torch.bfloat16, seed=7, magnitude=100.0)
    out = torch.empty(7, 32, dtype=torch.bfloat16)
    _constants_kernel[(1,)](x, out, 20, BLOCK=32)
    inside = torch.arange(32) < 20
    assert torch.equal(out[0], torch.where(inside, x, 3.0))
    assert torch.equal(out[1], torch.where(inside, x, -torch.inf))
    assert torch.equal(out[2], torch.full((32,), 2.7, dtype=torch.bfloat16))
    assert torch.equal(out[3], torch.zeros(32, dtype=torch.bfloat16))
    assert torch.equal(out[4], torch.arange(32).bfloat16())
    assert torch.equal(out[5], inside.bfloat16())
    assert torch.equal(out[6], torch.where(inside, x, 0.0).to(torch.int32).bfloat16())


def test_bfloat16_reductions():
    x = make_tensor((4, 16), torch.bfloat16, seed=8)
    out = torch.empty(6, 4, dtype=torch.bfloat16)
    _reduce_kernel[(1,)](x, out, ROWS=4, COLUMNS=16)
    assert torch.equal(out[0], x.amax(1))
    assert torch.equal(out[1], x.amax(1))
    assert torch.equal(out[2], x.amin(1))
    in_order = x[:, 0]
    for column in range(1, 16):
        in_order = in_order + x[:, column]
    assert torch.equal(out[3], in_order) and torch.equal(out[4], in_order)  # tl.sum of bfloat16 rounds every addition
    assert_accurate(out[5], x.double().sum(1), name="sum in float32")
    assert not torch.equal(out[3], out[5])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_dot_is_exact_with_small_integers(dtype):
    a = make_tensor((16, 64), torch.int32, seed=9, magnitude=3)
    b = make_tensor((64, 16), torch.int32, seed=10, magnitude=3)
    out = torch.empty(16, 16)
    _dot_kernel[(1,)](a.to(dtype), b.to(dtype), out, M=16, N=16, K=64)
    assert torch.equal(out, (a @ b).float())


def test_maximum_and_clamp_drop_a_nan_as_the_gpu_does():
    x = torch.tensor([torch.nan, 1.0, torch.nan, -5.0])
    y = torch.tensor([2.0, torch.nan, torch.nan, 7.0])
    out = torch.empty(4, 4)
    _number_of_two_kernel[(1,)](x, y, out, BLOCK=4)
    assert same_bits(out[0], torch.fmax(x, y)) and same_bits(out[1], torch.fmin(x, y))
    assert same_bits(out[2], torch.tensor([-1.0, 1.0, -1.0, -1.0]))
    assert same_bits(out[3], torch.maximum(x, y))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_padding_is_nan(dtype):
    x = make_tensor((16,), dtype, seed=11)
    out = torch.empty(16, dtype=dtype)
    _nan_padding_kernel[(1,)](x, out, 10, BLOCK=16)
    assert torch.equal(out[:10], x[:10]) and bool(out[10:].isnan().all())


@pytest.mark.parametrize(
    ("kernel", "dtype", "message"),
    [
        (_add_kernel, torch.float8_e4m3fn, "arithmetic on float8"),
        (_atomic_kernel, torch.bfloat16, "create_atomic_rmw on bfloat16"),
    ],
)
def test_what_cannot_be_repaired_raises(kernel, dtype, message):
    x = make_tensor((16,), dtype, seed=12)
    with pytest.raises(triton.runtime.errors.InterpreterError, match=message):
        kernel[(1,)](x, torch.zeros_like(x), BLOCK=16)


def test_install_is_idempotent_and_uninstall_restores():
    builder = triton.runtime.interpreter.InterpreterBuilder
    repaired = dict(vars(builder))
    interpreter.install()
    assert dict(vars(builder)) == repaired and interpreter.faults() == []
    interpreter.uninstall()
    assert vars(builder)["cast_impl"] is not repaired["cast_impl"] and "get_bf16" not in vars(builder)
    interpreter.install()
    assert interpreter.faults() == []


@pytest.mark.parametrize(
    "test",
    [
        test_cast_to_bfloat16_equals_torch,
        test_bfloat16_arithmetic_equals_torch,
        test_bfloat16_comparisons_equal_torch,
        test_bfloat16_constants_masks_and_integers,
        test_bfloat16_reductions,
        test_maximum_and_clamp_drop_a_nan_as_the_gpu_does,
        lambda: test_nan_padding_is_nan(torch.bfloat16),
        lambda: test_dot_is_exact_with_small_integers(torch.bfloat16),
        lambda: test_cast_to_float8_equals_torch_and_saturates(torch.float8_e4m3fn, FLOAT8_E4M3FN),
        lambda: test_cast_to_float8_equals_torch_and_saturates(torch.float8_e5m2, FLOAT8_E5M2),
    ],
)
def test_without_the_repair_each_check_fails(test):
    """If Triton is repaired one day, this test says which repairs may go."""
    interpreter.uninstall()
    assert len(interpreter.faults()) == 8
    with pytest.raises((AssertionError, triton.runtime.errors.InterpreterError)):
        test()


def test_an_interpreter_that_stays_wrong_is_refused(monkeypatch):
    interpreter.uninstall()
    monkeypatch.setattr(interpreter, "_replace_all", lambda module: None)
    with pytest.raises(RuntimeError, match="cannot be repaired: casts to bfloat16"):
        interpreter.install()


def test_install_without_the_interpreter_says_what_to_set():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    code = "from fusedops.testing import interpreter; interpreter.install()"
    ended = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 1 and "set TRITON_INTERPRET=1 before triton is imported" in ended.stderr


def test_float32_format_agrees_with_numpy():
    specials = (1e39, torch.nan, -torch.inf, 1e-45)
    x = make_tensor((1000,), torch.float64, seed=13, magnitude=1e-38, specials=specials).numpy()
    with np.errstate(over="ignore"):
        expected = torch.from_numpy(x.astype(np.float32))
    assert same_bits(torch.from_numpy(formats.encode(x, FLOAT32).view(np.float32)), expected)
