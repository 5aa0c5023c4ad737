"""What linear layers with quantised weights share, those in training and those that are converted."""

import torch

from fusedops._core import checks, env
from fusedops.ops.compress_24 import decompress_24
from fusedops.ops.weight_only_matmul.reference import dequantized

STORED = ("weight", "weight_scale", "weight_zero", "metadata")  # what a layer may have in place of a weight

_is_compiling = torch.compiler.is_dynamo_compiling


def direct(operator, x):
    """torch's composition of an operator, where a call with x would run it without a look at values; else None.

    The arguments fit each other: they come from one layer, whose input `entering` has looked at.
    """
    return None if _is_compiling() or env.validate() == 2 else operator.direct(x)


def beside(dtype, tensor):
    """A parameter as operators take it beside data of a dtype: of that dtype, or float32."""
    return tensor if tensor is None or tensor.dtype is dtype else tensor.float()


def as_input_scale(name, value, device):
    """A scale for all inputs of a layer as its parameter: one float32 number.

    Raises:
        ValueError: it is not one number, not finite, or not above 0.
    """
    if value is None:
        raise ValueError(f"{name}: input_scale must be a number with static_input, got None")
    scale = torch.as_tensor(value, dtype=torch.float32, device=device).detach()
    if scale.numel() != 1:
        raise ValueError(f"{name}: input_scale must be one number, got shape {list(scale.shape)}")
    if not scale.is_meta:
        checks.check_scale_values(name, "input_scale", scale.reshape(1))
    return scale.reshape(()).clone()


def misfits(name, parameters, kept, state_dict, prefix):
    """What keeps tensors of a state dict from being a layer's parameters; those in `kept` need their very dtype."""
    found = []
    for key, parameter in parameters.items():
        tensor = state_dict.get(prefix + key)
        if parameter is None or not isinstance(tensor, torch.Tensor):
            continue
        wanted = (parameter.dtype,) if key in kept else checks.FLOATS
        if tensor.shape != parameter.shape or tensor.dtype not in wanted:
            described = " or ".join(str(dtype).removeprefix("torch.") for dtype in wanted)
            found.append(
                f"{name}: {prefix}{key} must be {described} of shape {list(parameter.shape)}, "
                f"got {str(tensor.dtype).removeprefix('torch.')} of shape {list(tensor.shape)}"
            )
    return found


def entering(layer, x):
    """x as the operators take it; an error in the layer's name where it is none.

    Raises:
        TypeError: x is not a tensor.
        ValueError: its last dimension is not the layer's, or it is on another device.
    """
    device = layer._parameters["weight"].device
    if type(x) is not torch.Tensor or x.shape[-1:] != (layer.in_features,) or x.device != device:
        name, K = type(layer).__name__, layer.in_features
        checks.bind_shapes(name, x=(x, "..."))
        if x.shape[-1:] != (K,):
            raise ValueError(f"{name}: x must have shape [..., K] with K={K}, got {list(x.shape)}")
        if x.device != device:
            raise ValueError(f"{name}: x must be on {device}, got {x.device}")
    return x if x.stride(-1) == 1 else x.contiguous()


def autocast_dtype(x):
    """The dtype that autocast wants of x, None where it is off."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if kind != "meta" and torch.is_autocast_enabled(kind) else None


def wants_gradient(x, bias):
    """Whether a graph is recorded for an input and a bias."""
    return torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))


def keeping_dtypes(fn, tensors):
    """The function that `Module._apply` is given, but for these tensors, by identity, no more than a move."""
    kept = {id(tensor) for tensor in tensors if tensor is not None}

    def applied(tensor):
        result = fn(tensor)
        if id(tensor) in kept and result.dtype != tensor.dtype:
            return tensor.to(result.device)
        return result

    return applied


def dequantized_weight(parameters, in_features, dtype):
    """The weight ``[N, K]`` that parameters of a quantised layer stand for, computed in float32 and rounded once."""
    codes, scale = parameters["weight"].detach()[0], parameters.get("weight_scale")
    metadata = parameters.get("metadata")
    if metadata is not None:
        codes = decompress_24(codes, metadata.detach(), in_features=in_features)
    if scale is None:
        return codes.to(dtype)
    return dequantized(codes, scale.detach(), parameters.get("weight_zero"), in_features, torch.float32).to(dtype)


def differentiable(target, x, weight, parameters):
    """``target.compute(x, parameters)`` with straight-through gradients.

    Args:
        target: A class of quantised layers.
        x: ``[..., K]``.
        weight: The float weight that wants a gradient, or None.
        parameters: Tensors by the names of the target's parameters.
    """
    with torch.no_grad():
        out, values, scale = target.compute(x, parameters)
    if weight is None:
        values = scale = None  # which its gradient alone needs
    stored = [parameters.get(name) for name in STORED]
    return _StraightThrough.apply(out, x, weight, parameters["bias"], values, scale, *stored)


class _StraightThrough(torch.autograd.Function):
    """Gives a result that was computed without a graph the gradients of ``x @ weight.T + bias``.

    ``grad_x = grad @ dequantised weight``; ``grad_weight = grad.T @ dequantised x``; ``grad_bias = sum of grad's rows``
    """

    @staticmethod
    def forward(out, x, weight, bias, values, scale, *stored):
        return out.view_as(out)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, x, weight, bias, values, scale, *stored = inputs
        ctx.shape, ctx.dtypes = x.shape, [None if t is None else t.dtype for t in (x, weight, bias)]
        multiplied = None if weight is None else x if values is None else values
        ctx.save_for_backward(multiplied, scale, *stored)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        values, scale, *stored = ctx.saved_tensors
        K, (x_dtype, weight_dtype, bias_dtype) = ctx.shape[-1], ctx.dtypes
        rows = grad.reshape(-1, grad.shape[-1])
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[1]:
            weight = dequantized_weight(dict(zip(STORED, stored, strict=True)), K, grad.dtype)
            grad_x = (rows @ weight).view(ctx.shape).to(x_dtype)
        if ctx.needs_input_grad[2]:
            multiplied = values.reshape(-1, K)
            if scale is not None:
                multiplied = dequantized(multiplied, scale, None, K, torch.float32)
            grad_weight = (rows.T @ multiplied.to(grad.dtype)).to(weight_dtype)
        if ctx.needs_input_grad[3]:
            grad_bias = rows.sum(0, dtype=torch.float32).to(bias_dtype)
        return None, grad_x, grad_weight, grad_bias, None, None, *[None] * len(STORED)
