"""The checks of paged attention's arguments, and at level 2 of the values that lie in device memory."""

import torch

from fusedops._core import checks, env
from fusedops.ops.attention import check_head_dim, check_table, check_values
from fusedops.ops.write_kv_cache import check_cache, check_scales

OP = "paged_attention"
WORD = 32  # draft tokens of one word of a tree mask
MAX_SPLITS = 128
_INTEGERS = (int, torch.SymInt)


def check_arguments(
    q, k_cache, v_cache, block_table, cache_seqlens, cu_seqlens_q, max_seqlen_q, sinks, alibi_slopes, k_scale, v_scale,
    tree_mask, *options,
):  # fmt: skip
    """Raise what the public function's docstring lists."""
    sizes = checks.bind_shapes(
        OP, q=(q, "T H D"), k_cache=(k_cache, "num_pages page_size Hk D"),
        v_cache=(v_cache, "num_pages page_size Hk Dv"), block_table=(block_table, "B max_pages"),
        cache_seqlens=(cache_seqlens, "B"),
    )  # fmt: skip
    checks.check_float(OP, q=q)
    check_cache(OP, q, k_cache, v_cache, sizes)
    checks.check_rows(OP, q=q, block_table=block_table, cache_seqlens=cache_seqlens)
    heads, kv_heads, batch = sizes["H"], sizes["Hk"], sizes["B"]
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"{OP}: k_cache must have a number of heads Hk that divides H={heads}, got {kv_heads}")
    for name in ("D", "Dv"):
        check_head_dim(OP, name, sizes[name])
    for name, tensor in (("block_table", block_table), ("cache_seqlens", cache_seqlens)):
        _check_int32(name, tensor)
    _check_queries(sizes, cu_seqlens_q, max_seqlen_q, q)
    if sinks is not None:
        check_table(OP, "sinks", sinks, q, [(heads,)], "[H]", (q.dtype, torch.float32))
    if alibi_slopes is not None:
        shapes = [(heads,), (batch, heads)]
        check_table(OP, "alibi_slopes", alibi_slopes, q, shapes, "[H] or [B, H]", (torch.float32,))
        checks.check_rows(OP, alibi_slopes=alibi_slopes)
    check_scales(OP, k_cache, sizes, k_scale=k_scale, v_scale=v_scale)
    if tree_mask is not None:
        _check_tree(tree_mask, sizes["T"], max_seqlen_q, q)
    _check_gradients(q=q, k_cache=k_cache, v_cache=v_cache, sinks=sinks, alibi_slopes=alibi_slopes, k_scale=k_scale,
                     v_scale=v_scale)  # fmt: skip
    if env.validate():
        *values, num_splits = options
        check_values(OP, *values)
        _check_splits(num_splits)
    if env.validate() == 2 and not torch.compiler.is_compiling() and not q.is_meta:
        _check_device_values(sizes, block_table, cache_seqlens, cu_seqlens_q, max_seqlen_q, k_scale, v_scale)


def _check_int32(name, tensor):
    if tensor.dtype != torch.int32:
        raise TypeError(f"{OP}: {name} must be int32, got {str(tensor.dtype).removeprefix('torch.')}")


def _check_queries(sizes, cu_seqlens_q, max_seqlen_q, q):
    """Where each sequence's queries are."""
    batch, total = sizes["B"], sizes["T"]
    if cu_seqlens_q is None:
        if total != batch:
            raise ValueError(
                f"{OP}: q must have one row for each of B={batch} sequences without cu_seqlens_q, got {total}"
            )
        return
    check_table(OP, "cu_seqlens_q", cu_seqlens_q, q, [(batch + 1,)], "[B + 1]", (torch.int32,))
    checks.check_rows(OP, cu_seqlens_q=cu_seqlens_q)
    if not isinstance(max_seqlen_q, _INTEGERS) or isinstance(max_seqlen_q, bool):
        raise TypeError(f"{OP}: max_seqlen_q must be an integer with cu_seqlens_q, got {type(max_seqlen_q).__name__}")
    if env.validate() and max_seqlen_q < 0:
        raise ValueError(f"{OP}: max_seqlen_q must be at least 0, got {max_seqlen_q}")


def _check_tree(tree_mask, total, max_seqlen_q, q):
    words = -(-max_seqlen_q // WORD)
    shape = [(total, words)]
    check_table(OP, "tree_mask", tree_mask, q, shape, "[T, ceil(max_seqlen_q / 32)]", (torch.int32,))
    checks.check_rows(OP, tree_mask=tree_mask)


def _check_splits(num_splits):
    if num_splits is None:
        return
    if not isinstance(num_splits, int) or isinstance(num_splits, bool):
        raise TypeError(f"{OP}: num_splits must be an integer or None, got {type(num_splits).__name__}")
    if not 1 <= num_splits <= MAX_SPLITS:
        raise ValueError(f"{OP}: num_splits must be from 1 to {MAX_SPLITS}, got {num_splits}")


def _check_gradients(**tensors):
    if not torch.is_grad_enabled():
        return
    for name, tensor in tensors.items():
        if tensor is not None and tensor.requires_grad:
            raise NotImplementedError(f"{OP}: {name} must not require a gradient, this operator has none")


def _check_device_values(sizes, block_table, cache_seqlens, cu_seqlens_q, max_seqlen_q, k_scale, v_scale):
    """What only a look into device memory tells; it waits for the device."""
    capacity = sizes["max_pages"] * sizes["page_size"]
    lengths = cache_seqlens.long()
    if bool(((lengths < 0) | (lengths > capacity)).any()):
        raise ValueError(
            f"{OP}: cache_seqlens must be from 0 to {capacity}, as block_table holds, got {lengths.tolist()}"
        )
    used = torch.arange(sizes["max_pages"], device=lengths.device) * sizes["page_size"] < lengths[:, None]
    bad = used & ((block_table < 0) | (block_table >= sizes["num_pages"]))
    if bool(bad.any()):
        raise ValueError(
            f"{OP}: block_table must hold page ids from 0 to {sizes['num_pages'] - 1} where tokens are, "
            f"got {block_table[bad][0].item()}"
        )
    if cu_seqlens_q is not None:
        starts = cu_seqlens_q.long()
        counts = starts.diff()
        if int(starts[0]) != 0 or int(starts[-1]) != sizes["T"] or bool((counts < 0).any()):
            raise ValueError(f"{OP}: cu_seqlens_q must rise from 0 to {sizes['T']}, got {starts.tolist()}")
        longest = int(counts.max()) if counts.numel() else 0
        if longest > max_seqlen_q:
            raise ValueError(f"{OP}: max_seqlen_q must be at least the longest length {longest}, got {max_seqlen_q}")
    for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        if scale is not None and scale.dim() < 3 and not bool((scale.isfinite() & (scale > 0)).all()):
            raise ValueError(f"{OP}: {name} must be finite and above 0, got {scale.tolist()}")
