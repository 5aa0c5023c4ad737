"""quantize_int4 by torch's own operators, some rows at a time, so that its float32 copies stay small."""

import torch
import torch.nn.functional as F

from fusedops._core.codes import rounded_up

ROWS_BYTES = 2**24  # of float32 values that are worked on at once


def quantize_int4(weight, group_size):
    """Blocks of rows into tensors made beforehand."""
    N, K = weight.shape
    groups = -(-K // group_size)
    values = weight.new_empty(N, -(-K // 2), dtype=torch.uint8)
    scale, zero = weight.new_empty(N, groups), weight.new_empty(N, groups, dtype=torch.uint8)
    step = max(ROWS_BYTES // (4 * groups * group_size), 1)
    for first in range(0, N, step):
        part = slice(first, first + step)
        w = F.pad(weight[part].float(), (0, groups * group_size - K)).unflatten(1, (groups, group_size))
        codes, part_scale, part_zero = _quantized(w, weight.dtype)
        codes = F.pad(codes.flatten(1)[:, :K], (0, K % 2)).unflatten(1, (-1, 2))
        values[part] = codes[..., 0] | (codes[..., 1] << 4)
        scale[part], zero[part] = part_scale, part_zero
    return values, scale, zero


def _quantized(w, dtype):
    """(codes, scale, zero) of groups [rows, groups, size]: the even grid, or where it is better that of eighths."""
    low, high = torch.aminmax(w, dim=-1)
    low, high = low.clamp_(max=0.0), high.clamp_(min=0.0)
    even = rounded_up((high - low) / 15.0, dtype)
    eighths = rounded_up(torch.maximum(high, -low) / 8.0, dtype)
    even_zero = (-low / even).round_()
    eighths_zero = torch.where(-low >= high, 8.0, 7.0)
    codes, error = _codes(w, even, even_zero)
    other, other_error = _codes(w, eighths, eighths_zero)
    better = other_error < error
    scale = torch.where(better, eighths, even)
    zero = torch.where(better, eighths_zero, even_zero)
    codes = torch.where(better[..., None], other, codes)
    broken = ~scale.isfinite()
    codes = codes.masked_fill_(broken[..., None], 0.0).to(torch.uint8)
    return codes, scale.to(dtype), zero.masked_fill_(broken, 0.0).to(torch.uint8)


def _codes(w, scale, zero):
    """Codes as float32, and the largest error of each group."""
    places = w / scale[..., None]
    codes = places.round().add_(zero[..., None]).clamp_(0.0, 15.0)
    error = places.sub_(codes - zero[..., None]).abs_().amax(-1)
    return codes, error.mul_(scale)
