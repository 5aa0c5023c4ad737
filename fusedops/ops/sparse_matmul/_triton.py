"""sparse_matmul for few rows: the weight is read compressed, and becomes dense in the registers of the product.

A thread of the tensor cores needs eight columns of a row of the weight: four values and one byte of metadata. Selectors
of bytes follow from the byte by shifts, and one instruction for each 32-bit register takes the values to their places,
so no number of the weight passes through another thread. The weight is the right operand of mma.sync products: few rows
of a are few instructions. With up to 64 rows K is cut into parts, so that there are programs enough to draw the whole
memory bandwidth; these depend on the weight's shape alone and are added in their order. A program's sums over K are the
same instructions for every number of rows in that range.
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
from fusedops._core.scales import row_kind
from fusedops._core.tl import float8_as_half, take_bytes
from fusedops._core.tl_epilogue import finish, sum_of_parts
from fusedops._core.tuning import Tunable

FP8 = torch.float8_e4m3fn
GROUP = tl.constexpr(4)  # columns, of which two are kept
VALUES_UNIT, METADATA_UNIT = tl.constexpr(32), tl.constexpr(16)  # elements that rows are multiples of
FEW_ROWS = 64
PROGRAMS_PER_SM = 4  # of two warps, that the parts of K aim at
LOAD_BYTES = 16  # that a thread asks for at once
STAGE_BYTES = 40 * KIB  # of weights and a that a program has under way
MAX_SUMS = 128  # of one thread, in registers
INVARIANT_ROWS = 1024  # of one launch in batch-invariant mode, whose parts of sums are in memory
MIN_PART_STEPS = 4  # of a program's loop, below which adding the parts costs more than it saves
COMBINE_BLOCK = 1024  # sums of a row that one program adds up: 16 bytes of 16-bit results for each thread


@dataclass(frozen=True)
class SparseConfig:
    """A tile of block_m rows of a by block_n rows of the weight, summed over one of `splits` parts of K."""

    block_m: int
    block_n: int
    block_k: int
    splits: int
    num_warps: int
    num_stages: int


@triton.jit
def _as_halves(pairs):
    """Two bytes of float8_e4m3fn as two float16 of 2**-8 times their value in a uint32, as `float8_as_half` has one."""
    pairs = pairs.to(tl.uint32)
    spread = (pairs & 0xFF) | ((pairs & 0xFF00) << 8)
    sizes = spread & 0x7F007F
    nan = ((sizes + 0x10001) & 0x800080) >> 7
    return ((spread & 0x800080) << 8) | (sizes << 7) | (nan * 0x7E00)


@triton.jit
def _dense(values, metadata, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, dtype: tl.constexpr):
    """A tile [BLOCK_N, BLOCK_K] of the weight, of pairs of values [.., BLOCK_K / 4] and bytes [.., BLOCK_K / 8].

    A pair is one unsigned integer. Of 16 bits two selectors stand in a register: 0x44 are two zero bytes, 0x10 the
    first value and 0x32 the second. Of 8 bits each of the four is a nibble. Equal places, of metadata that is none,
    select a byte behind the word, which is zero too.
    """
    metadata = metadata.to(tl.uint32)
    places = tl.join(metadata, metadata >> 4).reshape(BLOCK_N, BLOCK_K // GROUP)
    if dtype.primitive_bitwidth == 16:
        selector = 0x44444444 ^ (0x54 << ((places & 3) << 3)) ^ (0x76 << ((places & 12) << 1))
        low, high = take_bytes(values, selector), take_bytes(values, selector >> 16)
        first, second = low.to(tl.uint16), (low >> 16).to(tl.uint16)
        third, fourth = high.to(tl.uint16), (high >> 16).to(tl.uint16)
    else:
        selector = 0x4444 ^ (4 << ((places & 3) << 2)) ^ (5 << (places & 12))
        taken = take_bytes(values.to(tl.uint32), selector)
        first, second = taken.to(tl.uint8), (taken >> 8).to(tl.uint8)
        third, fourth = (taken >> 16).to(tl.uint8), (taken >> 24).to(tl.uint8)
    dense = tl.join(tl.join(first, third), tl.join(second, fourth)).reshape(BLOCK_N, BLOCK_K)
    return dense.to(dtype, bitcast=True)


@triton.jit
def _dense_float32(values, metadata, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """The same of float32 values [BLOCK_N, BLOCK_K / 2]."""
    metadata = metadata.to(tl.int32)
    places = tl.join(metadata & 15, metadata >> 4).reshape(BLOCK_N, BLOCK_K // GROUP)
    one, other = tl.split(values.reshape(BLOCK_N, BLOCK_K // GROUP, 2))
    place, behind = places & 3, places >> 2
    first = tl.where(place == 0, one, 0.0)
    second = tl.where(place == 1, one, tl.where(behind == 1, other, 0.0))
    third = tl.where(place == 2, one, tl.where(behind == 2, other, 0.0))
    fourth = tl.where(behind == 3, other, 0.0)
    return tl.join(tl.join(first, third), tl.join(second, fourth)).reshape(BLOCK_N, BLOCK_K)


@triton.jit
def _add(acc, a, weight, EXPAND: tl.constexpr, IS_FP8: tl.constexpr):
    """acc + a @ weight.T; of float8 a tile's products are a sum of their own: Ada's tensor cores keep few bits."""
    if acc.dtype == tl.int32:
        return tl.dot(a, tl.trans(weight), acc, out_dtype=tl.int32)
    elif EXPAND:  # 2**-8 on both sides
        return acc + tl.dot(float8_as_half(a), tl.trans(weight)) * 65536.0
    elif IS_FP8:
        return acc + tl.dot(a, tl.trans(weight))
    else:
        return tl.dot(a, tl.trans(weight), acc, input_precision="ieee")


@triton.jit(do_not_specialize=["M"])
def _sparse_matmul_kernel(
    a_ptr, values_ptr, metadata_ptr, scale_a_ptr, scale_b_ptr, bias_ptr, out_ptr, parts_ptr, stride_a_m,
    M, N, K, num_units, num_steps, part_steps,
    ACTIVATION: tl.constexpr, SCALE_A: tl.constexpr, SCALE_B: tl.constexpr, EXPAND: tl.constexpr, ACC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program computes a tile of the output, or of one part's sums; those with the same weights are neighbours.

    num_units: blocks of 64 columns that a row of the weight is stored as.
    """
    dtype: tl.constexpr = a_ptr.dtype.element_ty
    IS_WORD: tl.constexpr = dtype.primitive_bitwidth < 32
    PER_LOAD: tl.constexpr = 2 if IS_WORD else 1  # values that one element of a load holds
    num_m = tl.cdiv(M, BLOCK_M)
    pid = tl.program_id(0)
    part = tl.program_id(1)
    offs_m = pid % num_m * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    first_n = pid // num_m * BLOCK_N
    offs_n = tl.minimum(first_n + tl.arange(0, BLOCK_N), N - 1).to(tl.int64)[:, None]
    offs_k = tl.arange(0, BLOCK_K)[None, :]
    offs_v = tl.arange(0, BLOCK_K // 2 // PER_LOAD)[None, :]
    width = num_units * (VALUES_UNIT // PER_LOAD)
    if IS_WORD:
        values_ptr = values_ptr.to(tl.pointer_type(tl.uint32 if dtype.primitive_bitwidth == 16 else tl.uint16))
    a_rows = a_ptr + tl.minimum(offs_m, M - 1).to(tl.int64) * stride_a_m
    value_rows = values_ptr + offs_n * width
    metadata_width = tl.cdiv(num_units, 2) * METADATA_UNIT
    metadata_rows = metadata_ptr + offs_n * metadata_width + tl.arange(0, BLOCK_K // 8)[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_N], ACC)
    for step in range(part * part_steps, tl.minimum((part + 1) * part_steps, num_steps)):
        first_v, first_k = step * (BLOCK_K // 2 // PER_LOAD), step * BLOCK_K
        values = tl.load(value_rows + (first_v + offs_v), mask=first_v + offs_v < width, other=0)
        metadata = tl.load(metadata_rows + step * (BLOCK_K // 8))  # rows end at multiples of BLOCK_K
        if dtype.is_int():
            a = tl.load(a_rows + (first_k + offs_k), mask=first_k + offs_k < K, other=0)
        else:
            a = tl.load(a_rows + (first_k + offs_k), mask=first_k + offs_k < K, other=0.0)
        if EXPAND:
            weight = _dense(_as_halves(values), metadata, BLOCK_N, BLOCK_K, tl.float16)
        elif IS_WORD:
            weight = _dense(values, metadata, BLOCK_N, BLOCK_K, dtype)
        else:
            weight = _dense_float32(values, metadata, BLOCK_N, BLOCK_K)
        acc = _add(acc, a, weight, EXPAND, dtype.is_fp8())
    if parts_ptr is not None:
        offs_n = first_n + tl.arange(0, BLOCK_N)[None, :]
        rows = (part * M + offs_m).to(tl.int64)
        tl.store(parts_ptr + rows * N + offs_n, acc, mask=(offs_m < M) & (offs_n < N))
    else:
        finish(
            acc, offs_m, first_n, scale_a_ptr, scale_b_ptr, bias_ptr, None, out_ptr, 0, M, N, ACTIVATION, False,
            SCALE_A, SCALE_B,
        )  # fmt: skip


@triton.jit(do_not_specialize=["M"])
def _sparse_matmul_combine_kernel(
    parts_ptr, scale_a_ptr, scale_b_ptr, bias_ptr, out_ptr, M, N, num_parts,
    ACTIVATION: tl.constexpr, SCALE_A: tl.constexpr, SCALE_B: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program adds up BLOCK_N columns of a row in the order of their parts, and finishes them."""
    offs_m = tl.program_id(0) + tl.arange(0, 1)[:, None]
    first_n = tl.program_id(1) * BLOCK_N
    acc = sum_of_parts(parts_ptr, offs_m, first_n + tl.arange(0, BLOCK_N)[None, :], M, N, num_parts)
    finish(
        acc, offs_m, first_n, scale_a_ptr, scale_b_ptr, bias_ptr, None, out_ptr, 0, M, N, ACTIVATION, False, SCALE_A,
        SCALE_B,
    )  # fmt: skip


_run, _run_combine = Relauncher(_sparse_matmul_kernel), Relauncher(_sparse_matmul_combine_kernel)


def default(M, N, K, itemsize, expand, device_limits):
    """The tile by arithmetic; for up to FEW_ROWS rows, and for more, only what no row's sums see differs.

    expand: Whether bytes of float8 become float16 on the way, which takes registers.
    """
    if itemsize == 4:  # products on the cores that know float32: operands in registers, so small tiles
        block_m, block_n, block_k, num_warps = min(max(power_of_2(M), 16), 32), 64, 32, 4
    else:  # two warps: with four a Hopper GPU's products of 64 rows want the weight in shared memory
        most = 32 if expand else 64
        block_m, block_n, block_k, num_warps = min(max(power_of_2(M), 16), most), 64, 128, 2
    num_stages = min(max(STAGE_BYTES // _stage_bytes(block_m, block_n, block_k, itemsize), 2), 5) + 1
    tile = SparseConfig(block_m, block_n, block_k, 1, num_warps, num_stages)
    while tile.num_stages > 2 and shared_bytes(tile, itemsize) > device_limits.shared_memory:
        num_stages -= 1
        tile = SparseConfig(block_m, block_n, block_k, 1, num_warps, num_stages)
    if M > FEW_ROWS:
        return tile
    steps = ceil_div(K, block_k)
    wanted = ceil_div(PROGRAMS_PER_SM * device_limits.sm_count, ceil_div(N, block_n))
    splits = max(min(wanted, steps // MIN_PART_STEPS), 1)
    splits = ceil_div(steps, ceil_div(steps, splits))  # none is empty
    return SparseConfig(block_m, block_n, block_k, splits, num_warps, num_stages)


def _stage_bytes(block_m, block_n, block_k, itemsize):
    """What one step of the loop reads."""
    return block_n * (block_k // 2 * itemsize + block_k // 8) + block_m * block_k * itemsize


def shared_bytes(tile, itemsize):
    """At most what the kernel asks for: tiles on their way, of float32 those that are multiplied too, or the result."""
    here = 4 * tile.block_k * (tile.block_m + tile.block_n) if itemsize == 4 else 0
    ring = max(tile.num_stages - 1, 1) * _stage_bytes(tile.block_m, tile.block_n, tile.block_k, itemsize)
    return max(ring + here, 4 * tile.block_m * (tile.block_n + 16)) + KIB


def _fits(tile, M, N, K, itemsize, expand, device_limits):
    """Whether the memory holds the stages, a thread its sums, its loads are wide, and the products are mma.sync's."""
    loaded = 32 * tile.num_warps * LOAD_BYTES
    return (
        shared_bytes(tile, itemsize) <= device_limits.shared_memory
        and tile.block_m * tile.block_n // (32 * tile.num_warps) <= MAX_SUMS // (1 + expand)
        and tile.block_n * tile.block_k // 2 * itemsize >= loaded
        and (itemsize == 4 or tile.block_n * tile.block_k // 8 >= loaded)
        and not (tile.block_m >= 64 and tile.num_warps >= 4)
    )


# Neither block_k nor splits: a result has the same bits whatever the table says.
TILE = Tunable(
    "sparse_matmul",
    default=lambda *asked: default(*asked),
    sizes=("rows", "columns", "depth"),
    flags=("itemsize", "expand"),
    also=("dtype", "out_dtype", "scale_a", "scale_b", "bias", "activation"),
    space={"block_m": (16, 32, 64), "block_n": (32, 64, 128), "num_warps": (1, 2, 4), "num_stages": (2, 3, 4, 5, 6)},
    fits=_fits,
    source=__file__,
)


def config(op, device_limits, a, values, metadata, scale_a, scale_b, bias, out_dtype, activation):
    """The configuration of one call."""
    rows, K = a.shape
    M = min(rows, FEW_ROWS) if invariance.enabled() else rows
    also = a.dtype, out_dtype, row_kind(scale_a), row_kind(scale_b), bias is not None, activation
    expand = _expands(a.dtype, device_limits)
    return TILE.choose(device_limits, (M, values.shape[0], K, a.element_size(), expand), also)


def _expands(dtype, device_limits):
    """Whether the device has no products of float8, and its bytes become float16 on the way."""
    return dtype == FP8 and device_limits.capability < MIN_FP8_CAPABILITY


def sparse_matmul(a, values, metadata, scale_a, scale_b, bias, out_dtype, activation):
    """Launch the product, and the sum over its parts where there are several."""
    (M, K), N = a.shape, values.shape[0]
    if M > INVARIANT_ROWS and invariance.enabled():
        scales = [scale_a] * M if row_kind(scale_a) != "row" else scale_a.split(INVARIANT_ROWS)
        parts = zip(a.split(INVARIANT_ROWS), scales)
        return torch.cat(
            [sparse_matmul(x, values, metadata, scale, scale_b, bias, out_dtype, activation) for x, scale in parts]
        )
    out = a.new_empty((M, N), dtype=out_dtype)
    if not M:
        return out
    device_limits = limits(a.device)
    given = a, values, metadata, scale_a, scale_b, bias, out_dtype, activation
    tile = config("sparse_matmul", device_limits, *given)
    kinds = {"ACTIVATION": activation or "none", "SCALE_A": row_kind(scale_a), "SCALE_B": row_kind(scale_b)}
    expand = _expands(a.dtype, device_limits)
    if expand:
        a, values = a.view(torch.uint8), values.view(torch.uint8)
    if values.data_ptr() % (2 * values.element_size()):  # pairs are read as one number
        values = values.clone()
    scale_a, scale_b, bias = (None if one is None else one.contiguous() for one in (scale_a, scale_b, bias))
    acc = tl.int32 if a.dtype == torch.int8 else tl.float32
    parts = None
    if tile.splits > 1:
        parts = a.new_empty((tile.splits, M, N), dtype=torch.int32 if acc is tl.int32 else torch.float32)
    steps = ceil_div(K, tile.block_k)
    numbers = a.stride(0), M, N, K, values.shape[1] // 32, steps, ceil_div(steps, tile.splits)
    blocks = {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k}
    grid = ceil_div(M, tile.block_m) * ceil_div(N, tile.block_n), tile.splits, 1
    _run(
        grid, (a, values, metadata, scale_a, scale_b, bias, out, parts), numbers,
        {**kinds, "EXPAND": expand, "ACC": acc, **blocks}, tile.num_warps, tile.num_stages,
    )  # fmt: skip
    if parts is not None:
        grid, tensors = (M, ceil_div(N, COMBINE_BLOCK), 1), (parts, scale_a, scale_b, bias, out)
        _run_combine(grid, tensors, (M, N, tile.splits), {**kinds, "BLOCK_N": COMBINE_BLOCK}, 4)
    return out


def examples(dtype, target):
    """A weight of Llama 3 8B by one row, by 64 and by a prompt, in every format, and the sum over parts.

    dtype is the result's; that of 8-bit codes is bfloat16.
    """
    yield _example(dtype, target, dtype, 1, 14336)
    if dtype != "bf16":
        return
    fp8 = "fp8e4nv" if target.capability >= MIN_FP8_CAPABILITY else "u8"
    yield _example(dtype, target, dtype, 64, 14336)
    yield _example(dtype, target, dtype, 1024, 14336)
    yield _example(dtype, target, "i8", 1, 4096)
    yield _example(dtype, target, fp8, 64, 4096)
    kinds = {"ACTIVATION": "silu", "SCALE_A": "row", "SCALE_B": "row", "BLOCK_N": COMBINE_BLOCK}
    yield _described(_sparse_matmul_combine_kernel, dtype, "i8", kinds, 4, 1)


def _example(dtype, target, code, M, N, K=4096):
    tile = default(M, N, K, {"fp32": 4, "fp16": 2, "bf16": 2}.get(code, 1), code == "u8", target)
    scale = "none" if code == dtype else "row"
    constants = {
        "ACTIVATION": "silu", "SCALE_A": scale, "SCALE_B": scale, "EXPAND": code == "u8",
        "ACC": tl.int32 if code == "i8" else tl.float32,
        "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k,
    }  # fmt: skip
    if tile.splits == 1:
        constants["parts_ptr"] = None
    return _described(_sparse_matmul_kernel, dtype, code, constants, tile.num_warps, tile.num_stages)


def _described(kernel, dtype, code, constants, num_warps, num_stages):
    """A launch on whole tiles, with a bias."""
    pointers = {"a_ptr": code, "values_ptr": code, "metadata_ptr": "u8", "parts_ptr": "i32" if code == "i8" else "fp32"}
    pointers |= {"scale_a_ptr": "fp32", "scale_b_ptr": "fp32", "bias_ptr": dtype, "out_ptr": dtype}
    absent = [name for name in ("scale_a", "scale_b") if constants[name.upper()] == "none"]
    constants = constants | {f"{name}_ptr": None for name in absent}
    types, divisible = {}, []
    for name in kernel.arg_names:
        if name not in constants:
            types[name] = f"*{pointers[name]}" if name in pointers else "i32"
            divisible += [name] if name in pointers or name in ("stride_a_m", "N", "K") else []
    return KernelExample(kernel, types, constants, tuple(divisible), num_warps=num_warps, num_stages=num_stages)
