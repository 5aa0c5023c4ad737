"""Rotary position embedding by torch's own operators: the CPU's way, and other devices'.

Few calls for few elements, where each call's own cost counts; for many, one product and two sums in place.
"""

import torch

SMALL = 65536  # elements; about where the two ways take the same time on an x86 core


def rotary(q, k, cos, sin, interleaved, head_dim=2):
    """Both tensors by the same cos and sin; with ``head_dim=1`` they are [B, H, S, D], as models have them."""
    cos, sin = cos.unsqueeze(head_dim), sin.unsqueeze(head_dim)
    first, second = _parts(sin, interleaved)
    if q.dtype is not torch.float32 and q.numel() <= SMALL:
        return _rotate_together(q, k, cos, first, second, interleaved, head_dim)
    whole = cos.shape[-1] == q.shape[-1] and q.dtype is cos.dtype is torch.float32
    if not whole or interleaved or q.numel() > SMALL:
        return _rotate(q, cos, first, second, interleaved, -1), _rotate(k, cos, first, second, interleaved, -1)
    signed = torch.cat((-first, second), -1)
    half = q.shape[-1] // 2
    return torch.addcmul(q * cos, q.roll(half, -1), signed), torch.addcmul(k * cos, k.roll(half, -1), signed)


def _rotate_together(q, k, cos, first, second, interleaved, head_dim):
    """Both as the heads of one float32 tensor: half as many calls."""
    count, size = q.shape[head_dim], cos.shape[-1]
    joined = torch.cat((q, k), head_dim).float()
    turned = joined if size == joined.shape[-1] else joined[..., :size]
    rotated = turned * cos
    for target, other, sine, sign in zip(
        _parts(rotated, interleaved), reversed(_parts(turned, interleaved)), (first, second), (-1, 1)
    ):
        target.addcmul_(other, sine, value=sign)
    if turned is not joined:
        rotated = torch.cat((rotated, joined[..., size:]), -1)
    parts = rotated.split_with_sizes([count, k.shape[head_dim]], head_dim)
    return tuple(torch.empty_like(t).copy_(part) for t, part in zip((q, k), parts))


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
