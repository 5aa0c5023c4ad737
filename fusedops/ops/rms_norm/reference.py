"""The meaning of the RMS norms. In float64 this is the truth for every implementation."""

import torch


def rms_norm(x, weight, eps, weight_offset=0.0, rounding="once", round_to=None):
    """``out = x / sqrt(mean(x**2) + eps) * (weight + weight_offset)``.

    round_to is the dtype of the contract's roundings, for a truth that is computed in a wider dtype.
    """
    stored = round_to or x.dtype
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    out = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if rounding == "llama":
        out = out.to(stored).to(wide.dtype)
    if weight is not None:
        out = out * (weight.to(wide.dtype) + weight_offset)
    return out.to(x.dtype)


def add_rms_norm(x, residual, weight, eps, weight_offset=0.0, rounding="once", round_to=None):
    """``h = round(x + residual)``;  ``out = rms_norm(h)``. The sum is the addition of the stored dtype."""
    stored = round_to or x.dtype
    h = (x.to(stored) + residual.to(stored)).to(x.dtype)
    return rms_norm(h, weight, eps, weight_offset, rounding, round_to), h


def add_rms_norm_(x, residual, weight, eps, weight_offset=0.0, rounding="once"):
    """In place: x becomes out, residual becomes h."""
    out, h = add_rms_norm(x, residual, weight, eps, weight_offset, rounding)
    x.copy_(out)
    residual.copy_(h)


def rms_norm_quantized(x, weight, eps, weight_offset=0.0, rounding="once", dtype=torch.int8):
    """Codes of ``rms_norm(x)`` and the scale of each row."""
    return _quantized(rms_norm(x, weight, eps, weight_offset, rounding), dtype)


def add_rms_norm_quantized(x, residual, weight, eps, weight_offset=0.0, rounding="once", dtype=torch.int8):
    """Codes of ``add_rms_norm(x, residual)``, the scale of each row, and the sum."""
    out, h = add_rms_norm(x, residual, weight, eps, weight_offset, rounding)
    return *_quantized(out, dtype), h


def _quantized(out, dtype):
    """The scale brings a row's largest value to the largest code; in int8 NaN is 0."""
    out = out.float()
    largest = 127.0 if dtype == torch.int8 else torch.finfo(dtype).max
    scale = (torch.nn.functional.pad(out.abs(), (0, 1)).amax(-1) / largest).clamp(min=2.0**-126)
    codes = out * (1.0 / scale).unsqueeze(-1)
    if dtype == torch.int8:
        codes = torch.where(codes.isnan(), 0.0, codes).round()
    return codes.to(dtype), scale


def rms_norm_backward(grad, x, weight, eps, weight_offset=0.0, grad_h=None):
    """Gradients of x and weight by differentiating `rms_norm`; grad_h is what reaches x past the norm."""
    with torch.enable_grad():
        wide = torch.promote_types(x.dtype, torch.float32)
        leaf = x.detach().to(wide).requires_grad_()
        scale = None if weight is None else weight.detach().to(wide).requires_grad_()
        out = rms_norm(leaf, scale, eps, weight_offset)
        grads = torch.autograd.grad(out, [leaf] if scale is None else [leaf, scale], grad.to(wide))
    dx = grads[0] if grad_h is None else grads[0] + grad_h.to(wide)
    dweight = x.new_empty(0) if weight is None else grads[1].to(weight.dtype)
    return dx.to(x.dtype), dweight
