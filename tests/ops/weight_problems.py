"""Quantised weights of every kind, and what a product with them should be."""

import torch

from fusedops.ops.weight_only_matmul import reference
from fusedops.testing import make_tensor
from tests.ops.common import DTYPES, counted_budget

FP8 = torch.float8_e4m3fn
NAN, INF = float("nan"), float("inf")
KINDS = ("int8 tensor", "int8 row", "int8 group", "int8 block", "fp8 tensor", "fp8 row", "fp8 group", "fp8 block",
         "int4 group", "int4 symmetric")  # fmt: skip


def ints(shape, low, high, seed, dtype=torch.int64):
    return torch.randint(low, high + 1, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def spread(table, pad):
    """The same matrix in a wider buffer whose slack is NaN, or the largest code."""
    slack = torch.full((table.shape[0], table.shape[1] + pad), 127, dtype=torch.uint8)
    if table.element_size() > 1:
        slack = torch.full(slack.shape, NAN, dtype=table.dtype)
    view = slack.view(table.dtype)[:, : table.shape[1]]
    view.view(torch.uint8 if table.element_size() == 1 else table.dtype).copy_(
        table.view(torch.uint8) if table.element_size() == 1 else table
    )
    return view


def scale_shape(kind, N, K, group):
    return {"tensor": (), "row": (N,), "block": (-(-N // 128), -(-K // 128))}.get(kind, (N, -(-K // group)))


def weight_of(kind, N, K, group=32, seed=0, codes=None):
    """(values, scale, zero) with weights of about 1; codes limits the size of whole ones, and scales are then 1/2."""
    stored, granularity = kind.split()
    shape = scale_shape(granularity, N, K, group)
    zero = None
    if stored == "int4":
        values = ints((N, -(-K // 2)), 0, 255, seed, torch.uint8)
        zero = ints(shape, 0, 255, seed + 1, torch.uint8) if granularity == "group" else None
        step = 1 / 8
    elif stored == "int8":
        values, step = ints((N, K), -(codes or 128), codes or 127, seed, torch.int8), 1 / 64
    else:
        whole = ints((N, K), -(codes or 1), codes or 1, seed).float()
        values = whole.to(FP8) if codes else make_tensor((N, K), torch.float32, seed=seed).to(FP8)
        step = 1
    scale = (
        torch.full(shape, 0.5) if codes else make_tensor(shape, torch.float32, seed=seed + 2).abs() * step + step / 8
    )
    return values, scale, zero


def wide(value):
    is_wide = isinstance(value, torch.Tensor) and value.dtype in DTYPES
    return value.double() if is_wide else value


def truth_of(x, values, scale, zero=None, bias=None, activation=None, residual=None, gated=False):
    return reference.weight_only_matmul(*map(wide, (x, values, scale, zero, bias, residual)), activation, gated)


def budget_of(implementation, x, values, scale, zero, truth, bias=None, activation=None):
    """The default, and what is lost before the last rounding: all there is, where terms or 1 + erf or tanh cancel.

    Sums of float32 lose half a bit of what their terms are together. torch's product with int8 weights rounds to
    bfloat16 by itself: a rounding more, and one more before a scale. What either of a gated pair loses is multiplied by
    the other.
    """
    if not truth.any():
        return None
    product, slope = truth_of(x, values, scale, zero, bias).abs(), 1.13  # of the steepest activation
    lost = torch.zeros_like(product)
    if x.dtype == torch.float32:
        terms = reference.dequantized(values, wide(scale), zero, x.shape[-1], torch.float64).abs()
        lost += x.double().abs() @ terms.T * torch.finfo(x.dtype).eps / 2
    if implementation == "torch" and x.dtype == torch.bfloat16 and values.dtype == torch.int8 and scale.dim() < 2:
        lost += truth_of(x, values, scale, zero).abs() * torch.finfo(x.dtype).eps
    lost *= slope
    if activation in ("gelu", "gelu_tanh"):
        lost += product * torch.finfo(torch.float32).eps
    if truth.shape != product.shape:
        lost = lost[:, ::2] * product[:, 1::2] + lost[:, 1::2] * product[:, ::2]
    return counted_budget(x.dtype, lost, truth)
