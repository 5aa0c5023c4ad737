"""RMS norm, alone and fused with the residual addition before it."""

import math

import torch

from fusedops._core import checks, codes, env
from fusedops._core.register import register

MAX_N = 65536  # two int32 row offsets and float32 sums stay exact enough; no model comes near
ROUNDINGS = ("once", "llama")


def rms_norm(x, weight, eps=1e-6, *, weight_offset=0.0, rounding="once", out=None):
    """Divide each row by its root mean square and scale it.

    ``out = x / sqrt(mean(x**2) + eps) * (weight + weight_offset)``

    Args:
        x: ``[..., N]``, float16, bfloat16 or float32; rows may be strided, the last dimension is contiguous.
        weight: ``[N]``, x's dtype or float32; None scales by 1 (and ignores `weight_offset`).
        eps: Added to the mean square.
        weight_offset: Added to the weight; 1.0 for Gemma, whose weights are stored around zero.
        rounding: ``"once"`` rounds at the end; ``"llama"`` also rounds to x's dtype before the weight is applied, as
            Llama-family models in Hugging Face do (bitwise equal to them on the CPU).
        out: Where to write the result: x's shape and dtype; x itself or memory of its own. Not differentiable.

    Returns:
        Tensor of x's shape and dtype, contiguous unless `out` is given. Empty input gives empty output.

    Raises:
        ValueError: a shape, stride, device or option does not fit.
        TypeError: a dtype is not one of the above.
        NotImplementedError: N > MAX_N.

    Numerics: sums in float32; rows whose squares overflow float32 (elements beyond 1e19) give zeros, as in torch.
        Gradients are those of the formula without its inner rounding; the weight's is accumulated in float32 in a fixed
        order.
    Runs on: CUDA 8.0 and newer (Triton); elsewhere torch.
    From: Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019, https://arxiv.org/abs/1910.07467
    """
    args = x, weight, eps, weight_offset, rounding
    done = _rms_norm.again(*args) if out is None else None
    if done is not None:
        return done
    _check("rms_norm", weight, eps, rounding, x=x)
    if out is not None:
        checks.check_out("rms_norm", out, x, x=x, weight=weight)
    return _rms_norm(*args, out=out)


def add_rms_norm(x, residual, weight, eps=1e-6, *, weight_offset=0.0, rounding="once"):
    """Add a residual, then divide each row by its root mean square and scale it.

    ``h = round(x + residual)``;  ``out = h / sqrt(mean(h**2) + eps) * (weight + weight_offset)``

    Args:
        x: ``[..., N]``, float16, bfloat16 or float32; rows may be strided, the last dimension is contiguous.
        residual: x's shape and dtype. Not modified.
        weight, eps, weight_offset, rounding: As in `rms_norm`.

    Returns:
        ``(out, h)``, both x's shape and dtype, contiguous. Empty input gives empty output.

    Raises:
        ValueError: a shape, stride, device or option does not fit.
        TypeError: a dtype is not one of the above.
        NotImplementedError: N > MAX_N.

    Numerics: h is torch's own ``x + residual``, rounded to x's dtype before it is normalised; sums in float32.
    Runs on: CUDA 8.0 and newer (Triton); elsewhere torch.
    From: Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019, https://arxiv.org/abs/1910.07467
    """
    args = x, residual, weight, eps, weight_offset, rounding
    done = _add_rms_norm.again(*args)
    if done is not None:
        return done
    _check("add_rms_norm", weight, eps, rounding, x=x, residual=residual)
    return _add_rms_norm(*args)


def add_rms_norm_(x, residual, weight, eps=1e-6, *, weight_offset=0.0, rounding="once"):
    """Add a residual and normalise in place: x becomes out, residual becomes h.

    ``residual = round(x + residual)``;  ``x = residual / sqrt(mean(residual**2) + eps) * (weight + weight_offset)``

    Args:
        x: ``[..., N]``, float16, bfloat16 or float32; rows may be strided. Overwritten.
        residual: x's shape and dtype, in memory apart from x. Overwritten.
        weight, eps, weight_offset, rounding: As in `rms_norm`.

    Raises:
        ValueError: a shape, stride, device or option does not fit, or tensors share memory.
        TypeError: a dtype is not one of the above.
        NotImplementedError: N > MAX_N.
        RuntimeError: gradients are recorded for x, residual or weight.

    Numerics: as `add_rms_norm`, bitwise.
    Runs on: CUDA 8.0 and newer (Triton); elsewhere torch.
    """
    _check("add_rms_norm_", weight, eps, rounding, x=x, residual=residual)
    checks.check_writable("add_rms_norm_", x=x, residual=residual)
    checks.check_apart("add_rms_norm_", x=x, residual=residual, weight=weight)
    checks.check_no_grad("add_rms_norm_", x=x, residual=residual, weight=weight)
    _add_rms_norm_(x, residual, weight, eps, weight_offset, rounding)


