"""Paged attention in decoding, even and skewed, against torch's way and other libraries."""

import functools

import torch
import torch.nn.functional as F
from _common import Case, main, peer

from fusedops import paged_attention

FA3_KVCACHE = peer("fa3_fwd_interface", "flash_attn_with_kvcache") or peer(
    "flash_attn_interface", "flash_attn_with_kvcache"
)
FA2_KVCACHE = peer("flash_attn", "flash_attn_with_kvcache")
FLASHINFER_DECODE = peer("flashinfer", "BatchDecodeWithPagedKVCacheWrapper")

HEADS, KV_HEADS, DIM = 32, 8, 128  # Llama 3 8B
EVEN = ((32, 4096), (1, 8192), (8, 8192), (64, 8192), (128, 4096), (256, 2048), (1, 131072), (4, 32768))  # (B, S)
SKEWED = (131072, *[4096] * 31)
STEPS = (2, 4, 12, 16, 24, 48)  # batches between those of EVEN, at 8192 tokens: time must grow evenly
SMALL = 9, 3, 64  # heads, key heads and head size on a CPU: SmolLM2-135M


def pool_of(lengths, page_size, heads, dim, dtype, device):
    """(k_cache, v_cache, block_table, cache_seqlens) of sequences on pages in random order, random data."""
    counts = [-(-length // page_size) for length in lengths]
    caches = [torch.randn(sum(counts), page_size, heads, dim, device=device).to(dtype) for _ in "kv"]
    order = iter(torch.randperm(sum(counts)).split(counts))
    rows = [F.pad(pages, (0, max(counts) - len(pages))) for pages in order]
    table = torch.stack(rows).to(device, torch.int32)
    return *caches, table, torch.tensor(lengths, dtype=torch.int32, device=device)


def gathered(q, k_cache, v_cache, table, lengths, limit):
    """torch: all pages copied to where SDPA wants them, and a mask; `limit` is the longest length."""
    keys, values = (cache[table.long()].flatten(1, 2)[:, :limit].transpose(1, 2) for cache in (k_cache, v_cache))
    mask = torch.arange(limit, device=q.device) < lengths[:, None]
    attend = functools.partial(F.scaled_dot_product_attention, enable_gqa=True)
    return attend(q[:, :, None], keys, values, attn_mask=mask[:, None, None]).squeeze(2)


def fa3_kvcache(q, k_cache, v_cache, table, lengths):
    return FA3_KVCACHE(q[:, None], k_cache, v_cache, cache_seqlens=lengths, page_table=table)[:, 0]


def fa2_kvcache(q, k_cache, v_cache, table, lengths):
    """Takes pages of multiples of 256 tokens alone, and says so."""
    return FA2_KVCACHE(q[:, None], k_cache, v_cache, cache_seqlens=lengths, block_table=table)[:, 0]


def flashinfer(lengths, page_size, heads):
    """FlashInfer's wrapper, on the tensor cores, planned once for these lengths; its pages are those of the table."""
    planned = []

    def plan(q, table):
        space = torch.empty(2**27, dtype=torch.uint8, device=q.device)
        wrapper = FLASHINFER_DECODE(space, "NHD", use_tensor_cores=True)
        counts = torch.tensor([-(-length // page_size) for length in lengths], dtype=torch.int32)
        starts = F.pad(counts.cumsum(0, dtype=torch.int32), (1, 0))
        used = torch.arange(table.shape[1]) < counts[:, None]
        last = torch.tensor([(length - 1) % page_size + 1 for length in lengths], dtype=torch.int32)
        wrapper.plan(starts, table[used.to(table.device)], last, *heads, page_size, q_data_type=q.dtype)
        return wrapper

    def call(q, k_cache, v_cache, table, seqlens):
        if not planned:
            planned.append(plan(q, table))
        return planned[0].run(q, (k_cache, v_cache))

    return call


def decode_case(lengths, page_size, device, dtype, name, cache_dtype=None, sizes=(HEADS, KV_HEADS, DIM)):
    """One new token for each sequence; the bytes are those of the tokens that there are."""
    heads, kv_heads, dim = sizes

    def make(seed):
        q = torch.randn(len(lengths), heads, dim, device=device).to(dtype)
        return q, *pool_of(lengths, page_size, kv_heads, dim, cache_dtype or dtype, device)

    peers = {} if cache_dtype else {"torch": functools.partial(gathered, limit=max(lengths))}
    if device == "cuda" and not cache_dtype:
        peers |= {"fa3": fa3_kvcache} if FA3_KVCACHE else {}
        peers |= {"flash-attn 2": fa2_kvcache} if FA2_KVCACHE else {}
        peers |= {"flashinfer": flashinfer(lengths, page_size, (heads, kv_heads, dim))} if FLASHINFER_DECODE else {}
        peers = peers if sum(lengths) <= 2**19 else {k: v for k, v in peers.items() if k != "torch"}
    tokens, itemsize = sum(lengths), (cache_dtype or dtype).itemsize
    moved = 2 * tokens * kv_heads * dim * itemsize + 2 * len(lengths) * heads * dim * dtype.itemsize
    goal = (1.0, 0.90) if 2 * tokens * kv_heads * dim * itemsize >= 2**28 and not cache_dtype else (None, None)
    candidates = {"fusedops": paged_attention, **peers}
    cost, check = (moved, 4 * tokens * heads * dim), None if tokens > 2**15 else _error
    name, dtype = f"{name}, page {page_size}", cache_dtype or dtype
    return Case("paged_attention", name, dtype, make, candidates, {}, cost=cost, goal=goal, check=check)


def _error(case, arguments, out):
    """How far our result is from SDPA in float64 on the same keys."""
    q, k_cache, v_cache, table, lengths = arguments
    wide = [t.double() for t in (q, k_cache, v_cache)]
    wanted = gathered(*wide, table, lengths, int(lengths.max()))
    return float((out.double() - wanted).norm() / wanted.norm())


def cases(device, quick):
    """Goals 3 and 4: even batches, one long sequence among short ones beside as many keys shared evenly, and steps."""
    if device == "cpu":
        for lengths in ([100] * 8, [512, 16, 16, 16]):
            yield decode_case(lengths, 16, device, torch.float32, f"{len(lengths)} of {max(lengths)}", sizes=SMALL)
        return
    dtype, even = torch.bfloat16, [sum(SKEWED) // len(SKEWED)] * len(SKEWED)
    for batch, length in EVEN[:2] if quick else EVEN:
        for page_size in (16, 64):
            yield decode_case([length] * batch, page_size, device, dtype, f"{batch}x{length}")
    yield decode_case(even, 16, device, dtype, "even")
    yield decode_case(SKEWED, 16, device, dtype, "1x128k and 31x4k")
    for code in (torch.float8_e4m3fn, torch.int8):
        yield decode_case([4096] * 32, 16, device, dtype, "32x4096", code)
    for batch in () if quick else STEPS:
        yield decode_case([8192] * batch, 16, device, dtype, f"{batch}x8192")


if __name__ == "__main__":
    main(cases)
