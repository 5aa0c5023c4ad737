"""The mma.sp kernels of sparse_matmul: their machine code, their bank conflicts, and bugs planted in their source.

What nvcc makes is kept in pytest's cache under a hash of the sources.
"""

import ctypes
import functools
import hashlib
import re
import subprocess

import pytest
import torch

from fusedops._core import cubin, sass
from fusedops._core.cuda import images, toolchain
from fusedops.ops.sparse_matmul._cuda import mma
from fusedops.ops.sparse_matmul._cuda.epilogue import Epilogue
from fusedops.testing import ptx
from tests.ops.sparse_problems import Call, integers, masked

NVCC = toolchain.find_nvcc()
HEADER = "sparse_matmul_mma.cuh"
TARGETS = ("sm_80", "sm_90a", "sm_100a", pytest.param("sm_120a", marks=pytest.mark.deep))
SYMBOLS = {tile.symbol(dtype): (tile, dtype) for tile in mma.candidates() for dtype in mma.NAMES}

pytestmark = [
    pytest.mark.compile,
    pytest.mark.skipif(NVCC is None, reason="nvcc is not on the PATH"),
]


def nvcc(folder, source, *options):
    """What nvcc says about a source in a folder."""
    command = [NVCC, *toolchain.FLAGS, "-Werror", "all-warnings", *options, source]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.fixture(scope="session")
def kept(request):
    """A folder for what is compiled, of this source alone."""
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(images.sources().glob("*.cu*"))))
    return request.config.cache.mkdir(f"sparse_matmul_mma-{digest.hexdigest()[:16]}")


@functools.cache
def machine_code(folder, target):
    """What ptxas says, and each kernel's instructions, of the source without the kernels that only sm_90a has."""
    words, listing = folder / f"{target}.txt", folder / f"{target}.listing"
    if not listing.exists():
        made, guard = folder / f"{target}.cubin", "#ifdef __CUDA_ARCH_FEAT_SM90_ALL"
        source = (images.sources() / "sparse_matmul.cu").read_text().partition(guard)[0]
        made.with_suffix(".cu").write_text(source)
        options = ("-I", str(images.sources()), f"-arch={target}", "--cubin", "-Xptxas", "-v", "-o", str(made))
        words.write_text(nvcc(folder, f"{target}.cu", *options))
        listing.write_text(cubin._run_tool("cuobjdump", "-sass", str(made)))
    parts = {part.split(None, 1)[0]: part for part in listing.read_text().split("Function : ")[1:]}
    return words.read_text(), {name: sass.parse_all(part, [2**31])[0] for name, part in parts.items()}


