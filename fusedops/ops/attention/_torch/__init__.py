"""Attention by torch's own operators: the CPU's way, and other devices'. Memory is linear in Sk."""

import torch

from fusedops._core import invariance
from fusedops.ops.attention._torch import blocks, flash
from fusedops.ops.attention._torch.parts import NO_SCORE, Options, outputs


def attention(q, k, v, *options):
    """torch's fused kernel where it covers the options, else matmuls."""
    if invariance.enabled() and q.numel() and not q.is_meta:
        parts = [_alone(q, k, v, Options(*options), b) for b in range(len(q))]
        return tuple(torch.cat(part) for part in zip(*parts))
    return _together(q, k, v, *options)


def _alone(q, k, v, options, b):
    """Sequence b from fresh memory: torch's kernels share work out by the number of sequences."""
    own = (t[b : b + 1].clone(memory_format=torch.contiguous_format) for t in (q, k, v))
    options = options.of_sequence(b)
    if options.mask is not None and len(options.mask) > 1:
        options = options._replace(mask=options.mask[b : b + 1])
    return _together(*own, *options)


def _together(q, k, v, *options):
    found = flash.plain_attention(q, k, v, *options)
    if found is not None:
        return found
    options = Options(*options).simplified(q.shape[1], k.shape[1])
    if q.is_meta:
        return outputs(q, v, options)
    way = flash if flash.covers(q, k, v, options) else blocks
    return way.attention(q, k, v, options)


def attention_backward(grad_out, grad_lse, q, k, v, out, lse, *options):
    """By the same way as forward, unless lse has a gradient, which torch's kernel does not take."""
    options = Options(*options).simplified(q.shape[1], k.shape[1])
    grads = None
    if grad_lse is None and flash.covers(q, k, v, options):
        grads = flash.attention_backward(grad_out, q, k, v, out, lse, options)
    if grads is None:
        grads = blocks.attention_backward(grad_out, grad_lse, q, k, v, out, lse, options)
    if options.sinks is None:
        return *grads, q.new_empty(0)
    # a sink's weight meets no value, so its score's gradient is -weight * delta
    delta = blocks.row_products(grad_out, out, grad_lse)
    dsinks = (torch.exp(options.sinks.float()[:, None] - lse) * -delta).sum((0, 2))
    return *grads, dsinks.to(options.sinks.dtype)


def attention_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, *options):
    """One sequence after another."""
    options = Options(*options)
    out, lse = (t[0] for t in outputs(q[None], v[None], options))
    if q.is_meta:
        return out, lse
    for b, rows, keys in _sequences(cu_seqlens_q, cu_seqlens_k):
        part = attention(q[rows][None], k[keys][None], v[keys][None], *options.of_sequence(b))
        out[rows], lse[:, rows] = part[0][0], part[1][0]
    return out, lse


def attention_varlen_backward(
    grad_out, grad_lse, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, *options
):
    """One sequence after another; the sinks' gradients are added up in their order."""
    options = Options(*options)
    dq, dk, dv = (torch.zeros(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
    wide = options if options.sinks is None else options._replace(sinks=options.sinks.float())
    dsinks = q.new_empty(0) if wide.sinks is None else torch.zeros_like(wide.sinks)
    for b, rows, keys in _sequences(cu_seqlens_q, cu_seqlens_k):
        dq[rows], dk[keys], dv[keys], part = (
            grad[0] if grad.dim() > 1 else grad
            for grad in attention_backward(
                grad_out[rows][None], None if grad_lse is None else grad_lse[None, :, rows], q[rows][None],
                k[keys][None], v[keys][None], out[rows][None], lse[None, :, rows], *wide.of_sequence(b),
            )
        )  # fmt: skip
        dsinks += part
    return dq, dk, dv, dsinks if options.sinks is None else dsinks.to(options.sinks.dtype)


def _sequences(cu_seqlens_q, cu_seqlens_k):
    """(index, queries, keys) of each sequence that has queries."""
    starts_q, starts_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for b in range(len(starts_q) - 1):
        if starts_q[b] < starts_q[b + 1]:
            yield b, slice(starts_q[b], starts_q[b + 1]), slice(starts_k[b], starts_k[b + 1])


def merge_attention(out_a, lse_a, out_b, lse_b):
    """Each side's weight relative to the sum."""
    if not invariance.enabled() or not out_a.numel() or out_a.is_meta:
        return _merged(out_a, lse_a, out_b, lse_b)
    length, heads, dv = out_a.shape[-3:]
    sides = [t.reshape(-1, 1, heads, dv) for t in (out_a, out_b)]
    tables = [t.mT.reshape(-1, heads, 1) for t in (lse_a, lse_b)]
    rows = [
        _merged(*(t[row].clone() for t in (sides[0], tables[0], sides[1], tables[1]))) for row in range(len(sides[0]))
    ]
    out, lse = (torch.cat(part) for part in zip(*rows))
    lse = lse.view(*lse_a.shape[:-2], length, heads).mT
    return out.view(out_a.shape), lse.contiguous()


def _merged(out_a, lse_a, out_b, lse_b):
    lse = torch.logaddexp(lse_a, lse_b)
    shift = lse.masked_fill(lse == NO_SCORE, 0.0)
    merged = None
    for out, part in ((out_a, lse_a), (out_b, lse_b)):
        weight = torch.exp(part - shift).mT[..., None]
        share = (out * weight).masked_fill_(weight == 0.0, 0.0)
        merged = share if merged is None else merged.add_(share)
    return merged.to(out_a.dtype).contiguous(), lse.contiguous()
