"""quantize_int4 on the GPU: a group stays in registers from its extremes to its codes."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from fusedops._core.device import limits
from fusedops._core.launch import KernelExample
from fusedops._core.numbers import ceil_div
from fusedops._core.tuning import Tunable

ZERO_STEPS = tl.constexpr(16.0)  # of a code, that zeros are counted in
ROUNDER = tl.constexpr(12582912.0)  # 1.5 * 2**23: adding it leaves no fraction bits, rounded to nearest even


@dataclass(frozen=True)
class Int4Config:
    """Groups of one program."""

    block_g: int
    num_warps: int = 4


@triton.jit
def _rounded_up(step, dtype: tl.constexpr):
    """Steps as the next number of the dtype that is not below, in float32; NaN stays NaN."""
    least: tl.constexpr = 2.0**-24 if dtype == tl.float16 else 2.0**-126
    step = tl.maximum(step, least, propagate_nan=tl.PropagateNan.ALL)
    if dtype == tl.float32:
        return step
    else:
        rounded = step.to(dtype)
        above = (rounded.to(tl.int16, bitcast=True) + 1).to(dtype, bitcast=True).to(tl.float32)
        return tl.where(rounded.to(tl.float32) < step, above, rounded.to(tl.float32))


@triton.jit
def _codes(w, scale, zero):
    """Codes in float32, and the largest error of each group."""
    places = tl.div_rn(w, tl.broadcast_to(scale[:, None], w.shape))
    rounded = ((places + zero[:, None]) + ROUNDER) - ROUNDER
    codes = tl.minimum(tl.maximum(rounded, 0.0), 15.0)
    return codes, tl.max(tl.abs(places - (codes - zero[:, None])), 1) * scale


@triton.jit
def _quantize_int4_kernel(
    weight_ptr, values_ptr, scale_ptr, zero_ptr, stride_weight_n, N, K, num_groups, num_stored,
    GROUP: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """One program quantises BLOCK_G groups."""
    dtype: tl.constexpr = weight_ptr.dtype.element_ty
    groups = tl.program_id(0).to(tl.int64) * BLOCK_G + tl.arange(0, BLOCK_G)
    rows = groups // num_groups
    first = groups % num_groups * GROUP
    columns = first[:, None] + tl.arange(0, GROUP)[None, :]
    inside = (rows < N)[:, None] & (columns < K)
    w = tl.load(weight_ptr + rows[:, None] * stride_weight_n + columns, mask=inside, other=0.0).to(tl.float32)
    low = tl.minimum(tl.min(w, 1), 0.0)
    high = tl.maximum(tl.max(w, 1), 0.0)
    has_nan = tl.max((w != w).to(tl.int32), 1) != 0
    top = tl.maximum(high, -low)
    even = _rounded_up(tl.div_rn(high - low, tl.full([BLOCK_G], 15.0, tl.float32)), dtype)
    eighths = _rounded_up(top * 0.125, dtype)
    place = tl.div_rn(-low, even)
    scale, zero = even, (place + ROUNDER) - ROUNDER
    codes, error = _codes(w, scale, zero)
    centre = tl.where(-low >= high, 8.0, 7.0)
    other, other_error = _codes(w, eighths, centre)
    better = other_error < error
    scale, zero = tl.where(better, eighths, scale), tl.where(better, centre, zero)
    codes, error = tl.where(better[:, None], other, codes), tl.where(better, other_error, error)
    between = ((place * ZERO_STEPS + ROUNDER) - ROUNDER) * (1.0 / ZERO_STEPS)
    other, other_error = _codes(w, even, between)
    better = (other_error < error) & (tl.min(tl.abs(w), 1) > 0.0)
    scale, zero = tl.where(better, even, scale), tl.where(better, between, zero)
    codes = tl.where(better[:, None], other, codes)
    scale = tl.where(has_nan, float("nan"), scale)
    finite = scale < float("inf")
    codes = tl.where(finite[:, None] & inside, codes, 0.0).to(tl.int32)
    even_codes, odd_codes = tl.split(codes.reshape([BLOCK_G, GROUP // 2, 2]))
    pairs = (even_codes | (odd_codes << 4)).to(tl.uint8)
    stored = (first // 2)[:, None] + tl.arange(0, GROUP // 2)[None, :]
    mask = (rows < N)[:, None] & (stored < num_stored)
    tl.store(values_ptr + rows[:, None] * num_stored + stored, pairs, mask=mask)
    tl.store(scale_ptr + groups, scale.to(dtype), mask=rows < N)
    tl.store(zero_ptr + groups, tl.where(finite, zero * ZERO_STEPS, 0.0).to(tl.uint8), mask=rows < N)


def _default(group_size):
    """4096 elements: 32 for each of 128 threads."""
    return Int4Config(4096 // group_size)


def _fits(tile, group_size, device_limits):
    """Whether a thread has wide accesses, and registers for its values and what three searches keep of them."""
    return 8 <= tile.block_g * group_size // (32 * tile.num_warps) <= 64


# A group is quantised alone, and its extremes are exact in any order: results have the same bits.
TILE = Tunable(
    "quantize_int4",
    default=lambda group_size, device_limits: _default(group_size),
    sizes=(),
    flags=("group_size",),
    also=("dtype",),
    space={"block_g": (8, 16, 32, 64, 128, 256), "num_warps": (1, 2, 4, 8)},
    fits=_fits,
    source=__file__,
)


def config(op, device_limits, weight, group_size):
    """The configuration of one call."""
    return TILE.choose(device_limits, (group_size,), (weight.dtype,))


def quantize_int4(weight, group_size):
    """Launch the kernel."""
    N, K = weight.shape
    num_groups, num_stored = ceil_div(K, group_size), ceil_div(K, 2)
    values = weight.new_empty(N, num_stored, dtype=torch.uint8)
    scale, zero = weight.new_empty(N, num_groups), weight.new_empty(N, num_groups, dtype=torch.uint8)
    if weight.numel():
        tile = config("quantize_int4", limits(weight.device), weight, group_size)
        _quantize_int4_kernel[(ceil_div(N * num_groups, tile.block_g),)](
            weight, values, scale, zero, weight.stride(0), N, K, num_groups, num_stored,
            GROUP=group_size, BLOCK_G=tile.block_g, num_warps=tile.num_warps,
        )  # fmt: skip
    return values, scale, zero


def examples(dtype, target):
    """Groups of 32 of a row of 4096."""
    types = {"weight_ptr": f"*{dtype}", "values_ptr": "*u8", "scale_ptr": f"*{dtype}", "zero_ptr": "*u8"}
    types |= dict.fromkeys(("stride_weight_n", "N", "K", "num_groups", "num_stored"), "i32")
    constants = {"GROUP": 32, "BLOCK_G": _default(32).block_g}
    yield KernelExample(_quantize_int4_kernel, types, constants, divisible=tuple(types))
