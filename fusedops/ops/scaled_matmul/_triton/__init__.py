"""int8_matmul and fp8_matmul on the GPU: which kernel takes a call, its tile by arithmetic, and the launches."""

import functools
from dataclasses import dataclass, replace

import torch
import triton.language as tl

from fusedops._core import invariance
from fusedops._core.device import MIN_FP8_CAPABILITY, limits
from fusedops._core.numbers import ceil_div, power_of_2
from fusedops._core.relaunch import Relauncher
from fusedops._core.tuning import Tunable
from fusedops.ops.scaled_matmul._triton import hopper_launch, launches
from fusedops.ops.scaled_matmul._triton.portable import _scaled_matmul_kernel
from fusedops.ops.scaled_matmul._triton.small import (
    _scaled_matmul_combine_kernel,
    _scaled_matmul_small_kernel,
    combine_block,
)

FP8 = torch.float8_e4m3fn
BLOCK_K = 128  # of float8 also the elements that tensor cores add up before float32 takes over
SMALL_M = 64  # rows up to which the weights' bytes are all that counts
SMALL_BLOCK_N = 64  # the rows of b that one tensor core instruction takes
MIN_SPLIT_K = 512  # depth below which a split costs more than it brings
GROUP_M = 8  # rows of tiles that are walked through together
MAX_SUMS = 256  # of one thread, in registers
ALIGNMENT = 16  # bytes

_run = Relauncher(_scaled_matmul_kernel)
_run_small, _run_combine = Relauncher(_scaled_matmul_small_kernel), Relauncher(_scaled_matmul_combine_kernel)


@dataclass(frozen=True)
class MatmulConfig:
    """A tile of block_m rows, block_n columns and block_k of the depth, and how many programs share the depth.

    Attributes:
        kernel: "tile", or "small" for few rows.
        split_k: Depth of one program.
        num_splits: Programs that share a tile's depth; a second kernel adds their parts.
    """

    kernel: str
    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    split_k: int = 0
    num_splits: int = 1


@functools.lru_cache(maxsize=4096)
def default(rows, columns, depth, narrow, device_limits):
    """The tile of a call by arithmetic; how the depth is split does not depend on the rows.

    `narrow`: scales of blocks, or bytes of float8 on the way to float16, take registers in the loop.
    """
    if rows <= SMALL_M:
        return _small(rows, columns, depth, device_limits)
    return _tile(rows, columns, narrow, device_limits)


