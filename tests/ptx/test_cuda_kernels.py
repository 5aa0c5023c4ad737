"""CUDA kernels as nvcc compiles them, on the CPU: each under every schedule, with the right results and no report."""

import pytest
import torch

from fusedops.testing import ptx
from tests.ptx import cuda_problems as problems
from tests.ptx.cuda import build

FP8 = torch.float8_e4m3fn
PROBLEMS = {
    "gemm_bf16_mma-64x64x64": lambda: problems.gemm_mma(64, 64, 64),
    "gemm_bf16_mma-100x72x136": lambda: problems.gemm_mma(100, 72, 136),
    "gemm_bf16_mma-256x256x256-random": lambda: problems.gemm_mma(256, 256, 256, random=True),
    "gemm_int8_mma-70x65x144": lambda: problems.gemm_mma(70, 65, 144, torch.int8),
    "gemm_fp8_mma-70x65x144": lambda: problems.gemm_mma(70, 65, 144, FP8),
    "gemm_sparse_bf16_mma-128x128x256-random": lambda: problems.gemm_sparse_mma(128, 128, 256, random=True),
    "gemm_sparse_bf16_mma-64x128x128": lambda: problems.gemm_sparse_mma(64, 128, 128),
    "gemm_bf16_wgmma-200x96x320-random": lambda: problems.gemm_wgmma(200, 96, 320, random=True),
    "gemm_bf16_wgmma-130x64x648": lambda: problems.gemm_wgmma(130, 64, 648),
    "gemm_fp8_wgmma-130x72x528": lambda: problems.gemm_wgmma(130, 72, 528, FP8),
    "gemm_int8_wgmma-130x72x528-random": lambda: problems.gemm_wgmma(130, 72, 528, torch.int8, random=True),
    "gemm_sparse_bf16_wgmma-128x64x512-random": lambda: problems.gemm_sparse_wgmma(128, 64, 512, random=True),
    "gemm_registers_bf16_wgmma-128x256x192-random": lambda: problems.gemm_registers_wgmma(128, 256, 192, random=True),
    "cluster_matvec-of-1": lambda: problems.cluster_matvec(70, 256, 1),
    "cluster_matvec-of-2": lambda: problems.cluster_matvec(150, 640, 2),
    "cluster_matvec-of-4": lambda: problems.cluster_matvec(500, 384, 4),
    "cluster_column_sum-of-2": lambda: problems.cluster_column_sum(37, 100, 2),
    "cluster_column_sum-of-4": lambda: problems.cluster_column_sum(37, 100, 4),
    "grouped_scale": lambda: problems.grouped_scale((5, 0, 32, 70), 40),
    "bulk_axpy": lambda: problems.bulk_axpy(600),
    "ragged_row_sum": lambda: problems.ragged_row_sum(35),
    "sum_by_key": lambda: problems.sum_by_key(500, 5),
    "ping_pong_sum": lambda: problems.ping_pong_sum(7),
    "histogram": lambda: problems.histogram(3001),
    "scale_vectors": lambda: problems.scale_vectors(1000),
    "gemm_split_k": lambda: problems.gemm_split_k(33, 20, 90, 4),
}


@pytest.mark.parametrize("schedule", ptx.SCHEDULES)
@pytest.mark.parametrize("problem", PROBLEMS)
def test_kernel(problem, schedule):
    launch = PROBLEMS[problem]()
    launch.run(schedule)
    assert launch.right()


def test_every_kernel_is_tested():
    tested = {PROBLEMS[problem]().kernel for problem in PROBLEMS}
    assert tested == {
        name for output in build.OUTPUTS for name in ptx.load(build.ptx_path(*output).read_text()).kernels
    }


@pytest.mark.parametrize("output", build.OUTPUTS, ids=".".join)
def test_the_ptx_was_made_from_this_source(output):
    first_line = build.ptx_path(*output).read_text().splitlines()[0]
    assert f" {build.fingerprint(output[0])} " in first_line, "run python tests/ptx/cuda/build.py"


@pytest.mark.compile
@pytest.mark.skipif(build.nvcc() is None, reason=f"needs nvcc of CUDA {build.NVCC_RELEASE} on the PATH")
@pytest.mark.parametrize("output", build.OUTPUTS, ids=".".join)
def test_nvcc_still_makes_this_ptx(output):
    text = build.compiled(*output)
    assert build.ptx_path(*output).read_text().split("\n", 1)[1] == build.tidied(text)
    assert ptx.load(text).kernels.keys() == ptx.load(build.tidied(text)).kernels.keys()
