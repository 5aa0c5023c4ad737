"""The wgmma.sp kernel in the emulator: every element type, tile, epilogue and schedule; and its machine code."""

import re
import shutil
import subprocess

import pytest
import torch

from fusedops import batch_invariant, decompress_24, sparse_matmul
from fusedops._core import cubin, sass
from fusedops._core.checks import ACTIVATIONS
from fusedops._core.cuda import images
from fusedops._core.device import TARGETS
from fusedops.ops.sparse_matmul import _cuda
from fusedops.ops.sparse_matmul._cuda import wgmma
from fusedops.testing import assert_accurate, ptx
from tests.ops.common import using
from tests.ops.sparse_wgmma_problems import DTYPES, FP8, TILES, problem

emulated = pytest.mark.emulated
EVERY_TILE = pytest.mark.parametrize("dtype, block_m", TILES, ids=lambda x: str(x).removeprefix("torch."))
# Rows, columns and depth with something odd in each: parts of tiles, of chunks, of pairs of columns and of stages.
SIZES = ((65, 8, 16), (100, 136, 100), (129, 264, 64), (300, 131, 777), (257, 128, 1040))


def exact(case, *args, **kwargs):
    out = case.run(*args, **kwargs)
    assert torch.equal(out, case.truth().to(case.out_dtype))


@emulated
@EVERY_TILE
@pytest.mark.parametrize("sizes", SIZES, ids=lambda sizes: "x".join(map(str, sizes)))
def test_integers_are_exact(dtype, block_m, sizes):
    exact(problem(dtype, *sizes, torch.float16 if dtype == torch.float16 else torch.bfloat16), block_m)


@emulated
@EVERY_TILE
def test_float32_results(dtype, block_m):
    exact(problem(dtype, 140, 136, 272, torch.float32), block_m)


@emulated
@EVERY_TILE
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_scales_bias_and_activation(dtype, block_m, activation):
    generator = torch.Generator().manual_seed(ACTIVATIONS.index(activation))
    m, n = 70, 136
    bias = torch.randn(n, generator=generator)
    for out_dtype, rows in ((torch.bfloat16, (m, 1)), (torch.float16, (1, n)), (torch.float32, (m, n))):
        scales = {}
        if dtype.itemsize == 1:
            scales = {
                f"scale_{name}": (torch.rand(size, generator=generator) + 0.1) * 0.02 for name, size in zip("ab", rows)
            }
        case = problem(
            dtype, m, n, 272, out_dtype, random=True, bias=bias.to(out_dtype), activation=activation, **scales
        )  # fmt: skip
        assert_accurate(case.run(block_m), case.truth(), zeros=False)


@emulated
@EVERY_TILE
def test_stores_by_tensor_map_and_from_registers_agree(dtype, block_m):
    """Rows of 132 columns are no multiple of 16 bytes, those of 136 are."""
    case = problem(dtype, 70, 136, 208, random=True, bias=torch.randn(136))
    fewer = case.values[:132], case.metadata[:132], case.bias[:132]
    whole = case.run(block_m)
    case.values, case.metadata, case.bias = fewer
    assert torch.equal(case.run(block_m), whole[:, :132])


@emulated
@pytest.mark.parametrize("blocks, group_n", [(1, 1), (2, 8), (5, 2), (64, 4)])
def test_persistent_blocks_take_every_tile_once(blocks, group_n):
    exact(problem(torch.int8, 300, 520, 400, torch.float32), 64, blocks, group_n)


@emulated
@pytest.mark.parametrize("dtype", [torch.bfloat16, FP8, torch.int8])
def test_every_schedule_gives_the_same_bits(dtype):
    for block_m in wgmma.widths(dtype):
        exact(problem(dtype, block_m + 6, 264, 656), block_m, 2, 1, "all")


@emulated
def test_int8_sums_are_exact_in_int32():
    """A float32 sum would lose the last bits of each."""
    case = problem(torch.int8, 70, 64, 4096, torch.float32)
    case.a = torch.full_like(case.a, 127)
    case.a[:, ::3] = 126
    case.values = torch.full_like(case.values, 127)
    exact(case, 64)


@emulated
def test_float8_sums_are_taken_over_by_float32():
    """Sums of a few thousand random products are as exact as float32; the emulator's tensor cores lose nothing."""
    case = problem(FP8, 65, 64, 4096, torch.float32, random=True)
    assert_accurate(case.run(64), case.truth(), zeros=False)


@emulated
def test_nan_and_infinity_of_a_meet_only_what_is_stored():
    case = problem(torch.bfloat16, 66, 136, 128, torch.float32)
    case.a[3, 5], case.a[7, 70] = torch.nan, torch.inf
    stored = decompress_24(torch.ones_like(case.values), case.metadata) == 1
    out = case.run(64)
    assert torch.equal(out[3].isnan(), stored[:, 5]) and 0 < stored[:, 5].sum() < 136
    assert torch.equal(~out[7].isfinite(), stored[:, 70]) and 0 < stored[:, 70].sum() < 136
    assert out[[row for row in range(66) if row not in (3, 7)]].isfinite().all()


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda case: setattr(case, "a", problem(torch.bfloat16, 66, 128, 100, pitch=2).a), "multiples of 16 bytes"),
        (lambda case: setattr(case, "a", case.a[:1].expand(66, -1)), "not overlap"),
        (lambda case: setattr(case, "a", case.a.float()), "got float32"),
    ],
)
def test_what_is_rejected(change, message):
    case = problem(torch.bfloat16, 66, 128, 128)
    change(case)
    assert message in wgmma.rejection(TARGETS["sm_90a"], case.a, case.values, case.metadata)


