"""Quantising on the GPU: every element is read and written once, and for one scale of a whole tensor read twice.

The tiles of a launch are parts of rows: whole rows, blocks of 128, or parts of any size where all share one scale.
"""

import torch
import triton
import triton.language as tl

from fusedops._core import codes, rows
from fusedops._core.device import limits
from fusedops._core.launch import KernelExample
from fusedops._core.numbers import ceil_div, power_of_2
from fusedops._core.relaunch import Relauncher
from fusedops._core.tl import encoded, inverse_of, largest_bits, row_offsets, scale_of, size_bits
from fusedops._core.tuning import Tunable
from fusedops.ops.quantize import BLOCK, scale_shape


@triton.jit
def _quantize_kernel(
    x_ptr, given_ptr, values_ptr, scale_ptr, stride_x_outer, stride_x_inner, M, N, inner, num_parts, num_given,
    SCALE: tl.constexpr, CODE: tl.constexpr, BY_INTEGERS: tl.constexpr, ONE_BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_GIVEN: tl.constexpr,
):  # fmt: skip
    """One program quantises BLOCK_M rows, or one part of BLOCK_N elements of each.

    SCALE is "own" where each part has a scale that is computed here, "each" where it is given, "one" where one number
    is given for all, and "all" where that is made from the largest values that `_largest_kernel` has found.
    """
    pid = tl.program_id(0)
    part = pid % num_parts
    offs_m = (pid // num_parts).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < M
    start = part.to(tl.int64) * BLOCK_N
    x_rows = x_ptr + row_offsets(offs_m, inner, stride_x_outer, stride_x_inner)[:, None]
    values_rows = values_ptr + (offs_m * N)[:, None]
    offs_n = start + tl.arange(0, BLOCK_N)[None, :]
    if ONE_BLOCK:
        mask = mask_m[:, None] & (offs_n < N)
        x = tl.load(x_rows + offs_n, mask=mask, other=0.0).to(tl.float32)

    if SCALE == "own":
        if ONE_BLOCK:
            top = largest_bits(x, 1)
        else:
            tops = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)
            for begin in range(0, N, BLOCK_N):
                mask = mask_m[:, None] & (begin + offs_n < N)
                x = tl.load(x_rows + begin + offs_n, mask=mask, other=0.0).to(tl.float32)
                tops = tl.maximum(tops, size_bits(x))
            top = tl.max(tops, 1)
        scale = scale_of(top, CODE)
        tl.store(scale_ptr + offs_m * num_parts + part, scale, mask=mask_m)
    elif SCALE == "each":
        scale = tl.load(given_ptr + offs_m * num_parts + part, mask=mask_m, other=1.0)
    elif SCALE == "one":
        scale = tl.full([BLOCK_M], 0.0, tl.float32) + tl.load(given_ptr)
    else:
        offs = tl.arange(0, BLOCK_GIVEN)
        one = scale_of(tl.max(tl.load(given_ptr + offs, mask=offs < num_given, other=0), 0), CODE)
        if pid == 0:
            tl.store(scale_ptr, one)
        scale = tl.full([BLOCK_M], 0.0, tl.float32) + one

    inverse = inverse_of(scale)[:, None]
    if ONE_BLOCK:
        tl.store(values_rows + offs_n, encoded(x * inverse, CODE, -127.0, BY_INTEGERS), mask=mask)
    else:
        for begin in range(0, N, BLOCK_N):
            mask = mask_m[:, None] & (begin + offs_n < N)
            x = tl.load(x_rows + begin + offs_n, mask=mask, other=0.0).to(tl.float32)
            tl.store(values_rows + begin + offs_n, encoded(x * inverse, CODE, -127.0, BY_INTEGERS), mask=mask)


