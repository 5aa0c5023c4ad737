"""Products of int8 and of float8 matrices, with the scales, bias, activation and residual in the same pass."""

import torch

from fusedops._core import checks, env
from fusedops._core.checks import FLOATS
from fusedops._core.numbers import ceil_div
from fusedops._core.register import register
from fusedops.ops.attention import check_table

MAX_K_INT8 = 2**17  # the sum of so many products of -128 is 2**31, the first number that int32 has not
MAX_SIZE = 2**30  # rows, columns and depth; kernels count them in 32 bits
BLOCK = 128  # elements of a block that shares a scale
FP8 = torch.float8_e4m3fn


def int8_matmul(
    a, b, scale_a, scale_b, *, bias=None, out_dtype=torch.bfloat16, activation=None, residual=None, gated=False
):
    """Multiply int8 matrices and give the result its scales, bias, activation and residual.

    ``out = activation((a @ b.T) * scale_a * scale_b + bias) + residual``; of gated pairs
    ``p = (a @ b.T) * scale_a * scale_b + bias``, ``out = activation(p[:, ::2]) * p[:, 1::2] + residual``

    Args:
        a: ``[M, K]``, int8; the last dimension is contiguous, the stride of the rows is free.
        b: ``[N, K]``, int8, as `nn.Linear` keeps its weight. Strides as a's.
        scale_a: float32, one number (``[]`` or ``[1]``) or one for each row of a, ``[M]``.
        scale_b: float32, one number or one for each row of b, ``[N]``.
        bias: ``[N]``, out_dtype or float32; None adds nothing.
        out_dtype: float16, bfloat16 or float32.
        activation: None, ``"relu"``, ``"silu"``, ``"gelu"`` (with erf, as `F.gelu`) or ``"gelu_tanh"``
            (``F.gelu(approximate="tanh")``).
        residual: ``[M, N]``, out_dtype; the last dimension is contiguous. None adds nothing.
        gated: Whether b's rows are pairs, the gate of a column of the result before its up, as `interleave_rows` joins
            two weights. N is even, there is an activation, and residual is ``[M, N / 2]``.

    Returns:
        ``[M, N]`` in out_dtype, ``[M, N / 2]`` where gated, contiguous. M may be 0.

    Raises:
        ValueError: a shape, stride, device or option does not fit; with FUSEDOPS_VALIDATE=2 also scales that are not
            finite and above 0.
        TypeError: a dtype is not one of the above.
        NotImplementedError: K > MAX_K_INT8, where sums leave int32; a size > MAX_SIZE.

    Numerics: sums are exact, up to K = MAX_K_INT8 of -128 times -128. They become float32, are multiplied by scale_a,
        then by scale_b, and all that follows is float32 too, rounded once at the end. A row of the result does not
        depend on the other rows of a, bitwise.
    Runs on: CUDA 8.0 and newer (Triton); elsewhere torch.
    From: Dettmers et al., "LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale", 2022,
        https://arxiv.org/abs/2208.07339
    """
    args = a, b, scale_a, scale_b, bias, out_dtype, activation, residual, gated
    done = _int8_matmul.again(*args)
    if done is not None:
        return done
    sizes = _check("int8_matmul", torch.int8, *args)
    if sizes["K"] > MAX_K_INT8:
        raise NotImplementedError(f"int8_matmul: K must be at most MAX_K_INT8 = {MAX_K_INT8}, got {sizes['K']}")
    return _int8_matmul(*args)


def fp8_matmul(
    a, b, scale_a, scale_b, *, bias=None, out_dtype=torch.bfloat16, activation=None, residual=None, gated=False
):
    """Multiply float8 matrices and give the result its scales, bias, activation and residual.

    ``out = activation((a @ b.T) * scale_a * scale_b + bias) + residual``, gated pairs as in `int8_matmul`; scales of
    blocks multiply the elements of their blocks

    Args:
        a: ``[M, K]``, float8_e4m3fn; the last dimension is contiguous, the stride of the rows is free.
        b: ``[N, K]``, float8_e4m3fn, as `nn.Linear` keeps its weight. Strides as a's.
        scale_a: float32, one number (``[]`` or ``[1]``), one for each row of a, ``[M]``, or one for each block of 128
            elements of each row, ``[M, ceil(K / 128)]`` with any strides.
        scale_b: float32, one number, one for each row of b, ``[N]``, or one for each block of 128 by 128,
            ``[ceil(N / 128), ceil(K / 128)]`` with any strides.
        bias, out_dtype, activation, residual, gated: As in `int8_matmul`; a block of b is 128 rows as they stand, of
            gates and ups.

    Returns:
        ``[M, N]`` in out_dtype, ``[M, N / 2]`` where gated, contiguous. M may be 0.

    Raises:
        ValueError: a shape, stride, device or option does not fit; with FUSEDOPS_VALIDATE=2 also scales that are not
            finite and above 0.
        TypeError: a dtype is not one of the above.
        NotImplementedError: a size > MAX_SIZE.

    Numerics: tensor cores add up 128 products, since Hopper's and Ada's keep few bits of a sum of float8 products; sums
        of 128 are multiplied by the scales of their blocks and added in float32, so that the error does not grow with K
        as theirs does. Scales that are not of blocks, bias, activation and residual follow in float32, rounded once at
        the end. On a GPU a row of the result does not depend, bitwise, on the other rows of a as long as there are at
        most 64, or always more; between the two, and between devices, products are added in another order.
    Runs on: CUDA 8.0 and newer (Triton); before 8.9 elements become float16 on the way to the tensor cores, which is
        exact, and slower than their own products. Elsewhere torch, in float32.
    From: Micikevicius et al., "FP8 Formats for Deep Learning", 2022, https://arxiv.org/abs/2209.05433; for scales of
        blocks DeepSeek-AI, "DeepSeek-V3 Technical Report", 2024, https://arxiv.org/abs/2412.19437
    """
    args = a, b, scale_a, scale_b, bias, out_dtype, activation, residual, gated
    done = _fp8_matmul.again(*args)
    if done is not None:
        return done
    _check("fp8_matmul", FP8, *args)
    return _fp8_matmul(*args)


