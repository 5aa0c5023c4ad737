"""Rotary position embedding on the GPU: q and k in one launch, every element read and written once."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from fusedops._core.device import limits
from fusedops._core.launch import KernelExample
from fusedops._core.numbers import ceil_div, power_of_2
from fusedops._core.relaunch import Relauncher
from fusedops._core.rows import MAX_VALUES, dense
from fusedops._core.tuning import Tunable


@triton.jit
def _turn(first, second, cos_first, cos_second, sin_first, sin_second, BACKWARD: tl.constexpr):
    """The rotation of pairs, or its transpose."""
    if BACKWARD:
        return first * cos_first + second * sin_second, second * cos_second - first * sin_first
    return first * cos_first - second * sin_first, second * cos_second + first * sin_second


@triton.jit
def _rotate_heads(
    x_row, out_row, stride_x_h, stride_out_h, cos_row, sin_row, pid_h, num_heads,
    HALF: tl.constexpr, D: tl.constexpr, INTERLEAVED: tl.constexpr, BACKWARD: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    """Rotate BLOCK_H heads of one token of one tensor."""
    dtype = out_row.dtype.element_ty
    offs_h = pid_h * BLOCK_H + tl.arange(0, BLOCK_H)
    mask_h = (offs_h < num_heads)[:, None]
    x_heads = x_row + offs_h.to(tl.int64)[:, None] * stride_x_h
    out_heads = out_row + offs_h.to(tl.int64)[:, None] * stride_out_h
    if INTERLEAVED:
        offs = tl.arange(0, 2 * BLOCK_HALF)
        mask = mask_h & (offs < 2 * HALF)[None, :]
        cos_first, cos_second = tl.split(
            tl.load(cos_row + offs, mask=offs < 2 * HALF, other=0.0).to(tl.float32).reshape([1, BLOCK_HALF, 2])
        )
        sin_first, sin_second = tl.split(
            tl.load(sin_row + offs, mask=offs < 2 * HALF, other=0.0).to(tl.float32).reshape([1, BLOCK_HALF, 2])
        )
        x = tl.load(x_heads + offs[None, :], mask=mask, other=0.0).to(tl.float32)
        first, second = tl.split(x.reshape([BLOCK_H, BLOCK_HALF, 2]))
        first, second = _turn(first, second, cos_first, cos_second, sin_first, sin_second, BACKWARD)
        out = tl.join(first, second).reshape([BLOCK_H, 2 * BLOCK_HALF])
        tl.store(out_heads + offs[None, :], out.to(dtype), mask=mask)
    else:
        offs = tl.arange(0, BLOCK_HALF)[None, :]
        mask = mask_h & (offs < HALF)
        cos_first = tl.load(cos_row + offs, mask=offs < HALF, other=0.0).to(tl.float32)
        cos_second = tl.load(cos_row + HALF + offs, mask=offs < HALF, other=0.0).to(tl.float32)
        sin_first = tl.load(sin_row + offs, mask=offs < HALF, other=0.0).to(tl.float32)
        sin_second = tl.load(sin_row + HALF + offs, mask=offs < HALF, other=0.0).to(tl.float32)
        first = tl.load(x_heads + offs, mask=mask, other=0.0).to(tl.float32)
        second = tl.load(x_heads + HALF + offs, mask=mask, other=0.0).to(tl.float32)
        first, second = _turn(first, second, cos_first, cos_second, sin_first, sin_second, BACKWARD)
        tl.store(out_heads + offs, first.to(dtype), mask=mask)
        tl.store(out_heads + HALF + offs, second.to(dtype), mask=mask)
    if D > 2 * HALF:
        rest = 2 * HALF + tl.arange(0, BLOCK_REST)[None, :]
        tl.store(
            out_heads + rest, tl.load(x_heads + rest, mask=mask_h & (rest < D), other=0.0), mask=mask_h & (rest < D)
        )


@triton.jit
def _rotary_kernel(
    q_ptr, k_ptr, cos_ptr, sin_ptr, out_q_ptr, out_k_ptr,
    stride_q_b, stride_q_s, stride_q_h, stride_k_b, stride_k_s, stride_k_h,
    stride_cos_b, stride_cos_s, stride_sin_b, stride_sin_s,
    stride_out_q_b, stride_out_q_s, stride_out_q_h, stride_out_k_b, stride_out_k_s, stride_out_k_h,
    S, H, Hk,
    HALF: tl.constexpr, D: tl.constexpr, INTERLEAVED: tl.constexpr, BACKWARD: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    """One program rotates BLOCK_H heads of q, or of k, of one token."""
    token = tl.program_id(0).to(tl.int64)
    pid_h = tl.program_id(1)
    b = token // S
    s = token % S
    cos_row = cos_ptr + b * stride_cos_b + s * stride_cos_s
    sin_row = sin_ptr + b * stride_sin_b + s * stride_sin_s
    num_q_blocks = tl.cdiv(H, BLOCK_H)
    if pid_h < num_q_blocks:
        _rotate_heads(
            q_ptr + b * stride_q_b + s * stride_q_s, out_q_ptr + b * stride_out_q_b + s * stride_out_q_s,
            stride_q_h, stride_out_q_h, cos_row, sin_row, pid_h, H,
            HALF, D, INTERLEAVED, BACKWARD, BLOCK_H, BLOCK_HALF, BLOCK_REST,
        )  # fmt: skip
    else:
        _rotate_heads(
            k_ptr + b * stride_k_b + s * stride_k_s, out_k_ptr + b * stride_out_k_b + s * stride_out_k_s,
            stride_k_h, stride_out_k_h, cos_row, sin_row, pid_h - num_q_blocks, Hk,
            HALF, D, INTERLEAVED, BACKWARD, BLOCK_H, BLOCK_HALF, BLOCK_REST,
        )  # fmt: skip


_run = Relauncher(_rotary_kernel)


@dataclass(frozen=True)
class RotaryConfig:
    """Heads of one program, the tile of half the rotated elements, and of those that pass."""

    block_h: int
    block_half: int
    block_rest: int
    num_warps: int


def default(num_heads, head_dim, rotary_dim):
    """Up to 2048 pairs a program: two 16-byte accesses of 16-bit values for each of 128 threads."""
    block_half = power_of_2(rotary_dim // 2)
    block_rest = power_of_2(max(head_dim - rotary_dim, 1))
    block_h = max(1, min(2048 // block_half, power_of_2(num_heads)))
    return RotaryConfig(block_h, block_half, block_rest, max(1, min(block_h * block_half // 512, 4)))


def _fits(tile, num_heads, head_dim, rotary_dim, device_limits):
    """Whether a thread has a pair or more, and registers for all of its values."""
    pairs, threads = tile.block_h * tile.block_half, 32 * tile.num_warps
    return pairs >= threads and tile.block_h * (2 * tile.block_half + tile.block_rest) <= MAX_VALUES * threads


TILE = Tunable(
    "rotary",
    default=lambda *asked: default(*asked[:-1]),
    sizes=("num_heads",),
    flags=("head_dim", "rotary_dim"),
    also=("dtype", "cos_dtype", "interleaved", "backward"),
    space={"block_h": (1, 2, 4, 8, 16, 32, 64), "num_warps": (1, 2, 4, 8)},
    fits=_fits,
    source=__file__,
)


def config(op, device_limits, q, k, cos, sin, interleaved):
    """The configuration of one call."""
    return _tile(device_limits, q, k, cos, interleaved, op.endswith("backward"))


def _tile(device_limits, q, k, cos, interleaved, backward):
    asked = max(q.shape[2], k.shape[2]), q.shape[3], cos.shape[2]
    return TILE.choose(device_limits, asked, (q.dtype, cos.dtype, interleaved, backward))


def rotary(q, k, cos, sin, interleaved):
    """Launch the rotation."""
    return _launch(q, k, cos, sin, interleaved, False)


def rotary_backward(grad_q, grad_k, cos, sin, interleaved):
    """Launch the transposed rotation."""
    return _launch(grad_q, grad_k, cos, sin, interleaved, True)


def _launch(q, k, cos, sin, interleaved, backward):
    out_q, out_k = torch.empty_like(q), torch.empty_like(k)
    batch, length, heads, head_dim = q.shape
    kv_heads, rotary_dim = k.shape[2], cos.shape[2]
    if batch * length * head_dim == 0 or heads + kv_heads == 0:
        return out_q, out_k
    q, k, cos, sin = dense(q), dense(k), dense(cos), dense(sin)
    tile = _tile(limits(q.device), q, k, cos, interleaved, backward)
    blocks = ceil_div(heads, tile.block_h) + ceil_div(kv_heads, tile.block_h)
    broadcast = cos.shape[0] == 1
    numbers = (
        *q.stride()[:3], *k.stride()[:3],
        0 if broadcast else cos.stride(0), cos.stride(1), 0 if broadcast else sin.stride(0), sin.stride(1),
        *out_q.stride()[:3], *out_k.stride()[:3], length, heads, kv_heads,
    )  # fmt: skip
    constants = {
        "HALF": rotary_dim // 2, "D": head_dim, "INTERLEAVED": interleaved, "BACKWARD": backward,
        "BLOCK_H": tile.block_h, "BLOCK_HALF": tile.block_half, "BLOCK_REST": tile.block_rest,
    }  # fmt: skip
    _run((batch * length, blocks, 1), (q, k, cos, sin, out_q, out_k), numbers, constants, tile.num_warps)
    return out_q, out_k


def examples(dtype, target):
    """Heads of 128, whole and in part rotated, in both pairings."""
    pointers = {f"{name}_ptr": f"*{dtype}" for name in ("q", "k", "cos", "sin", "out_q", "out_k")}
    strides = {f"stride_{name}_{dim}": "i32" for name in ("q", "k") for dim in "bsh"}
    strides |= {f"stride_{name}_{dim}": "i32" for name in ("cos", "sin") for dim in "bs"}
    strides |= {f"stride_{name}_{dim}": "i32" for name in ("out_q", "out_k") for dim in "bsh"}
    sizes = {"S": "i32", "H": "i32", "Hk": "i32"}
    for rotary_dim, interleaved, backward in ((128, False, False), (64, False, True), (128, True, False)):
        tile = default(32, 128, rotary_dim)
        yield KernelExample(
            _rotary_kernel, {**pointers, **strides, **sizes},
            {"HALF": rotary_dim // 2, "D": 128, "INTERLEAVED": interleaved, "BACKWARD": backward,
             "BLOCK_H": tile.block_h, "BLOCK_HALF": tile.block_half, "BLOCK_REST": tile.block_rest},
            divisible=(*pointers, *strides), num_warps=tile.num_warps,
        )  # fmt: skip
