"""Rotary position embedding by torch's own operators: one product and two sums in place, without joining halves."""

import torch


def rotary(q, k, cos, sin, interleaved):
    """Both tensors by the same cos and sin."""
    first, second = _parts(sin, interleaved)
    return _rotate(q, cos, first, second, interleaved, -1), _rotate(k, cos, first, second, interleaved, -1)


def rotary_backward(grad_q, grad_k, cos, sin, interleaved):
    """The transposed rotation: the parts of sin trade places and signs."""
    second, first = _parts(sin, interleaved)
    return _rotate(grad_q, cos, first, second, interleaved, 1), _rotate(grad_k, cos, first, second, interleaved, 1)


def _parts(x, interleaved):
    """The two elements of every pair."""
    return (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, -1)


def _rotate(x, cos, sin_first, sin_second, interleaved, sign):
    out = torch.empty_like(x)
    size = cos.shape[-1]
    turned, target = x, out
    if size != x.shape[-1]:
        turned, target = x[..., :size], out[..., :size]
        out[..., size:] = x[..., size:]
    if x.dtype != torch.float32:
        turned = turned.float()
    narrow, target = target, target if x.dtype == torch.float32 else torch.empty_like(turned)
    torch.mul(turned, cos.unsqueeze(-2), out=target)
    first, second = _parts(turned, interleaved)
    target_first, target_second = _parts(target, interleaved)
    target_first.addcmul_(second, sin_first.unsqueeze(-2), value=sign)
    target_second.addcmul_(first, sin_second.unsqueeze(-2), value=-sign)
    if narrow is not target:
        narrow.copy_(target)
    return out
