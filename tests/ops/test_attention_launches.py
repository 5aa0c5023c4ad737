"""How the kernels of attention are launched: tiles within every device's limits, splits, and the machine code."""

import itertools

import pytest
import torch

from fusedops import explain
from fusedops._core.cubin import CubinReport
from fusedops._core.device import MIN_CAPABILITY, TARGETS
from fusedops._core.relaunch import Relauncher
from fusedops.ops.attention import _triton as kernels
from tests.test_compile import OPERATOR_FILES, compiled_rows

TRITON_TARGETS = [target for target in TARGETS.values() if target.capability >= MIN_CAPABILITY]
SHAPES = list(itertools.product(
    (1, 16, 17, 100, 4096), (8, 40, 64, 72, 96, 128, 192, 256, 512), (16, 128, 256, 512), (1, 2, 4), (False, True)
))  # fmt: skip


def test_splits_fill_the_device():
    """One program each where there are enough; never fewer than two blocks of keys a split."""
    small, large = (kernels.AttentionConfig(block_m, 64, 128, 128, 4, 2) for block_m in (16, 128))
    for target, programs, blocks in itertools.product(TARGETS.values(), (1, 2, 8, 60, 99, 500), (0, 1, 3, 64, 4096)):
        number = kernels.num_splits(large, programs, blocks, target)
        assert 1 <= number <= kernels.num_splits(small, programs, blocks, target) <= kernels.MAX_SPLITS
        assert number == 1 or (2 * number <= blocks and number * programs <= target.sm_count)
        if programs > target.sm_count:
            assert number == 1
    assert kernels.num_splits(large, 8, 4096, TARGETS["sm_90a"]) == 16
    assert kernels.num_splits(small, 8, 4096, TARGETS["sm_90a"]) == 33


def test_explain_tells_tile_and_splits():
    q, k = (torch.empty(1, *sizes, 128, dtype=torch.bfloat16, device="meta") for sizes in ((1, 32), (8192, 8)))
    lse = torch.empty(1, 32, 1, device="meta")
    decode = explain("attention", q, k, k, causal=True, target="sm_80").config
    prefill = explain("attention", k, k, k, causal=True, target="sm_80").config
    assert "block_m=16" in decode and "num_splits=27" in decode
    assert "block_m=128" in prefill and "num_splits=1)" in prefill
    assert "block_dv=128" in explain("merge_attention", q, lse, q, lse, target="sm_90a").config


@pytest.mark.parametrize("target", TRITON_TARGETS, ids=lambda target: target.arch)
def test_tiles_fit_every_target(target):
    """B57: a default configuration never asks for more shared memory than there is."""
    assert len(SHAPES) >= 200
    for num_rows, head_dim, head_dim_v, itemsize, masked in SHAPES:
        tile = kernels.default(num_rows, head_dim, head_dim_v, itemsize, masked, target)
        assert kernels.shared_bytes(tile, itemsize, masked) <= target.shared_memory
        assert tile.block_d >= head_dim and tile.block_dv >= head_dim_v
        assert min(tile.block_m, tile.block_n) >= 16 and tile.num_stages >= 1 and tile.num_warps in (4, 8)
        again = kernels.default(num_rows, head_dim, head_dim_v, itemsize, masked, target)
        assert tile == again and hash(tile) == hash(again)


@pytest.fixture(scope="module")
def machine_code(request, tmp_path_factory):
    """The reports of the forward kernel that tests/test_compile.py keeps."""
    path = next(path for path in OPERATOR_FILES if "attention" in path.parts)
    rows = compiled_rows(path, request.config.cache.mkdir("fusedops_compile"), tmp_path_factory.mktemp("triton"))
    rows = [row for row in rows if row["kernel"] == "_attention_kernel"]
    return [(row, row["constants"], CubinReport.from_dict(row["report"])) for row in rows]


@pytest.mark.compile
def test_shared_memory_is_what_the_arithmetic_says(machine_code):
    for row, constants, report in machine_code:
        itemsize = 4 if row["dtype"] == "fp32" else 1 if constants["HAS_QK_SCALE"] == "True" else 2
        sizes = {name: int(constants[name.upper()]) for name in ("block_m", "block_n", "block_d", "block_dv")}
        masked = constants["MASK_KIND"] != "none"
        fitting = [
            kernels.AttentionConfig(**sizes, num_warps=report.num_warps, num_stages=stages) for stages in (1, 2, 3)
        ]
        assert report.shared_bytes <= max(kernels.shared_bytes(tile, itemsize, masked) for tile in fitting)


@pytest.mark.compile
@pytest.mark.parametrize("target, expected, other", [("sm_80", "HMMA", "HGMMA"), ("sm_90a", "HGMMA", "HMMA")])
def test_products_run_on_the_tensor_cores(machine_code, target, expected, other):
    """16-bit prefill tiles: whole and causal, every head dim up to 256."""
    seen = set()
    for row, constants, report in machine_code:
        if row["target"] != target or row["dtype"] == "fp32" or constants["HAS_QK_SCALE"] == "True":
            continue
        if int(constants["BLOCK_M"]) >= 64:
            assert report.count(expected) > 0 and report.count(other) == 0, constants
            seen.add((int(constants["D"]), constants["HAS_RIGHT"]))
        else:
            assert report.count("HMMA") > 0, constants
    assert {(64, "True"), (128, "True"), (128, "False"), (256, "True")} <= seen


# ---- launching again


class _Kernel:
    """Stands in for a Triton kernel: compiles, or, as in the interpreter, does not."""

    arg_names = ("x_ptr", "y_ptr", "N", "BLOCK")

    def __init__(self, compiles):
        self.compiles, self.first, self.again = compiles, [], []

    def __getitem__(self, grid):
        def launch(*args, **constants):
            self.first.append((grid, args, constants))
            return {grid: lambda *args: self.again.append((grid, args))} if self.compiles else None

        return launch


def test_relaunch_only_where_nothing_compiled_for_has_changed():
    kernel = _Kernel(compiles=True)
    run = Relauncher(kernel)
    buffer = torch.zeros(64)
    x, odd, constants = buffer[:8], buffer[1:9], {"BLOCK": 16}
    run((2, 1, 1), (x, None), (8,), constants, 4)
    run((2, 1, 1), (buffer[16:24], None), (8,), constants, 4)
    assert len(kernel.first) == 1 and kernel.first[0][2] == {"BLOCK": 16, "num_warps": 4, "num_stages": 1}
    grid, args = kernel.again[0]
    assert grid == (2, 1, 1) and args[0].data_ptr() == buffer[16:].data_ptr() and args[1:] == (None, 8, 16)
    others = [
        ((odd, None), (8,), constants, 4, 1), ((x, x), (8,), constants, 4, 1),
        ((x.half(), None), (8,), constants, 4, 1), ((x, None), (9,), constants, 4, 1),
        ((x, None), (8,), {"BLOCK": 32}, 4, 1), ((x, None), (8,), constants, 8, 1), ((x, None), (8,), constants, 4, 2),
    ]  # fmt: skip
    for number, other in enumerate(others, 2):
        run((2, 1, 1), *other)
        assert len(kernel.first) == number and len(kernel.again) == 1


def test_relaunch_keeps_nothing_in_the_interpreter():
    kernel = _Kernel(compiles=False)
    run = Relauncher(kernel)
    for _ in range(2):
        run((1, 1, 1), (torch.zeros(1), None), (8,), {"BLOCK": 16}, 4)
    assert len(kernel.first) == 2 and not kernel.again
