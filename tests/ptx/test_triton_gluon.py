"""Gluon kernels, run on the CPU: layouts of their own, and a warp-specialised Hopper matmul."""

import pytest
import torch
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from fusedops.testing import assert_accurate, ptx
from tests.ptx.kernels import gluon_matmul


@pytest.mark.parametrize("target", ("sm_80", "sm_90a"))
def test_copy(target):
    x = torch.randn(300)
    out = torch.full_like(x, 7)
    ptx.run(gluon_matmul.gluon_copy_kernel, (2,), x, out, 290, BLOCK=256, target=target, num_warps=2)
    assert torch.equal(out[:290], x[:290])
    assert (out[290:] == 7).all()


@pytest.mark.parametrize("stages", (1, 2, 3))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_warp_specialised_matmul(dtype, stages):
    a, b = torch.randn(64, 192).to(dtype), torch.randn(128, 192).to(dtype)
    out = torch.empty(64, 128, dtype=dtype)
    layout = gl.NVMMASharedLayout.get_default_for([64, 64], gl.bfloat16 if dtype == torch.bfloat16 else gl.float16)
    descriptors = [TensorDescriptor.from_tensor(one, [64, 64], layout) for one in (a, b, out)]
    ptx.run(gluon_matmul.gluon_matmul_kernel, (1, 2), *descriptors, 192, STAGES=stages)
    assert_accurate(out, a.double() @ b.double().T, zeros=False)
