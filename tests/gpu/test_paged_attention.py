"""Paged attention and the writes on a GPU: caches, splits, graphs replayed with other lengths and pages, size."""

import pytest
import torch

from fusedops import paged_attention, rotary_write_kv_cache, write_kv_cache
from fusedops.ops.write_kv_cache import reference as written
from fusedops.testing import assert_accurate
from tests.gpu.common import DEVICE, needs_gpu, randn, sized
from tests.ops.common import using
from tests.ops.paged_problems import FP8, packed_bits, problem, truth_of

pytestmark = pytest.mark.gpu

needs_fp8 = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9),
    reason="needs float8 products, compute capability 8.9 or newer",
)
CACHES = ["same", "int8", pytest.param("fp8", marks=needs_fp8)]
DECODE = sized([(1, 4097), (1, 60), (1, 0), (1, 1000)], [(1, 40), (1, 0), (1, 17)])
MIXED = sized([(1, 3000), (130, 500), (64, 64), (1, 1), (7, 4000)], [(1, 40), (9, 30), (4, 4)])


def on_device(args, kwargs):
    move = lambda value: value.to(DEVICE) if isinstance(value, torch.Tensor) else value  # noqa: E731
    return [move(arg) for arg in args], {name: move(value) for name, value in kwargs.items()}


