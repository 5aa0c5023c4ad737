"""Triton kernels of elements and rows, compiled and run on the CPU, against torch in float64."""

import pytest
import torch

from fusedops.testing import assert_accurate, make_tensor, ptx
from tests.ptx.kernels import elementwise

TARGETS = ("sm_80", "sm_90a")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.int32, torch.int8, torch.int64, torch.float64], ids=str)
def test_vector_add(dtype, target):
    x, y = (torch.randint(-60, 60, (300,)).to(dtype) for _ in range(2))
    out = torch.empty_like(x)
    ptx.run(elementwise.add_kernel, lambda meta: (-(-meta["n"] // meta["BLOCK"]),), x, y, out, 300, BLOCK=128,
            target=target, read_only=("x_ptr", "y_ptr"))  # fmt: skip
    assert torch.equal(out, x + y)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_softmax(dtype, target):
    x = make_tensor((3, 200), dtype, seed=1, layout="padded")
    out = torch.empty(3, 200, dtype=dtype)
    ptx.run(elementwise.softmax_kernel, (3,), x, out, x.stride(0), 200, BLOCK=256, target=target)
    assert_accurate(out, torch.softmax(x.double(), 1))


@pytest.mark.parametrize("num_warps", (1, 4))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layer_norm(dtype, num_warps):
    x, weight, bias = (make_tensor(shape, dtype, seed=seed) for seed, shape in enumerate([(2, 300), (300,), (300,)]))
    out, mean, rstd = torch.empty_like(x), torch.empty(2), torch.empty(2)
    ptx.run(elementwise.layer_norm_kernel, (2,), x, weight, bias, out, mean, rstd, 300, 1e-5, BLOCK=128,
            num_warps=num_warps, target="sm_80")  # fmt: skip
    truth = torch.nn.functional.layer_norm(x.double(), (300,), weight.double(), bias.double(), 1e-5)
    assert_accurate(out, truth, zeros=False)  # zeros=False: a product may cancel the bias
    assert_accurate(mean, x.double().mean(1))
    assert_accurate(rstd, (x.double().var(1, correction=0) + 1e-5).rsqrt())
