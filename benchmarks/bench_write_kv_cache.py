"""Writes of new tokens into a paged cache, with and without the rotation before, against torch's assignments."""

import torch
from _common import Case, main, peer
from _layouts import Layouts

from fusedops import rotary, rotary_write_kv_cache, write_kv_cache

FLASHINFER = peer("flashinfer", "append_paged_kv_cache")

SIZES = {"cuda": (32, 8, 128), "cpu": (9, 3, 64)}  # heads, key heads and head size: Llama 3 8B, SmolLM2-135M
TOKENS = {"cuda": (1, 128, 8192), "cpu": (1, 128)}


def indexed(k, v, k_cache, v_cache, slots):
    """torch: assignments at places."""
    k_cache.view(-1, *k.shape[1:])[slots] = k
    v_cache.view(-1, *v.shape[1:])[slots] = v


def flashinfer(k, layout):
    v, caches, *places = layout
    FLASHINFER(k, v, *places[:2], caches, *places[2:], "NHD")
    return caches


def for_flashinfer(v, k_cache, v_cache, slots):
    """All pages as those of one sequence in their order, in which a slot is a position."""
    count, page_size, positions = len(k_cache), k_cache.shape[1], slots.int()
    pages = torch.arange(count, dtype=torch.int32, device=v.device)
    bounds = torch.tensor([0, count, page_size], dtype=torch.int32, device=v.device)
    return v, (k_cache, v_cache), torch.zeros_like(positions), positions, pages, bounds[:2], bounds[2:]


def write_case(tokens, device, dtype, sizes):
    _, kv_heads, dim = sizes
    layouts = Layouts()

    def make(seed):
        k, v = (torch.randn(tokens, kv_heads, dim, device=device).to(dtype) for _ in "kv")
        caches = [torch.randn(-(-tokens // 16) * 2, 16, kv_heads, dim, device=device).to(dtype) for _ in "kv"]
        slots = torch.randperm(tokens * 2, device=device)[:tokens]
        layouts.add(seed, v, *caches, slots)
        return k, v, *caches, slots

    def ours(*arguments):
        write_kv_cache(*arguments)
        return arguments[2:4]

    def torch_way(*arguments):
        indexed(*arguments)
        return arguments[2:4]

    name = f"{tokens} tokens of {kv_heads}x{dim}"
    candidates = {"fusedops": ours, "torch": torch_way}
    if device == "cuda" and FLASHINFER:
        candidates["flashinfer"] = layouts.taking(flashinfer, for_flashinfer)
    return Case("write_kv_cache", name, dtype, make, candidates, {}, check=None)


def rotary_write_case(tokens, device, dtype, sizes):
    heads, kv_heads, dim = sizes

    def make(seed):
        q, k, v = (torch.randn(tokens, count, dim, device=device).to(dtype) for count in (heads, kv_heads, kv_heads))
        angle = torch.rand(tokens, dim, device=device)
        caches = [torch.randn(-(-tokens // 16), 16, kv_heads, dim, device=device).to(dtype) for _ in "kv"]
        return q, k, v, angle.cos().to(dtype), angle.sin().to(dtype), *caches, torch.randperm(tokens, device=device)

    def two_calls(q, k, v, cos, sin, k_cache, v_cache, slots):
        turned, keys = rotary(q[None], k[None], cos[None], sin[None])
        indexed(keys[0], v, k_cache, v_cache, slots)
        return turned[0]

    name = f"{tokens} tokens of {heads}/{kv_heads}x{dim}"
    candidates = {"fusedops": rotary_write_kv_cache, "rotary, then torch": two_calls}
    return Case("rotary_write_kv_cache", name, dtype, make, candidates, {}, check=None)


def cases(device, quick):
    """One decoding step, a small batch of them, and a prompt."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    for tokens in TOKENS[device][-1:] if quick else TOKENS[device]:
        yield write_case(tokens, device, dtype, SIZES[device])
        yield rotary_write_case(tokens, device, dtype, SIZES[device])


if __name__ == "__main__":
    main(cases)
