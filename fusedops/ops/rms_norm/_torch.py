"""RMS norm by torch's own operators: the CPU's way, and other devices'.

`torch.rms_norm` works in float32 inside and rounds once, in the order of operations of Hugging Face's norms.
"""

import math

import torch

from fusedops._core import codes


def rms_norm(x, weight, eps, weight_offset, rounding, out=None):
    """The norm, contiguous or in `out`."""
    y = _normalise(x, weight, eps, weight_offset, rounding)
    return y.contiguous() if out is None else out.copy_(y)


def _normalise(x, weight, eps, weight_offset, rounding):
    """One call where weight and roundings allow it, two otherwise; the layout is x's."""
    if x.is_cpu and x.numel() == x.shape[-1] > 0 and x.dtype is not torch.float32:
        return _normalise_row(x, weight, eps, weight_offset, rounding)
    if weight is None or (rounding == "llama" and x.dtype is not torch.float32):
        y = torch.rms_norm(x, x.shape[-1:], None, eps)
        if weight is not None:
            y = (y * weight if not weight_offset else y * (weight.float() + weight_offset)).to(x.dtype)
    elif not weight_offset and weight.dtype is x.dtype:
        y = torch.rms_norm(x, weight.shape, weight, eps)
    else:
        y = torch.rms_norm(x.float(), weight.shape, weight.float() + weight_offset, eps).to(x.dtype)
    return y


def _normalise_row(x, weight, eps, weight_offset, rounding):
    """One row of 16 bits, as in decoding: the calls are what it costs, and a number needs none."""
    y = x.float()
    row = y.view(-1)
    mean = torch.dot(row, row).item() / len(row) + eps
    y.mul_(mean**-0.5 if mean else math.inf)
    if rounding == "llama":
        y = y.to(x.dtype)
    if weight is not None:
        y.mul_(weight.float() + weight_offset if weight_offset else weight)
    return y.to(x.dtype)


def add_rms_norm(x, residual, weight, eps, weight_offset, rounding):
    """The sum is made once, contiguous, and normalised."""
    h = (x + residual).contiguous()
    return _normalise(h, weight, eps, weight_offset, rounding), h


def add_rms_norm_(x, residual, weight, eps, weight_offset, rounding):
    """In place, without a copy of the sum."""
    residual += x
    x.copy_(_normalise(residual, weight, eps, weight_offset, rounding))


def rms_norm_quantized(x, weight, eps, weight_offset, rounding, dtype):
    """The norm, then its codes."""
    return codes.quantized_rows(_normalise(x, weight, eps, weight_offset, rounding), dtype)


def add_rms_norm_quantized(x, residual, weight, eps, weight_offset, rounding, dtype):
    """The sum, its norm, then the codes."""
    out, h = add_rms_norm(x, residual, weight, eps, weight_offset, rounding)
    return *codes.quantized_rows(out, dtype), h


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
