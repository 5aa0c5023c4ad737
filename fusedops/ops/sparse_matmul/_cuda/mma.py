"""Launches of the kernel that multiplies by `mma.sp`: GPUs from 8.0 on, 16-bit floats and int8."""

import ctypes
import functools
from dataclasses import dataclass

import torch

from fusedops._core import cuda
from fusedops._core.cuda import images
from fusedops._core.numbers import ceil_div
from fusedops._core.tuning import Tunable

NAMES = {torch.bfloat16: "bf16", torch.float16: "f16", torch.int8: "int8"}
TILE_BYTES = 128  # of a row of a that a tile holds
ALIGNMENT = 16  # bytes of an asynchronous copy; rows of a that are not at multiples of it go through registers


@dataclass(frozen=True)
class MmaConfig:
    """A tile of a block, as `csrc/cuda/sparse_matmul.cu` has it.

    Attributes:
        block_n: Rows of the weight.
        block_m: Rows of a.
        num_warps: Warps of a block.
        num_stages: Tiles in shared memory.
    """

    block_n: int
    block_m: int
    num_warps: int
    num_stages: int

    def symbol(self, dtype):
        """The kernel's name."""
        return f"fusedops_sparse_matmul_mma_{NAMES[dtype]}_{self.block_n}x{self.block_m}"

    def shared_bytes(self, itemsize):
        """Dynamic shared memory of a block: of each stage values, a, and metadata of 4 bits for 4 columns."""
        columns = TILE_BYTES // itemsize
        values, metadata = columns // 2 * itemsize, columns // 8
        return self.num_stages * (self.block_n * (values + metadata) + self.block_m * TILE_BYTES)


LARGE, SMALL = MmaConfig(128, 128, 4, 3), MmaConfig(128, 64, 4, 4)


def candidates():
    """All tiles that are compiled."""
    return LARGE, SMALL


@functools.lru_cache(maxsize=4096)
def default(rows, columns, device_limits):
    """The large tile, unless that left multiprocessors without work or half of many tiles empty."""
    tiles = ceil_div(rows, LARGE.block_m) * ceil_div(columns, LARGE.block_n)
    halves = ceil_div(rows, SMALL.block_m)
    few_rows = halves % 2 == 1 and halves < 8
    return SMALL if tiles < device_limits.sm_count or few_rows else LARGE


def _compiled(tile, *asked):
    """The tile of so many rows of a that is compiled: all else follows."""
    return next(one for one in candidates() if one.block_m == tile.block_m)


# Both tiles add up a row's products in one order: a result has the same bits whatever the table says.
TILE = Tunable(
    "sparse_matmul_mma",
    default=lambda rows, columns, depth, itemsize, device_limits: default(rows, columns, device_limits),
    sizes=("rows", "columns", "depth"),
    flags=("itemsize",),
    also=("dtype", "out_dtype", "scale_a", "scale_b", "bias", "activation"),
    space={"block_m": (64, 128)},
    fits=lambda tile, *asked: tile.shared_bytes(asked[3]) <= asked[-1].shared_memory,
    source=(__file__, str(images.sources() / "sparse_matmul.cu")),
    complete=_compiled,
)


def config(device_limits, a, values, also):
    """The configuration of one call."""
    return TILE.choose(device_limits, (a.shape[0], values.shape[0], a.shape[1], a.element_size()), also)


def rejection(device_limits, a, values, metadata):
    """Why the kernel cannot take a call, or None."""
    if a.dtype not in NAMES:
        return f"mma.sp takes bfloat16, float16 and int8, got {str(a.dtype).removeprefix('torch.')}"
    if default(a.shape[0], values.shape[0], device_limits).shared_bytes(a.element_size()) > device_limits.shared_memory:
        return f"a tile takes more than the {device_limits.shared_memory} bytes of shared memory of a block"
    return None


def launch(tile, device_limits, a, values, metadata, epilogue, out):
    """One launch; `epilogue` is what `Epilogue.arguments` gives."""
    (rows, depth), columns = a.shape, values.shape[0]
    kernel = cuda.load("sparse_matmul", tile.symbol(a.dtype), device_limits.arch)
    grid = ceil_div(rows, tile.block_m) * ceil_div(columns, tile.block_n), 1, 1
    sizes = [ctypes.c_int32(size) for size in (rows, columns, depth)]
    arguments = (
        a, values, metadata, *epilogue.tensors, out, ctypes.c_int64(a.stride(0) * a.element_size()),
        *epilogue.strides, *sizes, *epilogue.codes,
    )  # fmt: skip
    kernel.launch(grid, (32 * tile.num_warps, 1, 1), arguments, shared=tile.shared_bytes(a.element_size()))