def _check(op, dtype, a, b, scale_a, scale_b, bias, out_dtype, activation, residual, gated):
    """Check all arguments and return the sizes."""
    wide = "M half?" if gated is True else "M N?"
    sizes = checks.bind_shapes(op, a=(a, "M K"), b=(b, "N K"), bias=(bias, "N?"), residual=(residual, wide))
    for name, tensor in (("a", a), ("b", b)):
        if tensor.dtype != dtype:
            raise TypeError(f"{op}: {name} must be {_name(dtype)}, got {_name(tensor.dtype)}")
    if out_dtype not in FLOATS:
        raise TypeError(f"{op}: out_dtype must be float16, bfloat16 or float32, got {_name(out_dtype)}")
    if bias is not None and bias.dtype not in (out_dtype, torch.float32):
        raise TypeError(f"{op}: bias must be {_name(out_dtype)} or float32, got {_name(bias.dtype)}")
    if residual is not None and residual.dtype != out_dtype:
        raise TypeError(f"{op}: residual must be {_name(out_dtype)}, got {_name(residual.dtype)}")
    checks.check_rows(op, a=a, b=b, residual=residual)
    for name, least in (("M", 0), ("N", 1), ("K", 1)):
        if sizes[name] < least:
            raise ValueError(f"{op}: {name} must be at least {least}, got {sizes[name]}")
        if sizes[name] > MAX_SIZE:
            raise NotImplementedError(f"{op}: {name} must be at most MAX_SIZE = {MAX_SIZE}, got {sizes[name]}")
    _check_scales(op, dtype, a, sizes, scale_a, scale_b)
    checks.check_activation(op, activation)
    checks.check_gated(op, gated, activation, sizes["N"], residual)
    return sizes


def _check_scales(op, dtype, a, sizes, scale_a, scale_b):
    """Granularities are told by the shapes alone; a [M] with M = 1 is one number either way."""
    blocks_k, blocks_n = (ceil_div(sizes[name], BLOCK) for name in ("K", "N"))
    for name, scale, size, blocked in (
        ("scale_a", scale_a, "M", (sizes["M"], blocks_k)),
        ("scale_b", scale_b, "N", (blocks_n, blocks_k)),
    ):
        shapes, described = [(), (1,), (sizes[size],)], f"[], [1] or [{size}]"
        if dtype == FP8:
            shapes.append(blocked)
            rows = "M" if name == "scale_a" else "ceil(N / 128)"
            described = f"[], [1], [{size}] or [{rows}, ceil(K / 128)]"
        check_table(op, name, scale, a, shapes, described, (torch.float32,))
        if env.validate() == 2 and not torch.compiler.is_compiling() and not scale.is_meta:
            checks.check_scale_values(op, name, scale)


def _name(dtype):
    return str(dtype).removeprefix("torch.")


def _fake(a, b, scale_a, scale_b, bias, out_dtype, activation, residual, gated=False):
    return a.new_empty((a.shape[0], b.shape[0] // (1 + gated)), dtype=out_dtype)


def _cost(a, b, scale_a, scale_b, bias, out_dtype, activation, residual, gated=False):
    (rows, depth), columns = a.shape, b.shape[0]
    read = [tensor for tensor in (a, b, scale_a, scale_b, bias, residual) if tensor is not None]
    moved = sum(tensor.numel() * tensor.element_size() for tensor in read)
    return moved + rows * columns // (1 + gated) * out_dtype.itemsize, 2 * rows * columns * depth


def _example(dtype):
    """Calls for a shape [..., K]: as many columns as K, one scale for each row of both, and a bias."""

    def example(shape, out_dtype, device):
        *leading, depth = shape
        rows = 1
        for size in leading:
            rows *= size
        a, b = (torch.randn(size, depth, device=device) for size in (rows, depth))
        a, b = ((x * 32).clamp(-127, 127).round().to(dtype) for x in (a, b))
        scales = [torch.rand(size, device=device) + 0.5 for size in (rows, depth)]
        bias = torch.randn(depth, device=device).to(out_dtype)
        return (a, b, *scales), {"bias": bias, "out_dtype": out_dtype}

    return example


def _register(name, dtype):
    return register(
        f"{name}(Tensor a, Tensor b, Tensor scale_a, Tensor scale_b, Tensor? bias, ScalarType out_dtype, "
        "str? activation, Tensor? residual, bool gated=False) -> Tensor",
        package=__name__,
        implementations=("triton", "torch", "reference"),
        rows=("a", "scale_a", "residual"),
        fake=_fake,
        cost=_cost,
        example=_example(dtype),
    )


_int8_matmul = _register("int8_matmul", torch.int8)
_fp8_matmul = _register("fp8_matmul", FP8)
