"""Attention on the GPU: which kernel runs, its tile and grid by arithmetic, and the launches."""

import functools
from dataclasses import dataclass, replace

import torch

from fusedops._core.device import MIN_FP8_CAPABILITY, fp8_rejection, limits
from fusedops._core.launch import KernelExample
from fusedops._core.numbers import ceil_div, power_of_2
from fusedops._core.relaunch import Relauncher
from fusedops._core.tuning import Tunable
from fusedops.ops.attention._triton import backward_launch, hopper_launch, invariant, merge_launch
from fusedops.ops.attention._triton.forward import _attention_kernel
from fusedops.ops.attention._triton.split_kv import _combine_kernel, warps_of_join

FP8 = torch.float8_e4m3fn
_run_attention, _run_combine = Relauncher(_attention_kernel), Relauncher(_combine_kernel)
MAX_SPLITS = 128  # the combining kernel holds the maxima of all of them
MAX_SUMS = 128  # of one thread, in registers
MIN_SPLIT_BLOCKS = 2  # key blocks below which a part costs more than it saves


@dataclass(frozen=True)
class AttentionConfig:
    """A tile of block_m rows (query, head) and block_n keys, its head dims padded to powers of two, and the splits."""

    block_m: int
    block_n: int
    block_d: int
    block_dv: int
    num_warps: int
    num_stages: int
    num_splits: int = 1


def supports(first, *rest):
    """Why these kernels cannot run a call, or None."""
    return fp8_rejection(first)


# (block_m, block_n, num_warps, num_stages) for head dims padded to the key, the largest that keep a loop in registers.
_MANY_ROWS = {64: (128, 64, 8, 3), 128: (128, 64, 8, 2), 256: (64, 32, 8, 2), 512: (32, 32, 8, 1)}
_MANY_ROWS_WIDE = {64: (128, 64, 8, 3), 128: (64, 64, 4, 3), 256: (128, 32, 8, 2), 512: (32, 32, 8, 2)}
_SOME_ROWS = {64: (64, 64, 8, 3), 128: (64, 64, 8, 2), 256: (64, 32, 8, 2), 512: (32, 32, 8, 1)}
_FEW_ROWS = {64: (16, 128, 4, 3), 128: (16, 64, 4, 3), 256: (16, 64, 8, 2), 512: (16, 32, 8, 2)}
_FLOAT32 = {64: (32, 32, 4, 2), 128: (32, 16, 8, 2), 256: (16, 32, 8, 2), 512: (16, 16, 8, 1)}


