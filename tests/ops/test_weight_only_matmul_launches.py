"""weight_only_matmul: tiles by arithmetic, and the machine code of its examples."""

import itertools

import pytest

from fusedops._core.cubin import CubinReport
from fusedops._core.device import MIN_CAPABILITY, TARGETS
from fusedops.ops.weight_only_matmul import _triton as kernels
from tests.test_compile import OPERATOR_FILES, compiled_rows

TRITON_TARGETS = [target for target in TARGETS.values() if target.capability >= MIN_CAPABILITY]
SIZES = (1, 100, 576, 4096, 14336)
WEIGHTS = [(1, None), (1, 128), (1, 32), (2, 32), (2, 64), (2, 128)]  # weights of a byte, columns of a scale


@pytest.mark.parametrize("target", TRITON_TARGETS, ids=lambda target: target.arch)
def test_tiles(target):
    """They fit the shared memory and are loaded 16 bytes by each thread; no part of a sum is empty."""
    for M, N, K, itemsize, (pack, group) in itertools.product((1, 17, 64, 65, 4096), SIZES, SIZES, (2, 4), WEIGHTS):
        tile = kernels.default(M, N, K, itemsize, pack, group, target)
        stored = tile.block_n * tile.block_k // pack
        assert tile.num_stages * (stored + tile.block_m * tile.block_k * itemsize) <= target.shared_memory
        assert stored >= 16 * 32 * tile.num_warps
        assert tile.block_k <= (group or tile.block_k) and (group or tile.block_k) % tile.block_k == 0
        steps = -(-K // tile.block_k)
        assert 1 <= tile.splits <= max(steps // 4, 1)
        assert -(-steps // tile.splits) * (tile.splits - 1) < steps


@pytest.mark.parametrize("rows", [range(1, 65), range(65, 5000, 97)])
def test_a_rows_sums_do_not_depend_on_the_number_of_rows(rows):
    """Steps and parts are the same; among few rows the warps too, so that the same instructions add them."""
    for N, K, itemsize, (pack, group) in itertools.product(SIZES, SIZES, (2, 4), WEIGHTS):
        tiles = [kernels.default(M, N, K, itemsize, pack, group, TARGETS["sm_90a"]) for M in rows]
        assert len({(tile.block_k, tile.splits) for tile in tiles}) == 1
        assert rows[0] > 1 or len({(tile.block_n, tile.num_warps) for tile in tiles}) == 1


@pytest.fixture(scope="module")
def machine_code(request, tmp_path_factory):
    """The reports that tests/test_compile.py keeps."""
    path = next(path for path in OPERATOR_FILES if "weight_only_matmul" in path.parts)
    rows = compiled_rows(path, request.config.cache.mkdir("fusedops_compile"), tmp_path_factory.mktemp("triton"))
    return [
        (row, row["constants"], CubinReport.from_dict(row["report"]))
        for row in rows if row["kernel"] == "_weight_only_kernel" and row["target"] in ("sm_80", "sm_90a")
    ]  # fmt: skip


@pytest.mark.compile
def test_few_rows_stream_the_weights_16_bytes_at_a_time(machine_code):
    """Every asynchronous copy, of x and of codes, and none of them in another way."""
    seen = set()
    for row, constants, report in machine_code:
        if int(constants["BLOCK_M"]) > 64:
            continue
        copies = {name for name in report.instructions if name.startswith("LDGSTS")}
        assert copies == {"LDGSTS.E.BYPASS.128"}, (row["dtype"], constants, copies)
        columns, pack = int(constants["BLOCK_K"]), 2 if constants["FORMAT"] == "int4" else 1
        bytes_of_a_stage = int(constants["BLOCK_N"]) * columns // pack
        bytes_of_a_stage += int(constants["BLOCK_M"]) * columns * (4 if row["dtype"] == "fp32" else 2)
        assert report.count("LDGSTS") * 16 * 32 * report.num_warps >= 3 * bytes_of_a_stage
        seen.add((row["target"], constants["FORMAT"]))
    assert seen == {("sm_80", "int8"), ("sm_80", "int4"), ("sm_80", "fp8 bits")} | {
        ("sm_90a", name) for name in ("int8", "int4", "fp8")
    }


@pytest.mark.compile
def test_products_run_on_the_tensor_cores(machine_code):
    """But those of float32 x; many rows on Hopper's own instruction, and nothing touches the stack."""
    for row, constants, report in machine_code:
        few = int(constants["BLOCK_M"]) <= 64
        product = "HGMMA" if row["target"] == "sm_90a" and not few else "HMMA"
        assert (report.count(product) > 0) == (row["dtype"] != "fp32")
        assert report.spill_stores == report.stack_bytes == 0
