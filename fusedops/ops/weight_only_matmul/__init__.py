"""Products with weights of 8 or 4 bits, and activations of 16 or 32."""

import torch

from fusedops._core import checks, env
from fusedops._core.register import register
from fusedops.ops.attention import check_table
from fusedops.ops.weight_only_matmul._groups import BLOCK, GROUPS

FORMATS = (torch.int8, torch.float8_e4m3fn, torch.uint8)
MAX_SIZE = 2**30  # rows of x, N and K; kernels count them in 32 bits


def weight_only_matmul(x, values, scale, *, zero=None, bias=None, activation=None, residual=None, gated=False):
    """Multiply by a quantised weight, and apply what follows, without ever storing the weight expanded.

    ``out = activation(x @ weight.T + bias) + residual`` with ``weight = values * scale``, of 4-bit codes
    ``weight = (code - zero / 16) * scale``; of gated pairs ``p = x @ weight.T + bias``,
    ``out = activation(p[..., ::2]) * p[..., 1::2] + residual``

    Args:
        x: ``[..., K]``, float16, bfloat16 or float32; the last dimension is contiguous.
        values: ``[N, K]``, int8 or float8_e4m3fn; or ``[N, ceil(K / 2)]``, uint8, of 4-bit codes: each byte holds the
            code of an even column in its lower four bits and that of the next column in its upper ones. The last
            dimension is contiguous, the rows may be strided.
        scale: x's dtype or float32; multiplies the codes. For int8 and float8 one number (``[]`` or ``[1]``), one for
            each row ``[N]``, or for each block of 128 by 128 ``[ceil(N / 128), ceil(K / 128)]``; for all formats one
            for each group of 32, 64 or 128 columns of a row, ``[N, ceil(K / group)]``, of which the last may be
            smaller: the group follows from the shapes.
        zero: For 4-bit codes alone, uint8 of scale's shape: sixteen times the code that stands for 0, which may lie
            between two codes (a whole zero of GPTQ or AWQ times 16). None is 128: code 8.
        bias: ``[N]``, x's dtype or float32.
        activation: None, ``"silu"``, ``"gelu"``, ``"gelu_tanh"`` or ``"relu"``.
        residual: ``[..., N]``, x's dtype; the last dimension is contiguous.
        gated: Whether the weight's rows are pairs, the gate of a column of the output before its up, as
            `interleave_rows` joins two weights. N is even, there is an activation, and residual is ``[..., N / 2]``.

    Returns:
        ``[..., N]`` of x's dtype, ``[..., N / 2]`` where gated, contiguous. Empty x gives empty output.

    Raises:
        ValueError: a shape, stride, device or option does not fit; with FUSEDOPS_VALIDATE=2 also scales that are not
            finite and above 0.
        TypeError: a dtype is not one of the above.
        NotImplementedError: a size > MAX_SIZE.

    Numerics: int8, float8 and 4-bit codes less their zero are exact in every dtype of x; products with them are summed
        in float32 (of float32 x with float32 products), each group's sum times its scale in float32; one scale or
        scales of rows multiply the whole sum. Bias, activation and residual follow in float32, and one rounding.
        A result of one row is the same bits for 1 to 64 rows of x, and for any number beyond. On a CPU with x of
        bfloat16 and up to 32 rows, an int8 weight with scales of rows is multiplied by torch's own product, which
        rounds the sum to bfloat16 before the bias, and before scales of float32.
    Runs on: CUDA 8.0 and newer (Triton; before 8.9 float8 is expanded by integer arithmetic); elsewhere torch.
    From: Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", 2022,
        https://arxiv.org/abs/2210.17323
    """
    args = x, values, scale, zero, bias, residual, activation, gated
    done = _weight_only_matmul.again(*args)
    if done is not None:
        return done
    _check(*args)
    return _weight_only_matmul(*args)


def _check(x, values, scale, zero, bias, residual, activation, gated):
    op = "weight_only_matmul"
    wide = "... half?" if gated is True else "... N?"
    sizes = checks.bind_shapes(
        op, x=(x, "... K"), values=(values, "N columns"), bias=(bias, "N?"), residual=(residual, wide)
    )
    N, K = sizes["N"], sizes["K"]
    checks.check_float(op, x=x, residual=residual)
    if values.dtype not in FORMATS:
        raise TypeError(f"{op}: values must be int8, float8_e4m3fn or uint8 (4-bit codes), got {_dtype(values)}")
    packed = values.dtype == torch.uint8
    if not N or not K:
        raise ValueError(f"{op}: values must have at least one row and one column, got N={N}, K={K}")
    if sizes["columns"] != (-(-K // 2) if packed else K):
        dims = "[N, ceil(K / 2)]" if packed else "[N, K]"
        raise ValueError(f"{op}: values must have shape {dims} with K={K}, got {list(values.shape)}")
    for name, size in (("the rows of x", x.numel() // K), ("N", N), ("K", K)):
        if size > MAX_SIZE:
            raise NotImplementedError(f"{op}: {name} must be at most MAX_SIZE = {MAX_SIZE}, got {size}")
    checks.check_rows(op, x=x, values=values, bias=bias, residual=residual)
    checks.check_parameter(op, x, bias=bias)
    checks.check_activation(op, activation)
    checks.check_gated(op, gated, activation, N, residual)
    groups = [(N, -(-K // size)) for size in GROUPS]
    blocks = [(), (1,), (N,), (-(-N // BLOCK), -(-K // BLOCK))]
    described = "[N, ceil(K / 32, 64 or 128)]"
    if not packed:
        described += ", [], [1], [N] or [ceil(N / 128), ceil(K / 128)]"
    dtypes = tuple(dict.fromkeys((x.dtype, torch.float32)))
    check_table(op, "scale", scale, x, groups if packed else groups + blocks, described, dtypes)
    if zero is not None:
        if not packed:
            raise ValueError(f"{op}: zero must be None unless values hold 4-bit codes (uint8), got {_dtype(values)}")
        check_table(op, "zero", zero, x, [tuple(scale.shape)], "of scale", (torch.uint8,))
    if env.validate() == 2 and not torch.compiler.is_compiling() and not scale.is_meta:
        checks.check_scale_values(op, "scale", scale)


def _dtype(tensor):
    return str(tensor.dtype).removeprefix("torch.")


def _fake(x, values, scale, zero, bias, residual, activation, gated=False):
    return x.new_empty(*x.shape[:-1], values.shape[0] // (1 + gated))


def _cost(x, values, scale, zero, bias, residual, activation, gated=False):
    K, N = x.shape[-1], values.shape[0]
    rows = x.numel() // K
    tables = sum(t.numel() * t.element_size() for t in (values, scale, zero, bias) if t is not None)
    moved = rows * (K + N // (1 + gated) * (1 if residual is None else 2)) * x.element_size()
    return tables + moved, 2 * rows * N * K


def _example(shape, dtype, device):
    """As many outputs as inputs, and int8 with a scale for each row."""
    K = shape[-1]
    values = torch.randint(-127, 128, (K, K), device=device, dtype=torch.int8)
    return (torch.randn(shape, device=device).to(dtype), values, torch.rand(K, device=device) / 64), {}


_weight_only_matmul = register(
    "weight_only_matmul(Tensor x, Tensor values, Tensor scale, Tensor? zero, Tensor? bias, Tensor? residual, "
    "str? activation, bool gated=False) -> Tensor",
    package=__name__,
    implementations=("triton", "torch", "reference"),
    rows=("x", "residual"),
    fake=_fake,
    cost=_cost,
    example=_example,
)
