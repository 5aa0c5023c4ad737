"""int8_matmul, fp8_matmul: which kernel and tile a call gets, Hopper's kernel over many tiles, and the machine code."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from fusedops import explain
from fusedops._core.cubin import CubinReport
from fusedops._core.device import TARGETS
from fusedops.ops.scaled_matmul import _triton as kernels
from fusedops.ops.scaled_matmul._triton import hopper_launch
from fusedops.testing import assert_accurate
from tests.ops.common import using
from tests.ops.matmul_problems import FP8, call_of
from tests.test_compile import OPERATOR_FILES, compiled_rows

TINY = replace(TARGETS["sm_86"], arch="sm_87", shared_memory=48 * 1024)  # less than any device has
GPUS = [TINY] + [limits for limits in TARGETS.values() if limits.capability >= 80]
SIZES = [(1, 64, 1), (16, 4096, 4096), (64, 28672, 4096), (65, 100, 300), (512, 4096, 14336), (8192, 28672, 8192)]


def meta(rows, depth, dtype=torch.int8, stride=None):
    return torch.empty((rows, stride or depth), dtype=dtype, device="meta")[:, :depth]


def chosen(a, b, target="sm_90a", op="int8_matmul"):
    """What a call would run with, as text."""
    one = torch.empty((), device="meta")
    return explain(op, a, b, one, one, target=target).config


@pytest.mark.parametrize(
    ("a", "b", "target", "config"),
    [
        (meta(4096, 4096), meta(4096, 4096), "sm_90a", "HopperConfig(block_n=256, num_stages=4, group_m=8)"),
        (meta(128, 4096), meta(4096, 4096), "sm_90a", "HopperConfig(block_n=64, num_stages=6, group_m=8)"),
        (meta(4096, 4096, FP8), meta(4096, 4096, FP8), "sm_90a", "HopperConfig(block_n=128, num_stages=6, group_m=8)"),
        (meta(4096, 4096, stride=4112), meta(64, 4096), "sm_90a", "HopperConfig"),
        (meta(4096, 4096), meta(4096, 4096), "sm_80", "MatmulConfig(kernel='tile', block_m=128, block_n=128"),
        (meta(4096, 4096), meta(4096, 4096), "sm_100a", "MatmulConfig(kernel='tile'"),
        (meta(4096, 4095), meta(64, 4095), "sm_90a", "MatmulConfig(kernel='tile'"),
        (meta(4096, 4096, stride=4097), meta(64, 4096), "sm_90a", "MatmulConfig(kernel='tile'"),
        (meta(1, 4096).expand(70, -1), meta(64, 4096), "sm_90a", "MatmulConfig(kernel='tile'"),
        (meta(64, 4096), meta(4096, 4096), "sm_90a", "MatmulConfig(kernel='small', block_m=64"),
        (meta(1, 4096), meta(4096, 4096), "sm_90a", "MatmulConfig(kernel='small', block_m=16"),
    ],
)
def test_each_call_gets_the_kernel_that_takes_it(a, b, target, config):
    op = "int8_matmul" if a.dtype == torch.int8 else "fp8_matmul"
    assert chosen(a, b, target, op).startswith(config)


@pytest.mark.parametrize("limits", GPUS, ids=lambda limits: limits.arch)
def test_every_tile_fits_every_device(limits):
    """B57: sgl-project/sglang#28038: a default asked for 147,456 bytes of shared memory of a device with 101,376."""
    for rows, columns, depth in SIZES:
        for narrow in (False, True):
            tile = kernels.default(rows, columns, depth, narrow, limits)
            assert kernels.shared_bytes(tile, limits) <= limits.shared_memory and tile.num_stages >= 2
            assert (
                tile.num_splits == 1 or (tile.num_splits - 1) * tile.split_k < depth <= tile.num_splits * tile.split_k
            )
        for is_int in (False, True):
            tile = hopper_launch.default(rows, columns, is_int, TARGETS["sm_90a"])
            assert 3 <= tile.num_stages and tile.block_n in ((256, 128, 64) if is_int else (128, 64))


def test_splits_do_not_depend_on_the_rows():
    """B53: vllm-project/vllm#36488: the parts of the depth followed from the number of tokens."""
    for limits in GPUS:
        for columns, depth in ((4096, 4096), (1024, 14336), (64, 100)):
            tiles = [kernels.default(rows, columns, depth, False, limits) for rows in range(1, kernels.SMALL_M + 1)]
            assert len({(tile.split_k, tile.num_splits, tile.block_n, tile.block_k) for tile in tiles}) == 1


