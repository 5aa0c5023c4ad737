"""weight_only_matmul on the GPU: codes are loaded as they are stored, and expanded between the load and the product.

The weight is the first operand of the product and stays in registers: its rows fill the tensor core's 64 or 16 rows,
and one activation costs a tile of 16 columns at most. With up to 64 rows of x the columns K are cut into parts, so that
there are programs enough to draw the whole memory bandwidth; the parts depend on the weight's shape alone and are
added in their order. A program's sums over K are the same instructions for every number of rows in that range.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from fusedops._core import invariance
from fusedops._core.device import KIB, MIN_FP8_CAPABILITY, limits
from fusedops._core.launch import KernelExample
from fusedops._core.numbers import ceil_div, power_of_2
from fusedops._core.relaunch import Relauncher
from fusedops._core.tl import activate, paired_rows, settled, split_columns, split_paired_rows, times
from fusedops._core.tuning import Tunable
from fusedops.ops.weight_only_matmul._groups import ZERO_STEPS, group_of

TWO_19 = tl.constexpr(524288.0)
ZERO_STEP = tl.constexpr(1.0 / ZERO_STEPS)
FEW_ROWS = 64
PROGRAMS_PER_SM = 2  # that the parts of K aim at
LOAD_BYTES = 16  # that a thread asks for at once
STAGE_BYTES = 64 * KIB  # of weights and x that a program has under way
MAX_SUMS = 128  # of one thread, in registers
INVARIANT_ROWS = 1024  # of one launch in batch-invariant mode, whose parts of sums are in memory
MIN_PART_STEPS = 4  # of a program's loop, below which adding the parts costs more than it saves
PAIRS = 28672  # rows of Llama 3 8B's gate and up projections as one weight


@dataclass(frozen=True)
class WeightOnlyConfig:
    """A tile of block_n rows of the weight by block_m rows of x, summed over one of `splits` parts of K."""

    block_m: int
    block_n: int
    block_k: int
    splits: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class CombineConfig:
    """Elements of a row of the output that one program adds up."""

    block_n: int
    num_warps: int = 4


@triton.jit
def _after(sixteenths):
    """2**19 and some sixteenths in float32, by their bits: a GPU converts integers at a fraction of this rate."""
    return (sixteenths.to(tl.int32) | 0x49000000).to(tl.float32, bitcast=True)


@triton.jit
def _expanded(codes, zero, FORMAT: tl.constexpr, dtype: tl.constexpr):
    """A tile of stored weights as numbers of `dtype`, exactly; of 4-bit codes two from each byte, less their zero."""
    if FORMAT == "int4":
        low = _after((codes & 15) << 4) - (zero + TWO_19)
        high = _after(codes & 240) - (zero + TWO_19)
        return tl.join(low.to(dtype), high.to(dtype)).reshape(codes.shape[0], 2 * codes.shape[1])
    elif FORMAT == "fp8 bits":  # as float16 these bits are 2**-8 of the number, denormal ones too, but for NaN
        bits = codes.to(tl.uint16)
        half = (((bits & 0x80) << 8) | ((bits & 0x7F) << 7)).to(tl.float16, bitcast=True) * 256.0
        return tl.where((bits & 0x7F) == 0x7F, float("nan"), half.to(tl.float32)).to(dtype)
    else:
        return codes.to(dtype)


@triton.jit
def _real(acc, scale_ptr, bias_ptr, stride_scale_n, N, offs_n, SCALE: tl.constexpr):
    """Sums of columns offs_n with what scales whole rows of the weight, and the bias."""
    mask_n = offs_n < N
    if SCALE == "row":
        acc *= tl.load(scale_ptr + offs_n.to(tl.int64) * stride_scale_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    return acc


@triton.jit
def _store(x, residual_ptr, out_ptr, stride_residual_m, M, N, offs_m, offs_n):
    """Add the residual to a tile [m, n] and store it, with its one rounding."""
    mask = (offs_m < M)[:, None] & (offs_n < N)[None, :]
    rows = offs_m.to(tl.int64)[:, None]
    if residual_ptr is not None:
        x += tl.load(residual_ptr + rows * stride_residual_m + offs_n[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + rows * N + offs_n[None, :], x.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _finish(
    acc, scale_ptr, bias_ptr, residual_ptr, out_ptr, stride_scale_n, stride_residual_m, M, N, offs_m, first_n,
    SCALE: tl.constexpr, ACTIVATION: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """Finish a tile [m, n] of sums, whose first column is first_n."""
    if GATED:
        gate, up = split_columns(acc)
        _finish_pairs(
            gate, up, scale_ptr, bias_ptr, residual_ptr, out_ptr, stride_scale_n, stride_residual_m, M, N, offs_m,
            first_n, SCALE, ACTIVATION,
        )  # fmt: skip
    else:
        offs_n = first_n + tl.arange(0, acc.shape[1])
        x = activate(_real(acc, scale_ptr, bias_ptr, stride_scale_n, N, offs_n, SCALE), ACTIVATION)
        _store(x, residual_ptr, out_ptr, stride_residual_m, M, N, offs_m, offs_n)


@triton.jit
def _finish_pairs(
    gate, up, scale_ptr, bias_ptr, residual_ptr, out_ptr, stride_scale_n, stride_residual_m, M, N, offs_m, first_n,
    SCALE: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """Finish sums [m, n] of even columns from first_n on and of those behind each."""
    columns = first_n // 2 + tl.arange(0, gate.shape[1])
    gate = activate(_real(gate, scale_ptr, bias_ptr, stride_scale_n, N, 2 * columns, SCALE), ACTIVATION)
    up = _real(up, scale_ptr, bias_ptr, stride_scale_n, N, 2 * columns + 1, SCALE)
    _store(times(gate, up), residual_ptr, out_ptr, stride_residual_m, M, N // 2, offs_m, columns)


@triton.jit
def _weight_only_kernel(
    x_ptr, values_ptr, scale_ptr, zero_ptr, bias_ptr, residual_ptr, out_ptr,
    stride_x_m, stride_values_n, stride_scale_n, stride_scale_g, stride_zero_n, stride_zero_g, stride_residual_m,
    M, N, K, num_stored, part_stored,
    FORMAT: tl.constexpr, SCALE: tl.constexpr, GROUP_N: tl.constexpr, GROUP_K: tl.constexpr, ACTIVATION: tl.constexpr,
    GATED: tl.constexpr, IS_SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program computes a tile of the output, or of one part's sums; those with the same weights are neighbours.

    Of parts of sums GATED is False: what is done with pairs follows when they have been added.
    """
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    PACK: tl.constexpr = 2 if FORMAT == "int4" else 1
    num_m = tl.cdiv(M, BLOCK_M)
    pid = tl.program_id(0)
    part = tl.program_id(1)
    offs_m = pid % num_m * BLOCK_M + tl.arange(0, BLOCK_M)
    first_n = pid // num_m * BLOCK_N
    rows_n = tl.arange(0, BLOCK_N)
    offs_n = first_n + (paired_rows(rows_n) if GATED else rows_n)
    offs_k = tl.arange(0, BLOCK_K)
    offs_stored = tl.arange(0, BLOCK_K // PACK)
    mask_m = offs_m < M
    mask_n = offs_n < N
    x_rows = x_ptr + offs_m.to(tl.int64) * stride_x_m
    weight_rows = values_ptr + offs_n.to(tl.int64) * stride_values_n
    scale_rows = scale_ptr + (offs_n // GROUP_N).to(tl.int64) * stride_scale_n
    if zero_ptr is not None:
        zero_rows = zero_ptr + offs_n.to(tl.int64) * stride_zero_n
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    last = tl.minimum((part + 1) * part_stored, num_stored)
    for first in range(part * part_stored, last, BLOCK_K // PACK):
        start = first * PACK
        codes = tl.load(
            weight_rows[:, None] + (first + offs_stored)[None, :],
            mask=mask_n[:, None] & (first + offs_stored < num_stored)[None, :], other=0.0,
        )  # fmt: skip
        x = tl.load(
            x_rows[None, :] + (start + offs_k)[:, None], mask=mask_m[None, :] & (start + offs_k < K)[:, None], other=0.0
        )
        group = tl.full([BLOCK_N], start // GROUP_K, tl.int64)
        zero = 8.0
        if zero_ptr is not None:
            zeros = tl.load(zero_rows + group * stride_zero_g, mask=mask_n, other=0)
            zero = zeros.to(tl.float32)[:, None] * ZERO_STEP
        weight = _expanded(codes, zero, FORMAT, dtype)
        if SCALE == "group":
            scale = tl.load(scale_rows + group * stride_scale_g, mask=mask_n, other=0.0)
            acc += tl.dot(weight, x, input_precision="ieee") * scale.to(tl.float32)[:, None]
        else:
            acc = settled(tl.dot(weight, x, acc, input_precision="ieee"))
    if IS_SPLIT:
        rows = (part * M + offs_m).to(tl.int64)[:, None]
        tl.store(out_ptr + rows * N + offs_n[None, :], tl.trans(acc), mask=mask_m[:, None] & mask_n[None, :])
    elif GATED:
        gate, up = split_paired_rows(acc)
        _finish_pairs(
            tl.trans(gate), tl.trans(up), scale_ptr, bias_ptr, residual_ptr, out_ptr, stride_scale_n,
            stride_residual_m, M, N, offs_m, first_n, SCALE, ACTIVATION,
        )  # fmt: skip
    else:
        _finish(
            tl.trans(acc), scale_ptr, bias_ptr, residual_ptr, out_ptr, stride_scale_n, stride_residual_m, M, N, offs_m,
            first_n, SCALE, ACTIVATION, GATED,
        )  # fmt: skip


@triton.jit
def _combine_kernel(
    parts_ptr, scale_ptr, bias_ptr, residual_ptr, out_ptr, stride_scale_n, stride_residual_m, M, N, splits,
    SCALE: tl.constexpr, ACTIVATION: tl.constexpr, GATED: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program adds BLOCK_N elements of a row over the parts, in their order, and finishes them."""
    offs_m = tl.program_id(0) + tl.arange(0, 1)
    first_n = tl.program_id(1) * BLOCK_N
    offs_n = first_n + tl.arange(0, BLOCK_N)
    mask = (offs_n < N)[None, :]
    acc = tl.zeros([1, BLOCK_N], tl.float32)
    for part in range(splits):
        rows = (part * M + offs_m).to(tl.int64)[:, None]
        acc += tl.load(parts_ptr + rows * N + offs_n[None, :], mask=mask, other=0.0)
    _finish(
        acc, scale_ptr, bias_ptr, residual_ptr, out_ptr, stride_scale_n, stride_residual_m, M, N, offs_m, first_n,
        SCALE, ACTIVATION, GATED,
    )  # fmt: skip


_run, _run_combine = Relauncher(_weight_only_kernel), Relauncher(_combine_kernel)


def default(M, N, K, itemsize, pack, group_k, device_limits):
    """The tile by arithmetic; for up to FEW_ROWS rows, and for more, only what no row's sums see differs.

    pack: weights of a stored element. group_k: columns that share a scale, None where whole rows do.
    """
    if itemsize == 4:  # products on the cores that know float32: operands in registers, so small tiles
        block_m, block_n, block_k, num_warps = min(max(power_of_2(M), 16), 32), 64, 32, 4
    elif M <= FEW_ROWS:  # 32 rows: with 64 a Hopper GPU's products want the weights in memory as no wide load puts them
        block_m, block_n, block_k, num_warps = max(power_of_2(M), 16), 32, 128, 4
    else:
        many = group_k is None and ceil_div(M, 128) * ceil_div(N, 128) >= device_limits.sm_count
        block_m, block_n, block_k, num_warps = (128, 128, 64, 8) if many else (64, 64, 64, 4)
    block_k = min(block_k, group_k or block_k)
    row_bytes = block_k // pack
    if row_bytes <= 32 and M <= FEW_ROWS:
        num_warps = 2
    block_n = max(block_n, num_warps * 32 * LOAD_BYTES // row_bytes)
    tile_bytes = block_n * row_bytes + block_m * block_k * itemsize
    num_stages = min(max(STAGE_BYTES // tile_bytes, 3), 6, (device_limits.shared_memory - KIB) // tile_bytes)
    splits = 1
    if M <= FEW_ROWS:
        wanted = ceil_div(PROGRAMS_PER_SM * device_limits.sm_count, ceil_div(N, block_n))
        steps = ceil_div(K, block_k)
        splits = max(min(wanted, steps // MIN_PART_STEPS), 1)
        splits = ceil_div(steps, ceil_div(steps, splits))  # none is empty
    return WeightOnlyConfig(block_m, block_n, block_k, splits, num_warps, num_stages)


def _fits(tile, M, N, K, itemsize, pack, group_k, device_limits):
    """Whether the memory holds the stages, the registers of a thread the sums, and its loads are wide."""
    tile_bytes = tile.block_n * tile.block_k // pack + tile.block_m * tile.block_k * itemsize
    return (
        tile.num_stages * tile_bytes <= device_limits.shared_memory - KIB
        and tile.block_m * tile.block_n // (32 * tile.num_warps) <= MAX_SUMS
        and tile.block_n * tile.block_k // pack >= tile.num_warps * 32 * LOAD_BYTES
        and (tile.block_m >= power_of_2(M) or M > FEW_ROWS)
    )


# Neither block_k nor splits: a result has the same bits whatever the table says.
TILE = Tunable(
    "weight_only_matmul",
    default=lambda *asked: default(*asked),
    sizes=("rows", "columns", "depth"),
    flags=("itemsize", "pack", "group_k"),
    also=("dtype", "weight_dtype", "scale_dtype", "zero", "bias", "residual", "activation", "gated"),
    space={
        "block_m": (16, 32, 64, 128), "block_n": (32, 64, 128, 256), "num_warps": (2, 4, 8),
        "num_stages": (2, 3, 4, 5, 6),
    },
    fits=_fits,
    source=__file__,
)  # fmt: skip


def config(op, device_limits, x, values, scale, zero, bias, residual, activation, gated=False):
    """The configuration of one call."""
    K, N = x.shape[-1], values.shape[0]
    pack = 2 if values.dtype == torch.uint8 else 1
    group_k = group_of(N, K, tuple(scale.shape))[1] if scale.dim() == 2 else None
    also = (
        x.dtype, values.dtype, scale.dtype, zero is not None, bias is not None, residual is not None, activation,
        gated,
    )  # fmt: skip
    rows = x.numel() // K
    M = min(rows, FEW_ROWS) if invariance.enabled() else rows
    return TILE.choose(device_limits, (M, N, K, x.element_size(), pack, group_k), also)


def _default_join(gated):
    """1024 results, 16 bytes of them for each thread; pairs become half as many."""
    return CombineConfig(2048 if gated else 1024)


def stored_format(values, device_limits):
    """How the kernel reads the weights: float8 as such where the hardware converts it."""
    if values.dtype == torch.float8_e4m3fn:
        return "fp8" if device_limits.capability >= MIN_FP8_CAPABILITY else "fp8 bits"
    return "int4" if values.dtype == torch.uint8 else "int8"


def weight_only_matmul(x, values, scale, zero, bias, residual, activation, gated=False):
    """Launch the product, and the sum over its parts where there are several."""
    K, N = x.shape[-1], values.shape[0]
    width = N // (1 + gated)
    out = x.new_empty(*x.shape[:-1], width)
    rows = x.reshape(-1, K)
    M = rows.shape[0]
    if not M:
        return out
    if M > INVARIANT_ROWS and invariance.enabled():
        residuals = [None] * M if residual is None else residual.reshape(-1, width).split(INVARIANT_ROWS)
        parts = [
            weight_only_matmul(part, values, scale, zero, bias, added, activation, gated)
            for part, added in zip(rows.split(INVARIANT_ROWS), residuals)
        ]
        return torch.cat(parts).view(out.shape)
    device_limits = limits(x.device)
    tile = config("weight_only_matmul", device_limits, x, values, scale, zero, bias, residual, activation, gated)
    group_n, group_k = group_of(N, K, tuple(scale.shape)) if scale.dim() == 2 else (1, 1)
    stored = stored_format(values, device_limits)
    if stored == "fp8 bits":
        values = values.view(torch.uint8)
    if residual is not None:
        residual = residual.reshape(-1, width)
    scale_strides = scale.stride() if scale.dim() == 2 else (scale.stride(0) if scale.numel() > 1 else 0, 0)
    strides = (
        rows.stride(0), values.stride(0), *scale_strides, *((0, 0) if zero is None else zero.stride()),
        0 if residual is None else residual.stride(0),
    )  # fmt: skip
    is_split = tile.splits > 1
    part_k = ceil_div(ceil_div(K, tile.block_k), tile.splits) * tile.block_k
    part_stored = part_k // 2 if stored == "int4" else part_k
    kind = "group" if scale.dim() == 2 else "row"
    constants = {
        "FORMAT": stored, "SCALE": kind, "GROUP_N": group_n, "GROUP_K": group_k, "ACTIVATION": activation or "none",
        "GATED": gated and not is_split, "IS_SPLIT": is_split,
        "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k,
    }  # fmt: skip
    target = x.new_empty(tile.splits, M, N, dtype=torch.float32) if is_split else out
    grid = ceil_div(M, tile.block_m) * ceil_div(N, tile.block_n), tile.splits, 1
    behind = (None, None) if is_split else (bias, residual)
    numbers = (*strides, M, N, K, values.shape[1], part_stored)
    _run(grid, (rows, values, scale, zero, *behind, target), numbers, constants, tile.num_warps, tile.num_stages)
    if is_split:
        join = _default_join(gated)
        constants = {"SCALE": kind, "ACTIVATION": activation or "none", "GATED": gated, "BLOCK_N": join.block_n}
        _run_combine(
            (M, ceil_div(N, join.block_n), 1), (target, scale, bias, residual, out),
            (scale_strides[0], strides[-1], M, N, tile.splits), constants, join.num_warps,
        )  # fmt: skip
    return out


def examples(dtype, target):
    """A weight of 4096 by 4096 by one row and by many, one of pairs by 64, in every format, and the sum over parts.

    The dtypes differ in how codes become numbers and how these are multiplied, so each has some of them.
    """
    fp8 = "fp8" if target.capability >= MIN_FP8_CAPABILITY else "fp8 bits"
    if dtype == "fp16":
        yield _example(dtype, target, 64, "int4", 128)
        yield _example(dtype, target, 1, fp8, 0)
        return
    yield _example(dtype, target, 1, "int8", 0)
    if dtype == "fp32":
        return
    yield _example(dtype, target, 64, fp8, 128, PAIRS)
    yield _example(dtype, target, 1, "int4", 32)
    yield _example(dtype, target, 1024, "int8", 0)
    join = _default_join(gated=True)
    types = {"parts_ptr": "*fp32", "scale_ptr": "*fp32", "bias_ptr": f"*{dtype}", "residual_ptr": f"*{dtype}"}
    types |= {"out_ptr": f"*{dtype}", "stride_residual_m": "i32", "M": "i32", "N": "i32", "splits": "i32"}
    constants = {"stride_scale_n": 1, "SCALE": "row", "ACTIVATION": "silu", "GATED": True, "BLOCK_N": join.block_n}
    divisible = tuple(name for name in types if name not in ("M", "splits"))
    yield KernelExample(_combine_kernel, types, constants, divisible, num_warps=join.num_warps)


def _example(dtype, target, M, stored, group, N=4096):
    """A launch for a weight of N by 4096: gated where it is PAIRS, of which few rows are not summed in parts."""
    itemsize, pack = 4 if dtype == "fp32" else 2, 2 if stored == "int4" else 1
    tile = default(M, N, 4096, itemsize, pack, group or None, target)
    is_split = tile.splits > 1
    constants = {
        "FORMAT": stored, "SCALE": "group" if group else "row", "GROUP_N": 1, "GROUP_K": group or 1,
        "ACTIVATION": "silu", "GATED": N == PAIRS, "IS_SPLIT": is_split,
        "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k,
    }  # fmt: skip
    pointers = dict.fromkeys(("x_ptr", "bias_ptr", "residual_ptr", "out_ptr"), f"*{dtype}")
    pointers |= {"values_ptr": {"int8": "*i8", "fp8": "*fp8e4nv"}.get(stored, "*u8"), "scale_ptr": "*fp32"}
    pointers |= {"zero_ptr": "*u8"} | ({"out_ptr": "*fp32"} if is_split else {})
    absent = ["bias_ptr", "residual_ptr"] * is_split + ["zero_ptr"] * (not group)
    types, divisible = {}, []
    for name in _weight_only_kernel.arg_names:
        if name in absent:
            constants[name] = None
        elif name not in constants:
            types[name] = pointers.get(name, "i32")
            divisible += [name] if name != "M" else []
    return KernelExample(
        _weight_only_kernel, types, constants, tuple(divisible), num_warps=tile.num_warps, num_stages=tile.num_stages
    )
