"""The meaning of attention. In float64 this is the truth that every implementation is measured against."""

import torch


def attention(
    q, k, v, sinks, alibi_slopes, mask, q_scale, k_scale, v_scale, softmax_scale, causal, window_left, window_right,
    softcap,
):  # fmt: skip
    """``out = softmax(scores) @ v`` over the visible keys, and the scores' logsumexp; a row without keys is 0 and -inf.

    Query i stands at position ``i + Sk - Sq`` among the keys. A sink is one more score, without a value.
    """
    wide = _wide(q)
    group = q.shape[2] // k.shape[2]
    queries, keys, values = (t.to(wide).transpose(1, 2) for t in (q, k, v))
    if q_scale is not None:
        queries = queries * q_scale.to(wide)[:, :, None, None]
    if k_scale is not None:
        keys = keys * k_scale.to(wide)[:, :, None, None]
    if v_scale is not None:
        values = values * v_scale.to(wide)[:, :, None, None]
    keys, values = (t.repeat_interleave(group, 1) for t in (keys, values))

    scores = queries @ keys.mT * softmax_scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    offset = k.shape[1] - q.shape[1]
    distance = torch.arange(k.shape[1], device=q.device) - torch.arange(q.shape[1], device=q.device)[:, None] - offset
    if alibi_slopes is not None:
        scores = scores - alibi_slopes.to(wide)[..., None, None] * distance.abs()
    visible = torch.ones_like(scores, dtype=torch.bool)
    if causal:
        visible = visible & (distance <= 0)
    if window_left >= 0:
        visible = visible & (distance >= -window_left)
    if window_right >= 0:
        visible = visible & (distance <= window_right)
    if mask is not None and mask.dtype == torch.bool:
        visible = visible & mask
    elif mask is not None:
        visible = visible & (mask != float("-inf"))
        scores = scores + mask.to(wide)
    scores = scores.masked_fill(~visible, float("-inf"))
    values = values.masked_fill(~visible.any(2)[..., None], 0.0)

    terms = scores
    if sinks is not None:
        terms = torch.cat((scores, sinks.to(wide)[None, :, None, None].expand(*scores.shape[:3], 1)), -1)
    weights, lse = _softmax(terms)
    out = (weights[..., : k.shape[1]] @ values).transpose(1, 2)
    return out.to(torch.bfloat16 if q.element_size() == 1 else q.dtype), lse


def _wide(tensor):
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _softmax(terms):
    """(weights, logsumexp) over the last dimension: 0 and -inf where all terms are -inf, or there are none."""
    empty = (terms == float("-inf")).all(-1, keepdim=True)
    filled = terms.masked_fill(empty, 0.0)
    lse = torch.logsumexp(filled, -1).masked_fill(empty.squeeze(-1), float("-inf"))
    return torch.softmax(filled, -1).masked_fill(empty, 0.0), lse


def attention_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, sinks, alibi_slopes, mask,
                     q_scale, k_scale, v_scale, *options):  # fmt: skip
    """`attention` of each sequence by itself."""
    outs, lses = [q.new_zeros(0, q.shape[1], v.shape[2])], [q.new_zeros(q.shape[1], 0)]
    starts_q, starts_k = cu_seqlens_q.long().tolist(), cu_seqlens_k.long().tolist()
    for b in range(len(starts_q) - 1):
        queries = slice(starts_q[b], starts_q[b + 1])
        keys = slice(starts_k[b], starts_k[b + 1])
        slopes, *scales = (
            t if t is None or t.dim() == 1 or t.shape[0] == 1 else t[b : b + 1]
            for t in (alibi_slopes, q_scale, k_scale, v_scale)
        )
        out, lse = attention(q[queries][None], k[keys][None], v[keys][None], sinks, slopes, None, *scales, *options)
        outs.append(out[0])
        lses.append(lse[0])
    return torch.cat(outs[1:] or outs), torch.cat(lses[1:] or lses, 1)


def attention_backward(grad_out, grad_lse, q, k, v, out, lse, *options):
    """Gradients of q, k, v and sinks by differentiating `attention`; out and lse are computed again."""
    return _differentiate(attention, grad_out, grad_lse, q, k, v, (), *options)


def attention_varlen_backward(grad_out, grad_lse, q, k, v, out, lse, *rest):
    """Gradients of q, k, v and sinks by differentiating `attention_varlen`."""
    return _differentiate(attention_varlen, grad_out, grad_lse, q, k, v, rest[:4], *rest[4:])


def _differentiate(function, grad_out, grad_lse, q, k, v, lengths, sinks, *options):
    with torch.enable_grad():
        wide = _wide(q)
        leaves = [None if t is None else t.detach().to(wide).requires_grad_() for t in (q, k, v, sinks)]
        out, lse = function(*leaves[:3], *lengths, leaves[3], *options)
        grads = [grad_out.to(wide), torch.zeros_like(lse) if grad_lse is None else grad_lse.to(wide)]
        wanted = [leaf for leaf in leaves if leaf is not None]
        if out.requires_grad:
            found = torch.autograd.grad((out, lse), wanted, grads, allow_unused=True, materialize_grads=True)
        else:  # there is no sequence
            found = [torch.zeros_like(leaf) for leaf in wanted]
    if sinks is None:
        return *(g.to(t.dtype) for g, t in zip(found, (q, k, v))), q.new_empty(0)
    return tuple(g.to(t.dtype) for g, t in zip(found, (q, k, v, sinks)))


def merge_attention(out_a, lse_a, out_b, lse_b):
    """The attention over two disjoint sets of keys, from that over each; a set without a visible key has lse -inf."""
    wide = _wide(out_a)
    weights, lse = _softmax(torch.stack((lse_a, lse_b), -1))
    weights = weights.transpose(-3, -2).to(wide)
    parts = [
        (weight * out.to(wide)).masked_fill(weight == 0.0, 0.0)
        for weight, out in zip(weights.split(1, -1), (out_a, out_b))
    ]
    return (parts[0] + parts[1]).to(out_a.dtype), lse
