"""torch's fused attention of the CPU, for all options but softcap, and for Dv = D.

It runs in float32 whatever the inputs: in 16 bits it rounds the weights, its lse is off by a hundred epsilons of
float32, and without matrix instructions for 16 bits it is no faster. What it does otherwise than this operator is
mended here: the lse of rows without a key is 0, NaN is lost where a row has no other score, and a NaN that is hidden by
-inf comes through.
"""

import itertools
import math

import torch

from fusedops._core.numbers import ceil_div
from fusedops._core.sharing import shares_reading
from fusedops.ops.attention._support import NOT_FUSED_ON_CPU
from fusedops.ops.attention._torch import blocks
from fusedops.ops.attention._torch.parts import MIN_ROWS, NO_SCORE, keys_of_block, outputs, parts

BLOCK_Q = 512  # queries of one call where window, causal offset, ALiBi or bool become a mask
BLOCK_MASK = 1 << 22  # elements of such a mask for one head: 16 MiB
PART_COPIES = 1 << 20  # elements of the float32 copies of a part's inputs: larger ones are fresh memory each time
CHUNK_COPIES = 7 << 16  # elements of a chunk's float32 copies for each thread: 1.75 MiB, about a core's own cache
PART_MASKS = 1 << 24  # elements of the masks of a part's heads: 64 MiB

ALIGNMENT = 16  # bytes: between rows that start at multiples of it torch's products do not differ in a bit
_HIDES, _SHOWS = torch.tensor(NO_SCORE, dtype=torch.float32), torch.tensor(0.0, dtype=torch.float32)


def _aligned(tensor):
    """The tensor if its rows are whole and start at aligned places, else a copy that is so.

    torch's products of other tensors add in another order, so that the same numbers elsewhere give other last bits.
    """
    batches, heads, rows, element = tensor.stride()
    unit = ALIGNMENT // tensor.element_size()
    if element == 1 and not ((batches | heads | rows) % unit or tensor.data_ptr() % ALIGNMENT):
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def _forward(q, k, v, causal, mask, scale):
    """out and lse of torch's kernel, which depend on the numbers alone and not on where they lie."""
    return torch._scaled_dot_product_flash_attention_for_cpu(
        _aligned(q), _aligned(k), _aligned(v), 0.0, causal, attn_mask=mask, scale=scale
    )


def _backward(grad_out, q, k, v, out, lse, causal, mask, scale):
    """dq, dk and dv of torch's kernel, which depend on the numbers alone too."""
    tensors = (_aligned(tensor) for tensor in (grad_out, q, k, v, out))
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default(
        *tensors, lse.masked_fill(lse == NO_SCORE, 0.0), 0.0, causal, attn_mask=mask, scale=scale
    )


# How a call is seen to use a feature; with no query or no key torch's kernel ends the process.
_USES = {
    "float8_e4m3fn": lambda q, k, v, options: q.element_size() == 1,
    "Dv other than D": lambda q, k, v, options: q.shape[-1] != v.shape[-1],
    "softcap": lambda q, k, v, options: options.softcap != 0.0,
    "q_scale, k_scale, v_scale": lambda q, k, v, options: options[3:6] != (None,) * 3,
    "no queries or no keys": lambda q, k, v, options: q.numel() == 0 or k.numel() == 0,
}
_LIMITS = tuple(_USES[feature] for feature in NOT_FUSED_ON_CPU)


def covers(q, k, v, options):
    """Whether torch's kernel takes the call."""
    return q.is_cpu and not any(uses(q, k, v, options) for uses in _LIMITS)


def _causal(q, k, options):
    """Whether torch's is_causal does it: it aligns the first query with the first key, and scales -inf too."""
    if (options.window_left, options.window_right) != (-1, 0) or options.softmax_scale <= 0.0:
        return False
    return options.mask is options.alibi_slopes is None and q.shape[1] == k.shape[1]


def _needs_mask(q, k, options):
    if options.mask is not None or options.alibi_slopes is not None or options.window_left >= 0:
        return True
    return options.window_right >= 0 and not _causal(q, k, options)


