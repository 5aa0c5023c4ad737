"""Paged attention on the GPU: tiles, splits and grid by arithmetic on what the host knows, and the launches."""

import functools
from dataclasses import dataclass, replace

import torch

from fusedops._core import invariance
from fusedops._core.device import fp8_rejection, limits
from fusedops._core.numbers import ceil_div, power_of_2
from fusedops._core.relaunch import Relauncher
from fusedops._core.scales import scale_kind, scale_strides
from fusedops._core.tuning import Tunable
from fusedops.ops.paged_attention._triton import launches
from fusedops.ops.paged_attention._triton.combine import _combine_kernel
from fusedops.ops.paged_attention._triton.forward import _paged_attention_kernel
from fusedops.ops.paged_attention._triton.schedule import MIN_SPLIT_KEYS as _MIN_SPLIT_KEYS

MIN_SPLIT_KEYS = _MIN_SPLIT_KEYS.value
MAX_SPLIT_BATCH = 1024  # sequences beyond which nothing is split: every program reads all lengths at once
WAVES = 4  # so many parts for each place on the device, that places are left when the longest ends
FIXED_ROWS = 64  # of a tile where num_splits is given: it must not depend on other sequences' queries
INVARIANT_SPLITS = 16  # at most, in batch-invariant mode: the parts of every sequence are in memory
MAX_SUMS = 128  # of one thread, in registers
BLOCK_SPLITS = 16  # parts that are joined at once
_run_attention, _run_combine = Relauncher(_paged_attention_kernel), Relauncher(_combine_kernel)


@dataclass(frozen=True)
class PagedConfig:
    """A tile of block_m rows (query, head) and block_n keys, and how the keys of few queries are split.

    splits is "none", "fixed" (num_splits parts of each sequence) or "auto" (`extra` more parts than sequences).
    """

    block_m: int
    block_n: int
    block_d: int
    block_dv: int
    num_warps: int
    num_stages: int
    splits: str = "none"
    num_splits: int = 1
    extra: int = 0


def supports(q, k_cache, *rest):
    """Why these kernels cannot run a call, or None."""
    return fp8_rejection(k_cache)


# (block_m, block_n, num_warps, num_stages) for head dims padded to the key. Tiles are those of attention's kernel, so
# that a contiguous call gives the same bits, but for Hopper's own. Page ids are loaded a stage before the keys: with 5
# stages two tiles of keys are on their way.
_MANY_ROWS = {64: (128, 64, 8, 5), 128: (128, 64, 8, 5), 256: (64, 32, 8, 5), 512: (32, 32, 8, 3)}
_SOME_ROWS = {64: (64, 64, 8, 5), 128: (64, 64, 8, 5), 256: (64, 32, 8, 5), 512: (32, 32, 8, 3)}
_FEW_ROWS = {64: (16, 128, 4, 5), 128: (16, 64, 4, 5), 256: (16, 64, 8, 5), 512: (16, 32, 8, 5)}
_FLOAT32 = {64: (32, 32, 4, 5), 128: (32, 16, 8, 5), 256: (16, 32, 8, 5), 512: (16, 16, 8, 3)}


