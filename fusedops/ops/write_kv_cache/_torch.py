"""Writing into the paged cache by torch's own operators: the CPU's way, and other devices'."""

import torch

from fusedops._core import codes


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
    if scale is None:
        values = x.clone()
    elif scale.dim() == 3:
        each = codes.scale_of(x.abs().amax(-1), cache.dtype)
        scale[places] = each
        values = x / each[..., None]
    else:
        values = x / scale.reshape(-1, 1)
    encoded = codes.encoded(values, cache.dtype, lowest=-128.0)
    if cache.dtype == torch.int8:
        cache[places] = encoded
    else:
        cache.view(torch.uint8)[places] = encoded.view(torch.uint8)
