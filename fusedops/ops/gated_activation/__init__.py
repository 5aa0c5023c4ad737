"""Gated activations: the middle of a model's MLP in one pass."""

import math

import torch

from fusedops._core import checks, codes, env
from fusedops._core.register import register

APPROXIMATIONS = ("none", "tanh")


def silu_mul(gate, up, *, out=None):
    """Apply SiLU to the gate and multiply by the other half (SwiGLU).

    ``out = round(gate / (1 + exp(-gate))) * up``

    Args:
        gate: ``[..., N]``, float16, bfloat16 or float32, any N; rows may be strided, such as half of a packed
            ``gate_up`` projection; the last dimension is contiguous.
        up: gate's shape and dtype.
        out: Where to write the result: gate's shape and dtype; gate or up itself, or memory of its own. Not
            differentiable.

    Returns:
        Tensor of gate's shape and dtype, contiguous unless `out` is given. Empty input gives empty output.

    Raises:
        ValueError: a shape, stride or device does not fit.
        TypeError: a dtype is not one of the above.

    Numerics: SiLU in float32, rounded to gate's dtype, then the product of that dtype: on the CPU bitwise equal to
        ``F.silu(gate) * up``. As there, silu(-inf) is NaN. The gradient of gate ignores the inner rounding (straight
        through), that of up uses the rounded activation; both are rounded once.
    Runs on: CUDA 8.0 and newer (Triton); elsewhere torch.
    From: Shazeer, "GLU Variants Improve Transformer", 2020, https://arxiv.org/abs/2002.05202
    """
    args = gate, up
    done = _silu_mul.again(*args) if out is None else None
    if done is not None:
        return done
    _check("silu_mul", gate, up, out)
    return _silu_mul(*args, out=out)


def silu_mul_quantized(gate, up, *, dtype=torch.int8):
    """Apply SiLU to the gate, multiply by the other half, and quantise each row of the product.

    ``values, scale = quantize(silu_mul(gate, up))``

    Args:
        gate: ``[..., N]``, float16, bfloat16 or float32, any N; rows may be strided, such as half of a packed
            ``gate_up`` projection; the last dimension is contiguous.
        up: gate's shape and dtype.
        dtype: int8, float8_e4m3fn or float8_e5m2.

    Returns:
        ``(values, scale)``: gate's shape in `dtype`, contiguous, and float32 ``[...]``, one for each row, that
        multiplies its values. Empty input gives empty values.

    Raises:
        ValueError: a shape, stride or device does not fit.
        TypeError: a dtype is not one of the above.

    Numerics: as `silu_mul`, whose result is rounded to gate's dtype, and then `quantize_int8` or `quantize_fp8` of
        its rows, bitwise.
    Runs on: CUDA 8.0 and newer (Triton); elsewhere torch.
    From: Shazeer, "GLU Variants Improve Transformer", 2020, https://arxiv.org/abs/2002.05202
    """
    args = gate, up, dtype
    done = _silu_mul_quantized.again(*args)
    if done is not None:
        return done
    _check("silu_mul_quantized", gate, up, None)
    checks.check_dtype("silu_mul_quantized", dtype, codes.DTYPES)
    return _silu_mul_quantized(*args)


