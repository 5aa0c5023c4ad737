"""Rows of any tensor: how leading dimensions become one or two strides, and how many rows one program takes."""

from dataclasses import dataclass

from fusedops._core.numbers import power_of_2
from fusedops._core.tuning import Tunable

# One program holds a row of up to this many elements in registers; longer rows are read in blocks, twice.
MAX_BLOCK = 16384
LOOP_BLOCK = 8192


@dataclass(frozen=True)
class RowConfig:
    """Tile of a row-wise kernel: block_m rows of block_n columns, by num_warps warps."""

    block_m: int
    block_n: int
    num_warps: int


def default(n, max_block=MAX_BLOCK):
    """The configuration for rows of n elements. It never depends on the number of rows, so a row's result does not."""
    block_n = power_of_2(n)
    if block_n > max_block:
        block_n = min(LOOP_BLOCK, max_block)
    block_m = max(1, 1024 // block_n)
    return RowConfig(block_m, block_n, min(max(block_m * block_n // 512, 1), 16))


# Values of one thread's registers: fewer leave it no wide access, more leave it no registers.
MIN_VALUES, MAX_VALUES = 4, 64


def tunable(name, source, also, max_block=MAX_BLOCK):
    """The Tunable of a row-wise kernel; like the default it never sees the number of rows."""

    def computed(n, device_limits):
        return default(n, max_block)

    def fits(config, n, device_limits):
        elements = config.block_m * config.block_n
        values = elements // (32 * config.num_warps)
        one_block = config.block_m == 1 or n <= config.block_n
        return one_block and elements <= max_block and MIN_VALUES <= values <= MAX_VALUES

    space = {"block_m": (1, 2, 4, 8, 16), "num_warps": (1, 2, 4, 8, 16)}
    return Tunable(name, default=computed, sizes=("n",), also=also, space=space, fits=fits, source=source)


def constants(n, tile):
    """The tile of rows of n elements as constants of a kernel that reads longer rows in blocks."""
    return {"ONE_BLOCK": n <= tile.block_n, "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n}


def collapse(*tensors):
    """Lay the leading dimensions of equally shaped tensors out as (outer, inner) rows that all of them can stride over.

    Returns:
        (rows, inner, strides): row r of tensor i starts at element
        ``(r // inner) * strides[2 * i] + (r % inner) * strides[2 * i + 1]``; ``inner`` is 1 where one stride is enough.
        None where some tensor needs more than two strides.
    """
    shape = tensors[0].shape[:-1]
    if all(tensor.is_contiguous() for tensor in tensors):
        n = tensors[0].shape[-1]
        rows = 1
        for size in shape:
            rows *= size
        return rows, 1, (n, 0) * len(tensors)
    groups = []  # (size, one stride per tensor), innermost first
    for dim in reversed(range(len(shape))):
        if shape[dim] == 1:
            continue
        strides = tuple(tensor.stride(dim) for tensor in tensors)
        if groups:
            size, inner = groups[-1]
            if all(outer == step * size for outer, step in zip(strides, inner)):
                groups[-1] = (size * shape[dim], inner)
                continue
        groups.append((shape[dim], strides))
    if len(groups) > 2:
        return None
    if not groups:
        return 1, 1, (0, 0) * len(tensors)
    if len(groups) == 1:
        (rows, strides), inner = groups[0], 1
        return rows, inner, tuple(x for stride in strides for x in (stride, 0))
    (inner, low), (outer, high) = groups
    return outer * inner, inner, tuple(x for pair in zip(high, low) for x in pair)


def dense(tensor):
    """The tensor, or a copy of it where its last dimension is not contiguous."""
    return tensor if tensor is None or tensor.stride(-1) == 1 or tensor.shape[-1] <= 1 else tensor.contiguous()


def stridable(*tensors):
    """The tensors and their collapsed layout; copies them where two strides are not enough for all."""
    layout = collapse(*tensors)
    if layout is None:
        tensors = tuple(tensor.contiguous() for tensor in tensors)
        layout = collapse(*tensors)
    return tensors, layout
