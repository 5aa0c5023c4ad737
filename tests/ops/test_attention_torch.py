"""attention on the CPU by torch's kernel: 16-bit tensors in chunks of batches and key heads."""

import pytest
import torch

from fusedops import attention
from fusedops.ops.attention import reference
from fusedops.ops.attention._torch import flash
from fusedops.testing import assert_accurate, make_tensor

BATCH, HEADS, KV_HEADS, DIM = 3, 10, 5, 16
MASKS = [None, *((kind, sizes) for kind in ("bool", "additive") for sizes in ("....", "b...", ".h..", "bhqk"))]


def masked(given, num_queries, num_keys):
    """A mask of a kind that is one value wide where a letter is missing; the first query of a batch sees nothing."""
    if given is None:
        return None
    kind, sizes = given
    whole = zip(sizes, (BATCH, HEADS, num_queries, num_keys), strict=True)
    values = make_tensor([1 if letter == "." else size for letter, size in whole], torch.float32, seed=3)
    mask = values > -0.5 if kind == "bool" else values
    if "k" in sizes:
        mask[0, :, 0] = False if kind == "bool" else float("-inf")
    return mask if kind == "bool" else mask.bfloat16()


@pytest.mark.parametrize("chunk", [1, 200, 3000, 9000, 1 << 30])  # elements: a head, some, a batch, two, all
@pytest.mark.parametrize("num_queries, causal", [(1, False), (40, False), (40, True)])
def test_chunks_are_put_together(monkeypatch, chunk, num_queries, causal):
    """Whatever a chunk holds, and whichever dimensions the mask has; with one query heads share keys too."""
    calls, forward = [], flash._forward
    monkeypatch.setattr(flash, "CHUNK_COPIES", chunk)
    monkeypatch.setattr(flash, "shares_reading", lambda heads, kv_heads, *sizes: heads > kv_heads)
    monkeypatch.setattr(
        flash, "_forward", lambda *args, **options: calls.append(args[1].shape[:2]) or forward(*args, **options)
    )
    monkeypatch.setattr(flash, "blocks", None)  # nothing is to be doubted
    shapes = (num_queries, HEADS), (40, KV_HEADS), (40, KV_HEADS)
    q, k, v = (make_tensor((BATCH, *shape, DIM), torch.bfloat16, seed=i) for i, shape in enumerate(shapes))
    for given in MASKS[:1] if causal else MASKS:
        mask = masked(given, num_queries, 40)
        calls.clear()
        out, lse = attention(q, k, v, causal=causal, mask=mask, return_lse=True)
        assert sum(batches * heads for batches, heads in calls) == BATCH * KV_HEADS
        wide = None if mask is None else mask if mask.dtype == torch.bool else mask.double()
        options = None, None, wide, None, None, None, DIM**-0.5, causal, -1, -1, 0.0
        truth, lse_truth = reference.attention(q.double(), k.double(), v.double(), *options)
        assert_accurate(out, truth)
        assert_accurate(lse, lse_truth, name="lse")


def test_chunks_have_a_head_for_every_thread(monkeypatch):
    """And are of one size: a head left over would run on one thread, and read the keys for each of its queries."""
    seen, forward = [], flash._forward
    monkeypatch.setattr(flash, "CHUNK_COPIES", 1)
    monkeypatch.setattr(
        flash, "_forward", lambda *args, **options: seen.append(args[1].shape[1]) or forward(*args, **options)
    )
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    for kv_heads, heads in ((3, [3]), (4, [2, 2]), (5, [3, 2]), (1, [1])):
        seen.clear()
        attention(*(torch.ones(1, 1, count, 16).half() for count in (kv_heads, kv_heads, kv_heads)))
        assert seen == heads
