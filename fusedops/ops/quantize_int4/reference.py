"""The meaning of quantize_int4. Its roundings are float32's, in float64 too: they are part of what it means."""

import torch

ZERO_STEPS = 16  # of a code, that zeros are counted in


def quantize_int4(weight, group_size, round_to=None):
    """Codes in pairs, scale and zero of each group: of three grids the one whose largest error is smaller.

    The even grid spans the group's values and 0 by 15 steps. Another has steps of an eighth of the largest absolute
    value, which is code 0 or 15: what was quantised so before is found again exactly. The last is the even one with a
    zero in sixteenths of a code, for groups without a 0 in them. round_to is the scale's dtype.
    """
    N, K = weight.shape
    dtype = round_to or weight.dtype
    groups = -(-K // group_size)
    w = torch.nn.functional.pad(weight.float(), (0, groups * group_size - K)).view(N, groups, group_size)
    low, high = w.amin(-1).clamp(max=0), w.amax(-1).clamp(min=0)
    top = torch.maximum(high, -low)
    even = _rounded_up((high - low) / 15, dtype)
    eighths = _rounded_up(top / 8, dtype)
    scale, zero = even, (-low / even).round()
    codes, error = _codes(w, scale, zero)
    centre = torch.where(-low >= high, 8.0, 7.0)
    between = (-low / even * ZERO_STEPS).round() / ZERO_STEPS
    for other_scale, other_zero, allowed in ((eighths, centre, True), (even, between, (w != 0).all(-1))):
        other_codes, other_error = _codes(w, other_scale, other_zero)
        better = (other_error < error) & allowed
        scale, zero = torch.where(better, other_scale, scale), torch.where(better, other_zero, zero)
        codes, error = torch.where(better[..., None], other_codes, codes), torch.where(better, other_error, error)
    finite = scale.isfinite()
    codes = torch.where(finite[..., None], codes, 0).flatten(1)[:, :K].to(torch.uint8)
    pairs = torch.nn.functional.pad(codes, (0, K % 2)).view(N, -(-K // 2), 2)
    zero = torch.where(finite, zero * ZERO_STEPS, 0).to(torch.uint8)
    return pairs[..., 0] | (pairs[..., 1] << 4), scale.to(dtype), zero


def _codes(w, scale, zero):
    """Codes, and the largest error of each group."""
    places = w / scale[..., None]
    codes = (places + zero[..., None]).round().clamp(0, 15)
    return codes, (places - (codes - zero[..., None])).abs().amax(-1) * scale


def _rounded_up(step, dtype):
    """The least number of the dtype that is not below, in float32; at least a number with a finite reciprocal."""
    if dtype not in (torch.float16, torch.bfloat16):
        return step.clamp(min=2.0**-126)
    least = 2.0**-24 if dtype == torch.float16 else 2.0**-126
    rounded = step.clamp(min=least).to(dtype)
    next_up = (rounded.view(torch.int16) + 1).view(dtype)
    return torch.where(rounded.float() < step, next_up, rounded).float()