@pytest.mark.parametrize("target", TARGETS)
def test_machine_code(target, kept):
    """Every kernel that is declared is there, in registers, with sparse products and wide, asynchronous copies."""
    words, found = machine_code(kept, target)
    assert found.keys() == SYMBOLS.keys()
    for name, code in found.items():
        tile, dtype = SYMBOLS[name]
        usage = re.search(rf"Function properties for {name}\n(.*)\n.*Used (\d+) registers", words)
        assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in usage[1]
        assert int(usage[2]) <= (168 if tile is mma.SMALL else 255)  # of LARGE two blocks, of SMALL three or more
        assert code["spill_stores"] == code["spill_loads"] == 0
        loop = sass.main_loop(code["loops"])["instructions"]
        products, kind = sass.matrix(loop), "IMMA.SP" if dtype == torch.int8 else "HMMA.SP"
        assert all(opcode.startswith(kind) for opcode in products)
        # A warp has a fourth of the tile, and two steps of it: 16 rows by 8 a product, 16 or 8 rows an ldmatrix.
        warp_n, warp_m = (64, 64) if tile is mma.LARGE else (32, 64)
        assert sum(products.values()) == sum(sass.matrix(code["instructions"]).values()) == 2 * warp_n * warp_m // 128
        assert loop["LDSM.16.M88.4"] == sass.number(loop, ("LDSM",)) == 2 * (warp_n // 16 + warp_m // 8)
        copies = sum(count for opcode, count in loop.items() if opcode.startswith("LDGSTS.E.BYPASS.128"))
        assert copies == (tile.block_n * 4 + tile.block_m * 8) // 128
        assert code["instructions"]["STG.E.128"] == 3  # of 16-bit results one, of float32 two
        # Those for rows that start anywhere included, which other calls jump over.
        assert sum(loop.values()) <= 10 * sum(products.values())


# A tile and an epilogue that compile in less time than those that are shipped.
TILE = mma.MmaConfig(64, 32, 4, 4)
INSTANCE = """
extern "C" __global__ void __launch_bounds__(128) {name}(
    const u8* a_ptr, const u8* values_ptr, const u8* metadata_ptr, const float* scale_a_ptr, const float* scale_b_ptr,
    const void* bias_ptr, void* out_ptr, long long a_row_bytes, int stride_scale_a, int stride_scale_b, int M, int N,
    int K, int bias_type, int out_type, int activation) {{
    {name}_::sparse_matmul_mma<{name}_::SparseTile<{element}, 64, 32, 32, 16, 4>>(
        {{a_ptr, values_ptr, metadata_ptr, a_row_bytes, M, N, K}}, out_ptr,
        {{scale_a_ptr, scale_b_ptr, bias_ptr, stride_scale_a, stride_scale_b, bias_type}}, {out_type}, ACTIVATION_NONE);
}}
"""


def kernels(variants):
    """One source, for one start of the compiler, with a kernel for each (name, element, results' type, edits)."""
    header = (images.sources() / HEADER).read_text()
    text = "".join(re.findall(r"^#include .*\n", header, re.MULTILINE)) + "using namespace fusedops;\n"
    for name, element, out_type, edits in variants:
        edited = re.sub(r"^#.*(once|include).*$", "", header, flags=re.MULTILINE)
        for place, replacement in edits:
            assert edited.count(place) == 1, f"{place!r} must be in {HEADER} once"
            edited = edited.replace(place, replacement)
        text += edited.replace("namespace fusedops {", f"namespace {name}_ {{")
        text += INSTANCE.format(name=name, element=element, out_type=out_type)
    return text


def compiled(kept, text):
    """PTX of a source beside the library's headers."""
    stored = kept / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.ptx"
    if not stored.exists():
        source = stored.with_suffix(".cu")
        source.write_text(text)
        options = ("-I", str(images.sources()), "-arch=compute_80", "-lineinfo", "--ptx", "-o", str(stored))
        nvcc(kept, source.name, *options)
    return stored.read_text()


ADDRESSES = """
#include "sparse_matmul_mma.cuh"
using namespace fusedops;
typedef SparseTile<BFloat16, 128, 128, 64, 64, 3> Tile;

// Of each lane the addresses, in bytes, of its accesses.
extern "C" __global__ void kernel(int* out_ptr) {
    const int lane = threadIdx.x;
    int at = 0;
    for (int step = 0; step < 2; step++) {
        out_ptr[32 * at++ + lane] = values_chunk(16 + lane % 16, step * 2 + lane / 16);
        out_ptr[32 * at++ + lane] = a_chunk(8 + lane % 8, step * 4 + lane / 8);
    }
    out_ptr[32 * at++ + lane] = values_chunk(lane / 4, lane % 4);
    out_ptr[32 * at++ + lane] = a_chunk(lane / 8, lane % 8);
    out_ptr[32 * at++ + lane] = (lane % 4 * 2 * Tile::OUT_ROW + lane / 4) * 4;
    out_ptr[32 * at++ + lane] = (lane / 16 * Tile::OUT_ROW + lane % 16 * 8 + lane / 4 % 2 * 4) * 4;
}
"""


def conflicts(addresses, access_bytes):
    """How often more than it must a warp's access takes the banks: 128 bytes go at a time."""
    group = 128 // access_bytes
    rounds = 0
    for first in range(0, 32, group):
        words = {
            address // 4 + word for address in addresses[first : first + group] for word in range(access_bytes // 4)
        }
        banks = [word % 32 for word in words]
        rounds += max(banks.count(bank) for bank in banks)
    return rounds - 32 // group


@pytest.mark.emulated
def test_shared_memory_is_read_and_written_without_bank_conflicts(kept):
    """ldmatrix of both operands in both steps, the copies to them, and the sums on their way out."""
    out = torch.full((8, 32), -1, dtype=torch.int32)
    text = compiled(kept, ADDRESSES)
    ptx.load(text).launch("kernel", (1, 1, 1), (32, 1, 1), [out], names=("out",))
    sizes = (16,) * 6 + (4, 16)
    assert bool((out >= 0).all())
    assert [conflicts(row, size) for row, size in zip(out.tolist(), sizes)] == [0] * 8
    unswizzled = [lane % 16 * 64 + lane // 16 * 16 for lane in range(32)]
    assert conflicts(unswizzled, 16) == 12, "the count itself"


def problem(dtype, M, N, K, pad):
    """A call whose sums are exact; rows of a have what must not be read behind them."""
    call = Call(integers((M, K), dtype, 0, 3), masked(integers((N, K), dtype, 1, 3)))
    memory = torch.full((M * (K + pad),), 127 if dtype == torch.int8 else torch.nan).to(dtype)
    a = memory.view(M, K + pad)[:, :K].copy_(call.a)
    return a, *call.args[1:], call.truth()


def right(text, name, dtype, sizes, schedule="default"):
    """Whether the kernel's result is exact. Raises ptx.Fault."""
    a, values, metadata, truth = problem(dtype, *sizes)
    out_dtype = torch.float32 if dtype == torch.int8 else dtype
    out = torch.full(truth.shape, torch.nan).to(out_dtype)
    epilogue = Epilogue.of(None, None, None, out_dtype, None)
    M, N, K, _ = sizes
    numbers = [ctypes.c_int64(a.stride(0) * a.element_size()), *epilogue.strides]
    numbers += [*map(ctypes.c_int32, (M, N, K)), *epilogue.codes]
    grid = -(-M // TILE.block_m) * -(-N // TILE.block_n), 1, 1
    ptx.load(text).launch(
        name, grid, (128, 1, 1), [a, values, metadata, None, None, None, out, *map(bytes, numbers)],
        shared=TILE.shared_bytes(dtype.itemsize), schedule=schedule, read_only=(0, 1, 2),
    )  # fmt: skip
    return torch.equal(out, truth.to(out_dtype))


# M, N, K, elements between rows of a. The last tile of LONG lies where the sums go.
ODD, EVEN, ALIGNED, LONG = (70, 131, 453, 0), (70, 136, 448, 0), (70, 131, 453, 11), (70, 131, 517, 11)
SOUND = {"sound_16": torch.bfloat16, "sound_8": torch.int8}
WRONG = "^wrong$"
RACE = "race on shared|nobody has written"
OUTSIDE = "out of bounds"
UNDEFINED = "metadata .* is not defined"
BUGS = {
    "waits for a stage less": (ALIGNED, [("cp_async_wait<Tile::STAGES - 2>", "cp_async_wait<Tile::STAGES - 1>")], RACE),
    "a group is not ended": (ALIGNED, [("        cp_async_commit();\n        warp.", "        warp.")], RACE),
    "no barrier after the wait": (
        ALIGNED, [("        __syncthreads();                               // the tile", "        // the tile")], RACE,
    ),
    "loads into the stage that is read": (ALIGNED, [("free_stage = Tile::STAGES - 1;", "free_stage = 0;")], RACE),
    "stages do not go round": (ALIGNED, [("stage + 1 == Tile::STAGES ? 0", "stage + 2 == Tile::STAGES ? 0")], RACE),
    "no barrier before the sums": (LONG, [("    __syncthreads();\n    float* out_smem", "    float* out_smem")], RACE),
    "no barrier after the sums": (
        ALIGNED, [("warp.store_sums(out_smem);\n    __syncthreads();", "warp.store_sums(out_smem);")], RACE,
    ),
    "selectors swapped": (ALIGNED, [("mma_sparse_bf16<STEP>", "mma_sparse_bf16<1 - STEP>")], WRONG),
    "metadata of the wrong lane": (ALIGNED, [("lane_id() % 4 * 2;", "(lane_id() + 1) % 4 * 2;")], WRONG),
    "metadata shifted by a nibble": (ALIGNED, [("+ 8 * 8) << 16", "+ 8 * 8) << 12")], f"{UNDEFINED}|{WRONG}"),
    "metadata of two rows swapped": (
        ALIGNED, [("return load_shared_u16(from) | load_shared_u16(from + 8 * 8) << 16",
                   "return load_shared_u16(from + 8 * 8) | load_shared_u16(from) << 16")], WRONG,
    ),
    "metadata of rows that do not exist": (ALIGNED, [(", operands.N - 1)", ", operands.N)")], OUTSIDE),
    "values of a row too many": (EVEN, [("i * VALUES_STEP < rows_n", "i * VALUES_STEP <= rows_n")], OUTSIDE),
    "rows of a one too many": (EVEN, [("i * A_STEP < rows_m ? bytes : 0);\n            }\n        } else",
                                       "i * A_STEP <= rows_m ? bytes : 0);\n            }\n        } else")], OUTSIDE),
    "the end of rows of a is read whole": (
        ALIGNED, [("max(min(left, Tile::CHUNK_ELEMENTS), 0)", "Tile::CHUNK_ELEMENTS")], OUTSIDE,
    ),
    "elements in the wrong half of a word": (ODD, [("element << at % 4 * 8", "element << (2 - at % 4) * 8")], WRONG),
    "an element too many": (ODD, [("if (at < bytes)", "if (at <= bytes)")], f"{OUTSIDE}|{WRONG}"),
    "a swizzle of one side only": (
        ALIGNED, [("a_chunk(warp_m + j * 8 + lane % 8, STEP * 4 + lane / 8)",
                   "a_chunk(warp_m + j * 8, STEP * 4 + lane / 8) + lane % 8 * A_ROW_BYTES")], WRONG,
    ),
    "halves of the weight's chunks swapped": (ALIGNED, [("STEP * 2 + lane / 16", "STEP * 2 + 1 - lane / 16")], WRONG),
    "rows of the result one too many": (
        EVEN, [("min(M - block_m, Tile::BLOCK_M)", "min(M - block_m + 1, Tile::BLOCK_M)")], OUTSIDE,
    ),
    "vectors where rows are odd": (ODD, [("N % 8 == 0, out_type", "true, out_type")], "misaligned"),
    "columns one too many": (
        ODD, [("if (i < columns) store_rounded", "if (i <= columns) store_rounded")], f"race on global|{OUTSIDE}",
    ),
    "halves not swapped back": (EVEN, [("flip ? second.element[i] : first.element[i]", "first.element[i]")], WRONG),
    "rows of the sums swapped": (EVEN, [("lane % 4 * 2 + e % 2;", "lane % 4 * 2 + 1 - e % 2;")], WRONG),
    "a group of tiles that is not whole": (EVEN, [("within % group_size)", "within % GROUP_N)")], f"{OUTSIDE}|{WRONG}"),
}  # fmt: skip


@pytest.fixture(scope="session")
def planted(kept):
    """PTX with a kernel for each bug, named by its place, and without one."""
    bf16 = "BFloat16", "OUT_BFLOAT16"
    sound = [("sound_16", *bf16, ()), ("sound_8", "signed char", "OUT_FLOAT32", ())]
    bugs = [(f"bug_{place}", *bf16, edits) for place, (_, edits, _) in enumerate(BUGS.values())]
    return compiled(kept, kernels(sound + bugs))


@pytest.mark.emulated
@pytest.mark.parametrize("name", SOUND)
@pytest.mark.parametrize("sizes", [ODD, EVEN, ALIGNED, LONG], ids=str)
def test_the_kernel_without_a_bug_is_right(sizes, name, planted):
    assert right(planted, name, SOUND[name], sizes)


@pytest.mark.emulated
@pytest.mark.parametrize("schedule", ["default", "random_0"])
@pytest.mark.parametrize("bug", BUGS)
def test_planted_bugs_are_found(bug, schedule, planted):
    sizes, _, says = BUGS[bug]
    try:
        found = (
            "wrong" if not right(planted, f"bug_{list(BUGS).index(bug)}", torch.bfloat16, sizes, schedule) else "right"
        )
    except ptx.Fault as fault:
        found = str(fault)
    assert re.search(says, found), found