def _small(rows, columns, depth, device_limits):
    """Two programs for each multiprocessor, in parts of the depth of at least MIN_SPLIT_K."""
    tiles = ceil_div(columns, SMALL_BLOCK_N)
    wanted = ceil_div(2 * device_limits.sm_count, tiles)
    num_splits = max(min(wanted, depth // MIN_SPLIT_K), 1)
    split_k = ceil_div(ceil_div(depth, BLOCK_K), num_splits) * BLOCK_K
    block_m = max(power_of_2(rows), 16)
    num_splits = ceil_div(depth, split_k)
    tile = MatmulConfig("small", block_m, SMALL_BLOCK_N, BLOCK_K, 4, 6, split_k, num_splits)
    return _fitting(tile, device_limits)


def _tile(rows, columns, narrow, device_limits):
    """Squares of 128, halved where there would be fewer of them than multiprocessors."""
    tile = MatmulConfig("tile", 128, 64 if narrow else 128, BLOCK_K, 8, 4)
    if ceil_div(rows, 128) * ceil_div(columns, 128) < device_limits.sm_count:
        tile = replace(tile, block_m=64, num_warps=4)
        if ceil_div(rows, 64) * ceil_div(columns, 128) < device_limits.sm_count:
            tile = replace(tile, block_n=64)
    return _fitting(tile, device_limits)


def _fitting(tile, device_limits):
    """The same with as many stages as the shared memory holds."""
    while tile.num_stages > 1 and shared_bytes(tile, device_limits) > device_limits.shared_memory:
        tile = replace(tile, num_stages=tile.num_stages - 1)
    return tile


def shared_bytes(tile, device_limits):
    """At most what a kernel asks for: tiles on their way, one more for asynchronous products, and 1 KiB of barriers."""
    tiles = max(tile.num_stages - 1, 1) + (90 <= device_limits.capability < 120)
    return tiles * (tile.block_m + tile.block_n) * tile.block_k + 1024


def _fits(tile, rows, columns, depth, narrow, device_limits):
    """Whether the memory holds the tiles, and the registers of a thread the sums."""
    sums = tile.block_m * tile.block_n // (32 * tile.num_warps)
    return shared_bytes(tile, device_limits) <= device_limits.shared_memory and sums <= MAX_SUMS // (1 + narrow)


def _tunable(name, space):
    """What is tuned leaves each sum as it is: a result has the same bits whatever the table says."""
    return Tunable(
        name, default=lambda *asked: default(*asked), sizes=("rows", "columns", "depth"), flags=("narrow",),
        also=("dtype", "out_dtype", "scale_a", "scale_b", "bias", "residual", "activation", "gated", "aligned"),
        space=space,
        fits=_fits, source=__file__,
    )  # fmt: skip


TILE = _tunable(
    "scaled_matmul",
    {"block_m": (32, 64, 128, 256), "block_n": (32, 64, 128, 256), "num_warps": (4, 8), "num_stages": (2, 3, 4, 5)},
)
SMALL = _tunable("scaled_matmul_small", {"num_warps": (2, 4, 8), "num_stages": (2, 3, 4, 5, 6, 7, 8)})


def config(op, device_limits, a, b, *rest):
    """The configuration of one call."""
    if _in_parts(a):
        a = a[:SMALL_M]
    tile = _hopper_tile(device_limits, a, b, *rest)
    return tile if tile is not None else _portable_tile(device_limits, a, b, *rest)


def _in_parts(a):
    """Whether rows must not meet the kernels for many: sums of integers are exact in any order, those of floats not."""
    return a.shape[0] > SMALL_M and a.dtype == FP8 and invariance.enabled()


def _portable_tile(device_limits, a, b, scale_a, scale_b, bias, out_dtype, activation, residual, gated=False):
    rows, depth = a.shape
    narrow = scale_a.dim() == 2 or scale_b.dim() == 2 or expands(a, device_limits)
    aligned = (depth | a.stride(0) | b.stride(0) | a.data_ptr() | b.data_ptr()) % ALIGNMENT == 0
    also = *_also(a, scale_a, scale_b, bias, out_dtype, activation, residual, gated), aligned
    tunable = SMALL if rows <= SMALL_M else TILE
    return tunable.choose(device_limits, (rows, b.shape[0], depth, narrow), also)


def _hopper_tile(device_limits, a, b, scale_a, scale_b, bias, out_dtype, activation, residual, gated=False):
    """The Hopper kernel's configuration, None where another takes the call."""
    if a.shape[0] <= SMALL_M or hopper_launch.rejection(device_limits, a, b) is not None:
        return None
    asked = a.shape[0], b.shape[0], a.shape[1], a.dtype == torch.int8
    also = _also(a, scale_a, scale_b, bias, out_dtype, activation, residual, gated)
    return hopper_launch.TILE.choose(device_limits, asked, also)


def _also(a, scale_a, scale_b, bias, out_dtype, activation, residual, gated):
    """What else tells calls apart, whichever kernel takes them."""
    kinds = _kind(scale_a), _kind(scale_b)
    return a.dtype, out_dtype, *kinds, bias is not None, residual is not None, activation, gated


def expands(a, device_limits):
    """Whether the device has no products of a's dtype, and bytes become float16 on the way."""
    return a.dtype == FP8 and device_limits.capability < MIN_FP8_CAPABILITY


def _kind(scale):
    """The kind of a scale: "one" for all, "row" for one each, "block" for 128 of the depth."""
    return "block" if scale.dim() == 2 else "row" if scale.numel() > 1 else "one"


def _described(scale):
    """A scale as kernels read it, and its kind."""
    kind = _kind(scale)
    return scale.contiguous() if kind == "row" else scale, kind


def int8_matmul(a, b, scale_a, scale_b, bias, out_dtype, activation, residual, gated=False):
    """Launch the kernels on integers."""
    return _matmul(a, b, scale_a, scale_b, bias, out_dtype, activation, residual, gated, tl.int32)


def fp8_matmul(a, b, scale_a, scale_b, bias, out_dtype, activation, residual, gated=False):
    """Launch the kernels on float8, or on its bytes."""
    return _matmul(a, b, scale_a, scale_b, bias, out_dtype, activation, residual, gated, tl.float32)


def _matmul(a, b, scale_a, scale_b, bias, out_dtype, activation, residual, gated, acc):
    given = a, b, scale_a, scale_b, bias, out_dtype, activation, residual, gated
    (rows, depth), columns = a.shape, b.shape[0]
    out = a.new_empty((rows, columns // (1 + gated)), dtype=out_dtype)
    if not rows:
        return out
    if _in_parts(a):
        return torch.cat([_matmul(*part, acc) for part in _parts(*given)])
    device_limits = limits(a.device)
    expand = expands(a, device_limits)
    if expand:
        a, b = a.view(torch.uint8), b.view(torch.uint8)
    (scale_a, kind_a), (scale_b, kind_b) = _described(scale_a), _described(scale_b)
    kinds = {"ACTIVATION": activation or "none", "GATED": gated, "SCALE_A": kind_a, "SCALE_B": kind_b}
    bias = None if bias is None else bias.contiguous()
    scale_strides = *_strides(scale_a), *_strides(scale_b)
    residual_stride = 0 if residual is None else residual.stride(0)
    tensors = (a, b, scale_a, scale_b, bias, residual, out)
    numbers = (a.stride(0), b.stride(0), *scale_strides, residual_stride, rows, columns, depth)
    tile = _hopper_tile(device_limits, *given)
    if tile is not None:
        hopper_launch.launch(tile, tensors, numbers, kinds, device_limits.sm_count)
        return out
    tile = _portable_tile(device_limits, *given)
    constants = {**kinds, "EVEN_K": depth % tile.block_k == 0, "EXPAND": expand, "ACC": acc}
    blocks = {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k}
    constants |= blocks
    if tile.kernel == "small":
        _few_rows(tile, tensors, numbers, constants, kinds)
        return out
    constants["GROUP_M"] = GROUP_M
    grid = ceil_div(rows, tile.block_m) * ceil_div(columns, tile.block_n), 1, 1
    _run(grid, tensors, numbers, constants, tile.num_warps, tile.num_stages)
    return out


def _parts(a, b, scale_a, scale_b, bias, out_dtype, activation, residual, gated):
    """The arguments of a call for every SMALL_M rows."""
    for first in range(0, len(a), SMALL_M):
        part = slice(first, first + SMALL_M)
        scale = scale_a[part] if scale_a.numel() > 1 else scale_a
        added = residual if residual is None else residual[part]
        yield a[part], b, scale, scale_b, bias, out_dtype, activation, added, gated


def _few_rows(tile, tensors, numbers, constants, kinds):
    """Launch the kernel for few rows, and where the depth is shared the one that adds the parts."""
    a, b, *rest, out = tensors
    parts = None
    if tile.num_splits > 1:
        parts_dtype = torch.int32 if constants["ACC"] is tl.int32 else torch.float32
        parts = a.new_empty((tile.num_splits, len(a), len(b)), dtype=parts_dtype)
        constants = constants | {"GATED": False}
    grid = ceil_div(len(b), tile.block_n), tile.num_splits, 1
    _run_small(grid, (*tensors, parts), (*numbers, tile.split_k), constants, tile.num_warps, tile.num_stages)
    if parts is not None:
        block_n = combine_block(kinds["GATED"])
        grid = ceil_div(len(b), block_n), len(a), 1
        stride, rows, columns, _ = numbers[-4:]
        numbers = stride, rows, columns, tile.num_splits
        _run_combine(grid, (parts, *rest, out), numbers, {**kinds, "BLOCK_N": block_n}, 4)


def _strides(scale):
    """Of rows and of blocks of the depth."""
    return scale.stride() if scale.dim() == 2 else (0, 0)


def examples(dtype, target):
    """Launches for a target, with the tiles that it gets."""
    return launches.examples(default, dtype, target)
