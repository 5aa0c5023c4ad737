"""Writing into the paged cache by torch's own operators: the CPU's way, and other devices'."""

import torch

LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
LEAST_SCALE = 2.0**-126  # the smallest normal number: a row of zeros has a scale too


def write_kv_cache(k, v, k_cache, v_cache, slot_mapping, k_scale, v_scale):
    """The slots that are there, each element by one assignment."""
    if k.is_meta:
        return
    num_pages, page_size = k_cache.shape[:2]
    keep = (slot_mapping >= 0) & (slot_mapping < num_pages * page_size)
    if not bool(keep.all()):
        slot_mapping, k, v = slot_mapping[keep], k[keep], v[keep]
    places = slot_mapping // page_size, slot_mapping % page_size
    _write(k, k_cache, k_scale, places)
    _write(v, v_cache, v_scale, places)


def rotary_write_kv_cache(q, k, v, cos, sin, k_cache, v_cache, slot_mapping, interleaved, k_scale, v_scale):
    """The rotation of one long sequence, then the write."""
    cos, sin = cos[None], sin[None]
    turned, keys = torch.ops.fusedops.rotary.default(q[None], k[None], cos, sin, interleaved)
    write_kv_cache(keys[0], v, k_cache, v_cache, slot_mapping, k_scale, v_scale)
    return torch.empty_like(q).copy_(turned[0])


def _write(x, cache, scale, places):
    if cache.dtype == x.dtype:
        cache[places] = x
        return
    x = x.float()
    largest = LARGEST[cache.dtype]
    if scale is None:
        codes = x
    elif scale.dim() == 3:
        each = (x.abs().amax(-1) / largest).clamp_(min=LEAST_SCALE)
        scale[places] = each
        codes = x / each[..., None]
    else:
        codes = x / scale.reshape(-1, 1)
    if cache.dtype == torch.int8:
        cache[places] = codes.nan_to_num(0.0).clamp_(-128.0, 127.0).round_().to(torch.int8)
    else:
        cache.view(torch.uint8)[places] = codes.clamp(-largest, largest).to(cache.dtype).view(torch.uint8)
