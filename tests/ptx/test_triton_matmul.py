"""Matrix products in Triton: dtypes, layouts, pipelines, descriptors, warp specialisation; run on the CPU."""

import pytest
import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from fusedops.testing import Budget, assert_accurate, ptx
from tests.ptx.kernels import CHECKS_OF_POINTERS, matmul

F8 = torch.float8_e4m3fn
# Products of a tf32 matmul have 11 bits; those of fp8 on Hopper are summed with 14 bits.
BUDGETS = {"tf32": Budget(8192, 8192), F8: Budget(2048, 4096)}
CASES = [
    ("sm_80", torch.bfloat16), ("sm_80", torch.float16), ("sm_80", torch.float32), ("sm_80", torch.int8),
    ("sm_89", F8), ("sm_89", torch.bfloat16), ("sm_90a", torch.bfloat16), ("sm_90a", torch.float16),
    ("sm_90a", torch.float32), ("sm_90a", torch.int8), ("sm_90a", F8),
]  # fmt: skip


def operands(m, n, k, dtype):
    """Two matrices ``[M, K]`` and ``[N, K]``."""
    generator = torch.Generator().manual_seed(0)
    if dtype == torch.int8:
        return tuple(torch.randint(-128, 128, (rows, k), dtype=dtype, generator=generator) for rows in (m, n))
    return tuple(torch.randn(rows, k, generator=generator).to(dtype) for rows in (m, n))


def check(out, a, b, budget=None):
    truth = a.double() @ b.double().T
    if out.dtype == torch.int32:
        assert torch.equal(out, truth.to(torch.int32))
    else:
        assert_accurate(out, truth, budget=budget, zeros=False)


def run_matmul(a, b, target, schedules="all", blocks=(64, 64, 64), **options):
    m, n, k = a.shape[0], b.shape[0], a.shape[1]
    out = torch.empty(m, n, dtype=torch.int32 if a.dtype == torch.int8 else torch.float32)
    block_m, block_n, block_k = blocks
    ptx.run(
        matmul.matmul_kernel, (-(-m // block_m), -(-n // block_n)), a, b, out, m, n, k, *a.stride(),
        b.stride(1), b.stride(0), BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, target=target,
        schedules=schedules, checks=CHECKS_OF_POINTERS, **options,
    )  # fmt: skip
    return out


@pytest.mark.parametrize("target, dtype", CASES, ids=str)
def test_dtypes(target, dtype):
    a, b = operands(64, 64, 96, dtype)
    out = run_matmul(a, b, target, blocks=(64, 64, 32))
    check(out, a, b, BUDGETS.get("tf32" if dtype == torch.float32 else dtype))


@pytest.mark.parametrize("target", ("sm_80", "sm_90a"))
def test_full_float32(target):
    a, b = operands(32, 32, 64, torch.float32)
    check(run_matmul(a, b, target, "default", (32, 32, 32), PRECISION="ieee"), a, b)


@pytest.mark.parametrize("target", ("sm_80", "sm_90a"))
@pytest.mark.parametrize("num_stages", (1, 2, 4))
def test_pipelines_and_edges(target, num_stages):
    a, b = operands(70, 50, 200, torch.float16)
    check(run_matmul(a, b, target, num_stages=num_stages), a, b)


@pytest.mark.parametrize("target", ("sm_80", "sm_90a"))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.int8), ids=str)
@pytest.mark.parametrize("transposed", ("a", "b", "both"))
def test_transposed_operands(transposed, dtype, target):
    a, b = operands(64, 64, 64, dtype)
    columns = [one.T.contiguous().T if name in transposed or transposed == "both" else one
               for name, one in (("a", a), ("b", b))]  # fmt: skip
    check(run_matmul(*columns, target, ("default", "ahead")), a, b)


@pytest.mark.parametrize("num_warps", (4, 8))
def test_eight_warps_share_a_wide_tile(num_warps):
    a, b = operands(128, 128, 64, torch.bfloat16)
    check(run_matmul(a, b, "sm_90a", "default", (128, 128, 64), num_warps=num_warps), a, b)


@pytest.mark.parametrize("target", ("sm_80", "sm_90a"))
@pytest.mark.parametrize("warp_specialize", (False, True), ids=("plain", "specialised"))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, F8), ids=str)
def test_host_descriptors(target, warp_specialize, dtype):
    if target == "sm_80" and dtype == F8:
        pytest.skip("sm_80 has no float8")
    a, b = operands(64, 128, 256, dtype)
    out = torch.empty(64, 128, dtype=torch.float32 if dtype == F8 else dtype)
    a_desc, b_desc = TensorDescriptor.from_tensor(a, [64, 64]), TensorDescriptor.from_tensor(b, [64, 64])
    ptx.run(
        matmul.descriptor_matmul_kernel, (1, 2), a_desc, b_desc, TensorDescriptor.from_tensor(out, [64, 64]), 256,
        BLOCK_M=64, BLOCK_N=64, BLOCK_K=64, WARP_SPECIALIZE=warp_specialize, target=target, num_stages=3,
        read_only=("a_desc", "b_desc"),
    )  # fmt: skip
    check(out, a, b, BUDGETS.get(dtype))


def test_a_write_through_a_read_only_descriptor_is_found():
    a, b = operands(64, 64, 64, torch.float16)
    out = torch.empty(64, 64, dtype=torch.float16)
    descriptors = [TensorDescriptor.from_tensor(one, [64, 64]) for one in (a, b, out)]
    with pytest.raises(ptx.Fault, match="out_desc"):
        ptx.run(
            matmul.descriptor_matmul_kernel, (1, 1), *descriptors, 64, BLOCK_M=64, BLOCK_N=64, BLOCK_K=64,
            read_only=("out_desc",), schedules="default",
        )  # fmt: skip


@pytest.mark.parametrize("target", ("sm_80", "sm_90a"))
def test_device_descriptors(target):
    a, b = operands(100, 80, 96, torch.bfloat16)  # the last tiles reach over the edges
    out = torch.empty(100, 80, dtype=torch.bfloat16)
    ptx.run(
        matmul.device_descriptor_matmul_kernel, (2, 2), a, b, out, 100, 80, 96, BLOCK_M=64, BLOCK_N=64, BLOCK_K=64,
        target=target,
    )  # fmt: skip
    check(out, a, b)


def test_clusters_of_two_blocks():
    a, b = operands(128, 64, 64, torch.bfloat16)
    check(run_matmul(a, b, "sm_90a", blocks=(128, 64, 64), num_ctas=2), a, b)