HOPPER = [
    ("int8_matmul", (150, 600, 656), ("row", "row"), torch.bfloat16),  # halves of 256 columns, two rounds, a rest of K
    ("int8_matmul", (130, 300, 272), ("row", "one"), torch.float32),
    ("fp8_matmul", (200, 300, 1040), ("block", "block"), torch.bfloat16),
    ("fp8_matmul", (70, 129, 144), ("one", "row"), torch.float32),  # an odd number of columns
]


@pytest.mark.emulated
@pytest.mark.parametrize(("op", "sizes", "kinds", "dtype"), HOPPER)
def test_tiles_of_the_hopper_kernel(op, sizes, kinds, dtype):
    """More tiles than programs, so that the ring goes round, and rows, columns and depth that end inside a tile."""
    call = call_of(
        op, *sizes, kinds, out_dtype=dtype, bias=torch.float32, activation="gelu_tanh", residual=True,
        layouts=("sliced", "contiguous", "offset:3"), gated=sizes[1] % 2 == 0,
    )  # fmt: skip
    assert hopper_launch.rejection(TARGETS["sm_90a"], *call.args[:2]) is None
    with using("emulate-sm_90a"):
        assert_accurate(call.run(), call.truth(), zeros=False)


# ---- machine code


@pytest.fixture(scope="module")
def machine_code(request, tmp_path_factory):
    """(row, constants, report) of every example of the kernels, from the cache that test_compile fills."""
    path = next(path for path in OPERATOR_FILES if "scaled_matmul" in path.parts)
    rows = compiled_rows(path, request.config.cache.mkdir("fusedops_compile"), tmp_path_factory.mktemp("triton"))
    return [(row, row["constants"], CubinReport.from_dict(row["report"])) for row in rows]


def kinds_of(machine_code, target, kernel):
    """(products and loads that tensor cores and TMA have) of a kernel's examples, integers and float8 apart."""
    found = {"int": set(), "float": set()}
    for row, constants, report in machine_code:
        if (row["target"], row["kernel"]) == (target, kernel):
            opcodes = {name.split(".")[0] for name in report.instructions}
            is_int = any("S8" in name for name in report.instructions)
            found["int" if is_int else "float"] |= opcodes & {
                "HMMA",
                "IMMA",
                "QMMA",
                "IGMMA",
                "QGMMA",
                "HGMMA",
                "UTMALDG",
            }
            if "small" in kernel:
                assert report.count("LDGSTS", "128") > 0 and not report.count("LDGSTS", "64", "32"), constants
    return found


@pytest.mark.compile
@pytest.mark.parametrize(
    ("target", "kernel", "of_int", "of_float"),
    [
        ("sm_80", "_scaled_matmul_kernel", {"IMMA"}, {"HMMA"}),
        ("sm_80", "_scaled_matmul_small_kernel", {"IMMA"}, {"HMMA"}),
        ("sm_90a", "_scaled_matmul_hopper_kernel", {"IGMMA", "UTMALDG"}, {"QGMMA", "UTMALDG"}),
        ("sm_90a", "_scaled_matmul_small_kernel", {"IGMMA"}, {"QGMMA"}),
    ],
)
def test_products_run_on_the_tensor_cores(machine_code, target, kernel, of_int, of_float):
    assert kinds_of(machine_code, target, kernel) == {"int": of_int, "float": of_float}


@pytest.mark.compile
def test_a_pair_stays_in_its_thread(machine_code):
    """Only the result, in float32 at most, passes through the shared memory on its way to wide stores; no shuffles."""
    seen = set()
    for row, constants, report in machine_code:
        if constants["GATED"] == "True" and "combine" not in row["kernel"] and row["target"] in ("sm_80", "sm_90a"):
            tile = int(constants.get("BLOCK_M", hopper_launch.BLOCK_M)) * int(constants["BLOCK_N"]) // 2
            threads = 32 * report.num_warps
            if "hopper" in row["kernel"]:
                threads = 128  # of a warpgroup, whose code stands there twice
            stored = threads * (16 * report.count("STS", "128") + 8 * report.count("STS", "64"))
            stored += threads * 4 * sum(n for name, n in report.instructions.items() if name in ("STS", "STSM"))
            assert 0 < stored <= 4.5 * tile and not report.count("SHFL", "BFLY"), (row, stored, tile)
            seen.add((row["target"], row["kernel"]))
    assert len(seen) == 4


@pytest.mark.compile
def test_float8_has_its_own_products_on_ada(tmp_path):
    """test_compile reads no machine code of sm_89."""
    code = """
from fusedops._core import cubin
from fusedops._core.device import TARGETS
from fusedops.ops.scaled_matmul import _triton as kernels
example = list(kernels.examples("bf16", TARGETS["sm_89"]))[1]
print(example.types["b_ptr"], sorted(cubin.report(example, "sm_89").instructions))
"""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("*fp8e4nv") and "QMMA" in done.stdout and "HMMA" not in done.stdout
