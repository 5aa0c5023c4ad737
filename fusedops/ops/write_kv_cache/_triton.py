"""Write keys and values into their pages on the GPU: one launch, every element read and written once.

The rows of a tile are pairs (token, head). A row is cut as the rotation wants it: the two halves of the rotated
elements (HALF of each), and the rest; without a rotation the rest is the whole row.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from fusedops._core.device import MIN_FP8_CAPABILITY, fp8_rejection, limits
from fusedops._core.launch import KernelExample
from fusedops._core.numbers import ceil_div, power_of_2
from fusedops._core.relaunch import Relauncher
from fusedops._core.rows import MAX_VALUES, MIN_VALUES
from fusedops._core.scales import scale_kind, scale_strides
from fusedops._core.tl import encoded, largest_bits, scale_of
from fusedops._core.tuning import Tunable


@triton.jit
def _encoded(x, scale, dtype: tl.constexpr):
    """Values of a tile as stored values of `dtype`: the very bits, or codes."""
    if dtype == tl.int8:
        return encoded(tl.div_rn(x, scale), "int8", -128.0, False)
    elif dtype == tl.float8e4nv:
        return encoded(tl.div_rn(x, scale), "fp8e4nv", 0.0, False)
    else:
        return x.to(dtype)


@triton.jit
def _pairs(rows, mask_m, HALF: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK_HALF: tl.constexpr):
    """The two elements of every pair of a tile of rows, in float32."""
    if INTERLEAVED:
        offs = tl.arange(0, 2 * BLOCK_HALF)[None, :]
        x = tl.load(rows[:, None] + offs, mask=mask_m[:, None] & (offs < 2 * HALF), other=0.0).to(tl.float32)
        return tl.split(x.reshape([rows.shape[0], BLOCK_HALF, 2]))
    else:
        offs = tl.arange(0, BLOCK_HALF)[None, :]
        mask = mask_m[:, None] & (offs < HALF)
        first = tl.load(rows[:, None] + offs, mask=mask, other=0.0).to(tl.float32)
        second = tl.load(rows[:, None] + HALF + offs, mask=mask, other=0.0).to(tl.float32)
        return first, second


@triton.jit
def _store_pairs(rows, first, second, mask_m, HALF: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK_HALF: tl.constexpr):
    """The reverse of `_pairs`."""
    if INTERLEAVED:
        offs = tl.arange(0, 2 * BLOCK_HALF)[None, :]
        x = tl.join(first, second).reshape([rows.shape[0], 2 * BLOCK_HALF])
        tl.store(rows[:, None] + offs, x, mask=mask_m[:, None] & (offs < 2 * HALF))
    else:
        offs = tl.arange(0, BLOCK_HALF)[None, :]
        mask = mask_m[:, None] & (offs < HALF)
        tl.store(rows[:, None] + offs, first, mask=mask)
        tl.store(rows[:, None] + HALF + offs, second, mask=mask)


@triton.jit
def _write_heads(
    x_rows, cos_rows, sin_rows, out_rows, scale_ptrs, mask_m,
    HALF: tl.constexpr, D: tl.constexpr, INTERLEAVED: tl.constexpr, SCALE: tl.constexpr,
    BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    """Rotate the heads of a tile by their tokens' angles and store them, with their scales where SCALE is "token"."""
    dtype: tl.constexpr = out_rows.dtype.element_ty
    source: tl.constexpr = x_rows.dtype.element_ty
    offs = 2 * HALF + tl.arange(0, BLOCK_REST)[None, :]
    mask_rest = mask_m[:, None] & (offs < D)
    if HALF > 0:
        first, second = _pairs(x_rows, mask_m, HALF, INTERLEAVED, BLOCK_HALF)
        cos_first, cos_second = _pairs(cos_rows, mask_m, HALF, INTERLEAVED, BLOCK_HALF)
        sin_first, sin_second = _pairs(sin_rows, mask_m, HALF, INTERLEAVED, BLOCK_HALF)
        turned = first * cos_first - second * sin_first
        second = (second * cos_second + first * sin_second).to(source).to(tl.float32)
        first = turned.to(source).to(tl.float32)
    if D > 2 * HALF:
        rest = tl.load(x_rows[:, None] + offs, mask=mask_rest, other=0.0).to(tl.float32)
    scale = tl.full([x_rows.shape[0]], 1.0, tl.float32)
    if SCALE == "token":
        if HALF > 0:
            top = tl.maximum(largest_bits(first, 1), largest_bits(second, 1))
            if D > 2 * HALF:
                top = tl.maximum(top, largest_bits(rest, 1))
        else:
            top = largest_bits(rest, 1)
        scale = scale_of(top, "int8" if dtype == tl.int8 else "fp8e4nv")
        tl.store(scale_ptrs, scale, mask=mask_m)
    elif SCALE == "head":
        scale = tl.load(scale_ptrs, mask=mask_m, other=1.0)
    scale = scale[:, None]
    if HALF > 0:
        first, second = _encoded(first, scale, dtype), _encoded(second, scale, dtype)
        _store_pairs(out_rows, first, second, mask_m, HALF, INTERLEAVED, BLOCK_HALF)
    if D > 2 * HALF:
        tl.store(out_rows[:, None] + offs, _encoded(rest, scale, dtype), mask=mask_rest)


