"""The meaning of the layer norms. In float64 this is the truth that every implementation is measured against."""

import torch


def layer_norm(x, weight, bias, eps):
    """``out = (x - mean(x)) / sqrt(mean((x - mean(x))**2) + eps) * weight + bias``."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    centred = wide - wide.mean(-1, keepdim=True)
    out = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        out = out * weight.to(wide.dtype)
    if bias is not None:
        out = out + bias.to(wide.dtype)
    return out.to(x.dtype)


def add_layer_norm(x, residual, weight, bias, eps, round_to=None):
    """``h = round(x + residual)``;  ``out = layer_norm(h)``. The sum is the addition of the stored dtype.

    round_to is the dtype of the sum, for a truth that is computed in a wider dtype.
    """
    stored = round_to or x.dtype
    h = (x.to(stored) + residual.to(stored)).to(x.dtype)
    return layer_norm(h, weight, bias, eps), h


def layer_norm_backward(grad, x, weight, bias, eps, grad_h=None):
    """Gradients of x, weight and bias by differentiating `layer_norm`; grad_h is what reaches x past the norm."""
    with torch.enable_grad():
        wide = torch.promote_types(x.dtype, torch.float32)
        leaves = [None if t is None else t.detach().to(wide).requires_grad_() for t in (x, weight, bias)]
        wanted = [leaf for leaf in leaves if leaf is not None]
        grads = iter(torch.autograd.grad(layer_norm(*leaves, eps), wanted, grad.to(wide)))
    dx = next(grads)
    dx = dx if grad_h is None else dx + grad_h.to(wide)
    dweight = x.new_empty(0) if weight is None else next(grads).to(weight.dtype)
    dbias = x.new_empty(0) if bias is None else next(grads).to(bias.dtype)
    return dx.to(x.dtype), dweight, dbias
