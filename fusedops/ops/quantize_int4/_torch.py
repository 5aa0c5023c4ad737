"""quantize_int4 by torch's own operators, some rows at a time, so that its float32 copies stay small."""

import torch
import torch.nn.functional as F

from fusedops._core.codes import rounded_up

ZERO_STEPS = 16  # of a code, that zeros are counted in
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
    """(codes, scale, zero) of groups [rows, groups, size]: the even grid, or one of two others where it is better."""
    low, high = torch.aminmax(w, dim=-1)
    low, high = low.clamp_(max=0.0), high.clamp_(min=0.0)
    even = rounded_up((high - low) / 15.0, dtype)
    eighths = rounded_up(torch.maximum(high, -low) / 8.0, dtype)
    scale, zero = even, (-low / even).round_()
    codes, error = _codes(w, scale, zero)
    centre = torch.where(-low >= high, 8.0, 7.0)
    between = (-low / even).mul_(ZERO_STEPS).round_().div_(ZERO_STEPS)
    for other_scale, other_zero, allowed in ((eighths, centre, True), (even, between, (w != 0).all(-1))):
        other, other_error = _codes(w, other_scale, other_zero)
        better = (other_error < error) & allowed
        scale, zero = torch.where(better, other_scale, scale), torch.where(better, other_zero, zero)
        codes, error = torch.where(better[..., None], other, codes), torch.where(better, other_error, error)
    broken = ~scale.isfinite()
    codes = codes.masked_fill_(broken[..., None], 0.0).to(torch.uint8)
    return codes, scale.to(dtype), zero.mul_(ZERO_STEPS).masked_fill_(broken, 0.0).to(torch.uint8)


def _codes(w, scale, zero):
    """Codes as float32, and the largest error of each group."""
    places = w / scale[..., None]
    codes = (places + zero[..., None]).round_().clamp_(0.0, 15.0)
    error = places.sub_(codes - zero[..., None]).abs_().amax(-1)
    return codes, error.mul_(scale)
