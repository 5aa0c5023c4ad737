"""Layer norm, alone and fused with the residual addition before it."""

import torch

from fusedops._core import checks, env
from fusedops._core.register import register

MAX_N = 65536  # the kernel shifts a long row by its first block's mean, which must be a fair share of the row


def layer_norm(x, weight, bias=None, eps=1e-5, *, out=None):
    """Subtract each row's mean, divide by its standard deviation, scale and shift.

    ``out = (x - mean(x)) / sqrt(mean((x - mean(x))**2) + eps) * weight + bias``

    Args:
        x: ``[..., N]``, float16, bfloat16 or float32; rows may be strided, the last dimension is contiguous.
        weight: ``[N]``, x's dtype or float32; None scales by 1.
        bias: ``[N]``, x's dtype or float32; None adds nothing.
        eps: Added to the variance.
        out: Where to write the result: x's shape and dtype; x itself or memory of its own. Not differentiable.

    Returns:
        Tensor of x's shape and dtype, contiguous unless `out` is given. Empty input gives empty output.

    Raises:
        ValueError: a shape, stride, device or option does not fit.
        TypeError: a dtype is not one of the above.
        NotImplementedError: N > MAX_N.

    Numerics: float32 inside, rounded once. The fused kernel takes the variance from centred values and corrects the
        mean by what its rounding left, so a mean far larger than the deviation costs no accuracy; `F.layer_norm`, which
        runs elsewhere, loses about |mean| / deviation epsilons of float32. Rows whose squares overflow float32
        (elements beyond 1e19 in size) give zeros or NaN, rows with an infinity NaN. Gradients of weight and bias are
        accumulated in float32 in a fixed order.
    Runs on: CUDA 8.0 and newer (Triton); elsewhere torch.
    From: Ba, Kiros and Hinton, "Layer Normalization", 2016, https://arxiv.org/abs/1607.06450
    """
    args = x, weight, bias, eps
    done = _layer_norm.again(*args) if out is None else None
    if done is not None:
        return done
    _check("layer_norm", weight, bias, eps, x=x)
    if out is not None:
        checks.check_out("layer_norm", out, x, x=x, weight=weight, bias=bias)
    return _layer_norm(*args, out=out)


def add_layer_norm(x, residual, weight, bias=None, eps=1e-5):
    """Add a residual, then subtract each row's mean, divide by its standard deviation, scale and shift.

    ``h = round(x + residual)``;  ``out = (h - mean(h)) / sqrt(mean((h - mean(h))**2) + eps) * weight + bias``

    Args:
        x: ``[..., N]``, float16, bfloat16 or float32; rows may be strided, the last dimension is contiguous.
        residual: x's shape and dtype. Not modified.
        weight, bias, eps: As in `layer_norm`.

    Returns:
        ``(out, h)``, both x's shape and dtype, contiguous. Empty input gives empty output.

    Raises:
        ValueError: a shape, stride, device or option does not fit.
        TypeError: a dtype is not one of the above.
        NotImplementedError: N > MAX_N.

    Numerics: h is torch's own ``x + residual``, rounded to x's dtype before it is normalised; the rest as `layer_norm`.
    Runs on: CUDA 8.0 and newer (Triton); elsewhere torch.
    From: Ba, Kiros and Hinton, "Layer Normalization", 2016, https://arxiv.org/abs/1607.06450
    """
    args = x, residual, weight, bias, eps
    done = _add_layer_norm.again(*args)
    if done is not None:
        return done
    _check("add_layer_norm", weight, bias, eps, x=x, residual=residual)
    return _add_layer_norm(*args)


def _check(op, weight, bias, eps, **rows):
    shapes = {name: (tensor, "... N") for name, tensor in rows.items()}
    sizes = checks.bind_shapes(op, **shapes, weight=(weight, "N?"), bias=(bias, "N?"))
    checks.check_float(op, **rows)
    checks.check_parameter(op, rows["x"], weight=weight, bias=bias)
    checks.check_rows(op, **rows, weight=weight, bias=bias)
    if sizes["N"] > MAX_N:
        raise NotImplementedError(f"{op}: N must be at most MAX_N = {MAX_N}, got {sizes['N']}")
    if env.validate():
        checks.check_eps(op, eps)


def _cost(x, weight, bias, eps):
    return _bytes(x, x, weight, bias), 8 * x.numel()


def _cost_residual(x, residual, weight, bias, eps):
    return _bytes(x, residual, x, x, weight, bias), 9 * x.numel()


def _bytes(*tensors):
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)


def _example(shape, dtype, device):
    x = torch.randn(shape, device=device).to(dtype)
    weight = torch.ones(shape[-1], dtype=dtype, device=device)
    return (x, weight, torch.zeros_like(weight)), {}


def _example_residual(shape, dtype, device):
    (x, weight, bias), options = _example(shape, dtype, device)
    return (x, torch.randn(shape, device=device).to(dtype), weight, bias), options


def _setup(ctx, inputs, output):
    x, weight, bias, ctx.eps = inputs
    ctx.save_for_backward(x, weight, bias)


def _backward(ctx, grad):
    return *_gradients(ctx, grad, None), None


def _setup_residual(ctx, inputs, output):
    _, _, weight, bias, ctx.eps = inputs
    ctx.save_for_backward(output[1], weight, bias)


def _backward_residual(ctx, grad, grad_h):
    dx, dweight, dbias = _gradients(ctx, grad, grad_h)
    return dx, dx, dweight, dbias, None


def _gradients(ctx, grad, grad_h):
    x, weight, bias = ctx.saved_tensors
    dx, dweight, dbias = _layer_norm_backward(grad, x, weight, bias, ctx.eps, grad_h)
    return dx, None if weight is None else dweight, None if bias is None else dbias


def _fake_backward(grad, x, weight, bias, *rest):
    parameters = (x.new_empty(0) if p is None else p.new_empty(p.shape) for p in (weight, bias))
    return x.new_empty(x.shape), *parameters


IMPLEMENTATIONS = ("triton", "torch", "reference")
_OPTIONS = "Tensor? weight, Tensor? bias, float eps"

_layer_norm = register(
    f"layer_norm(Tensor x, {_OPTIONS}) -> Tensor",
    package=__name__,
    implementations=IMPLEMENTATIONS,
    rows=("x",),
    fake=lambda x, *rest: x.new_empty(x.shape),
    setup_context=_setup,
    backward=_backward,
    out=True,
    cost=_cost,
    example=_example,
)
_add_layer_norm = register(
    f"add_layer_norm(Tensor x, Tensor residual, {_OPTIONS}) -> (Tensor, Tensor)",
    package=__name__,
    implementations=IMPLEMENTATIONS,
    rows=("x", "residual"),
    fake=lambda x, *rest: (x.new_empty(x.shape), x.new_empty(x.shape)),
    setup_context=_setup_residual,
    backward=_backward_residual,
    cost=_cost_residual,
    example=_example_residual,
)
_layer_norm_backward = register(
    f"layer_norm_backward(Tensor grad, Tensor x, {_OPTIONS}, Tensor? grad_h) -> (Tensor, Tensor, Tensor)",
    package=__name__,
    implementations=IMPLEMENTATIONS,
    fake=_fake_backward,
)
