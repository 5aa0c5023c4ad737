"""Rotary position embedding of queries and keys."""

import torch

from fusedops._core import checks
from fusedops._core.register import register

MAX_D = 1024  # a head's half stands in one tile


def rotary(q, k, cos, sin, *, interleaved=False):
    """Rotate pairs of elements of every head by the angles of its position.

    ``out = x * cos + pair(x) * sin`` on the first R elements of each head, the others pass;
    ``pair(x) = (-x[R/2:], x[:R/2])``, or ``(-x1, x0, -x3, x2, ...)`` where interleaved.

    Args:
        q: ``[B, S, H, D]``, float16, bfloat16 or float32; the last dimension is contiguous, all other strides are free:
            ``[B, H, S, D]`` comes in as ``.transpose(1, 2)``.
        k: ``[B, S, Hk, D]``, q's dtype.
        cos, sin: ``[B or 1, S, R]`` with R even and R <= D, q's dtype or float32. One value for each element: what
            Hugging Face's rotary modules return. Not differentiable.
        interleaved: Pairs are neighbours (GPT-J, GLM) instead of the two halves (Llama, GPT-NeoX).

    Returns:
        ``(q, k)``, new tensors with the inputs' shapes and dtype, and their strides where those are dense.

    Raises:
        ValueError: a shape, stride or device does not fit.
        TypeError: a dtype is not one of the above.
        NotImplementedError: D > MAX_D, or cos or sin requires a gradient.

    Numerics: products and sum in float32, rounded once.
    Runs on: CUDA 8.0 and newer (Triton); elsewhere torch.
    From: Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", 2021,
        https://arxiv.org/abs/2104.09864
    """
    args = q, k, cos, sin, interleaved
    done = _rotary.again(*args)
    if done is not None:
        return done
    sizes = checks.bind_shapes("rotary", q=(q, "B S H D"), k=(k, "B S Hk D"), cos=(cos, "C S R"), sin=(sin, "C S R"))
    checks.check_float("rotary", q=q, k=k)
    checks.check_parameter("rotary", q, cos=cos, sin=sin)
    checks.check_rows("rotary", q=q, k=k, cos=cos, sin=sin)
    rotary_dim, head_dim = sizes["R"], sizes["D"]
    if sizes["C"] != 1 and sizes["C"] != sizes["B"]:
        raise ValueError(f"rotary: cos must have first size 1 or B={sizes['B']}, got {sizes['C']}")
    if rotary_dim % 2 or not 0 < rotary_dim <= head_dim:
        raise ValueError(f"rotary: cos must have an even last size from 2 to D={head_dim}, got {rotary_dim}")
    if head_dim > MAX_D:
        raise NotImplementedError(f"rotary: D must be at most MAX_D = {MAX_D}, got {head_dim}")
    if torch.is_grad_enabled() and (cos.requires_grad or sin.requires_grad):
        raise NotImplementedError("rotary: cos and sin must not require gradients, this operator has none for them")
    return _rotary(*args)


def _cost(q, k, cos, sin, interleaved):
    moved = sum(t.numel() * t.element_size() for t in (q, k, q, k, cos, sin))
    return moved, 3 * (q.numel() + k.numel()) * cos.shape[-1] // max(q.shape[-1], 1)


def _example(shape, dtype, device):
    """shape is [B, S, H, D]; k has as many heads as q."""
    q, k = (torch.randn(shape, device=device).to(dtype) for _ in "qk")
    angle = torch.rand(1, shape[1], shape[3], device=device)
    return (q, k, angle.cos().to(dtype), angle.sin().to(dtype)), {}


def _fake(q, k, *rest):
    return torch.empty_like(q), torch.empty_like(k)


def _setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs[2:4])
    ctx.interleaved = inputs[4]


def _backward(ctx, grad_q, grad_k):
    return *_rotary_backward(grad_q, grad_k, *ctx.saved_tensors, ctx.interleaved), None, None, None


def _backward_of_backward(ctx, grad_q, grad_k):
    return *_rotary(grad_q, grad_k, *ctx.saved_tensors, ctx.interleaved), None, None, None


_rotary = register(
    "rotary(Tensor q, Tensor k, Tensor cos, Tensor sin, bool interleaved) -> (Tensor, Tensor)",
    package=__name__,
    implementations=("triton", "torch", "reference"),
    fake=_fake,
    setup_context=_setup,
    backward=_backward,
    cost=_cost,
    example=_example,
)
_rotary_backward = register(
    "rotary_backward(Tensor grad_q, Tensor grad_k, Tensor cos, Tensor sin, bool interleaved) -> (Tensor, Tensor)",
    package=__name__,
    implementations=("triton", "torch", "reference"),
    fake=_fake,
    setup_context=_setup,
    backward=_backward_of_backward,
)
