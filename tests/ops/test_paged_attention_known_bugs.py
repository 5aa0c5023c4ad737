"""Faults that paged attention kernels and caches of others had, each with its thread, in every implementation."""

import pytest
import torch

from fusedops import merge_attention, paged_attention, write_kv_cache
from fusedops.testing import make_tensor
from fusedops.testing.inputs import huge_stride_rows
from tests.ops.common import FUSED, IMPLEMENTATIONS, using
from tests.ops.paged_problems import INF, LARGEST_ID, NAN, problem

EVERY_IMPLEMENTATION = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


@EVERY_IMPLEMENTATION
def test_b03_b04_sequences_without_keys(implementation):
    """B03, B04: flashinfer-ai/flashinfer#4051, #4484, vllm-project/vllm#39148, #28181, #49294: NaN, or a finite lse."""
    found = problem([(1, 0), (3, 0), (1, 7), (5, 2)], seed=1)
    with using(implementation):
        out, lse = found.run()
        found.check(out, lse)
        merged, total = merge_attention(out, lse, torch.full_like(out, NAN), torch.full_like(lse, -INF))
    empty = [0, 1, 2, 3, 5, 6, 7]
    assert not out[empty].any() and lse[:, empty].isneginf().all()
    assert torch.equal(merged, out) and torch.equal(total, lse)


@EVERY_IMPLEMENTATION
@pytest.mark.parametrize("cache", ["same", "int8", "fp8"])
@pytest.mark.parametrize("filling", [NAN, INF])
def test_b06_unused_slots_change_nothing(implementation, cache, filling):
    """B06: Dao-AILab/flash-attention#1745, #2374, vllm-project/vllm#936, ROCm/aiter#5401: 0 * NaN of unused values."""
    found = problem([(1, 13), (4, 30), (1, 1)], seed=2, cache=cache, window_size=(9, 0))
    with using(implementation):
        found.check(*found.run(filling=filling))
        for a, b in zip(found.run(filling=filling), found.run(filling=0.0)):
            assert torch.equal(a, b)


@EVERY_IMPLEMENTATION
def test_b07_padding_tokens_do_not_reach_others(implementation):
    """B07: huggingface/transformers#46765: padding wrote NaN to a page that all sequences read from."""
    pool = torch.zeros(2, 4, 8, 1, 16)
    caches = pool[0, 1:3], pool[1, 1:3]  # of others are the pages around them
    k = make_tensor((6, 1, 16), torch.float32, seed=3)
    k[4:] = NAN
    with using(implementation):
        write_kv_cache(k, k, *caches, torch.tensor([0, 1, 2, 3, -1, -1]))
        out = paged_attention(make_tensor((2, 1, 16), torch.float32, seed=4), *caches, int32([0], [1]), int32(4, 8))
    assert out.isfinite().all() and not pool[:, [0, 3]].any() and not pool[:, 1, 4:].any()


def far_caches(last_page, stride, num_heads=1, both=False):
    """k_cache and v_cache of last_page + 1 pages, `stride` elements apart; memory is committed where it is touched."""
    size = 8 * num_heads * 16
    pools = [
        huge_stride_rows(torch.zeros(2, 2 * size, dtype=torch.float16), last_offset=last_page * stride)
        for _ in range(1 if both else 2)
    ]
    shape, strides = (last_page + 1, 8, num_heads, 16), (stride, 16 * num_heads, 16, 1)
    if both:
        return pools[0].as_strided(shape, strides), pools[0].as_strided(shape, strides, size)
    return [pool.as_strided(shape, strides) for pool in pools]


FAR = {
    "b13": ("vllm-project/vllm#47671: page id times stride in int32", 7769, 480 * 576, False),
    "b14": ("vllm-project/vllm#50427, #50483: the stride of a page spans keys and values", 7769, 480 * 576, True),
    "b15": ("vllm-project/vllm#1486: 64K pages", 65537, 32768, False),
    "b18": ("Dao-AILab/flash-attention#772: a stride of 2**30", 3, 2**30, False),
}


