"""The meaning of quantising. Everything is float32, and every rounding is part of the contract."""

import torch
import torch.nn.functional as F

BLOCK = 128
LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}


def quantize_int8(x, granularity):
    """Codes from -127 to 127 and their scales."""
    return _quantized(x, granularity, torch.int8)


def quantize_fp8(x, granularity, dtype):
    """Codes of a float8 dtype and their scales."""
    return _quantized(x, granularity, dtype)


def quantize_scaled(x, scale, granularity, dtype):
    """``x * (1 / scale)``, rounded to nearest even and cut to the range; in int8 NaN is 0."""
    codes = x.float() * (1.0 / _spread(scale, x.shape, granularity))
    if dtype == torch.int8:
        return torch.where(codes.isnan(), 0.0, codes).clamp(-127, 127).round().to(torch.int8)
    return codes.clamp(-LARGEST[dtype], LARGEST[dtype]).to(dtype)


def _quantized(x, granularity, dtype):
    """The scale brings the largest value to the largest code; it is never below the smallest normal number."""
    scale = (_largest(x.float().abs(), granularity) / LARGEST[dtype]).clamp(min=2.0**-126)
    return quantize_scaled(x, scale, granularity, dtype), scale


def _largest(size, granularity):
    """The largest value of each group, 0 of an empty one: whole rows, the whole tensor, 128 of a row, 128 by 128."""
    if granularity == "row":
        return F.pad(size, (0, 1)).amax(-1)
    if granularity == "tensor":
        return F.pad(size.flatten(), (0, 1)).amax()
    size = F.pad(size, (0, -size.shape[-1] % BLOCK)).unflatten(-1, (-1, BLOCK)).amax(-1)
    if granularity == "block":
        return size
    return F.pad(size, (0, 0, 0, -size.shape[-2] % BLOCK)).unflatten(-2, (-1, BLOCK)).amax(-2)


def _spread(scale, shape, granularity):
    """The scale of every element."""
    if scale.numel() == 1 or granularity == "tensor":
        return scale.reshape(())
    if granularity == "row":
        return scale.unsqueeze(-1)
    scale = scale.repeat_interleave(BLOCK, -1)[..., : shape[-1]]
    return scale if granularity == "block" else scale.repeat_interleave(BLOCK, -2)[..., : shape[-2], :]
