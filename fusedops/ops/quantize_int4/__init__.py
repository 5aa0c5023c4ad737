"""Quantising weights to 4 bits, for products with activations of 16 or 32."""

import torch

from fusedops._core import checks
from fusedops._core.register import register

GROUPS = (32, 64, 128)


def quantize_int4(weight, *, group_size=32):
    """Quantise a weight to 4-bit codes, with a scale and a zero for each group of columns.

    ``weight`` is about ``(code - zero / 16) * scale``, as `weight_only_matmul` takes it

    Args:
        weight: ``[N, K]``, float16, bfloat16 or float32; the rows may be strided, the last dimension is contiguous.
        group_size: Consecutive columns of a row that share a scale: 32, 64 or 128. The last group may be smaller.

    Returns:
        ``(values, scale, zero)``, all contiguous: uint8 ``[N, ceil(K / 2)]`` with the code of an even column in the
        lower four bits and that of the next in the upper ones (0 beyond K); weight's dtype ``[N, ceil(K / group)]``;
        and uint8 of scale's shape, from 0 to 240.

    Raises:
        ValueError: a shape, stride or option does not fit.
        TypeError: the dtype is not one of the above.

    Numerics: in float32. Of three grids each group takes the one whose largest error is least: 15 even steps from the
        least of its values and 0 to the largest of them and 0, so that no error is more than half such a step; steps of
        an eighth of the largest absolute value, by which a weight that was quantised so before (GGUF's Q4_0) comes back
        without an error; or, in groups without a 0, the even steps with a zero between two codes, by which what was
        stored with a least value of its own (Q4_1) comes back but for a 32nd of a step. The step is rounded up to
        weight's dtype. The zeros of the others are whole codes, so that 0 stays 0; every code less its zero is exact in
        any dtype. Groups of zeros have codes of their zero and a finite scale; where infinity or NaN is, the group's
        scale is infinity or NaN.
    Runs on: CUDA 8.0 and newer (Triton); elsewhere torch.
    From: Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", 2022,
        https://arxiv.org/abs/2210.17323
    """
    op = "quantize_int4"
    sizes = checks.bind_shapes(op, weight=(weight, "N K"))
    checks.check_float(op, weight=weight)
    checks.check_rows(op, weight=weight)
    if not sizes["K"]:
        raise ValueError(f"{op}: weight must have at least one column, got {list(weight.shape)}")
    if isinstance(group_size, bool) or group_size not in GROUPS:
        raise ValueError(f"{op}: group_size must be one of {', '.join(map(str, GROUPS))}, got {group_size!r}")
    return _quantize_int4(weight, int(group_size))


def _fake(weight, group_size):
    N, K = weight.shape
    groups = -(-K // group_size)
    scale = weight.new_empty(N, groups)
    return weight.new_empty(N, -(-K // 2), dtype=torch.uint8), scale, weight.new_empty(N, groups, dtype=torch.uint8)


def _cost(weight, group_size):
    N, K = weight.shape
    stored = -(-K // 2) + -(-K // group_size) * (weight.element_size() + 1)
    return weight.numel() * weight.element_size() + N * stored, 16 * weight.numel()


_quantize_int4 = register(
    "quantize_int4(Tensor weight, int group_size) -> (Tensor, Tensor, Tensor)",
    package=__name__,
    implementations=("triton", "torch", "reference"),
    fake=_fake,
    cost=_cost,
    example=lambda shape, dtype, device: ((torch.randn(shape, device=device).to(dtype).flatten(0, -2),), {}),
)