@pytest.mark.parametrize("implementation", FUSED)
@pytest.mark.parametrize("name", FAR)
def test_b13_b14_b15_b18_pages_beyond_int32(implementation, name):
    """Written, read back, and the same as with pages side by side."""
    _, last, stride, both = FAR[name]
    caches = far_caches(last, stride, both=both)
    near = [torch.zeros(4, 8, 1, 16, dtype=torch.float16) for _ in "kv"]
    k, v = (make_tensor((30, 1, 16), torch.float16, seed=seed) for seed in (1, 2))
    q = make_tensor((1, 2, 16), torch.float16, seed=3)
    pages = torch.arange(last - 3, last + 1)
    token = torch.arange(30)
    with using(implementation):
        write_kv_cache(k, v, *caches, pages[token // 8] * 8 + token % 8)
        write_kv_cache(k, v, *near, token)
        for far, close in zip(caches, near):
            assert torch.equal(far[last - 3 :], close)
        found = paged_attention(q, *caches, pages.int()[None], int32(30), return_lse=True)
        wanted = paged_attention(q, *near, int32([0, 1, 2, 3]), int32(30), return_lse=True)
    assert all(map(torch.equal, found, wanted))


@EVERY_IMPLEMENTATION
def test_b26_lengths_beyond_the_table(implementation):
    """B26: Dao-AILab/flash-attention#2709, #2711: the table was read past its columns; here lies another's table."""
    found = problem([(1, 32), (1, 20)], seed=5)
    (q, k, v, table, _), _ = found.call(page_size=8, spare=4)
    narrow = table[:, :2]  # the next columns hold pages that exist
    with using(implementation):
        for length in (17, 2**31 - 1):
            out, lse = paged_attention(q, k, v, narrow, int32(length, 16), return_lse=True)
            wanted = paged_attention(q, k, v, narrow.contiguous(), int32(16, 16), return_lse=True)
            assert torch.equal(out, wanted[0]) and torch.equal(lse, wanted[1])
        out, lse = paged_attention(q, k, v, narrow, int32(-1, -(2**31)), return_lse=True)
    assert not out.any() and lse.isneginf().all()


@EVERY_IMPLEMENTATION
@pytest.mark.parametrize("splits", [None, 3])
@pytest.mark.parametrize("cache", ["same", "int8", "fp8"])
@pytest.mark.parametrize("bad", [-1, LARGEST_ID, -(2**31), "num_pages"])
def test_b27_pages_that_do_not_exist(implementation, bad, cache, splits):
    """B27: microsoft/onnxruntime#32391: one bound was checked. Who sees such a key gets NaN, nobody else does."""
    found = problem([(1, 30), (4, 30), (1, 11)], seed=6, cache=cache, window_size=(12, 0))
    args, kwargs = found.call(page_size=8)
    with using(implementation):
        wanted = paged_attention(*args, return_lse=True, num_splits=splits, **kwargs)
        args[3][1, 3] = args[1].shape[0] if bad == "num_pages" else bad  # tokens 24 to 29 of the second sequence
        args[3][0, 0] = args[3][1, 3]  # out of the window: nobody sees it
        out, lse = paged_attention(*args, return_lse=True, num_splits=splits, **kwargs)
    damaged = slice(1, 5)
    assert out[damaged].isnan().all() and lse[:, damaged].isnan().all()
    keep = [0, 5]
    assert torch.equal(out[keep], wanted[0][keep]) and torch.equal(lse[:, keep], wanted[1][:, keep])


@EVERY_IMPLEMENTATION
def test_b28_canary_pages(implementation):
    """B28: Dao-AILab/flash-attention#638: an append past the end changed other tensors."""
    pool = make_tensor((6, 8, 1, 16), torch.float32, seed=7)
    before = pool.clone()
    k = make_tensor((4, 1, 16), torch.float32, seed=8)
    with using(implementation):
        write_kv_cache(k, k, pool[1:3], pool[3:5], torch.tensor([15, 16, 17, 1000]))
    changed = (pool != before).flatten(1).any(1).tolist()
    assert changed == [False, False, True, False, True, False]


@EVERY_IMPLEMENTATION
def test_b29_starts_that_run_past_the_queries(implementation):
    """B29: flashinfer-ai/flashinfer#362: their number is checked (see the refusals); bad values stay inside q."""
    found = problem([(2, 9), (1, 17)], seed=9)
    (q, k, v, table, seqlens), kwargs = found.call(page_size=8)
    wanted = paged_attention(q, k, v, table, seqlens, **kwargs)
    buffer = torch.full((9, *q.shape[1:]), NAN)
    buffer[:3] = q
    with using(implementation):
        for starts in (int32(0, 2, 900), int32(0, 2, LARGEST_ID)):
            out = paged_attention(buffer[:3], k, v, table, seqlens, cu_seqlens_q=starts, max_seqlen_q=2)
            torch.testing.assert_close(out, wanted)
        for starts in (int32(-5, 2, 3), int32(0, -7, 3)):
            paged_attention(buffer[:3], k, v, table, seqlens, cu_seqlens_q=starts, max_seqlen_q=2)


@EVERY_IMPLEMENTATION
@pytest.mark.parametrize("page_size", [1, 8, 16, 32, 64, 128, 136, 248, 256])
def test_b30_page_sizes(implementation, page_size):
    """B30: flashinfer-ai/flashinfer#4347: wrong beyond 128. 544 and other sizes are refused."""
    found = problem([(1, 300), (2, 257)], seed=10)
    with using(implementation):
        found.check(*found.run(page_size=page_size))
    for refused in (0, 4, 7, 264, 544):
        caches = [torch.zeros(1, refused, 1, 16) for _ in "kv"]
        with pytest.raises(NotImplementedError, match=f"page_size must be .* got {refused}"):
            paged_attention(found.q[:1], *caches, int32([0]), int32(1))


@EVERY_IMPLEMENTATION
@pytest.mark.parametrize("slot", [16, 16 + 31, 2**31, 2**62, -2, -(2**63)])
def test_b31_every_index_at_its_bound(implementation, slot):
    """B31: vllm-project/vllm#49081: an id past the end wrote into the next request's memory."""
    pool = make_tensor((8, 8, 1, 16), torch.float32, seed=11)
    before = pool.clone()
    k = make_tensor((1, 1, 16), torch.float32, seed=12)
    with using(implementation):
        write_kv_cache(k, k, pool[2:4], pool[4:6], torch.tensor([slot]))
    assert torch.equal(pool, before)