@triton.jit
def _write_kv_cache_kernel(
    k_ptr, v_ptr, q_ptr, cos_ptr, sin_ptr, slots_ptr, out_q_ptr, k_cache_ptr, v_cache_ptr, k_scale_ptr, v_scale_ptr,
    stride_q_t, stride_q_h, stride_k_t, stride_k_h, stride_v_t, stride_v_h, stride_cos_t, stride_sin_t, stride_slots_t,
    stride_out_q_t, stride_out_q_h, stride_k_cache_p, stride_k_cache_s, stride_k_cache_h,
    stride_v_cache_p, stride_v_cache_s, stride_v_cache_h, stride_k_scale_p, stride_k_scale_s, stride_k_scale_h,
    stride_v_scale_p, stride_v_scale_s, stride_v_scale_h, T, H, Hk, num_q_blocks, num_pages,
    HALF: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, INTERLEAVED: tl.constexpr, K_SCALE: tl.constexpr,
    V_SCALE: tl.constexpr, PAGE_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """One program takes BLOCK_M rows (token, head): it rotates them in q, or writes keys and values to their slots."""
    pid = tl.program_id(0)
    if HALF > 0:
        if pid < num_q_blocks:
            rows = pid.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
            token = rows // H
            head = rows % H
            mask_m = token < T
            out_rows = out_q_ptr + token * stride_out_q_t + head * stride_out_q_h
            _write_heads(
                q_ptr + token * stride_q_t + head * stride_q_h, cos_ptr + token * stride_cos_t,
                sin_ptr + token * stride_sin_t, out_rows, out_rows, mask_m, HALF, D, INTERLEAVED, "none",
                BLOCK_HALF, BLOCK_REST,
            )  # fmt: skip
            return
    rows = (pid - num_q_blocks).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    token = rows // Hk
    head = rows % Hk
    slot = tl.load(slots_ptr + token * stride_slots_t, mask=token < T, other=-1)
    page = slot // PAGE_SIZE
    mask_m = (slot >= 0) & (page < num_pages)
    place = slot % PAGE_SIZE
    k_scale_ptrs = k_scale_ptr
    if K_SCALE != "none":
        k_scale_ptrs = k_scale_ptr + page * stride_k_scale_p + place * stride_k_scale_s + head * stride_k_scale_h
    v_scale_ptrs = v_scale_ptr
    if V_SCALE != "none":
        v_scale_ptrs = v_scale_ptr + page * stride_v_scale_p + place * stride_v_scale_s + head * stride_v_scale_h
    cos_rows = k_ptr
    sin_rows = k_ptr
    if HALF > 0:
        cos_rows = cos_ptr + token * stride_cos_t
        sin_rows = sin_ptr + token * stride_sin_t
    _write_heads(
        k_ptr + token * stride_k_t + head * stride_k_h, cos_rows, sin_rows,
        k_cache_ptr + page * stride_k_cache_p + place * stride_k_cache_s + head * stride_k_cache_h,
        k_scale_ptrs, mask_m, HALF, D, INTERLEAVED, K_SCALE, BLOCK_HALF, BLOCK_REST,
    )  # fmt: skip
    v_rows = v_ptr + token * stride_v_t + head * stride_v_h
    _write_heads(
        v_rows, v_rows, v_rows,
        v_cache_ptr + page * stride_v_cache_p + place * stride_v_cache_s + head * stride_v_cache_h,
        v_scale_ptrs, mask_m, 0, DV, False, V_SCALE, 1, BLOCK_DV,
    )  # fmt: skip


_run = Relauncher(_write_kv_cache_kernel)


@dataclass(frozen=True)
class WriteConfig:
    """A tile of block_m rows (token, head), each of half the rotated elements, those that pass, and values."""

    block_m: int
    block_half: int
    block_rest: int
    block_dv: int
    num_warps: int = 4


def supports(first, *rest):
    """Why these kernels cannot run a call, or None."""
    return fp8_rejection(*(t for t in rest if isinstance(t, torch.Tensor)))


def default(head_dim, head_dim_v, rotary_dim):
    """2048 elements a program: two 16-byte accesses of 16-bit values for each of 128 threads."""
    half, rest, dv = (power_of_2(size) for size in (rotary_dim // 2, head_dim - rotary_dim, head_dim_v))
    return WriteConfig(max(2048 // max(2 * half, rest, dv), 1), half, rest, dv)


def _fits(tile, *asked):
    """Whether a thread has wide accesses, and registers for its values."""
    values = tile.block_m * max(2 * tile.block_half, tile.block_rest, tile.block_dv) // (32 * tile.num_warps)
    return MIN_VALUES <= values <= MAX_VALUES


# Heads are rotated and encoded alone, by maxima that are exact in any order: results have the same bits.
TILE = Tunable(
    "write_kv_cache",
    default=lambda *asked: default(*asked[:-1]),
    sizes=(),
    flags=("head_dim", "head_dim_v", "rotary_dim"),
    also=("dtype", "cache_dtype", "cos_dtype", "interleaved", "k_scale", "v_scale", "page_size"),
    space={"block_m": (1, 2, 4, 8, 16, 32, 64, 128), "num_warps": (1, 2, 4, 8)},
    fits=_fits,
    source=__file__,
)


def config(op, device_limits, *args):
    """The configuration of one call."""
    if op == "rotary_write_kv_cache":
        _, k, v, cos, _, k_cache, _, _, interleaved, k_scale, v_scale = args
        return _tile(device_limits, k, v, cos, k_cache, interleaved, k_scale, v_scale)
    k, v, k_cache, _, _, k_scale, v_scale = args
    return _tile(device_limits, k, v, None, k_cache, False, k_scale, v_scale)


def _tile(device_limits, k, v, cos, k_cache, interleaved, k_scale, v_scale):
    asked = k.shape[2], v.shape[2], 0 if cos is None else cos.shape[1]
    kinds = scale_kind(k_scale), scale_kind(v_scale)
    cos_dtype = None if cos is None else cos.dtype
    return TILE.choose(device_limits, asked, (k.dtype, k_cache.dtype, cos_dtype, interleaved, *kinds, k_cache.shape[1]))


def write_kv_cache(k, v, k_cache, v_cache, slot_mapping, k_scale, v_scale):
    """Launch the kernel without a rotation."""
    _launch(None, k, v, None, None, k_cache, v_cache, slot_mapping, False, k_scale, v_scale, None)


def rotary_write_kv_cache(q, k, v, cos, sin, k_cache, v_cache, slot_mapping, interleaved, k_scale, v_scale):
    """Launch the kernel on q too."""
    out = torch.empty_like(q)
    _launch(q, k, v, cos, sin, k_cache, v_cache, slot_mapping, interleaved, k_scale, v_scale, out)
    return out


def _launch(q, k, v, cos, sin, k_cache, v_cache, slots, interleaved, k_scale, v_scale, out):
    (total, kv_heads, dim), dv = k.shape, v.shape[2]
    rotary_dim, heads = (0, 0) if q is None else (cos.shape[1], q.shape[1])
    if not total or not max(heads, kv_heads):
        return
    tile = _tile(limits(k.device), k, v, cos, k_cache, interleaved, k_scale, v_scale)
    num_q_blocks = ceil_div(total * heads, tile.block_m)
    q_strides = (0,) * 2 if q is None else q.stride()[:2]
    out_strides = (0,) * 2 if q is None else out.stride()[:2]
    numbers = (
        *q_strides, *k.stride()[:2], *v.stride()[:2], *((0, 0) if q is None else (cos.stride(0), sin.stride(0))),
        slots.stride(0), *out_strides, *k_cache.stride()[:3], *v_cache.stride()[:3],
        *scale_strides(k_scale), *scale_strides(v_scale), total, heads, kv_heads, num_q_blocks, k_cache.shape[0],
    )  # fmt: skip
    constants = {
        "HALF": rotary_dim // 2, "D": dim, "DV": dv, "INTERLEAVED": interleaved, "K_SCALE": scale_kind(k_scale),
        "V_SCALE": scale_kind(v_scale), "PAGE_SIZE": k_cache.shape[1], "BLOCK_M": tile.block_m,
        "BLOCK_HALF": tile.block_half, "BLOCK_REST": tile.block_rest, "BLOCK_DV": tile.block_dv,
    }  # fmt: skip
    tensors = (k, v, q, cos, sin, slots, out, k_cache, v_cache, k_scale, v_scale)
    programs = num_q_blocks + ceil_div(total * kv_heads, tile.block_m)
    _run((programs, 1, 1), tensors, numbers, constants, tile.num_warps)


def examples(dtype, target):
    """Heads of 128: copied, rotated whole and in part, and as codes with scales computed or given."""
    codes = {"int8": "i8"} | ({"fp8": "fp8e4nv"} if target.capability >= MIN_FP8_CAPABILITY else {})
    yield _example(dtype, dtype, 0, False, "none")
    yield _example(dtype, dtype, 128, False, "none")
    yield _example(dtype, dtype, 64, True, "none")
    for code in codes.values():
        yield _example(dtype, code, 0, False, "token")
        yield _example(dtype, code, 128, False, "token")
        yield _example(dtype, code, 0, False, "head")


def _example(dtype, code, rotary_dim, interleaved, scale):
    """A launch for 32 heads of queries, 8 of keys, on pages of 16."""
    tile = default(128, 128, rotary_dim)
    constants = {
        "HALF": rotary_dim // 2, "D": 128, "DV": 128, "INTERLEAVED": interleaved, "K_SCALE": scale, "V_SCALE": scale,
        "PAGE_SIZE": 16, "BLOCK_M": tile.block_m, "BLOCK_HALF": tile.block_half, "BLOCK_REST": tile.block_rest,
        "BLOCK_DV": tile.block_dv,
    }  # fmt: skip
    pointers = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "cos_ptr", "sin_ptr", "out_q_ptr"), f"*{dtype}")
    pointers |= {"slots_ptr": "*i64", "k_cache_ptr": f"*{code}", "v_cache_ptr": f"*{code}"}
    pointers |= dict.fromkeys(("k_scale_ptr", "v_scale_ptr"), "*fp32")
    absent = [] if rotary_dim else ["q_ptr", "cos_ptr", "sin_ptr", "out_q_ptr"]
    absent += ["k_scale_ptr", "v_scale_ptr"] if scale == "none" else []
    types, divisible = {}, []
    for name in _write_kv_cache_kernel.arg_names:
        if name in absent:
            constants[name] = None
        elif name not in constants:
            types[name] = pointers.get(name, "i32")
            divisible += [name] if name.startswith("stride_") or name in pointers else []
    return KernelExample(_write_kv_cache_kernel, types, constants, tuple(divisible), num_warps=tile.num_warps)