def _calls(q, k, v, options):
    """(part, rows, keys) of every call of torch's kernel: a part is one call where no mask has to be made."""
    rows, group = q.shape[1], q.shape[2] // k.shape[2]
    each = 0 if q.dtype == torch.float32 else 2 * (group * rows + k.shape[1]) * q.shape[-1] / PART_COPIES
    if _needs_mask(q, k, options) and not _is_mask(options):
        span = keys_of_block(BLOCK_Q, k.shape[1], options)
        rows = min(max(BLOCK_MASK // span, MIN_ROWS), BLOCK_Q, rows)
        if options.alibi_slopes is not None or options.mask is not None and options.mask.shape[1] > 1:
            each = max(each, group * rows * span / PART_MASKS)
    for part in parts(q, k, v, options, each):
        for block in part.blocks(rows):
            yield part, *block


def _is_mask(options):
    """Whether torch's kernel can take the caller's mask as it is."""
    return _is_small_mask(options) and options.mask.dtype == torch.float32


def _is_small_mask(options):
    """Whether a mask is all that there is beside the scores, and is float32 or takes little memory as such."""
    if options.alibi_slopes is not None or options.window_left >= 0 or options.window_right >= 0:
        return False
    return options.mask is not None and (options.mask.dtype == torch.float32 or options.mask.numel() <= BLOCK_MASK)


def _mask(part, rows, keys):
    """All that is added to the scores of a block, in float32."""
    if _is_mask(part.options):
        return part.mask
    added, hidden = part.bias(rows, keys)
    if hidden is None:
        return added
    return torch.where(hidden, _HIDES, _SHOWS if added is None else added)


def plain_attention(
    q, k, v, sinks, alibi_slopes, mask, q_scale, k_scale, v_scale, softmax_scale, causal, window_left, window_right,
    softcap,
):  # fmt: skip
    """out and lse of the plainest calls, as in decoding, where each argument weighs; None for others."""
    if not q.is_cpu or q.element_size() == 1:
        return None
    if not (sinks is alibi_slopes is q_scale is k_scale is v_scale is None):
        return None
    if window_left >= 0 or window_right >= 0 or softcap != 0.0 or softmax_scale <= 0.0:
        return None
    (_, num_queries, _, dim), num_keys = q.shape, k.shape[1]
    causal = causal and num_queries > 1
    if (causal and num_queries != num_keys) or dim != v.shape[3] or not q.numel() or not k.numel():
        return None
    if mask is not None and (causal or (mask.dtype is not torch.float32 and mask.numel() > BLOCK_MASK)):
        return None
    run = _whole if q.dtype is torch.float32 else _in_chunks
    out, lse = run(q, k, v, mask, causal, softmax_scale)
    if not lse.all():
        lse, doubtful = _without_empty_rows(lse, _added(mask))
        if doubtful:
            return None
    return None if mask is not None and math.isnan(out.sum()) else (out, lse)


def _added(mask):
    """What a mask adds to the scores, in float32."""
    if mask is None:
        return None
    return torch.where(mask, _SHOWS, _HIDES) if mask.dtype is torch.bool else mask.float()


def _whole(q, k, v, mask, causal, scale):
    """out and lse of torch's kernel on float32 tensors."""
    out, lse = _heads_first(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), _added(mask), causal, scale)
    return out.transpose(1, 2).contiguous(), lse.contiguous()


def _heads_first(q, k, v, added, causal, scale):
    """torch's kernel; where it pays the heads that share keys become the queries of one head."""
    heads, kv_heads = q.shape[1], k.shape[1]
    if q.shape[2] > 1 or not shares_reading(heads, kv_heads, *k.shape[2:]) or added is not None and added.shape[1] > 1:
        return _forward(q, k, v, causal, added, scale)
    rows = q.unflatten(1, (kv_heads, heads // kv_heads)).squeeze(3)
    out, lse = _forward(rows, k, v, False, added, scale)
    return out.flatten(1, 2)[:, :, None], lse.flatten(1, 2)[..., None]


def _in_chunks(q, k, v, mask, causal, scale):
    """out and lse of 16-bit tensors: some batches and key heads at a time, whose float32 copies the caches hold."""
    batch, kv_heads, num_threads = q.shape[0], k.shape[2], torch.get_num_threads()
    each = 2 * (q.numel() + k.numel()) // (batch * kv_heads)
    limit = CHUNK_COPIES * num_threads
    tensors = [t.transpose(1, 2) for t in (q, k, v)]
    if batch * kv_heads * each <= limit:
        out, lse = _heads_first(*(t.float() for t in tensors), _added(mask), causal, scale)
        return out.transpose(1, 2).to(q.dtype).contiguous(), lse.contiguous()
    num_chunks = max(min(ceil_div(kv_heads * each, limit), kv_heads // num_threads), 1)  # each has a head for a thread
    heads, batches = ceil_div(kv_heads, num_chunks), max(limit // (each * kv_heads), 1)
    parts = [
        _some_heads(*chunk, heads, causal, scale)
        for chunk in zip(*(t.split(batches) for t in tensors), _cuts(mask, batches, 0), strict=False)
    ]
    return tuple(part[0].contiguous() if len(part) == 1 else torch.cat(part) for part in zip(*parts, strict=True))


def _cuts(mask, size, dim):
    """The mask of each chunk, without end where all have the same."""
    return itertools.repeat(mask) if mask is None or mask.shape[dim] == 1 else mask.split(size, dim)


def _some_heads(q, k, v, mask, heads, causal, scale):
    """out and lse, so many key heads at a time: their copies lie where the last ones' did."""
    group = q.shape[1] // k.shape[1]
    added = _added(mask) if mask is None or mask.shape[1] == 1 else mask
    parts, keys, values = [], None, None
    for own_q, own_k, own_v, own in zip(
        q.split(heads * group, 1), k.split(heads, 1), v.split(heads, 1), _cuts(added, heads * group, 1), strict=False
    ):
        if keys is None:
            keys, values = own_k.float(), own_v.float()
        else:  # the last ones may be fewer
            keys, values = (t[:, : own_k.shape[1]].copy_(own_t) for t, own_t in ((keys, own_k), (values, own_v)))
        out, lse = _heads_first(own_q.float(), keys, values, _added(own), causal, scale)
        parts.append((out.transpose(1, 2).to(q.dtype), lse))
    outs, sums = zip(*parts, strict=True)
    return (outs[0], sums[0]) if len(parts) == 1 else (torch.cat(outs, 2), torch.cat(sums, 1))


def attention(q, k, v, options):
    """As `_run`, and where that leaves a doubt, what a NaN or infinity in the inputs does to each row by itself."""
    out, lse, doubtful = _run(q, k, v, options)
    if not doubtful or all(tensor.isfinite().all() for tensor in (q, k, v)):
        return out, lse
    out, lse, _ = _run(*(t.float().nan_to_num(0.0, 0.0, 0.0) for t in (q, k, v)), options)
    exact, exact_lse = blocks.attention(q, k, v, options)
    damaged = _damaged(q, k, v, options)
    out = torch.where(damaged.transpose(1, 2)[..., None], exact, out.to(exact.dtype))
    return out, torch.where(damaged, exact_lse, lse)


def _damaged(q, k, v, options):
    """Rows with a NaN or infinity in their query, or in a key or value that they see: [B, H, Sq]."""
    damaged = (~q.float().isfinite().all(-1)).transpose(1, 2)
    group = q.shape[2] // k.shape[2]
    for part in parts(q, k, v, options, group * MIN_ROWS * k.shape[1] / PART_MASKS):
        bad = ~(part.k.isfinite().all(-1) & part.v.isfinite().all(-1))
        bad = bad.repeat_interleave(group, 1)[:, :, None]
        for rows, keys in part.blocks(MIN_ROWS):
            _, hidden = part.bias_and_hidden(rows, keys)
            seen = bad[..., keys] if hidden is None else bad[..., keys] & ~hidden
            damaged[part.batch, part.heads, rows] |= seen.any(-1)
    return damaged


def _run(q, k, v, options):
    """out, lse, and whether something in them may be otherwise than this operator promises."""
    causal, masked = _causal(q, k, options), _needs_mask(q, k, options)
    if q.dtype == torch.float32 and not masked and options.sinks is None:
        out, lse = _whole(q, k, v, None, causal, options.softmax_scale)
        return out, lse, not lse.all()
    out, doubtful = None, False
    for part, rows, keys in _calls(q, k, v, options):
        mask = _mask(part, rows, keys) if masked else None
        block = part.q[:, :, rows], part.k[:, :, keys], part.v[:, :, keys]
        result, sums = _forward(*block, causal, mask, options.softmax_scale)
        if not sums.all():
            sums, unclear = _without_empty_rows(sums, mask)
            doubtful |= unclear
        doubtful = doubtful or masked and math.isnan(result.sum())  # five times as fast as isnan().any()
        if part.sinks is not None:
            result, sums = _with_sinks(result, sums, part.sinks)
        result = result.transpose(1, 2)
        if result.shape[:3] == q.shape[:3]:  # the only call
            return result.to(q.dtype).contiguous(), sums.contiguous(), doubtful
        if out is None:
            out, lse = outputs(q, v, options)
        out[part.batch, rows, part.heads] = result
        lse[part.batch, part.heads, rows] = sums
    return *(outputs(q, v, options) if out is None else (out, lse)), doubtful


def _without_empty_rows(lse, mask):
    """lse with -inf where a row sees no key, for which torch has 0, and whether other rows have 0 too."""
    zero = lse == 0.0
    if mask is None:
        return lse, True
    empty = zero & (mask == NO_SCORE).all(-1)
    return lse.masked_fill(empty, NO_SCORE), bool((zero & ~empty).any())


def _with_sinks(out, lse, sinks):
    """One more term in each denominator."""
    total = torch.logaddexp(lse, sinks.squeeze(-1))
    return out * torch.exp(lse - total.masked_fill(total == NO_SCORE, 0.0))[..., None], total


def attention_backward(grad_out, q, k, v, out, lse, options):
    """dq, dk and dv, or None where they have a NaN, which this kernel spreads to rows that do not see it."""
    causal, masked = _causal(q, k, options), _needs_mask(q, k, options)
    whole = q.dtype == torch.float32 and (not masked or _is_small_mask(options))
    grads = (_backward_whole if whole else _backward_in_parts)(grad_out, q, k, v, out, lse, options, causal, masked)
    return None if any(math.isnan(grad.sum()) for grad in grads) else grads


def _backward_whole(grad_out, q, k, v, out, lse, options, causal, masked):
    """One call on float32 tensors."""
    tensors = (t.transpose(1, 2) for t in (grad_out, q, k, v, out))
    grads = _backward(*tensors, lse, causal, _added(options.mask), options.softmax_scale)
    return tuple(grad.transpose(1, 2).contiguous() for grad in grads)


def _backward_in_parts(grad_out, q, k, v, out, lse, options, causal, masked):
    """What does not fit a call is cut, and what comes of keys and values is added up in float32."""
    dq = torch.zeros(q.shape, dtype=q.dtype)
    dk, dv = (torch.zeros(t.shape, dtype=t.dtype) for t in (k, v))
    sums_of = None
    for part, rows, keys in _calls(q, k, v, options):
        if part is not sums_of:
            sums_of, sum_k, sum_v = part, torch.zeros(part.k.shape), torch.zeros(part.v.shape)
        grads, outs = (t[part.batch, rows, part.heads].transpose(1, 2).float() for t in (grad_out, out))
        sums = lse[part.batch, part.heads, rows]
        step_q, step_k, step_v = _backward(
            grads, part.q[:, :, rows], part.k[:, :, keys], part.v[:, :, keys], outs, sums, causal,
            _mask(part, rows, keys) if masked else None, options.softmax_scale,
        )  # fmt: skip
        dq[part.batch, rows, part.heads] = step_q.transpose(1, 2)
        sum_k[:, :, keys] += step_k
        sum_v[:, :, keys] += step_v
        dk[part.batch, :, part.kv], dv[part.batch, :, part.kv] = sum_k.transpose(1, 2), sum_v.transpose(1, 2)
    return dq, dk, dv
