"""The meaning of rotary position embedding. In float64 this is the truth for every implementation."""

import torch


def _pair(x, interleaved):
    """The partner of each element with its sign: (-x2, x1) for the halves, or for neighbours."""
    if interleaved:
        return torch.stack((-x[..., 1::2], x[..., 0::2]), -1).flatten(-2)
    first, second = x.chunk(2, -1)
    return torch.cat((-second, first), -1)


def _rotate(x, cos, sin, interleaved):
    size = cos.shape[-1]
    wide = torch.promote_types(x.dtype, torch.float32)
    turned, rest = x[..., :size].to(wide), x[..., size:]
    cos, sin = cos.to(wide).unsqueeze(-2), sin.to(wide).unsqueeze(-2)
    return torch.cat(((turned * cos + _pair(turned, interleaved) * sin).to(x.dtype), rest), -1)


def rotary(q, k, cos, sin, interleaved=False):
    """``out = x * cos + pair(x) * sin`` on the first R elements of each head; the others pass."""
    return _rotate(q, cos, sin, interleaved), _rotate(k, cos, sin, interleaved)


def rotary_backward(grad_q, grad_k, cos, sin, interleaved=False):
    """The transposed rotation: each product with sin goes back to the partner."""
    if interleaved:
        back = torch.stack((sin[..., 1::2], sin[..., 0::2]), -1).flatten(-2)
    else:
        back = torch.cat(sin.chunk(2, -1)[::-1], -1)
    return _rotate(grad_q, cos, -back, interleaved), _rotate(grad_k, cos, -back, interleaved)
