"""Layer norm by torch's own operators: the CPU's way, and other devices'."""

import torch
import torch.nn.functional as F


def layer_norm(x, weight, bias, eps, out=None):
    """`F.layer_norm` works in float32 inside and rounds once; parameters wider than x go through float32."""
    if all(parameter is None or parameter.dtype == x.dtype for parameter in (weight, bias)):
        y = F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    else:
        wide = [None if parameter is None else parameter.float() for parameter in (weight, bias)]
        y = F.layer_norm(x.float(), x.shape[-1:], *wide, eps).to(x.dtype)
    return y.contiguous() if out is None else out.copy_(y)


def add_layer_norm(x, residual, weight, bias, eps):
    """The sum is made once, contiguous, and normalised."""
    h = (x + residual).contiguous()
    return layer_norm(h, weight, bias, eps), h


def layer_norm_backward(grad, x, weight, bias, eps, grad_h):
    """``dx = rstd * (g - mean(g) - xhat * mean(g * xhat)) + grad_h`` with ``g = grad * weight``."""
    grad = grad.float()
    centred = x.float()
    centred = centred - centred.mean(-1, keepdim=True)
    rstd = torch.rsqrt(centred.square().mean(-1, keepdim=True).add_(eps))
    xhat = centred.mul_(rstd)
    weighted = grad if weight is None else grad * weight.float()
    along = (weighted * xhat).mean(-1, keepdim=True)
    dx = (weighted - weighted.mean(-1, keepdim=True)).sub_(xhat * along).mul_(rstd)
    if grad_h is not None:
        dx += grad_h
    dweight = x.new_empty(0) if weight is None else (grad * xhat).sum_to_size(weight.shape).to(weight.dtype)
    dbias = x.new_empty(0) if bias is None else grad.sum_to_size(bias.shape).to(bias.dtype)
    return dx.to(x.dtype).contiguous(), dweight, dbias
