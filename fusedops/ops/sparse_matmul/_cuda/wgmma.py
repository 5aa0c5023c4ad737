"""Launch the wgmma.sp kernel of Hopper: which calls it takes, its tile by arithmetic, its tensor maps.

Numbers of a block follow those of `WgmmaTile` in csrc/cuda/sparse_matmul_wgmma.cuh.
"""

import functools
from ctypes import c_int32
from dataclasses import dataclass

import torch

from fusedops._core import cuda
from fusedops._core.cuda import images
from fusedops._core.device import KIB
from fusedops._core.numbers import ceil_div
from fusedops._core.tuning import Tunable

ARCH = "sm_90a"
FP8 = torch.float8_e4m3fn
NAMES = {torch.float16: "f16", torch.bfloat16: "bf16", torch.int8: "int8", FP8: "fp8"}
ALIGNMENT = 16  # bytes of every address and stride of a tensor map
BLOCK_N, GROUP_COLUMNS, CHUNK_ROWS = 128, 64, 32  # columns of a tile and of a warpgroup; rows that are stored at once
THREADS = 384
ROW_BYTES = 128  # of a, in one box
OUT_BYTES = 4 * CHUNK_ROWS * GROUP_COLUMNS * 2  # two buffers of each warpgroup
BARRIER_BYTES = 256  # that are kept for a full and an empty barrier of each stage
MAX_SHARED = 227 * KIB


@dataclass(frozen=True)
class WgmmaConfig:
    """Tiles of block_m rows and 128 columns; group_n tiles of columns are walked through together."""

    block_m: int
    group_n: int = 8

    def symbol(self, dtype):
        """The kernel's name."""
        return f"fusedops_sparse_matmul_wgmma_{NAMES[dtype]}_{self.block_m}"


@dataclass(frozen=True)
class Stage:
    """Bytes of one place in the ring, and what a copy takes of the rows of each operand.

    Attributes:
        boxes: Copies of a, each of 128 bytes of its rows.
        value_bytes, metadata_bytes: Of a row of the weight.
        total: Bytes.
    """

    boxes: int
    value_bytes: int
    metadata_bytes: int
    total: int

    @property
    def count(self):
        """How many of them there are."""
        return (MAX_SHARED - OUT_BYTES - BARRIER_BYTES) // self.total


@functools.cache
def stage(block_m, item_bytes):
    """The stage of a tile."""
    boxes = 1 if block_m == 256 else 2
    columns = boxes * ROW_BYTES // item_bytes
    metadata = max(columns // 8, ALIGNMENT)
    total = BLOCK_N * (64 * boxes + metadata) + boxes * block_m * ROW_BYTES
    return Stage(boxes, 64 * boxes, metadata, total)


def shared_bytes(config, item_bytes):
    """Dynamic shared memory of a block."""
    ring = stage(config.block_m, item_bytes)
    return ring.count * ring.total + OUT_BYTES + 16 * ring.count


def widths(dtype):
    """The rows of tiles that are compiled: float8 has two sums, of which 256 rows would not fit the registers."""
    return (128, 64) if dtype == FP8 else (256, 128, 64)


@functools.lru_cache(maxsize=4096)
def default(rows, columns, dtype, device_limits):
    """The rows of a tile with which the last round of tiles ends first.

    What a tile costs is what its products read from shared memory, 64 bytes of each row of a and 32 of each of 64 rows
    of the weight: by their data sheets, the memory is slower than the tensor cores.
    """

    def cost(block_m):
        tiles = ceil_div(rows, block_m) * ceil_div(columns, BLOCK_N)
        return ceil_div(tiles, device_limits.sm_count) * (block_m + 32)

    return WgmmaConfig(min(widths(dtype), key=cost))


def _of_kind(is_fp8):
    """A dtype whose tiles are compiled as those of the dtypes of this kind."""
    return FP8 if is_fp8 else torch.bfloat16


# All tiles add up a row's products in one order: a result has the same bits whatever the table says.
TILE = Tunable(
    "sparse_matmul_wgmma",
    default=lambda rows, columns, depth, is_fp8, limits: default(rows, columns, _of_kind(is_fp8), limits),
    sizes=("rows", "columns", "depth"),
    flags=("is_fp8",),
    also=("dtype", "out_dtype", "scale_a", "scale_b", "bias", "activation"),
    space={"block_m": (64, 128, 256), "group_n": (4, 8, 16)},
    fits=lambda tile, rows, columns, depth, is_fp8, limits: tile.block_m in widths(_of_kind(is_fp8)),
    source=(__file__, str(images.sources() / "sparse_matmul.cu")),
)


def config(device_limits, a, values, also):
    """The configuration of one call."""
    return TILE.choose(device_limits, (a.shape[0], values.shape[0], a.shape[1], a.dtype == FP8), also)


def rejection(device_limits, a, values, metadata):
    """Why this kernel does not take a call, or None. Where tensors start is asked at the launch, see `misses`."""
    if device_limits.arch != ARCH:
        return f"needs {ARCH}"
    if a.dtype not in NAMES:
        return f"wgmma.sp takes 16-bit floats, int8 and float8_e4m3fn, got {str(a.dtype).removeprefix('torch.')}"
    stride = a.stride(0) * a.element_size()
    if stride % ALIGNMENT or stride < a.shape[1] * a.element_size():
        return f"rows of a must start at multiples of {ALIGNMENT} bytes and not overlap, got a stride of {stride}"
    return None


def misses(tensor):
    """Whether a tensor starts where no tensor map can."""
    return tensor.data_ptr() % ALIGNMENT != 0


def launch(tile, device_limits, a, values, metadata, epilogue, out):
    """One launch, of no more blocks than there are multiprocessors."""
    (rows, depth), columns = a.shape, values.shape[0]
    item_bytes = a.element_size()
    ring = stage(tile.block_m, item_bytes)
    values_map = cuda.tensor_map(values, (BLOCK_N, ring.value_bytes // item_bytes), ring.value_bytes)
    mapped = out.element_size() == 2 and columns * 2 % ALIGNMENT == 0  # else results are stored from registers
    numbers = map(c_int32, (rows, columns, depth))
    arguments = (
        values_map,
        cuda.tensor_map(metadata, (BLOCK_N, ring.metadata_bytes)),
        cuda.tensor_map(a, (tile.block_m, ROW_BYTES // item_bytes), ROW_BYTES),
        *epilogue.tensors,
        cuda.tensor_map(out, (CHUNK_ROWS, GROUP_COLUMNS), ROW_BYTES) if mapped else values_map,
        None if mapped else out,
        *epilogue.strides, *numbers, *epilogue.codes, c_int32(tile.group_n),
    )  # fmt: skip
    tiles = ceil_div(rows, tile.block_m) * ceil_div(columns, BLOCK_N)
    kernel = cuda.load("sparse_matmul", tile.symbol(a.dtype), ARCH)
    kernel.launch(
        (min(device_limits.sm_count, tiles), 1, 1), (THREADS, 1, 1), arguments,
        shared=shared_bytes(tile, item_bytes), device=a.device,
    )  # fmt: skip