@functools.lru_cache(maxsize=4096)
def default(num_rows, head_dim, head_dim_v, itemsize, masked, device_limits):
    """The tile for packs of num_rows rows: from the table, then smaller until the device's shared memory holds it."""
    smallest = 32 if itemsize == 1 else 16  # the least that a tensor core sums over
    block_d, block_dv = (max(power_of_2(size), smallest) for size in (head_dim, head_dim_v))
    if itemsize == 4:
        table = _FLOAT32
    elif num_rows <= 16 and not masked:
        table = _FEW_ROWS
    elif num_rows <= 64 or masked:  # a tile of the mask takes the registers of as many scores
        table = _SOME_ROWS
    else:
        table = _MANY_ROWS_WIDE if 90 <= device_limits.capability < 120 else _MANY_ROWS
    block_m, block_n, num_warps, num_stages = table[max(block_d, block_dv, 64)]
    tile = AttentionConfig(16 if num_rows <= 16 else block_m, block_n, block_d, block_dv, num_warps, num_stages)
    while shared_bytes(tile, itemsize, masked) > device_limits.shared_memory:
        if tile.num_stages > 1:
            tile = replace(tile, num_stages=tile.num_stages - 1)
        elif tile.block_n > 32 or tile.block_m == 16:
            tile = replace(tile, block_n=tile.block_n // 2)
        else:
            tile = replace(tile, block_m=tile.block_m // 2)
    return tile


def shared_bytes(tile, itemsize, masked):
    """At most what the kernel asks for: q, each stage's k, v and mask, 8-bit values made wider, 2 KiB of row sums."""
    stage = tile.block_n * (tile.block_d + tile.block_dv) * itemsize + masked * tile.block_m * tile.block_n * 4
    widened = tile.block_n * tile.block_dv * 2 if itemsize == 1 else 0
    return tile.block_m * tile.block_d * itemsize + tile.num_stages * stage + widened + 2048


def _fits(tile, num_rows, head_dim, head_dim_v, itemsize, masked, device_limits):
    """Whether the memory holds the tiles, the registers of a thread the sums, and no tile is mostly empty."""
    smallest = 32 if itemsize == 1 else 16
    sums = tile.block_m * max(tile.block_n, tile.block_dv) // (32 * tile.num_warps)
    return (
        shared_bytes(tile, itemsize, masked) <= device_limits.shared_memory
        and tile.block_n >= smallest
        and tile.block_m <= max(power_of_2(num_rows), 16)
        and sums <= MAX_SUMS
    )


TILE = Tunable(
    "attention",
    default=lambda *asked: default(*asked),
    sizes=("num_rows",),
    flags=("head_dim", "head_dim_v", "itemsize", "masked"),
    also=("dtype", "heads_per_key_head", "varlen", "causal", "left", "right", "softcap", "sinks", "alibi", "scales"),
    space={
        "block_m": (16, 32, 64, 128), "block_n": (16, 32, 64, 128), "num_warps": (4, 8), "num_stages": (1, 2, 3, 4),
    },
    fits=_fits,
    source=__file__,
)  # fmt: skip


def num_splits(tile, num_programs, num_key_blocks, device_limits):
    """Into how many parts the keys are split so that few programs fill the device."""
    places = device_limits.sm_count * (2 if tile.block_m == 16 else 1)  # two small programs share a multiprocessor
    return max(1, min(places // max(num_programs, 1), num_key_blocks // MIN_SPLIT_BLOCKS, MAX_SPLITS))


def config(op, device_limits, *args):
    """The configuration of one call."""
    if op == "merge_attention":
        return merge_launch.config(device_limits, *args)
    if op.endswith("_backward"):
        return backward_launch.config(op, device_limits, *args)
    q, k, v, *rest = args
    if op == "attention_varlen":
        batch, max_q, max_k = rest[0].shape[0] - 1, rest[2], rest[3]
        rest = rest[4:]
        max_q, max_k = invariant.lengths(max_q, max_k, packed=True)
    else:
        batch, max_q, max_k = q.shape[0], q.shape[1], k.shape[1]
    mask, causal, left, right = rest[2], *rest[7:10]
    left, right = _bounds(max_q, max_k, causal, left, right)
    pack = _pack(q, k, mask)
    asked = max_q * pack, q.shape[-1], v.shape[-1], q.element_size(), mask is not None
    reach = min(max_k, (max_k if left is None else left) + (max_k if right is None else right) + max_q)

    def splits_of(tile):
        programs = ceil_div(max_q * pack, tile.block_m) * (q.shape[-2] // pack) * invariant.sequences(batch)
        splits = num_splits(tile, programs, ceil_div(reach, tile.block_n), device_limits)
        return invariant.splits(splits, tile, max_q * pack)

    varlen = op == "attention_varlen"
    if hopper_launch.rejection(device_limits, q, k, v, varlen, max_q, left is not None, rest) is None:
        if splits_of(default(*asked, device_limits)) == 1:  # by the default: which kernel runs is no matter of tuning
            return hopper_launch.config(device_limits, q, k, v, varlen, max_q, max_k, (left, right), rest)
    also = (
        q.dtype, pack, varlen, causal, left is not None, right is not None, rest[10] > 0.0, rest[0] is not None,
        rest[1] is not None, any(scale is not None for scale in rest[3:6]),
    )  # fmt: skip
    tile = TILE.choose(device_limits, asked, also)
    return replace(tile, num_splits=splits_of(tile))


def _bounds(max_q, max_k, causal, window_left, window_right):
    """Keys that a query sees to its left and right; None where that hides no key from any query."""
    right = 0 if causal else window_right
    return (
        window_left if 0 <= window_left < max_k - 1 else None,
        right if 0 <= right < max_q - 1 else None,
    )


def _pack(q, k, mask):
    """Heads of one tile: all that share a key head, but not where each hides other keys, whose values may be NaN."""
    return 1 if mask is not None and mask.shape[1] > 1 else q.shape[-2] // k.shape[-2]


def attention(q, k, v, *options):
    """Launch the forward kernel on a batch of equal lengths."""
    batch, num_queries, heads, _ = q.shape
    out = q.new_empty((batch, num_queries, heads, v.shape[-1]), dtype=_out_dtype(q))
    lse = q.new_empty((batch, heads, num_queries), dtype=torch.float32)
    if out.numel():
        q, k, v = invariant.aligned(limits(q.device), q, k, v)
        tile = config("attention", limits(q.device), q, k, v, *options)
        strides = [*q.stride()[:3], *k.stride()[:3], *v.stride()[:3]]
        _launch(tile, q, k, v, None, None, batch, num_queries, k.shape[1], strides, out, lse, *options)
    return out, lse


def attention_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, *options):
    """Launch the forward kernel on packed sequences."""
    total, heads, _ = q.shape
    out = q.new_empty((total, heads, v.shape[-1]), dtype=_out_dtype(q))
    lse = q.new_empty((heads, total), dtype=torch.float32)
    lengths = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
    batch = cu_seqlens_q.shape[0] - 1
    if out.numel() and batch and max_seqlen_q:
        q, k, v = invariant.aligned(limits(q.device), q, k, v)
        tile = config("attention_varlen", limits(q.device), q, k, v, *lengths, *options)
        strides = [0, *q.stride()[:2], 0, *k.stride()[:2], 0, *v.stride()[:2]]
        _launch(tile, q, k, v, cu_seqlens_q, cu_seqlens_k, batch, max_seqlen_q, max_seqlen_k, strides, out, lse,
                *options)  # fmt: skip
    return out, lse


def _out_dtype(q):
    return torch.bfloat16 if q.dtype == FP8 else q.dtype


def _launch(
    tile, q, k, v, cu_seqlens_q, cu_seqlens_k, batch, max_q, max_k, strides, out, lse,
    sinks, alibi_slopes, mask, q_scale, k_scale, v_scale, softmax_scale, causal, window_left, window_right, softcap,
):  # fmt: skip
    """Run the kernel, and where the keys are split the one that joins the parts."""
    varlen = cu_seqlens_q is not None
    bounds = _bounds(*invariant.lengths(max_q, max_k, varlen), causal, window_left, window_right)
    if isinstance(tile, hopper_launch.HopperConfig):
        sm_count = limits(q.device).sm_count
        hopper_launch.launch(tile, q, k, v, cu_seqlens_q, cu_seqlens_k, batch, max_q, max_k, bounds, out, lse,
                             sinks, (q_scale, k_scale, v_scale), softmax_scale, softcap, sm_count)  # fmt: skip
        return
    heads, pack = q.shape[-2], _pack(q, k, mask)
    left, right = bounds
    num_blocks = ceil_div(max_q * pack, tile.block_m)
    num_rows, dv = out.numel() // out.shape[-1], out.shape[-1]
    mask_kind = "none" if mask is None else "bool" if mask.dtype == torch.bool else "additive"
    if mask_kind == "bool":
        mask = mask.view(torch.uint8)
    parts, states = out, lse
    if tile.num_splits > 1:
        parts = q.new_empty((tile.num_splits, num_rows, dv), dtype=torch.float32)
        states = q.new_empty((tile.num_splits, 2, num_rows), dtype=torch.float32)
    sinks, alibi_slopes, q_scale, k_scale, v_scale = (
        t if t is None else t.contiguous() for t in (sinks, alibi_slopes, q_scale, k_scale, v_scale)
    )
    if k_scale is None and q_scale is not None:
        k_scale = q_scale.new_ones((1, k.shape[-2]))
    if q_scale is None and k_scale is not None:
        q_scale = k_scale.new_ones((1, heads))
    tensors = (
        q, k, v, sinks, alibi_slopes, mask, q_scale, k_scale, v_scale, cu_seqlens_q, cu_seqlens_k, parts, states,
    )  # fmt: skip
    numbers = (
        *strides, _batch_stride(alibi_slopes), *_mask_strides(mask),
        *(_batch_stride(scale) for scale in (q_scale, k_scale, v_scale)),
        *(0 if varlen else out.stride(0), heads * dv, dv), *((0, lse.stride(0)) if varlen else lse.stride()[:2]),
        max_q, max_k, num_blocks, heads // pack, pack, heads // k.shape[-2], tile.num_splits, num_rows,
        float(softmax_scale), float(softcap), left or 0, right or 0,
    )  # fmt: skip
    plain = softmax_scale > 0.0 and softcap == 0.0 and alibi_slopes is q_scale is None and mask_kind != "additive"
    constants = {
        "IS_VARLEN": varlen, "IS_SPLIT": tile.num_splits > 1, "HAS_LEFT": left is not None,
        "HAS_RIGHT": right is not None, "HAS_SOFTCAP": softcap > 0.0, "HAS_ALIBI": alibi_slopes is not None,
        "HAS_SINKS": sinks is not None, "HAS_QK_SCALE": q_scale is not None, "HAS_V_SCALE": v_scale is not None,
        "MASK_KIND": mask_kind, "PLAIN": plain, "WIDE": _wide(tile, k.stride(-3), v.stride(-3), mask),
        "D": q.shape[-1], "DV": dv, "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_D": tile.block_d,
        "BLOCK_DV": tile.block_dv,
    }  # fmt: skip
    programs = num_blocks * (heads // pack) * batch * tile.num_splits
    _run_attention((programs, 1, 1), tensors, numbers, constants, tile.num_warps, tile.num_stages)
    if tile.num_splits > 1:
        _combine(parts, states, sinks, out, lse, mask_kind == "additive")


attention_backward = backward_launch.attention_backward
attention_varlen_backward = backward_launch.attention_varlen_backward
merge_attention = merge_launch.merge_attention


def _batch_stride(table):
    """0 where one row serves every sequence."""
    return 0 if table is None or table.dim() == 1 or table.shape[0] == 1 else table.stride(0)


def _mask_strides(mask):
    return (0,) * 4 if mask is None else tuple(0 if n == 1 else s for n, s in zip(mask.shape, mask.stride()))


def _wide(tile, stride_k, stride_v, mask):
    """Whether offsets inside one tile may pass 2**31."""
    reach = max(stride_k, stride_v) * tile.block_n + max(tile.block_d, tile.block_dv)
    if mask is not None:
        reach = max(reach, mask.stride(2) * tile.block_m + mask.stride(3) * tile.block_n)
    return reach >= 2**31


def _combine(parts, states, sinks, out, lse, natural):
    length, heads, dv = out.shape[-3:]
    number, _, num_rows = states.shape
    block_dv, block_splits = min(power_of_2(dv), 128), power_of_2(number)
    constants = {
        "HAS_SINKS": sinks is not None, "NATURAL": natural, "DV": dv, "BLOCK_DV": block_dv,
        "BLOCK_SPLITS": block_splits,
    }  # fmt: skip
    _run_combine(
        (num_rows, ceil_div(dv, block_dv), 1), (parts, states, sinks, out, lse), (length, heads, num_rows, number),
        constants, warps_of_join(block_splits * block_dv),
    )  # fmt: skip


_SWITCHES = (
    "IS_VARLEN", "IS_SPLIT", "HAS_LEFT", "HAS_RIGHT", "HAS_SOFTCAP", "HAS_ALIBI", "HAS_SINKS", "HAS_QK_SCALE",
    "HAS_V_SCALE",
)  # fmt: skip


def examples(dtype, target):
    """Prefill for the usual head dims, an odd one and the largest; decode; packed; every option. Most in bfloat16."""
    causal = {"HAS_RIGHT": True}
    gptoss = {**causal, "HAS_LEFT": True, "HAS_SINKS": True, "IS_VARLEN": True}
    gemma = {**causal, "HAS_LEFT": True, "HAS_SOFTCAP": True}
    yield _example(dtype, target, 64, 4096, causal)
    yield _example(dtype, target, 128, 4096, causal)
    yield _example(dtype, target, 128, 8, {"IS_SPLIT": True})
    if dtype != "fp16":
        yield _example(dtype, target, 256, 4096, gemma)
        yield _example(dtype, target, 512, 4096, causal)
        yield _example(dtype, target, 128, 4096, {"HAS_ALIBI": True}, mask_kind="additive")
    if dtype == "bf16":
        yield _example(dtype, target, 128, 4096, {})
        yield _example(dtype, target, 64, 4096, gptoss)
        yield _example(dtype, target, 80, 4096, gemma, mask_kind="bool")
        yield _example(dtype, target, 64, 8, {"IS_SPLIT": True, **gptoss})
    if dtype == "bf16" and target.capability >= MIN_FP8_CAPABILITY:
        yield _example("fp8e4nv", target, 128, 4096, {**causal, "HAS_QK_SCALE": True, "HAS_V_SCALE": True})
    pointers = {"parts_ptr": "*fp32", "states_ptr": "*fp32", "sinks_ptr": f"*{dtype}", "out_ptr": f"*{dtype}"}
    pointers["lse_ptr"] = "*fp32"
    yield KernelExample(
        _combine_kernel, {**pointers, **dict.fromkeys(("S", "H", "num_rows", "num_splits"), "i32")},
        {"HAS_SINKS": True, "NATURAL": False, "DV": 128, "BLOCK_DV": 128, "BLOCK_SPLITS": 32},
        divisible=tuple(pointers), num_warps=warps_of_join(32 * 128),
        wide_access=False,  # its loads are; a row of the result is 8 bytes a thread
    )  # fmt: skip
    yield merge_launch.example(dtype)
    yield from backward_launch.examples(dtype, target)
    yield from hopper_launch.examples(dtype, target)


def _example(dtype, target, head_dim, num_rows, switches, mask_kind="none"):
    """A launch of the forward kernel with what the switches name, every other option left out."""
    itemsize = {"fp32": 4, "fp8e4nv": 1}.get(dtype, 2)
    out_dtype = "fp32" if switches.get("IS_SPLIT") else "bf16" if itemsize == 1 else dtype
    tile = default(num_rows, head_dim, head_dim, itemsize, mask_kind != "none", target)
    switches = {name: switches.get(name, False) for name in _SWITCHES}
    plain = not (switches["HAS_SOFTCAP"] or switches["HAS_ALIBI"] or switches["HAS_QK_SCALE"])
    constants = {
        **switches, "MASK_KIND": mask_kind, "PLAIN": plain and mask_kind != "additive", "WIDE": False,
        "D": head_dim, "DV": head_dim, "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n,
        "BLOCK_D": tile.block_d, "BLOCK_DV": tile.block_dv,
    }  # fmt: skip
    pointers = {
        "q_ptr": dtype, "k_ptr": dtype, "v_ptr": dtype,
        "sinks_ptr": "fp32" if switches["HAS_SINKS"] else None,
        "alibi_ptr": "fp32" if switches["HAS_ALIBI"] else None,
        "mask_ptr": {"none": None, "bool": "u8", "additive": dtype}[mask_kind],
        "q_scale_ptr": "fp32" if switches["HAS_QK_SCALE"] else None,
        "k_scale_ptr": "fp32" if switches["HAS_QK_SCALE"] else None,
        "v_scale_ptr": "fp32" if switches["HAS_V_SCALE"] else None,
        "cu_q_ptr": "i32" if switches["IS_VARLEN"] else None,
        "cu_k_ptr": "i32" if switches["IS_VARLEN"] else None,
        "out_ptr": out_dtype, "lse_ptr": "fp32",
    }  # fmt: skip
    types, divisible = {}, []
    for name in _attention_kernel.arg_names:
        if name in constants:
            continue
        if name in pointers and pointers[name] is None:
            constants[name] = None
        elif name == "stride_mask_n":
            constants[name] = 1
        else:
            scalar = "fp32" if name in ("softmax_scale", "softcap") else "i32"
            types[name] = f"*{pointers[name]}" if name in pointers else scalar
            divisible += [name] if name.endswith("_ptr") or name.startswith("stride_") else []
    return KernelExample(
        _attention_kernel, types, constants, tuple(divisible), num_warps=tile.num_warps, num_stages=tile.num_stages
    )