def rms_norm_quantized(x, weight, eps=1e-6, *, dtype=torch.int8, weight_offset=0.0, rounding="once"):
    """Divide each row by its root mean square, scale it, and quantise it.

    ``values, scale = quantize(rms_norm(x, weight, eps))``

    Args:
        x: ``[..., N]``, float16, bfloat16 or float32; rows may be strided, the last dimension is contiguous.
        weight, eps, weight_offset, rounding: As in `rms_norm`.
        dtype: int8, float8_e4m3fn or float8_e5m2.

    Returns:
        ``(values, scale)``: x's shape in `dtype`, contiguous, and float32 ``[...]``, one for each row, that multiplies
        its values. Empty input gives empty values.

    Raises:
        ValueError: a shape, stride, device or option does not fit.
        TypeError: a dtype is not one of the above.
        NotImplementedError: N > MAX_N.

    Numerics: as `rms_norm`, whose result is rounded to x's dtype, and then `quantize_int8` or `quantize_fp8` of its
        rows, bitwise.
    Runs on: CUDA 8.0 and newer (Triton); elsewhere torch.
    From: Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019, https://arxiv.org/abs/1910.07467
    """
    args = x, weight, eps, weight_offset, rounding, dtype
    done = _rms_norm_quantized.again(*args)
    if done is not None:
        return done
    _check("rms_norm_quantized", weight, eps, rounding, x=x)
    checks.check_dtype("rms_norm_quantized", dtype, codes.DTYPES)
    return _rms_norm_quantized(*args)


def add_rms_norm_quantized(x, residual, weight, eps=1e-6, *, dtype=torch.int8, weight_offset=0.0, rounding="once"):
    """Add a residual, divide each row by its root mean square, scale it, and quantise it.

    ``out, h = add_rms_norm(x, residual, weight, eps)``;  ``values, scale = quantize(out)``

    Args:
        x: ``[..., N]``, float16, bfloat16 or float32; rows may be strided, the last dimension is contiguous.
        residual: x's shape and dtype. Not modified.
        weight, eps, weight_offset, rounding: As in `rms_norm`.
        dtype: int8, float8_e4m3fn or float8_e5m2.

    Returns:
        ``(values, scale, h)``: the first two as `rms_norm_quantized`, and the sum in x's dtype, contiguous.

    Raises:
        ValueError: a shape, stride, device or option does not fit.
        TypeError: a dtype is not one of the above.
        NotImplementedError: N > MAX_N.

    Numerics: as `add_rms_norm`, whose results are rounded to x's dtype, and then `quantize_int8` or `quantize_fp8` of
        its rows, bitwise.
    Runs on: CUDA 8.0 and newer (Triton); elsewhere torch.
    From: Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019, https://arxiv.org/abs/1910.07467
    """
    args = x, residual, weight, eps, weight_offset, rounding, dtype
    done = _add_rms_norm_quantized.again(*args)
    if done is not None:
        return done
    _check("add_rms_norm_quantized", weight, eps, rounding, x=x, residual=residual)
    checks.check_dtype("add_rms_norm_quantized", dtype, codes.DTYPES)
    return _add_rms_norm_quantized(*args)


def _check(op, weight, eps, rounding, **rows):
    shapes = {name: (tensor, "... N") for name, tensor in rows.items()}
    sizes = checks.bind_shapes(op, **shapes, weight=(weight, "N?"))
    checks.check_float(op, **rows)
    checks.check_parameter(op, rows["x"], weight=weight)
    checks.check_rows(op, **rows, weight=weight)
    if sizes["N"] > MAX_N:
        raise NotImplementedError(f"{op}: N must be at most MAX_N = {MAX_N}, got {sizes['N']}")
    if env.validate():
        checks.check_eps(op, eps)
        checks.check_choice(op, "rounding", rounding, ROUNDINGS)