@functools.lru_cache(maxsize=4096)
def default(num_rows, head_dim, head_dim_v, itemsize, cache_itemsize, window, tree, device_limits):
    """The tile for sequences of up to num_rows rows: from the table, smaller until the shared memory holds it."""
    block_d, block_dv = (max(power_of_2(size), 16) for size in (head_dim, head_dim_v))
    if itemsize == 4:
        table = _FLOAT32
    else:
        some = num_rows <= 64 or cache_itemsize < itemsize  # codes on their way to wider values take registers
        table = _FEW_ROWS if num_rows <= 16 else _SOME_ROWS if some else _MANY_ROWS
    block_m, block_n, num_warps, num_stages = table[max(block_d, block_dv, 64)]
    tile = PagedConfig(16 if num_rows <= 16 else block_m, block_n, block_d, block_dv, num_warps, num_stages)
    if tree:  # its words take registers and shared memory
        tile = replace(tile, num_stages=min(tile.num_stages, 3))
    while shared_bytes(tile, itemsize, cache_itemsize, window, tree, device_limits) > device_limits.shared_memory:
        if tile.num_stages > 1:
            tile = replace(tile, num_stages=tile.num_stages - 2)
        elif tile.block_n > 32 or tile.block_m == 16:
            tile = replace(tile, block_n=tile.block_n // 2)
        else:
            tile = replace(tile, block_m=tile.block_m // 2)
    return tile


def shared_bytes(tile, itemsize, cache_itemsize, window, tree, device_limits):
    """At most what the kernel asks for: q, p, each tile's k, v, pages, scales and tree, wider copies, 1 KiB of sums.

    The tiles of two loops are there together where a window, or a tree, makes a loop more or a longer one. Asynchronous
    products keep a tile more.
    """
    keys = tile.block_n * (tile.block_d + tile.block_dv)
    queries = tile.block_m * (tile.block_d + tile.block_n) * itemsize + 1024
    if tile.num_stages == 1:  # everything is on its way in registers
        return queries + keys * itemsize
    stage = keys * cache_itemsize + tile.block_n * 24 + tree * tile.block_m * tile.block_n * 4
    tiles = max((tile.num_stages - 1) // 2, 1) * (2 if window or tree else 1)
    tiles += 90 <= device_limits.capability < 120 and tile.block_m >= 64
    widened = keys * itemsize if cache_itemsize < itemsize else 0
    return queries + tiles * stage + widened


def _fits(tile, num_rows, head_dim, head_dim_v, itemsize, cache_itemsize, window, tree, device_limits):
    """Whether the memory holds the tiles, and the registers of a thread the sums."""
    sums = tile.block_m * max(tile.block_n, tile.block_dv) // (32 * tile.num_warps)
    needed = shared_bytes(tile, itemsize, cache_itemsize, window, tree, device_limits)
    return needed <= device_limits.shared_memory and sums <= MAX_SUMS


TILE = Tunable(
    "paged_attention",
    default=lambda *asked: default(*asked),
    sizes=("num_rows",),
    flags=("head_dim", "head_dim_v", "itemsize", "cache_itemsize", "window", "tree"),
    also=("dtype", "cache_dtype", "heads_per_key_head", "page_size", "splits", "varlen", "causal", "right", "softcap",
          "sinks", "alibi", "k_scale", "v_scale"),
    space={"block_n": (16, 32, 64, 128), "num_warps": (2, 4, 8), "num_stages": (1, 3, 5, 7)},
    fits=_fits,
    source=__file__,
)  # fmt: skip


def extra_slots(batch, kv_heads, capacity, device_limits):
    """How many more parts than sequences there may be: enough for every place, none below MIN_SPLIT_KEYS keys."""
    if batch > MAX_SPLIT_BATCH or capacity <= MIN_SPLIT_KEYS:
        return 0
    places = 2 * device_limits.sm_count  # two programs share a multiprocessor
    return min(ceil_div(WAVES * places, kv_heads), batch * ceil_div(capacity, MIN_SPLIT_KEYS))


def _own_splits(kv_heads, device_limits):
    """Where rows must not depend on each other, the splits of a sequence that has the device for itself; else None."""
    if not invariance.enabled():
        return None
    return min(ceil_div(2 * device_limits.sm_count, kv_heads), INVARIANT_SPLITS)


def config(op, device_limits, *args):
    """The configuration of one call."""
    q, k_cache, v_cache, block_table, _, _, max_seqlen_q, *rest = args  # rest: from sinks to num_splits
    page_size, kv_heads = k_cache.shape[1:3]
    group, num_splits = q.shape[1] // kv_heads, rest[-1] or _own_splits(kv_heads, device_limits)
    num_rows = FIXED_ROWS if num_splits else max_seqlen_q * group
    sizes = q.shape[-1], v_cache.shape[-1], q.element_size(), k_cache.element_size()
    capacity = block_table.shape[1] * page_size
    window = _left(rest[7], capacity) is not None
    also = (
        q.dtype, k_cache.dtype, group, page_size, bool(num_splits), args[5] is not None, rest[6], rest[8] >= 0,
        rest[9] > 0.0, rest[0] is not None, rest[1] is not None, scale_kind(rest[2]), scale_kind(rest[3]),
    )  # fmt: skip
    tile = TILE.choose(device_limits, (num_rows, *sizes, window, rest[4] is not None), also)
    if num_splits:
        return replace(tile, splits="fixed" if num_splits > 1 else "none", num_splits=num_splits)
    extra = extra_slots(block_table.shape[0], kv_heads, capacity, device_limits)
    return replace(tile, splits="auto", extra=extra) if extra else tile


def _left(window_left, capacity):
    """Keys that a query sees before its own; None where that hides none in any sequence."""
    return window_left if 0 <= window_left < capacity - 1 or window_left >= 0 and invariance.enabled() else None


def paged_attention(
    q, k_cache, v_cache, block_table, cache_seqlens, cu_seqlens_q, max_seqlen_q, sinks, alibi_slopes, k_scale, v_scale,
    tree_mask, softmax_scale, causal, window_left, window_right, softcap, num_splits,
):  # fmt: skip
    """Launch the kernel, and where the keys may be split the one that joins the parts."""
    (total, heads, dim), dv = q.shape, v_cache.shape[-1]
    out = q.new_empty((total, heads, dv))
    lse = q.new_empty((heads, total), dtype=torch.float32)
    batch, max_pages = block_table.shape
    if not out.numel() or not batch or not max_seqlen_q:
        return out, lse
    num_pages, page_size, kv_heads, _ = k_cache.shape
    group, capacity = heads // kv_heads, max_pages * page_size
    tile = config(
        "paged_attention", limits(q.device), q, k_cache, v_cache, block_table, cache_seqlens, cu_seqlens_q,
        max_seqlen_q, sinks, alibi_slopes, k_scale, v_scale, tree_mask, softmax_scale, causal, window_left,
        window_right, softcap, num_splits,
    )  # fmt: skip
    slots = {"none": batch, "fixed": batch * tile.num_splits, "auto": batch + tile.extra}[tile.splits]
    part_rows = min(tile.block_m, max_seqlen_q * group)
    num_parts = slots * kv_heads * part_rows if tile.splits != "none" else 0
    parts = q.new_empty((num_parts, dv), dtype=torch.float32)
    states = q.new_empty((num_parts, 2), dtype=torch.float32)
    sinks, alibi_slopes = (t if t is None else t.contiguous() for t in (sinks, alibi_slopes))
    left = _left(window_left, capacity)
    right = 0 if causal else window_right
    has_right = 0 <= right < max_seqlen_q - 1 or right >= 0 and invariance.enabled()
    num_blocks = ceil_div(max_seqlen_q * group, tile.block_m)
    tensors = (
        q, k_cache, v_cache, block_table, cache_seqlens, cu_seqlens_q, sinks, alibi_slopes, k_scale, v_scale, tree_mask,
        out, lse, parts, states,
    )  # fmt: skip
    numbers = (
        *q.stride()[:2], *k_cache.stride()[:3], *v_cache.stride()[:3], block_table.stride(0),
        alibi_slopes.stride(0) if alibi_slopes is not None and alibi_slopes.dim() == 2 else 0,
        *scale_strides(k_scale), *scale_strides(v_scale), 0 if tree_mask is None else tree_mask.stride(0),
        total, batch, num_pages, capacity, num_blocks, kv_heads, group, tile.extra, tile.num_splits,
        0 if tree_mask is None else tree_mask.shape[1], part_rows,
        float(softmax_scale), float(softcap), left or 0, max(right, 0),
    )  # fmt: skip
    shared = {"SPLITS": tile.splits, "IS_VARLEN": cu_seqlens_q is not None, "HAS_LEFT": left is not None}
    blocks = {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n}
    block_b = power_of_2(batch) if tile.splits == "auto" else 1
    constants = {
        **shared, "HAS_RIGHT": has_right, "HAS_SOFTCAP": softcap > 0.0, "HAS_ALIBI": alibi_slopes is not None,
        "HAS_SINKS": sinks is not None, "HAS_TREE": tree_mask is not None, "K_SCALE": scale_kind(k_scale),
        "V_SCALE": scale_kind(v_scale),
        "PLAIN": softmax_scale > 0.0 and softcap == 0.0 and alibi_slopes is k_scale is None,
        "PAGE_SIZE": page_size, "D": dim, "DV": dv, **blocks, "BLOCK_D": tile.block_d, "BLOCK_DV": tile.block_dv,
        "BLOCK_B": block_b,
    }  # fmt: skip
    grid = (num_blocks * kv_heads * slots, 1, 1)
    _run_attention(grid, tensors, numbers, constants, tile.num_warps, tile.num_stages)
    if tile.splits != "none":
        shared |= {"HAS_SINKS": sinks is not None, "DV": dv, **blocks, "BLOCK_B": block_b}
        sizes = total, batch, capacity, kv_heads, group, tile.extra, tile.num_splits, part_rows, left or 0
        _combine((cache_seqlens, cu_seqlens_q, sinks, parts, states, out, lse), sizes, shared)
    return out, lse


def _combine(tensors, sizes, constants):
    """Launch the kernel that joins the parts: a program for each row that may have any."""
    _, batch, _, kv_heads, *_, part_rows, _ = sizes
    block_dv = min(power_of_2(constants["DV"]), 128)
    constants = {**constants, "BLOCK_DV": block_dv, "BLOCK_SPLITS": BLOCK_SPLITS}
    grid = batch * kv_heads * part_rows, ceil_div(constants["DV"], block_dv), 1
    _run_combine(grid, tensors, sizes, constants, 4)


def examples(dtype, target):
    """Launches for a target, with the tiles that it gets."""
    return launches.examples(default, dtype, target)