def gelu_mul(gate, up, *, approximate="none", out=None):
    """Apply GELU to the gate and multiply by the other half (GeGLU).

    ``out = round(gate * (1 + erf(gate / sqrt(2))) / 2) * up``; with ``approximate="tanh"``
    ``out = round(gate * (1 + tanh(sqrt(2 / pi) * (gate + 0.044715 * gate**3))) / 2) * up``

    Args:
        gate: ``[..., N]``, float16, bfloat16 or float32, any N; rows may be strided, such as half of a packed
            ``gate_up`` projection; the last dimension is contiguous.
        up: gate's shape and dtype.
        approximate: ``"none"`` or ``"tanh"``, as in `torch.nn.functional.gelu`.
        out: Where to write the result: gate's shape and dtype; gate or up itself, or memory of its own. Not
            differentiable.

    Returns:
        Tensor of gate's shape and dtype, contiguous unless `out` is given. Empty input gives empty output.

    Raises:
        ValueError: a shape, stride, device or option does not fit.
        TypeError: a dtype is not one of the above.

    Numerics: GELU in float32, rounded to gate's dtype, then the product of that dtype: on the CPU bitwise equal to
        ``F.gelu(gate, approximate=approximate) * up``. As there, gelu(-inf) is NaN, and 1 + erf cancels where gate is
        below -3: the error is about one epsilon of float32 of gate itself. The gradient of gate ignores the inner
        rounding (straight through), that of up uses the rounded activation; both are rounded once.
    Runs on: CUDA 8.0 and newer (Triton); elsewhere torch.
    From: Shazeer, "GLU Variants Improve Transformer", 2020, https://arxiv.org/abs/2002.05202
    """
    args = gate, up, approximate
    done = _gelu_mul.again(*args) if out is None else None
    if done is not None:
        return done
    _check("gelu_mul", gate, up, out)
    if env.validate():
        checks.check_choice("gelu_mul", "approximate", approximate, APPROXIMATIONS)
    return _gelu_mul(*args, out=out)


def _check(op, gate, up, out):
    checks.bind_shapes(op, gate=(gate, "... N"), up=(up, "... N"))
    checks.check_float(op, gate=gate, up=up)
    checks.check_rows(op, gate=gate, up=up)
    if out is not None:
        checks.check_out(op, out, gate, gate=gate, up=up)


def _cost(gate, up, *options):
    return 3 * gate.numel() * gate.element_size(), 6 * gate.numel()


def _cost_quantized(gate, *rest):
    moved = (2 * gate.element_size() + 1) * gate.numel() + 4 * math.prod(gate.shape[:-1])
    return moved, 10 * gate.numel()


def _example(shape, dtype, device):
    gate, up = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
    return (gate, up), {}


def _setup(ctx, inputs, output):
    gate, up, *ctx.options = inputs
    ctx.save_for_backward(gate, up)


def _silu_backward(ctx, grad):
    return _silu_mul_backward(grad, *ctx.saved_tensors)


def _gelu_backward(ctx, grad):
    return *_gelu_mul_backward(grad, *ctx.saved_tensors, *ctx.options), None


def _fake_backward(grad, gate, *rest):
    return gate.new_empty(gate.shape), gate.new_empty(gate.shape)


IMPLEMENTATIONS = ("triton", "torch", "reference")

_silu_mul = register(
    "silu_mul(Tensor gate, Tensor up) -> Tensor",
    package=__name__,
    implementations=IMPLEMENTATIONS,
    rows=("gate", "up"),
    fake=lambda gate, up: gate.new_empty(gate.shape),
    setup_context=_setup,
    backward=_silu_backward,
    out=True,
    cost=_cost,
    example=_example,
)
_gelu_mul = register(
    "gelu_mul(Tensor gate, Tensor up, str approximate) -> Tensor",
    package=__name__,
    implementations=IMPLEMENTATIONS,
    rows=("gate", "up"),
    fake=lambda gate, up, approximate: gate.new_empty(gate.shape),
    setup_context=_setup,
    backward=_gelu_backward,
    out=True,
    cost=_cost,
    example=_example,
)
_silu_mul_quantized = register(
    "silu_mul_quantized(Tensor gate, Tensor up, ScalarType dtype) -> (Tensor, Tensor)",
    package=__name__,
    implementations=IMPLEMENTATIONS,
    rows=("gate", "up"),
    fake=lambda gate, up, dtype: codes.empty_rows(gate, dtype),
    cost=_cost_quantized,
    example=_example,
)
_silu_mul_backward = register(
    "silu_mul_backward(Tensor grad, Tensor gate, Tensor up) -> (Tensor, Tensor)",
    package=__name__,
    implementations=IMPLEMENTATIONS,
    fake=_fake_backward,
)
_gelu_mul_backward = register(
    "gelu_mul_backward(Tensor grad, Tensor gate, Tensor up, str approximate) -> (Tensor, Tensor)",
    package=__name__,
    implementations=IMPLEMENTATIONS,
    fake=_fake_backward,
)
