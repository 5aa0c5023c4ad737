"""Attention of new tokens to keys and values that lie in pages."""

import torch

from fusedops._core.register import register
from fusedops.ops.attention import arguments
from fusedops.ops.paged_attention import _checks


def paged_attention(
    q, k_cache, v_cache, block_table, cache_seqlens, *, cu_seqlens_q=None, max_seqlen_q=None, softmax_scale=None,
    causal=True, window_size=(-1, -1), softcap=0.0, sinks=None, alibi_slopes=None, k_scale=None, v_scale=None,
    tree_mask=None, num_splits=None, return_lse=False,
):  # fmt: skip
    """Attend to the keys of each sequence where they lie, on any pages of a pool: decode, prefill in chunks, or both.

    Token j of sequence b is ``k_cache[block_table[b, j // page_size], j % page_size]``; on the first `cache_seqlens[b]`
    of them the result is that of `attention`. The keys of the new tokens are written before (`write_kv_cache`) and
    counted: query i of Sq stands at position ``p = cache_seqlens[b] - Sq + i``, the last query at the last key.

    Args:
        q: ``[T, H, D]``, float16, bfloat16 or float32: the new tokens of all sequences, one after another; the last
            dimension is contiguous, all other strides are free. D is a multiple of 8 up to 256, or 512.
        k_cache: ``[num_pages, page_size, Hk, D]``, q's dtype, int8 or float8_e4m3fn; page_size is 1 or a multiple of 8
            up to 256. Hk divides H: head h reads head ``h // (H // Hk)``. k_cache and v_cache may be views of one
            buffer.
        v_cache: ``[num_pages, page_size, Hk, Dv]``, k_cache's dtype; Dv as D, and may differ from it.
        block_table: ``[B, max_pages]``, int32: the pages of each sequence. Entries past its end are never read.
        cache_seqlens: ``[B]``, int32: tokens of each sequence, the new ones among them; 0 gives 0 and -inf.
        cu_seqlens_q: ``[B + 1]``, int32: running sums of how many new tokens each sequence has, from 0 to T. None: one
            for each sequence, T = B.
        max_seqlen_q: The most new tokens of a sequence, or more; goes with cu_seqlens_q.
        softmax_scale, causal, window_size, softcap, sinks, alibi_slopes: As in `attention`.
        k_scale, v_scale: float32, for int8 and float8 alone: multiply the stored values to give the real ones. One
            number (``[]`` or ``[1]``), one for each head ``[Hk]``, or one for each token and head
            ``[num_pages, page_size, Hk]``, as `write_kv_cache` writes them. None is 1.
        tree_mask: ``[T, ceil(max_seqlen_q / 32)]``, int32, for drafts that form a tree: bit ``j % 32`` of word
            ``j // 32`` of a query's row says whether it sees new token j of its own sequence. The keys before the new
            tokens are seen by all; `causal` and window hide as ever, by the order in which tokens are stored.
        num_splits: Into how many parts the keys of a sequence with few queries are cut. None: by the lengths of all, so
            that the device is filled. A number, 1 to 128, makes each row's bits independent of the batch around it.
        return_lse: Return the logarithm of the softmax's denominator too.

    Returns:
        ``[T, H, Dv]`` of q's dtype, contiguous; with `return_lse` ``(out, lse)``, lse ``[H, T]``, float32, as in
        `attention`. Not differentiable. Rows of q that belong to no sequence are left unset.

    Raises:
        ValueError: a shape, stride, device or option does not fit; with FUSEDOPS_VALIDATE=2 also page ids out of range,
            lengths beyond the table, cu_seqlens_q that do not rise from 0 to T, and scales that are not above 0.
        TypeError: a dtype or the type of an option is not one of the above.
        NotImplementedError: a head or page size is none of the above, or a tensor requires a gradient.

    Numerics: as `attention`. Which pages a sequence has does not change a bit, nor does the page size, nor what lies in
        unused slots and pages. int8 and float8 values are exact in the products; their scales are float32. Unless level
        2 refuses them, lengths are cut to what the table holds, and a key on a page that does not exist is NaN for
        every query that sees it; its memory is not read.
    Runs on: CUDA 8.0 and newer (Triton), float8 8.9 and newer, without a look at device memory: a captured graph may be
        replayed with other lengths and pages. Elsewhere torch, one sequence after another.
    From: Kwon et al., "Efficient Memory Management for Large Language Model Serving with PagedAttention", 2023,
        https://arxiv.org/abs/2309.06180
    """
    max_seqlen_q = 1 if cu_seqlens_q is None else max_seqlen_q
    again = _paged_attention.again if return_lse else _paged_attention.again_first
    done = again(
        q, k_cache, v_cache, block_table, cache_seqlens, cu_seqlens_q, max_seqlen_q, sinks, alibi_slopes, k_scale,
        v_scale, tree_mask, softmax_scale, causal, window_size, softcap, num_splits,
    )  # fmt: skip
    if done is not None:
        return done
    args = _arguments(
        q, k_cache, v_cache, block_table, cache_seqlens, cu_seqlens_q, max_seqlen_q, sinks, alibi_slopes, k_scale,
        v_scale, tree_mask, softmax_scale, causal, window_size, softcap, num_splits,
    )  # fmt: skip
    _checks.check_arguments(*args)
    out, lse = _paged_attention(*args)
    return (out, lse) if return_lse else out


