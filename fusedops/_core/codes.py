"""Stored values of narrow types, "codes", by torch's own operators: largest codes, scales, and saturating casts."""

import torch

LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}
LEAST_SCALE = 2.0**-126  # the smallest normal number: zeros have a scale too, and its reciprocal is finite


def scale_of(top, dtype):
    """The scale that brings the largest absolute value to the largest code; NaN stays NaN."""
    return (top / LARGEST[dtype]).clamp_(min=LEAST_SCALE)


def encoded(values, dtype, lowest=-127.0):
    """float32 values, which are changed, as codes: to nearest even, cut to the range; in int8 NaN is 0."""
    if dtype == torch.int8:
        return values.nan_to_num_(0.0).clamp_(lowest, LARGEST[dtype]).round_().to(dtype)
    return values.clamp_(-LARGEST[dtype], LARGEST[dtype]).to(dtype)


def quantized_rows(x, dtype):
    """Codes of rows ``[..., K]`` and the scale of each, computed from its largest value; both are contiguous."""
    if not x.numel():
        return x.new_empty(x.shape, dtype=dtype), x.new_full(x.shape[:-1], LEAST_SCALE, dtype=torch.float32)
    low, high = torch.aminmax(x, dim=-1)
    scale = scale_of(torch.maximum(high, low.neg_()).float(), dtype).contiguous()
    values = x * scale.reciprocal().unsqueeze(-1)  # float32, within the range; NaN only where the scale is not finite
    if dtype != torch.int8:
        return values.to(dtype).contiguous(), scale
    codes = values.round_().to(dtype).contiguous()
    return codes.masked_fill_(~scale.isfinite().unsqueeze(-1), 0), scale
