"""RMS norm by torch's own operators: the CPU's way, and other devices'.

`F.rms_norm` works in float32 inside and rounds once, in the order of operations of Hugging Face's norms: equal bits.
"""

import torch
import torch.nn.functional as F


def rms_norm(x, weight, eps, weight_offset, rounding, out=None):
    """One fused call where weight and roundings allow it, two otherwise."""
    size = x.shape[-1:]
    if weight is None or (rounding == "llama" and x.dtype != torch.float32):
        y = F.rms_norm(x, size, None, eps)
        if weight is not None:
            y = (y * weight if not weight_offset else y * (weight.float() + weight_offset)).to(x.dtype)
    elif not weight_offset and weight.dtype == x.dtype:
        y = F.rms_norm(x, size, weight, eps)
    else:
        y = F.rms_norm(x.float(), size, weight.float() + weight_offset, eps).to(x.dtype)
    return y.contiguous() if out is None else out.copy_(y)


def add_rms_norm(x, residual, weight, eps, weight_offset, rounding):
    """The sum is made once, contiguous, and normalised."""
    h = (x + residual).contiguous()
    return rms_norm(h, weight, eps, weight_offset, rounding), h


def add_rms_norm_(x, residual, weight, eps, weight_offset, rounding):
    """In place, without a copy of the sum."""
    residual += x
    x.copy_(rms_norm(residual, weight, eps, weight_offset, rounding))


def rms_norm_backward(grad, x, weight, eps, weight_offset, grad_h):
    """``dx = rstd * (g - xhat * mean(g * xhat)) + grad_h`` with ``g = grad * (weight + weight_offset)``."""
    wide = x.float()
    grad = grad.float()
    rstd = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True).add_(eps))
    xhat = wide * rstd
    weighted = grad if weight is None else grad * (weight.float() + weight_offset)
    dx = (weighted - xhat * (weighted * xhat).mean(-1, keepdim=True)).mul_(rstd)
    if grad_h is not None:
        dx += grad_h
    if weight is None:
        return dx.to(x.dtype).contiguous(), x.new_empty(0)
    dweight = (grad * xhat).sum_to_size(weight.shape).to(weight.dtype)
    return dx.to(x.dtype).contiguous(), dweight