@emulated
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_operand_that_starts_anywhere(dtype):
    """The operator: 16-bit a goes to the other kernel, float8 has none and a is copied; the weight is copied."""
    case = problem(dtype, 70, 136, 208)
    room = torch.zeros(70, 256, dtype=dtype)
    room[:, 3:211] = case.a
    case.a = room[:, 3:211]
    assert wgmma.misses(case.a)
    values = torch.cat((case.values.flatten()[:1], case.values.flatten()))[1:].view(case.values.shape)
    with using("emulate-sm_90a"):
        out = sparse_matmul(case.a, values, case.metadata, out_dtype=None if dtype.itemsize == 2 else torch.bfloat16)
    assert torch.equal(out, case.truth().to(out.dtype))


def test_batch_invariant_rows_have_one_kernel_wherever_they_start():
    case, limits = problem(torch.bfloat16, 70, 64, 208), TARGETS["sm_90a"]
    shifted = torch.cat((case.a.flatten()[:1], case.a.flatten()))[1:].view(case.a.shape)
    found, rest = [], (None, None, None, torch.bfloat16, None)
    for enabled in (False, True):
        with batch_invariant(enabled):
            found += [type(_cuda.config("", limits, a, case.values, case.metadata, *rest)) for a in (case.a, shifted)]
    assert found[0] is not found[1]
    assert found[2] is found[3] is wgmma.WgmmaConfig


def test_other_devices_are_rejected():
    case = problem(torch.bfloat16, 66, 128, 128)
    for target, limits in TARGETS.items():
        rejected = wgmma.rejection(limits, case.a, case.values, case.metadata)
        assert (rejected is None) == (target == "sm_90a")


@EVERY_TILE
def test_a_block_fits_the_device(dtype, block_m):
    ring = wgmma.stage(block_m, dtype.itemsize)
    shared = wgmma.shared_bytes(wgmma.WgmmaConfig(block_m), dtype.itemsize)
    assert ring.count >= 4 and shared <= TARGETS["sm_90a"].shared_memory


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_default_takes_the_widest_tile_that_leaves_no_multiprocessor_idle(dtype):
    limits = TARGETS["sm_90a"]
    widest = wgmma.widths(dtype)[0]
    assert wgmma.default(8192, 8192, dtype, limits).block_m == widest
    assert wgmma.default(128, 4096, dtype, limits).block_m == 64
    for rows in (65, 100, 512, 4000):
        assert wgmma.default(rows, 4096, dtype, limits).block_m in wgmma.widths(dtype)


def symbols():
    return {wgmma.WgmmaConfig(block_m).symbol(dtype) for dtype, block_m in TILES}


def test_kernels_are_those_that_are_launched():
    kernels = ptx.load(images.ptx("sparse_matmul", "sm_90a")).kernels
    assert {name for name in kernels if "_wgmma_" in name} == symbols()


needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on the PATH")
OPCODES = {torch.bfloat16: "HGMMA.SP", torch.float16: "HGMMA.SP", torch.int8: "IGMMA.SP", FP8: "QGMMA.SP"}


@pytest.fixture(scope="module")
def machine_code(tmp_path_factory):
    """What ptxas said, and of each kernel what its machine code holds."""
    folder = tmp_path_factory.mktemp("wgmma")
    guard = "#ifdef __CUDA_ARCH_FEAT_SM90_ALL"
    instances = (images.sources() / "sparse_matmul.cu").read_text().partition(guard)[2]
    source, path = folder / "instances.cu", folder / "instances.cubin"
    source.write_text(f'#include "sparse_matmul_wgmma.cuh"\n{guard}{instances}')
    line = ["nvcc", "-std=c++17", "-O3", "-arch=sm_90a", "--cubin", "-Xptxas", "-v,-warn-spills"]
    line += ["-I", images.sources(), source, "-o", path]
    built = subprocess.run(line, capture_output=True, text=True, check=True)
    listing = cubin._run_tool("cuobjdump", "-sass", str(path))
    parts = {part.split(None, 1)[0]: part for part in listing.split("Function : ")[1:]}
    return built.stderr, {name: sass.parse_all(part, [2**31])[0] for name, part in parts.items() if "_wgmma_" in name}


@needs_nvcc
@pytest.mark.compile
def test_machine_code(machine_code):
    said, kernels = machine_code
    assert "warning" not in said.lower() and "C7510" not in said, said
    assert set(kernels) == symbols()
    properties = dict(re.findall(r"Function properties for (\w+)\n.*\n.*Used (\d+) registers", said))
    for dtype, block_m in TILES:
        name = wgmma.WgmmaConfig(block_m).symbol(dtype)
        code = kernels[name]
        assert code["spill_stores"] == code["spill_loads"] == 0, name
        assert int(properties[name]) == 168, "65,536 registers for 384 threads; warpgroups share them out themselves"
        opcodes = {base.split(".64x")[0]: count for base, count in code["instructions"].items()}
        assert {one for one in opcodes if sass.is_matrix(one)} == {OPCODES[dtype]}
        loop = sass.main_loop(code["loops"])["instructions"]
        products = sum(sass.matrix(loop).values())
        assert products == (2 if block_m == 256 else 4) == sum(sass.matrix(code["instructions"]).values())
        assert sass.number(code["instructions"], ("UTMALDG",)) == (3 if block_m == 256 else 4)
        assert sass.number(code["instructions"], ("UTMASTG",)) == 1 and sass.number(loop, ("LDL", "STL", "LDG")) == 0
        waits = [count for one, count in loop.items() if one.startswith("WARPGROUP.DEPBAR")]
        assert waits == [1], "one wait for products in the loop: ptxas has not put them one behind the other"
        extra = block_m // 2 if dtype == FP8 else 0
        assert sum(loop.values()) <= 80 + extra, loop
