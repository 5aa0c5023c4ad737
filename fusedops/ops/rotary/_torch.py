"""Rotary position embedding by torch's own operators: the CPU's way, and other devices'.

Few calls for few elements, where each call's own cost counts; for many, one product and two sums in place.
"""

import torch

SMALL = 65536  # elements; about where the two ways take the same time on an x86 core


def rotary(q, k, cos, sin, interleaved):
    """Both tensors by the same cos and sin."""
    whole = cos.shape[-1] == q.shape[-1] and q.dtype == cos.dtype == torch.float32
    if whole and q.numel() <= SMALL and not interleaved:
        first, second = sin.unsqueeze(2).chunk(2, -1)
        cos, signed = cos.unsqueeze(2), torch.cat((-first, second), -1)
        half = q.shape[-1] // 2
        return torch.addcmul(q * cos, q.roll(half, -1), signed), torch.addcmul(k * cos, k.roll(half, -1), signed)
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