def _arguments(q, k_cache, v_cache, block_table, cache_seqlens, cu_seqlens_q, max_seqlen_q, sinks, alibi_slopes,
               k_scale, v_scale, tree_mask, softmax_scale, causal, window_size, softcap, num_splits):  # fmt: skip
    """The registered operator's arguments, of the public function's."""
    tensors = sinks, alibi_slopes, k_scale, v_scale, tree_mask
    options = arguments("paged_attention", q, softmax_scale, causal, window_size, softcap)
    queries = cu_seqlens_q, max_seqlen_q
    return q, k_cache, v_cache, block_table, cache_seqlens, *queries, *tensors, *options, num_splits


def _fake(q, k_cache, v_cache, *rest):
    lse = q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)
    return q.new_empty((*q.shape[:2], v_cache.shape[-1])), lse


def _cost(q, k_cache, v_cache, block_table, *rest):
    """As if every sequence filled its pages: the lengths lie in device memory."""
    tokens = min(block_table.numel(), max(k_cache.shape[0], 1)) * k_cache.shape[1]
    kv_heads, sizes = k_cache.shape[2], k_cache.shape[3] + v_cache.shape[3]
    moved = tokens * kv_heads * sizes * k_cache.element_size() + 4 * block_table.numel()
    moved += q.shape[0] * q.shape[1] * (sizes * q.element_size() + 4)
    queries = q.shape[0] / max(block_table.shape[0], 1)
    return moved, int(2 * tokens * q.shape[1] * sizes * queries)


def _example(shape, dtype, device):
    """shape is [B, S, H, D]: B sequences of S tokens on pages of 16, each with one new token."""
    batch, length, heads, dim = shape
    pages = -(-length // 16)
    q = torch.randn(batch, heads, dim, device=device).to(dtype)
    caches = [torch.randn(batch * pages, 16, heads, dim, device=device).to(dtype) for _ in "kv"]
    table = torch.arange(batch * pages, dtype=torch.int32, device=device).view(batch, pages).flip(0)
    return (q, *caches, table, torch.full((batch,), length, dtype=torch.int32, device=device)), {}


_paged_attention = register(
    "paged_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor block_table, Tensor cache_seqlens, "
    "Tensor? cu_seqlens_q, int max_seqlen_q, Tensor? sinks, Tensor? alibi_slopes, Tensor? k_scale, Tensor? v_scale, "
    "Tensor? tree_mask, float softmax_scale, bool causal, int window_left, int window_right, float softcap, "
    "int? num_splits) -> (Tensor, Tensor)",
    package=__name__,
    implementations=("triton", "torch", "reference"),
    fake=_fake,
    cost=_cost,
    example=_example,
    arguments=_arguments,
)