@triton.jit
def _largest_kernel(
    x_ptr, tops_ptr, stride_x_outer, stride_x_inner, M, N, inner, num_parts, num_tiles,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program finds the largest absolute value of every num_programs-th tile, as bits."""
    tops = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)
    for tile in range(tl.program_id(0), num_tiles, tl.num_programs(0)):
        offs_m = (tile // num_parts).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        offs_n = (tile % num_parts).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
        x_rows = x_ptr + row_offsets(offs_m, inner, stride_x_outer, stride_x_inner)[:, None]
        mask = (offs_m < M)[:, None] & (offs_n < N)
        x = tl.load(x_rows + offs_n, mask=mask, other=0.0).to(tl.float32)
        tops = tl.maximum(tops, size_bits(x))
    tl.store(tops_ptr + tl.program_id(0), tl.max(tops))


@triton.jit
def _quantize_2d_kernel(
    x_ptr, given_ptr, values_ptr, scale_ptr, stride_x_outer, stride_x_inner, N, K, inner, num_blocks_n, num_blocks_k,
    HAS_SCALE: tl.constexpr, CODE: tl.constexpr, BY_INTEGERS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program quantises a block of BLOCK_N rows and columns of one of the matrices [N, K]."""
    pid = tl.program_id(0)
    block_n = pid // num_blocks_k
    matrix = (block_n // num_blocks_n).to(tl.int64)
    offs_n = block_n % num_blocks_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = (pid % num_blocks_k * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    mask = (offs_n < N)[:, None] & (offs_k < K)
    row = matrix * N + offs_n
    x_rows = x_ptr + row_offsets(row, inner, stride_x_outer, stride_x_inner)[:, None]
    x = tl.load(x_rows + offs_k, mask=mask, other=0.0).to(tl.float32)
    if HAS_SCALE:
        scale = tl.load(given_ptr + pid)
    else:
        scale = scale_of(tl.max(largest_bits(x, 1), 0), CODE)
        tl.store(scale_ptr + pid, scale)
    inverse = inverse_of(tl.full([1, 1], 0.0, tl.float32) + scale)
    values = encoded(x * inverse, CODE, -127.0, BY_INTEGERS)
    tl.store(values_ptr + (row * K)[:, None] + offs_k, values, mask=mask)


_quantize = Relauncher(_quantize_kernel)
_largest = Relauncher(_largest_kernel)
_quantize_2d = Relauncher(_quantize_2d_kernel)

TILE = 2048  # elements of a tile of parts: 16-byte stores of codes by each of 128 threads
NUM_WARPS = 4
WARPS_2D = 8
PROGRAMS_PER_SM = 4  # of the search for the largest value, whose results every program of the second launch reads


def default(granularity, columns):
    """The configuration for rows of so many columns. It never depends on the number of rows, as results do not."""
    if granularity == "block_2d":
        return rows.RowConfig(BLOCK, BLOCK, WARPS_2D)
    if granularity == "row":
        return rows.default(columns)
    block_n = BLOCK if granularity == "block" else min(power_of_2(columns), TILE)
    return rows.RowConfig(TILE // block_n, block_n, NUM_WARPS)


def _fits(tile, columns, granularity, device_limits):
    """Whether the parts are what share a scale, and a thread has wide accesses and registers for its values."""
    values = tile.block_m * tile.block_n // (32 * tile.num_warps)
    wanted = {"block": (tile.block_m, BLOCK), "block_2d": (BLOCK, BLOCK)}.get(granularity, (tile.block_m, tile.block_n))
    return (
        (tile.block_m, tile.block_n) == wanted
        and tile.block_n < 2 * max(columns, BLOCK)
        and rows.MIN_VALUES <= values <= rows.MAX_VALUES
    )


# Maxima are exact in any order and elements are quantised alone: a result has the same bits whatever the tables say.
ROWS = rows.tunable("quantize_rows", __file__, ("dtype", "codes", "given"))
PARTS = Tunable(
    "quantize_parts",
    default=lambda columns, granularity, device_limits: default(granularity, columns),
    sizes=("columns",),
    flags=("granularity",),
    also=("dtype", "codes", "given"),
    space={"block_m": (1, 2, 4, 8, 16, 32, 64, 128), "block_n": (128, 1024, 2048, 4096, 8192),
           "num_warps": (1, 2, 4, 8, 16)},
    fits=_fits,
    source=__file__,
)  # fmt: skip


def config(op, device_limits, x, *args):
    """The configuration of one call."""
    if op == "quantize_scaled":
        scale, granularity, dtype = args
        return _tile(device_limits, x, "tensor" if scale.numel() == 1 else granularity, dtype, True)
    granularity, dtype = args if op == "quantize_fp8" else (*args, torch.int8)
    return _tile(device_limits, x, granularity, dtype, False)


def _tile(device_limits, x, granularity, dtype, given):
    columns = x.numel() if granularity == "tensor" and x.is_contiguous() else x.shape[-1]
    also = x.dtype, dtype, given
    if granularity == "row":
        return ROWS.choose(device_limits, (columns,), also)
    return PARTS.choose(device_limits, (columns, granularity), also)


def quantize_int8(x, granularity):
    """Launch for int8."""
    return quantize_fp8(x, granularity, torch.int8)


def quantize_fp8(x, granularity, dtype):
    """Launch for any dtype of codes, with scales that are computed."""
    values = x.new_empty(x.shape, dtype=dtype)
    scale = x.new_empty(scale_shape(x.shape, granularity), dtype=torch.float32)
    if not x.numel():
        return values, scale.fill_(codes.LEAST_SCALE)
    tile = _tile(limits(x.device), x, granularity, dtype, False)
    if granularity == "block_2d":
        _launch_2d(tile, x, None, values, scale)
    elif granularity == "tensor":
        _launch(tile, x, _largest_values(tile, x), values, scale, granularity, "all")
    else:
        _launch(tile, x, None, values, scale, granularity, "own")
    return values, scale


def quantize_scaled(x, scale, granularity, dtype):
    """Launch for any dtype of codes, with scales that are given."""
    values = x.new_empty(x.shape, dtype=dtype)
    if not x.numel():
        return values
    scale = scale.contiguous()
    granularity = "tensor" if scale.numel() == 1 else granularity
    tile = _tile(limits(x.device), x, granularity, dtype, True)
    if granularity == "block_2d":
        _launch_2d(tile, x, scale, values, None)
    else:
        _launch(tile, x, scale, values, None, granularity, "one" if granularity == "tensor" else "each")
    return values


def _layout(x, granularity):
    """(x, rows, columns, inner, strides); a contiguous tensor of one scale is one long row."""
    if granularity == "tensor" and x.is_contiguous():
        return x, 1, x.numel(), 1, (0, 0)
    (x,), (num_rows, inner, strides) = rows.stridable(x)
    return x, num_rows, x.shape[-1], inner, strides


def _launch(tile, x, given, values, scale, granularity, kind):
    x, num_rows, columns, inner, strides = _layout(x, granularity)
    parts = 1 if granularity == "row" else ceil_div(columns, tile.block_n)
    stored, code, by_integers = codes.as_stored(values)
    num_given = given.numel() if kind == "all" else 0
    constants = {
        "SCALE": kind, "CODE": code, "BY_INTEGERS": by_integers,
        "ONE_BLOCK": granularity != "row" or columns <= tile.block_n,
        "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_GIVEN": power_of_2(num_given),
    }  # fmt: skip
    numbers = (*strides, num_rows, columns, inner, parts, num_given)
    grid = (ceil_div(num_rows, tile.block_m) * parts, 1, 1)
    _quantize(grid, (x, given, stored, scale), numbers, constants, tile.num_warps)


def _largest_values(tile, x):
    """The largest values of as many parts of x as there are programs, as bits."""
    x, num_rows, columns, inner, strides = _layout(x, "tensor")
    parts = ceil_div(columns, tile.block_n)
    tiles = ceil_div(num_rows, tile.block_m) * parts
    programs = min(tiles, PROGRAMS_PER_SM * limits(x.device).sm_count)
    tops = x.new_empty(programs, dtype=torch.int32)
    numbers = (*strides, num_rows, columns, inner, parts, tiles)
    constants = {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n}
    _largest((programs, 1, 1), (x, tops), numbers, constants, tile.num_warps)
    return tops


def _launch_2d(tile, x, given, values, scale):
    n, k = x.shape[-2:]
    (x,), (num_rows, inner, strides) = rows.stridable(x)
    stored, code, by_integers = codes.as_stored(values)
    blocks_n, blocks_k = ceil_div(n, BLOCK), ceil_div(k, BLOCK)
    constants = {"HAS_SCALE": given is not None, "CODE": code, "BY_INTEGERS": by_integers, "BLOCK_N": BLOCK}
    numbers = (*strides, n, k, inner, blocks_n, blocks_k)
    grid = num_rows // n * blocks_n * blocks_k, 1, 1
    _quantize_2d(grid, (x, given, stored, scale), numbers, constants, tile.num_warps)


def examples(dtype, target):
    """Every kind of scale, short, long and very long rows, and every code."""
    for code, granularity, columns, kind in (
        ("int8", "row", 4096, "own"), ("int8", "row", 16384, "own"), ("int8", "row", 32768, "own"),
        ("int8", "tensor", 1 << 32, "all"), ("fp8e4nv", "row", 4096, "own"), ("fp8e4nv", "block", 4096, "own"),
        ("fp8e4nv", "tensor", 1 << 32, "one"), ("fp8e4nv", "block", 4096, "each"), ("fp8e5", "row", 128, "own"),
    ):  # fmt: skip
        yield _example(dtype, codes.example(code, target), granularity, columns, kind)
    yield _example_2d(dtype, codes.example("fp8e4nv", target))
    tile = default("tensor", 1 << 32)
    yield KernelExample(
        _largest_kernel,
        {"x_ptr": f"*{dtype}", "tops_ptr": "*i32", "N": "i64", "num_parts": "i32", "num_tiles": "i32"},
        {"stride_x_outer": 0, "stride_x_inner": 0, "M": 1, "inner": 1,
         "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n},
        divisible=("x_ptr", "tops_ptr", "N"), num_warps=tile.num_warps, wide_access=False,
    )  # fmt: skip


def _example(dtype, how, granularity, columns, kind):
    """A launch over contiguous rows."""
    stored, code, by_integers = how
    tile = default(granularity, columns)
    flat = granularity == "tensor"
    constants = {
        "SCALE": kind, "CODE": code, "BY_INTEGERS": by_integers,
        "ONE_BLOCK": granularity != "row" or columns <= tile.block_n,
        "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_GIVEN": 1024 if kind == "all" else 1,
        **({"num_parts": 1} if granularity == "row" else {}), **({"M": 1} if flat else {}), "stride_x_inner": 0,
        "inner": 1, **({"given_ptr": None} if kind == "own" else {}),
        **({"scale_ptr": None} if kind in ("one", "each") else {}),
    }  # fmt: skip
    given = "*i32" if kind == "all" else "*fp32"
    wide = {"x_ptr": f"*{dtype}", "given_ptr": given, "values_ptr": f"*{stored}", "scale_ptr": "*fp32"}
    wide |= {"N": "i64"} if flat else {}
    types = {name: wide.get(name, "i32") for name in _quantize_kernel.arg_names if name not in constants}
    divisible = tuple(name for name in types if name in wide or name in ("N", "stride_x_outer"))
    return KernelExample(_quantize_kernel, types, constants, divisible, num_warps=tile.num_warps)


def _example_2d(dtype, how):
    """A launch over one contiguous matrix."""
    stored, code, by_integers = how
    constants = {
        "HAS_SCALE": False, "CODE": code, "BY_INTEGERS": by_integers, "BLOCK_N": BLOCK,
        "stride_x_inner": 0, "inner": 1, "given_ptr": None,
    }  # fmt: skip
    pointers = {"x_ptr": f"*{dtype}", "values_ptr": f"*{stored}", "scale_ptr": "*fp32"}
    types = {name: pointers.get(name, "i32") for name in _quantize_2d_kernel.arg_names if name not in constants}
    divisible = (*pointers, "stride_x_outer", "N", "K")
    return KernelExample(_quantize_2d_kernel, types, constants, divisible, num_warps=WARPS_2D)
