"""What quantises, on a GPU: the bits of the reference, and of the two calls that one stands for."""

import pytest
import torch

import fusedops
from fusedops._core import env
from fusedops.ops.quantize import GRANULARITIES, reference
from fusedops.ops.quantize_int4 import reference as four_bits
from tests.gpu.common import DEVICE, randn, same_bits, sized
from tests.ops.common import DTYPES

pytestmark = pytest.mark.gpu

CODES = (torch.int8, torch.float8_e4m3fn, torch.float8_e5m2)
SHAPES = sized([(1, 4096), (300, 14336), (2, 513, 1000), (3, 20000)], [(3, 300), (1, 2, 130)])
EVERY_CODE = pytest.mark.parametrize("code", CODES, ids=str)
EVERY_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)
EVERY_SHAPE = pytest.mark.parametrize("shape", SHAPES, ids=str)


@pytest.fixture(autouse=True)
def _kernels_alone():
    with env.override("FUSEDOPS_BACKEND", "triton"):
        yield


def quantize(x, code, **options):
    if code == torch.int8:
        return fusedops.quantize_int8(x, **options)
    return fusedops.quantize_fp8(x, dtype=code, **options)


@EVERY_SHAPE
@EVERY_DTYPE
@EVERY_CODE
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_every_bit_is_the_reference_s(granularity, code, dtype, shape):
    """Computed on the CPU: torch divides by a number otherwise on a GPU."""
    x = randn(*shape, dtype=dtype, seed=1)
    found = quantize(x, code, granularity=granularity)
    wanted = reference._quantized(x.cpu(), granularity, code)
    assert all(same_bits(a.cpu(), b) for a, b in zip(found, wanted, strict=True))
    again, _ = quantize(x, code, granularity=granularity, scale=found[1])
    assert same_bits(again, found[0])


@EVERY_DTYPE
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("shape", sized([(4096, 4096), (300, 14337), (1, 1)], [(3, 300), (1, 1)]), ids=str)
def test_every_4_bit_code_is_the_reference_s(shape, group, dtype):
    weight = randn(*shape, dtype=dtype, seed=1)
    found = fusedops.quantize_int4(weight, group_size=group)
    wanted = four_bits.quantize_int4(weight.cpu(), group)
    assert all(same_bits(a.cpu(), b) for a, b in zip(found, wanted, strict=True))


@EVERY_CODE
def test_casts_of_every_bfloat16(code):
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    one = torch.ones(())
    values = quantize(x.to(DEVICE), code, scale=one.to(DEVICE))[0].cpu()
    wanted = reference.quantize_scaled(x, one, "tensor", code)
    assert same_bits(values[~x.isnan()], wanted[~x.isnan()])
    assert torch.equal(values.float().isnan(), wanted.float().isnan())


@EVERY_SHAPE
@EVERY_DTYPE
@EVERY_CODE
def test_equal_to_the_two_calls(code, dtype, shape):
    x, residual, weight = (randn(*size, dtype=dtype, seed=i) for i, size in enumerate([shape, shape, shape[-1:]]))
    out, h = fusedops.add_rms_norm(x, residual, weight)
    pairs = (
        (fusedops.rms_norm_quantized(x, weight, dtype=code), quantize(fusedops.rms_norm(x, weight), code)),
        (fusedops.add_rms_norm_quantized(x, residual, weight, dtype=code), (*quantize(out, code), h)),
        (fusedops.silu_mul_quantized(x, residual, dtype=code), quantize(fusedops.silu_mul(x, residual), code)),
    )
    for found, wanted in pairs:
        assert all(same_bits(a, b) for a, b in zip(found, wanted, strict=True))
