"""Products with compressed 2:4 weights, with the scales, bias and activation in the same pass."""

import math

import torch

from fusedops._core import checks, env
from fusedops._core.checks import FLOATS
from fusedops._core.numbers import ceil_div
from fusedops._core.register import register
from fusedops.ops.attention import check_table
from fusedops.ops.compress_24 import check_compressed
from fusedops.ops.sparse_matmul._crossover import described

CODES = (torch.int8, torch.float8_e4m3fn)
MAX_K_INT8 = 2**17  # half of so many products of -128, which are multiplied, sum up to 2**30
MAX_SIZE = 2**30  # rows of a, N and K; kernels count them in 32 bits
PLACES = torch.tensor([0b0100, 0b1000, 0b1100, 0b1001, 0b1101, 0b1110], dtype=torch.uint8, device="cpu")  # of a pair


def sparse_matmul(a, values, metadata, *, scale_a=None, scale_b=None, bias=None, out_dtype=None, activation=None):
    """Multiply by a weight that `compress_24` stored, without the products with its zeros.

    ``out = activation((a @ weight.T) * scale_a * scale_b + bias)`` with
    ``weight = decompress_24(values, metadata, in_features=K)``

    Args:
        a: ``[..., K]``, values' dtype; the last dimension is contiguous.
        values: ``[N, ceil(K / 64) * 32]``, float16, bfloat16, float32, int8 or float8_e4m3fn, contiguous. Those of
            columns beyond K are zero, as `compress_24` makes them.
        metadata: ``[N, ceil(K / 128) * 16]``, uint8, contiguous.
        scale_a: float32, of int8 and float8 alone: one number (``[]`` or ``[1]``), or one for each row of a, ``[...]``
            or ``[rows]``. None is 1.
        scale_b: float32, of int8 and float8 alone: one number, or one for each row of the weight, ``[N]``. None is 1.
        bias: ``[N]``, out_dtype or float32; None adds nothing.
        out_dtype: Of int8 and float8 float16, bfloat16 or float32, None is bfloat16; of the others a's dtype or None.
        activation: None, ``"relu"``, ``"silu"``, ``"gelu"`` (with erf, as `F.gelu`) or ``"gelu_tanh"``
            (``F.gelu(approximate="tanh")``).

    Returns:
        ``[..., N]`` in out_dtype, contiguous. Empty a gives empty output.

    Raises:
        ValueError: a shape, stride, device or option does not fit; with FUSEDOPS_VALIDATE=2 also metadata with places
            that are not in order, and scales that are not finite and above 0.
        TypeError: a dtype is not one of the above.
        NotImplementedError: K > MAX_K_INT8 of int8; a size > MAX_SIZE.

    Numerics: sums of int8 are exact. Sums of the others are in float32, of float32 with float32 products. Scales, first
        scale_a, bias and activation follow in float32, rounded once at the end. NaN and infinity of a may reach a
        result through a zero of the weight, or not. Metadata that `compress_24` cannot have written gives numbers
        without a meaning, but is followed nowhere outside its own group.
    Runs on: CUDA 8.0 and newer (up to 64 rows, and float32, Triton, else CUDA C++); elsewhere torch, with some rows of
        the weight decompressed at a time.
    From: Mishra et al., "Accelerating Sparse Deep Neural Networks", 2021, https://arxiv.org/abs/2104.08378
    """
    if out_dtype is None and isinstance(a, torch.Tensor):
        out_dtype = torch.bfloat16 if a.dtype in CODES else a.dtype
    args = a, values, metadata, scale_a, scale_b, bias, out_dtype, activation
    done = _sparse_matmul.again(*args)
    if done is not None:
        return done
    out = _sparse_matmul(*_arguments(*args))
    return out if a.dim() == 2 else out.view(*a.shape[:-1], values.shape[0])


def _arguments(a, values, metadata, scale_a, scale_b, bias, out_dtype, activation):
    """What the operator gets, checked: a as a matrix, scale_a without leading dimensions."""
    op = "sparse_matmul"
    K, N = _check_operands(op, a, values, metadata)
    allowed = FLOATS if a.dtype in CODES else (a.dtype,)
    if out_dtype not in allowed:
        known = ", ".join(map(_name, allowed))
        raise TypeError(f"{op}: out_dtype must be {'one of ' * (len(allowed) > 1)}{known}, got {_name(out_dtype)}")
    checks.bind_shapes(op, values=(values, "N columns"), bias=(bias, "N?"))
    if bias is not None and bias.dtype not in (out_dtype, torch.float32):
        raise TypeError(f"{op}: bias must be {_name(out_dtype)} or float32, got {_name(bias.dtype)}")
    checks.check_rows(op, bias=bias)
    rows = math.prod(a.shape[:-1])
    leading = [(rows,), tuple(a.shape[:-1])]
    _check_scale(op, "scale_a", scale_a, a, [(), (1,), *leading], "[], [1], [...] or [rows]")
    _check_scale(op, "scale_b", scale_b, a, [(), (1,), (N,)], "[], [1] or [N]")
    checks.check_activation(op, activation)
    if a.dim() != 2:
        a = a.reshape(rows, K)
    if scale_a is not None and scale_a.dim() > 1:
        scale_a = scale_a.reshape(rows)
    return a, values, metadata, scale_a, scale_b, bias, out_dtype, activation


