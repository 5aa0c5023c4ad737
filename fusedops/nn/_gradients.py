"""Gradients of linear layers whose weight is quantised: what the operators compute is taken as linear in x."""

import torch

from fusedops.ops.weight_only_matmul.reference import dequantized


def dequantized_weight(parameters, in_features, dtype):
    """The weight ``[N, K]`` that parameters of a quantised layer stand for, computed in float32 and rounded once."""
    codes, scale = parameters["weight"].detach()[0], parameters["weight_scale"].detach()
    zero = parameters.get("weight_zero")
    return dequantized(codes, scale, zero, in_features, torch.float32).to(dtype)


class StraightThrough(torch.autograd.Function):
    """Gives a result that was computed without a graph the gradients of ``x @ weight.T + bias``.

    ``grad_x = grad @ dequantised weight``; ``grad_weight = grad.T @ dequantised x``; ``grad_bias = sum of grad's rows``
    """

    @staticmethod
    def forward(out, x, weight, bias, values, scale, codes, weight_scale, weight_zero):
        """`out` itself; `values` with their `scale` are what was multiplied with the quantised weight, `codes`."""
        return out.view_as(out)

    @staticmethod
    def setup_context(ctx, inputs, output):
        out, x, weight, bias, values, scale, codes, weight_scale, weight_zero = inputs
        ctx.shape, ctx.x_dtype = x.shape, x.dtype
        ctx.weight_dtype = None if weight is None else weight.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        if weight is None:
            values = scale = None
        ctx.save_for_backward(values, scale, codes, weight_scale, weight_zero)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        values, scale, codes, weight_scale, weight_zero = ctx.saved_tensors
        K = ctx.shape[-1]
        rows = grad.reshape(-1, grad.shape[-1])
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[1]:
            stored = {"weight": codes, "weight_scale": weight_scale, "weight_zero": weight_zero}
            grad_x = (rows @ dequantized_weight(stored, K, grad.dtype)).view(ctx.shape).to(ctx.x_dtype)
        if ctx.weight_dtype is not None and ctx.needs_input_grad[2]:
            given = values.reshape(-1, K)
            if scale is not None:
                given = dequantized(given, scale, None, K, torch.float32)
            grad_weight = rows.T.to(ctx.weight_dtype) @ given.to(ctx.weight_dtype)
        if ctx.bias_dtype is not None and ctx.needs_input_grad[3]:
            grad_bias = rows.sum(0, dtype=torch.float32).to(ctx.bias_dtype)
        return None, grad_x, grad_weight, grad_bias, None, None, None, None, None
