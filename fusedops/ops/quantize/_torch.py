"""Quantising by torch's own operators: every granularity is brought to rows, one scale for each."""

import torch
import torch.nn.functional as F

from fusedops._core import codes
from fusedops.ops.quantize import BLOCK


def quantize_int8(x, granularity):
    """Codes and scales in int8."""
    return quantize_fp8(x, granularity, torch.int8)


def quantize_fp8(x, granularity, dtype):
    """Codes and scales in any dtype of codes."""
    values, scale = codes.quantized_rows(_as_rows(x, granularity), dtype)
    return _from_rows(values, x.shape, granularity), scale


def quantize_scaled(x, scale, granularity, dtype):
    """Codes for scales that are given."""
    inverse = scale.reciprocal()
    if scale.numel() == 1:
        return codes.encoded(x.float() * inverse.reshape(()), dtype).contiguous()
    values = _as_rows(x, granularity).float() * inverse.unsqueeze(-1)
    return _from_rows(codes.encoded(values, dtype), x.shape, granularity)


def _as_rows(x, granularity):
    """A view, or a copy padded with zeros, whose rows are what shares a scale."""
    if granularity == "row":
        return x
    if granularity == "tensor":
        return x.reshape(-1)
    x = _padded(x, -1).unflatten(-1, (-1, BLOCK))
    return x if granularity == "block" else _padded(x, -3).unflatten(-3, (-1, BLOCK)).transpose(-3, -2).flatten(-2)


def _padded(x, dim):
    """x with zeros up to a multiple of BLOCK."""
    missing = -x.shape[dim] % BLOCK
    return F.pad(x, (0, 0) * (-1 - dim) + (0, missing)) if missing else x


def _from_rows(values, shape, granularity):
    """The reverse, contiguous."""
    if granularity == "tensor":
        values = values.view(shape)
    elif granularity != "row":
        if granularity == "block_2d":
            values = values.unflatten(-1, (BLOCK, BLOCK)).transpose(-3, -2).flatten(-4, -3)[..., : shape[-2], :, :]
        values = values.flatten(-2)[..., : shape[-1]]
    return values.contiguous()
