"""Stored values of narrow types, "codes", by torch's own operators: largest codes, scales, and saturating casts."""

import torch

from fusedops._core.device import MIN_FP8_CAPABILITY, limits

NAMES = {torch.int8: "int8", torch.float8_e4m3fn: "fp8e4nv", torch.float8_e5m2: "fp8e5"}  # in Triton
LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}
DTYPES = tuple(LARGEST)
LEAST_SCALE = 2.0**-126  # the smallest normal number: zeros have a scale too, and its reciprocal is finite
LEAST_STEP = {torch.float16: 2.0**-24, torch.bfloat16: LEAST_SCALE, torch.float32: LEAST_SCALE}


def scale_of(top, dtype):
    """The scale that brings the largest absolute value to the largest code; NaN stays NaN."""
    return (top / LARGEST[dtype]).clamp_(min=LEAST_SCALE)


def rounded_up(scale, dtype):
    """float32 scales rounded up to a dtype, in float32: by none of them does a value leave the codes' range."""
    scale = scale.clamp(min=LEAST_STEP[dtype])
    if dtype == torch.float32:
        return scale
    rounded = scale.to(dtype)
    return torch.where(rounded.float() < scale, (rounded.view(torch.int16) + 1).view(dtype), rounded).float()


def encoded(values, dtype, lowest=-127.0):
    """float32 values, which are changed, as codes: to nearest even, cut to the range; in int8 NaN is 0."""
    if dtype == torch.int8:
        return values.nan_to_num_(0.0).clamp_(lowest, LARGEST[dtype]).round_().to(dtype)
    return values.clamp_(-LARGEST[dtype], LARGEST[dtype]).to(dtype)


def quantized_rows(x, dtype):
    """Codes of rows ``[..., K]`` and the scale of each, computed from its largest value; both are contiguous."""
    if not x.numel():
        return x.new_empty(x.shape, dtype=dtype), x.new_full(x.shape[:-1], LEAST_SCALE, dtype=torch.float32)
    scale = scale_of(x.abs().amax(-1).float(), dtype).contiguous()  # aminmax of rows is many times slower
    values = x * scale.reciprocal().unsqueeze(-1)  # float32, within the range; NaN only where the scale is not finite
    if dtype != torch.int8:
        return values.to(dtype).contiguous(), scale
    codes = values.round_().to(dtype).contiguous()
    if not x.is_cpu or not scale.amax().item() < float("inf"):  # elsewhere looking would wait for the device
        codes.masked_fill_(~scale.isfinite().unsqueeze(-1), 0)
    return codes, scale


def as_float32(x):
    """float8 as float32 by a table, which takes a tenth of the time of torch's conversion."""
    codes = torch.arange(256, dtype=torch.uint8, device=x.device).view(x.dtype).float()
    return codes.index_select(0, x.view(torch.uint8).flatten().int()).view(x.shape)


def empty_rows(x, dtype):
    """Where the codes of rows and their scales go."""
    return x.new_empty(x.shape, dtype=dtype), x.new_empty(x.shape[:-1], dtype=torch.float32)


def as_stored(values):
    """(A tensor of codes as kernels store it, their constants CODE and BY_INTEGERS)."""
    by_integers = values.dtype != torch.int8 and limits(values.device).capability < MIN_FP8_CAPABILITY
    return values.view(torch.uint8) if by_integers else values, NAMES[values.dtype], by_integers


def example(name, target):
    """The same for a launch without tensors: (Triton's name of the stored type, CODE, BY_INTEGERS)."""
    by_integers = name != "int8" and target.capability < MIN_FP8_CAPABILITY
    return "i8" if name == "int8" else "u8" if by_integers else name, name, by_integers