def check(found, page_size=16, **changed):
    """Compare with float64 on the device, and two calls with each other, bit by bit."""
    args, kwargs = on_device(*found.call(page_size=page_size))
    with using("triton"):
        out, lse = paged_attention(*args, return_lse=True, **kwargs, **changed)
        again = paged_attention(*args, return_lse=True, **kwargs, **changed)
    assert torch.equal(out, again[0]) and torch.equal(lse, again[1])
    wanted, wanted_lse = truth_of(args, kwargs)
    assert_accurate(out, wanted, name="out", zeros=False)
    assert_accurate(lse, wanted_lse, name="lse", zeros=False)
    return out, lse


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("lengths", [DECODE, MIXED], ids=["decode", "mixed"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_caches_and_dtypes(dtype, lengths, cache):
    check(problem(lengths, dtype, 8, 2, sized(128, 16), cache=cache))


@pytest.mark.parametrize("dim", [40, 64, 72, 80, 96, 128, 192, 256, 512])
def test_head_sizes(dim):
    check(problem(MIXED, torch.bfloat16, 4, 2, dim))


@pytest.mark.parametrize("page_size", sized([1, 8, 16, 24, 64, 128, 256], [1, 24]))
@pytest.mark.parametrize("splits", [None, 1, 5])
def test_page_sizes_and_splits(page_size, splits):
    found = problem(DECODE, torch.bfloat16, 8, 1, sized(128, 16), seed=1)
    out, lse = check(found, page_size, num_splits=splits)
    args, kwargs = on_device(*found.call(page_size=16, seed=5))
    with using("triton"):
        other = paged_attention(*args, return_lse=True, num_splits=splits, **kwargs)
    assert torch.equal(out, other[0]) and torch.equal(lse, other[1])


@pytest.mark.parametrize("name", ["window", "softcap", "sinks", "alibi", "tree"])
def test_options(name):
    found = problem(MIXED, torch.bfloat16, 8, 2, 64, seed=2)
    longest = max(num_queries for num_queries, _ in MIXED)
    allowed = torch.rand(len(found.q), longest, generator=torch.Generator().manual_seed(0)) > 0.3
    found.options = {
        "window": {"window_size": (100, 0), "sinks": torch.randn(8)}, "softcap": {"softcap": 5.0},
        "sinks": {"sinks": torch.randn(8)}, "alibi": {"alibi_slopes": torch.rand(8) / 8},
        "tree": {"tree_mask": packed_bits(allowed)},
    }[name]  # fmt: skip
    check(found)


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_writes_are_the_reference_s(dtype, cache):
    """Keys, values, codes and scales, bit by bit."""
    total, page_size = sized(1000, 20), 16
    k, v = (randn(total, 2, 64, dtype=dtype, seed=seed) for seed in (1, 2))
    code = {"same": dtype, "int8": torch.int8, "fp8": FP8}[cache]
    slots = torch.randperm(total, device=DEVICE)
    slots[3::7] = -1
    pools = [[torch.zeros(-(-total // 16), page_size, 2, 64, device=DEVICE).to(code) for _ in "kv"] for _ in "ab"]
    scales = [[None if cache == "same" else torch.zeros(-(-total // 16), page_size, 2, device=DEVICE) for _ in "kv"]
              for _ in "ab"]  # fmt: skip
    with using("triton"):
        write_kv_cache(k, v, *pools[0], slots, k_scale=scales[0][0], v_scale=scales[0][1])
    written.write_kv_cache(k, v, *pools[1], slots, *scales[1])
    assert all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(*pools))
    assert cache == "same" or all(map(torch.equal, *scales))


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotation_and_write(interleaved):
    total = sized(333, 7)
    q, k, v = (randn(total, heads, 64, seed=heads) for heads in (8, 2, 3))
    v = v[:, :2]
    angle = randn(total, 32, dtype=torch.float32, seed=9)
    pools = [torch.zeros(-(-total // 16), 16, 2, 64, dtype=torch.bfloat16, device=DEVICE) for _ in "kv"]
    with using("triton"):
        out = rotary_write_kv_cache(
            q, k, v, angle.cos(), angle.sin(), *pools, torch.arange(total, device=DEVICE), interleaved=interleaved
        )
    cos, sin = angle.cos().double(), angle.sin().double()
    assert_accurate(out, written._rotated(q.double(), cos, sin, interleaved), zeros=False)
    found = pools[0].flatten(0, 1)[:total]
    assert_accurate(found, written._rotated(k.double(), cos, sin, interleaved), zeros=False)
    assert torch.equal(pools[1].flatten(0, 1)[:total], v)


@needs_gpu
def test_a_graph_replays_with_other_lengths_and_pages():
    """B48: NVIDIA/TensorRT-LLM#18443, #15556, alibaba/rtp-llm#378, #1084: a plan of earlier metadata was used."""
    first, second = (problem([(1, n), (1, m)], torch.bfloat16, 8, 2, 64, seed=n) for n, m in ((3000, 17), (40, 2977)))
    (args, _), (others, _) = (on_device(*found.call(page_size=16, spare=8)) for found in (first, second))
    width = min(args[3].shape[1], others[3].shape[1])
    pages = min(len(args[1]), len(others[1]))
    for call in (args, others):
        call[3] = call[3][:, :width].contiguous()
        call[1:3] = [torch.cat((cache, cache[:8])) for cache in call[1:3]]
        call[1:3] = [cache[: pages + 8] for cache in call[1:3]]
    paged_attention(*args)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = paged_attention(*args, return_lse=True)
    for old, new in zip(args, others):
        old.copy_(new)
    graph.replay()
    assert all(map(torch.equal, captured, paged_attention(*args, return_lse=True)))


@needs_gpu
def test_lengths_are_never_looked_at():
    """Nothing waits for the device: torch would raise."""
    args, kwargs = on_device(*problem(MIXED, torch.bfloat16, 8, 2, 64).call())
    paged_attention(*args, **kwargs)
    slots = torch.arange(len(args[0]), device="cuda")
    keys = args[0][:, :2].contiguous()
    torch.cuda.set_sync_debug_mode("error")
    try:
        paged_attention(*args, **kwargs)
        write_kv_cache(keys, keys, *args[1:3], slots)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_gpu
def test_bad_pages_and_slots_stay_inside():
    """B27, B28 where memory is real: a read or write outside would end the process or change the canaries."""
    pool = randn(1000, 16, 2, 64)
    before = pool.clone()
    q, table = randn(2, 8, 64), torch.tensor([[1, 2**31 - 1], [-1, -(2**31)]], dtype=torch.int32, device="cuda")
    lengths = torch.tensor([32, 2**31 - 1], dtype=torch.int32, device="cuda")
    assert paged_attention(q, pool[10:20], pool[30:40], table, lengths).isnan().all()
    slots = torch.tensor([-(2**63), 160, 2**62, 2**31], device="cuda")
    write_kv_cache(*[randn(4, 2, 64)] * 2, pool[10:20], pool[30:40], slots)
    assert torch.equal(pool, before)
