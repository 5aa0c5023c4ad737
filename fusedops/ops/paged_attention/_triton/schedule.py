"""Which part of which sequence a program takes, from lengths in device memory.

Few programs and long keys are split. A slot is a range of keys of one sequence. Every sequence has one slot, and the
`extra` slots of a launch go to where the keys are: a range is at least `total / extra` blocks long, whatever the
lengths, so that one long sequence among short ones is cut into more parts. Only sequences whose queries fit one tile
are split; the others have tiles enough. With a fixed number of splits a sequence's parts depend on nothing but itself.
"""

import triton
import triton.language as tl

MIN_SPLIT_KEYS = tl.constexpr(256)  # below which a part costs more than it saves


@triton.jit
def lengths_of(b, seqlens_ptr, cu_q_ptr, T, capacity, mask, IS_VARLEN: tl.constexpr):
    """(first query, queries, keys) of sequences `b`, cut to what q and the table hold."""
    num_keys = tl.minimum(tl.maximum(tl.load(seqlens_ptr + b, mask=mask, other=0), 0), capacity)
    if IS_VARLEN:
        start = tl.minimum(tl.maximum(tl.load(cu_q_ptr + b, mask=mask, other=0), 0), T)
        end = tl.minimum(tl.load(cu_q_ptr + b + 1, mask=mask, other=0), T)
        return start, tl.maximum(end - start, 0), num_keys
    else:
        return b, (num_keys >= 0).to(tl.int32), num_keys


@triton.jit
def first_block(num_queries, num_keys, window_left, HAS_LEFT: tl.constexpr, BLOCK_N: tl.constexpr):
    """The block of the first key that any query of a sequence may see."""
    if HAS_LEFT:
        return tl.maximum(num_keys - num_queries - window_left, 0) // BLOCK_N
    else:
        return num_keys * 0


@triton.jit
def _parts_of_all(
    seqs, seqlens_ptr, cu_q_ptr, B, T, capacity, pack, extra, window_left,
    IS_VARLEN: tl.constexpr, HAS_LEFT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Into how many parts each sequence is cut; at most extra + B in all, and none beyond the last sequence."""
    mask = seqs < B
    _, num_queries, num_keys = lengths_of(seqs, seqlens_ptr, cu_q_ptr, T, capacity, mask, IS_VARLEN)
    blocks = tl.cdiv(num_keys, BLOCK_N) - first_block(num_queries, num_keys, window_left, HAS_LEFT, BLOCK_N)
    blocks = tl.where(mask & (num_queries * pack <= BLOCK_M) & (num_queries > 0), blocks, 0)
    total = tl.sum(blocks.to(tl.int64), 0)
    least = tl.maximum(tl.cdiv(total, extra), MIN_SPLIT_KEYS // BLOCK_N).to(tl.int32)
    return tl.where(mask, tl.maximum(tl.cdiv(blocks, least), 1), 0)


@triton.jit
def parts_of(
    b, seqlens_ptr, cu_q_ptr, num_queries, B, T, capacity, pack, extra, num_splits, window_left,
    SPLITS: tl.constexpr, IS_VARLEN: tl.constexpr, HAS_LEFT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """(first slot, number of parts) of sequence b."""
    if SPLITS == "fixed":
        return b * num_splits, tl.where(num_queries * pack <= BLOCK_M, num_splits, 1)
    else:
        seqs = tl.arange(0, BLOCK_B)
        parts = _parts_of_all(
            seqs, seqlens_ptr, cu_q_ptr, B, T, capacity, pack, extra, window_left, IS_VARLEN, HAS_LEFT, BLOCK_M, BLOCK_N
        )
        return tl.sum(tl.where(seqs < b, parts, 0), 0), tl.sum(tl.where(seqs == b, parts, 0), 0)


@triton.jit
def sequence_of(
    slot, seqlens_ptr, cu_q_ptr, B, T, capacity, pack, extra, num_splits, window_left,
    SPLITS: tl.constexpr, IS_VARLEN: tl.constexpr, HAS_LEFT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """The sequence that a slot belongs to; B where it belongs to none."""
    if SPLITS == "none":
        return slot
    elif SPLITS == "fixed":
        return slot // num_splits
    else:
        seqs = tl.arange(0, BLOCK_B)
        parts = _parts_of_all(
            seqs, seqlens_ptr, cu_q_ptr, B, T, capacity, pack, extra, window_left, IS_VARLEN, HAS_LEFT, BLOCK_M, BLOCK_N
        )
        return tl.sum(((tl.cumsum(parts, 0) <= slot) & (seqs < B)).to(tl.int32), 0)
