"""The meaning of quantize_int4. Its roundings are float32's, in float64 too: they are part of what it means."""

import torch


def quantize_int4(weight, group_size, round_to=None):
    """Codes in pairs, scale and zero of each group: of two grids the one whose largest error is smaller.

    The even grid spans the group's values and 0 by 15 steps. The other has steps of an eighth of the largest absolute
    value, which is code 0 or 15: what was quantised so before is found again exactly. round_to is the scale's dtype.
    """
    N, K = weight.shape
    dtype = round_to or weight.dtype
    groups = -(-K // group_size)
    w = torch.nn.functional.pad(weight.float(), (0, groups * group_size - K)).view(N, groups, group_size)
    low, high = w.amin(-1).clamp(max=0), w.amax(-1).clamp(min=0)
    top = torch.maximum(high, -low)
    scale, codes, zero, error = _grid(w, (high - low) / 15, None, -low, dtype)
    other = _grid(w, top / 8, torch.where(-low >= high, 8.0, 7.0), -low, dtype)
    better = other[3] < error
    scale = torch.where(better, other[0], scale)
    codes = torch.where(better[..., None], other[1], codes)
    zero = torch.where(better, other[2], zero)
    finite = scale.isfinite()
    codes = torch.where(finite[..., None], codes, 0).flatten(1)[:, :K].to(torch.uint8)
    pairs = torch.nn.functional.pad(codes, (0, K % 2)).view(N, -(-K // 2), 2)
    return pairs[..., 0] | (pairs[..., 1] << 4), scale.to(dtype), torch.where(finite, zero, 0).to(torch.uint8)


def _grid(w, step, zero, below, dtype):
    """(scale, codes, zero, largest error) of steps rounded up to the dtype."""
    scale = _rounded_up(step, dtype)
    zero = (below / scale).round() if zero is None else zero
    places = w / scale[..., None]
    codes = (places.round() + zero[..., None]).clamp(0, 15)
    return scale, codes, zero, (places - (codes - zero[..., None])).abs().amax(-1) * scale


def _rounded_up(step, dtype):
    """The least number of the dtype that is not below, in float32; at least a number with a finite reciprocal."""
    if dtype not in (torch.float16, torch.bfloat16):
        return step.clamp(min=2.0**-126)
    least = 2.0**-24 if dtype == torch.float16 else 2.0**-126
    rounded = step.clamp(min=least).to(dtype)
    next_up = (rounded.view(torch.int16) + 1).view(dtype)
    return torch.where(rounded.float() < step, next_up, rounded).float()
