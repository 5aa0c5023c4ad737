"""Every option by matmuls: scores are made for a block of queries at a time, so memory grows with Sk, not Sq * Sk."""

import torch

from fusedops.ops.attention._torch.parts import MIN_ROWS, NO_SCORE, empty_like, keys_of_block, outputs, parts

BLOCK_Q = 256  # queries: enough for a matmul at full speed, few enough to skip most keys that causal hides
BLOCK_SCORES = 1 << 22  # elements of a block's scores: 16 MiB in float32


def _step(group, num_keys, options):
    """Queries of a block."""
    return min(max(BLOCK_SCORES // max(group * keys_of_block(BLOCK_Q, num_keys, options), 1), MIN_ROWS), BLOCK_Q)


def _parts(q, k, v, options):
    """(part, its blocks of queries and keys)."""
    group = q.shape[2] // k.shape[2]
    step = _step(group, k.shape[1], options)
    each = group * min(q.shape[1], step) * keys_of_block(step, k.shape[1], options) / BLOCK_SCORES
    for part in parts(q, k, v, options, each):
        part.k, part.v = part.k.contiguous(), part.v.contiguous()  # as every block's matmul wants them
        yield part, part.blocks(step)


def _grouped(part, tensor):
    """[batch, head, query, D] with the heads of each key head one below the other."""
    return tensor.unflatten(1, (part.k.shape[1], -1)).flatten(2, 3)


def _scores(part, queries, rows, keys, backward=False):
    """Scores of a block, -inf where hidden; what is hidden; for backward the derivative of softcap (None: 1)."""
    num_rows, softcap = rows.stop - rows.start, part.options.softcap
    scores = (queries @ part.k[:, :, keys].mT).unflatten(2, (-1, num_rows)).flatten(1, 2)
    slope = None
    if softcap:
        scores.div_(softcap)
        slope = scores.cosh().reciprocal_().square_() if backward else None  # 1 - tanh**2 would cancel
        scores.tanh_().mul_(softcap)
    added, hidden = part.bias_and_hidden(rows, keys)
    if added is not None:
        scores += added
    if hidden is not None:
        scores.masked_fill_(hidden, NO_SCORE)
    return scores, hidden, slope


def attention(q, k, v, options):
    """The softmax of a block's whole visible range of keys."""
    out, lse = outputs(q, v, options)
    for part, blocks in _parts(q, k, v, options):
        for rows, keys in blocks:
            queries = _grouped(part, part.q[:, :, rows] * options.softmax_scale)
            scores, hidden, _ = _scores(part, queries, rows, keys)
            top = scores.amax(-1, keepdim=True)
            if part.sinks is not None:
                top = torch.maximum(top, part.sinks)
            top.masked_fill_(top == NO_SCORE, 0.0)
            weights = scores.sub_(top).exp_()
            total = weights.sum(-1, keepdim=True)
            if part.sinks is not None:
                total += torch.exp(part.sinks - top)
            result = _times_values(part, weights, keys, hidden)
            result /= total.masked_fill(total == 0.0, 1.0)
            out[part.batch, rows, part.heads] = result.transpose(1, 2).to(out.dtype)
            lse[part.batch, part.heads, rows] = (top + total.log()).squeeze(-1)
    return out, lse


def _times_values(part, weights, keys, hidden):
    """The weighed values; those that no query of the block sees count as zero even where they are NaN."""
    num_rows = weights.shape[2]
    values, grouped = part.v[:, :, keys], _grouped(part, weights)
    result = grouped @ values
    if part.mask is not None and result.isnan().any():
        unseen = hidden.expand(weights.shape).unflatten(1, (values.shape[1], -1)).all(3).all(2)
        result = grouped @ values.masked_fill(unseen[..., None], 0.0)
    return result.unflatten(2, (-1, num_rows)).flatten(1, 2)


def attention_backward(grad_out, grad_lse, q, k, v, out, lse, options):
    """Scores of each block again; the gradients of keys and values are summed in float32."""
    dq = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    dk, dv = empty_like(k), empty_like(v)
    delta = row_products(grad_out, out, grad_lse)
    for part, blocks in _parts(q, k, v, options):
        sum_k, sum_v = torch.zeros_like(part.k), torch.zeros_like(part.v)
        # A NaN that a query sees is in its weights and its delta already; elsewhere it must not meet a weight of 0.
        clean_k, clean_v = (t.nan_to_num(0.0, 0.0, 0.0) for t in (part.k, part.v))
        for rows, keys in blocks:
            queries = _grouped(part, part.q[:, :, rows] * options.softmax_scale)
            scores, _, slope = _scores(part, queries, rows, keys, backward=True)
            shift, part_delta = (t[part.batch, part.heads, rows, None] for t in (lse, delta))
            weights = scores.sub_(shift.masked_fill(shift == NO_SCORE, 0.0)).exp_()
            grads = _grouped(part, grad_out[part.batch, rows, part.heads].transpose(1, 2).float())
            dscores = (grads @ clean_v[:, :, keys].mT).unflatten(2, (-1, weights.shape[2])).flatten(1, 2)
            dscores.sub_(part_delta).mul_(weights).masked_fill_(weights == 0.0, 0.0)
            if slope is not None:
                dscores *= slope
            dscores = _grouped(part, dscores)
            sum_v[:, :, keys] += _grouped(part, weights).mT @ grads
            sum_k[:, :, keys] += dscores.mT @ queries
            step = (dscores @ clean_k[:, :, keys]).mul_(options.softmax_scale)
            step = step.unflatten(2, (-1, weights.shape[2])).flatten(1, 2)
            dq[part.batch, rows, part.heads] = step.transpose(1, 2).to(q.dtype)
        dk[part.batch, :, part.kv] = sum_k.transpose(1, 2).to(k.dtype)
        dv[part.batch, :, part.kv] = sum_v.transpose(1, 2).to(v.dtype)
    return dq, dk, dv


def row_products(grad_out, out, grad_lse):
    """What a row's gradient loses to the softmax's denominator: ``sum(grad_out * out) - grad_lse``, [B, H, Sq]."""
    delta = (grad_out.float() * out.float()).sum(-1).transpose(1, 2)
    return delta if grad_lse is None else delta - grad_lse