def _cost(x, *rest):
    tensors = [tensor for tensor in (x, *rest) if isinstance(tensor, torch.Tensor)]
    residual = any(tensor.shape == x.shape for tensor in tensors[1:])
    moved = (4 if residual else 2) * x.numel() * x.element_size()
    moved += sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor.dim() == 1 and tensor is not x)
    return moved, (5 if residual else 4) * x.numel()


def _cost_quantized(x, *rest):
    moved, operations = _cost(x, *rest)
    return moved - x.numel() * (x.element_size() - 1) + 4 * math.prod(x.shape[:-1]), operations + 4 * x.numel()


def _example(shape, dtype, device):
    x = torch.randn(shape, device=device).to(dtype)
    return (x, torch.ones(shape[-1], dtype=dtype, device=device)), {}


def _example_residual(shape, dtype, device):
    (x, weight), options = _example(shape, dtype, device)
    return (x, torch.randn(shape, device=device).to(dtype), weight), options


def _setup(ctx, inputs, output):
    x, weight, ctx.eps, ctx.weight_offset, _ = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx, grad):
    x, weight = ctx.saved_tensors
    dx, dweight = _rms_norm_backward(grad, x, weight, ctx.eps, ctx.weight_offset, None)
    return dx, None if weight is None else dweight, None, None, None


def _setup_residual(ctx, inputs, output):
    _, _, weight, ctx.eps, ctx.weight_offset, _ = inputs
    ctx.save_for_backward(output[1], weight)


def _backward_residual(ctx, grad, grad_h):
    h, weight = ctx.saved_tensors
    dx, dweight = _rms_norm_backward(grad, h, weight, ctx.eps, ctx.weight_offset, grad_h)
    return dx, dx, None if weight is None else dweight, None, None, None


def _fake_backward(grad, x, weight, *rest):
    return x.new_empty(x.shape), x.new_empty(0) if weight is None else weight.new_empty(weight.shape)


IMPLEMENTATIONS = ("triton", "torch", "reference")
_OPTIONS = "Tensor? weight, float eps, float weight_offset, str rounding"

_rms_norm = register(
    f"rms_norm(Tensor x, {_OPTIONS}) -> Tensor",
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
_add_rms_norm = register(
    f"add_rms_norm(Tensor x, Tensor residual, {_OPTIONS}) -> (Tensor, Tensor)",
    package=__name__,
    implementations=IMPLEMENTATIONS,
    rows=("x", "residual"),
    fake=lambda x, *rest: (x.new_empty(x.shape), x.new_empty(x.shape)),
    setup_context=_setup_residual,
    backward=_backward_residual,
    cost=_cost,
    example=_example_residual,
)
_add_rms_norm_ = register(
    f"add_rms_norm_(Tensor(a!) x, Tensor(b!) residual, {_OPTIONS}) -> ()",
    package=__name__,
    implementations=IMPLEMENTATIONS,
    rows=("x", "residual"),
    fake=lambda x, residual, *rest: None,
    cost=_cost,
    example=_example_residual,
)
_rms_norm_quantized = register(
    f"rms_norm_quantized(Tensor x, {_OPTIONS}, ScalarType dtype) -> (Tensor, Tensor)",
    package=__name__,
    implementations=IMPLEMENTATIONS,
    rows=("x",),
    fake=lambda x, *options: codes.empty_rows(x, options[-1]),
    cost=_cost_quantized,
    example=_example,
)
_add_rms_norm_quantized = register(
    f"add_rms_norm_quantized(Tensor x, Tensor residual, {_OPTIONS}, ScalarType dtype) -> (Tensor, Tensor, Tensor)",
    package=__name__,
    implementations=IMPLEMENTATIONS,
    rows=("x", "residual"),
    fake=lambda x, *options: (*codes.empty_rows(x, options[-1]), x.new_empty(x.shape)),
    cost=_cost_quantized,
    example=_example_residual,
)
_rms_norm_backward = register(
    "rms_norm_backward(Tensor grad, Tensor x, Tensor? weight, float eps, float weight_offset, Tensor? grad_h)"
    " -> (Tensor, Tensor)",
    package=__name__,
    implementations=IMPLEMENTATIONS,
    fake=_fake_backward,
)