def _check_operands(op, a, values, metadata):
    """Raise where the operands do not fit each other or the limits; give K and N."""
    checks.bind_shapes(op, a=(a, "... K"), values=(values, "N columns"), metadata=(metadata, "N bytes"))
    check_compressed(op, values, metadata)
    if a.dtype != values.dtype:
        raise TypeError(f"{op}: a must be {_name(values.dtype)} as values are, got {_name(a.dtype)}")
    K, (N, columns) = a.shape[-1], values.shape
    if not N or not K:
        raise ValueError(f"{op}: values must have at least one row and one column, got N={N}, K={K}")
    if ceil_div(K, 64) * 32 != columns:
        raise ValueError(f"{op}: values must have shape [N, ceil(K / 64) * 32] with K={K}, got {list(values.shape)}")
    for name, size in (("the rows of a", a.numel() // K), ("N", N), ("K", K)):
        if size > MAX_SIZE:
            raise NotImplementedError(f"{op}: {name} must be at most MAX_SIZE = {MAX_SIZE}, got {size}")
    if a.dtype == torch.int8 and K > MAX_K_INT8:
        raise NotImplementedError(f"{op}: K of int8 must be at most MAX_K_INT8 = {MAX_K_INT8}, got {K}")
    checks.check_rows(op, a=a)
    for name, tensor in (("values", values), ("metadata", metadata)):
        if not tensor.is_contiguous():
            raise ValueError(f"{op}: {name} must be contiguous, got strides {list(tensor.stride())}")
    return K, N


def _check_scale(op, name, scale, a, shapes, described):
    if scale is None:
        return
    if a.dtype not in CODES:
        raise ValueError(f"{op}: {name} must be None unless values are int8 or float8_e4m3fn, got {_name(a.dtype)}")
    check_table(op, name, scale, a, shapes, described, (torch.float32,))
    if env.validate() == 2 and not torch.compiler.is_compiling() and not scale.is_meta:
        checks.check_scale_values(op, name, scale)


def notes(a, values, *rest):
    """What `fusedops.explain` tells beside: for how many rows sparse was measured to be faster than dense."""
    return (("crossover", described(a, values)),)


def _name(dtype):
    return str(dtype).removeprefix("torch.")


def _fake(a, values, metadata, scale_a, scale_b, bias, out_dtype, activation):
    return a.new_empty((a.shape[0], values.shape[0]), dtype=out_dtype)


def _cost(a, values, metadata, scale_a, scale_b, bias, out_dtype, activation):
    """Only what is stored is multiplied."""
    read = [tensor for tensor in (a, values, metadata, scale_a, scale_b, bias) if tensor is not None]
    moved = sum(tensor.numel() * tensor.element_size() for tensor in read)
    rows, columns = a.shape[0], values.shape[0]
    return moved + rows * columns * out_dtype.itemsize, 2 * rows * values.numel()


def _example(shape, dtype, device):
    """As many outputs as inputs, and a bias; pairs at any places of whole groups."""
    K = shape[-1]
    values = torch.randn(K, ceil_div(K, 64) * 32, device=device).to(dtype)
    values[:, K // 4 * 2 :] = 0
    low, high = PLACES.to(device)[torch.randint(0, len(PLACES), (2, K, ceil_div(K, 128) * 16), device=device)]
    a, bias = torch.randn(shape, device=device).to(dtype), torch.randn(K, device=device).to(dtype)
    return (a, values, low | high << 4), {"bias": bias}


_sparse_matmul = register(
    "sparse_matmul(Tensor a, Tensor values, Tensor metadata, Tensor? scale_a, Tensor? scale_b, Tensor? bias, "
    "ScalarType out_dtype, str? activation) -> Tensor",
    package=__name__,
    implementations=("cuda", "triton", "torch", "reference"),
    rows=("a", "scale_a"),
    fake=_fake,
    cost=_cost,
    example=_example,
)
