"""Rotary position embedding by torch's own operators: the CPU's way, and other devices'.

Few calls for few elements, where each call's own cost counts; for many, one product and two sums in place.
"""

import torch

SMALL = 65536  # elements; about where the two ways take the same time on an x86 core


def rotary(q, k, cos, sin, interleaved, head_dim=2):
    """Both tensors by the same cos and sin; with ``head_dim=1`` they are [B, H, S, D], as models have them."""
    cos, sin = cos.unsqueeze(head_dim), sin.unsqueeze(head_dim)
    whole = cos.shape[-1] == q.shape[-1] and q.dtype is cos.dtype is torch.float32
    first, second = _parts(sin, interleaved)
    if not whole or interleaved or q.numel() > SMALL:
        return _rotate(q, cos, first, second, interleaved, -1), _rotate(k, cos, first, second, interleaved, -1)
    signed = torch.cat((-first, second), -1)
    half = q.shape[-1] // 2
    return torch.addcmul(q * cos, q.roll(half, -1), signed), torch.addcmul(k * cos, k.roll(half, -1), signed)


def rotary_backward(grad_q, grad_k, cos, sin, interleaved):
    """The transposed rotation: the parts of sin trade places and signs."""
    cos = cos.unsqueeze(2)
    second, first = _parts(sin.unsqueeze(2), interleaved)
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
    torch.mul(turned, cos, out=target)
    first, second = _parts(turned, interleaved)
    target_first, target_second = _parts(target, interleaved)
    target_first.addcmul_(second, sin_first, value=sign)
    target_second.addcmul_(first, sin_second, value=-sign)
    if narrow is not target:
        narrow.copy_(target)
    return out
