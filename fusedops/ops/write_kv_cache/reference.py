"""The meaning of a write into the paged cache. Roundings that are part of the contract are written out."""

import torch


def write_kv_cache(k, v, k_cache, v_cache, slot_mapping, k_scale, v_scale):
    """Token t goes to page ``slot // page_size``, place ``slot % page_size``; slots that do not exist are left out."""
    page_size = k_cache.shape[1]
    for token, slot in enumerate(slot_mapping.tolist()):
        if 0 <= slot < k_cache.shape[0] * page_size:
            place = slot // page_size, slot % page_size
            for x, cache, scale in ((k, k_cache, k_scale), (v, v_cache, v_scale)):
                if scale is not None and scale.dim() == 3:
                    scale[place] = _scales(x[token], cache.dtype)
                    codes = _codes(x[token], scale[place], cache.dtype)
                else:
                    codes = _codes(x[token], scale, cache.dtype)
                _bytes(cache)[place] = _bytes(codes)


def _scales(heads, dtype):
    """[Hk]: what brings the largest value of each head to the largest code; never below the smallest normal number."""
    largest = 127.0 if dtype == torch.int8 else 448.0
    return (heads.float().abs().amax(-1) / largest).clamp(min=2.0**-126)


def _codes(heads, scale, dtype):
    """``heads / scale`` in float32, rounded to nearest even, cut to the range; in int8 NaN is 0."""
    if dtype == heads.dtype or dtype not in (torch.int8, torch.float8_e4m3fn):
        return heads.to(dtype)
    values = heads.float() if scale is None else heads.float() / scale.reshape(-1, 1)
    if dtype == torch.int8:
        return torch.where(values.isnan(), 0.0, values).clamp(-128, 127).round().to(torch.int8)
    return values.clamp(-448, 448).to(dtype)


def _bytes(tensor):
    """float8 as the bytes that it is: torch does not assign it at places."""
    return tensor.view(torch.uint8) if tensor.dtype == torch.float8_e4m3fn else tensor


def rotary_write_kv_cache(q, k, v, cos, sin, k_cache, v_cache, slot_mapping, interleaved, k_scale, v_scale):
    """Queries and keys turned by their tokens' angles and rounded to their dtype; the keys written as they are then."""
    write_kv_cache(_rotated(k, cos, sin, interleaved), v, k_cache, v_cache, slot_mapping, k_scale, v_scale)
    return _rotated(q, cos, sin, interleaved)


def _rotated(x, cos, sin, interleaved):
    """``out = x * cos + pair(x) * sin`` on the first R elements of each head; the others pass."""
    wide = torch.promote_types(x.dtype, torch.float32)
    turned, rest = x[..., : cos.shape[-1]].to(wide), x[..., cos.shape[-1] :]
    cos, sin = cos.to(wide).unsqueeze(-2), sin.to(wide).unsqueeze(-2)
    if interleaved:
        pair = torch.stack((-turned[..., 1::2], turned[..., 0::2]), -1).flatten(-2)
    else:
        first, second = turned.chunk(2, -1)
        pair = torch.cat((-second, first), -1)
    return torch.cat(((turned * cos + pair * sin).to(x.dtype), rest), -1)
