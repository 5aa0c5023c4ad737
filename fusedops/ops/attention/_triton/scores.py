"""What forward and backward share: scores from products, which key a query may see, and the ranges of blocks.

A query at position p among the keys (p = i + Sk - Sq) may see the keys p - window_left to p + window_right; a bound
that is not there is HAS_LEFT or HAS_RIGHT False. Causal is HAS_RIGHT with window_right = 0. Scores are in natural
units, as the operator defines them; weights are powers of two, `exp2((s - m) * LOG2E)`.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def tanh(x):
    """tanh to 2 float32 epsilons: an odd polynomial near 0, where the quotient of exponentials would cancel."""
    size = tl.abs(x)
    square = x * x
    small = 1.5729683e-2
    small = small * square - 5.2303962e-2
    small = small * square + 1.3315298e-1
    small = small * square - 3.3332768e-1
    small = small * square * size + size
    power = tl.exp2(size * (-2.0 * LOG2E))
    result = tl.where(size < 0.55, small, (1.0 - power) / (1.0 + power))
    return tl.where(x < 0.0, -result, result)


@triton.jit
def scaled(qk, scale, softcap, HAS_SOFTCAP: tl.constexpr):
    """Products to scores before any bias. The derivative by qk is scale, times 1 - (s / softcap)**2 with a softcap."""
    s = qk * scale
    if HAS_SOFTCAP:
        s = softcap * tanh(s / softcap)
    return s


@triton.jit
def biased(s, slope, pos_m, offs_n, bias, HAS_ALIBI: tl.constexpr, HAS_BIAS: tl.constexpr):
    """Add ALiBi, `slope` for each query at positions `pos_m`, and the tile `bias` of an additive mask."""
    if HAS_ALIBI:
        s -= slope * tl.abs(pos_m - offs_n).to(tl.float32)
    if HAS_BIAS:
        s += bias.to(tl.float32)
    return s


@triton.jit
def in_sight(pos_m, offs_n, Sk, window_left, window_right, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr):
    """Which keys `offs_n` there are and are near enough for the queries at `pos_m`; the shapes broadcast."""
    visible = offs_n < Sk
    if HAS_LEFT:
        visible = visible & (offs_n >= pos_m - window_left)
    if HAS_RIGHT:
        visible = visible & (offs_n <= pos_m + window_right)
    return visible


@triton.jit
def block_range(
    first, last, size, before, after, HAS_BEFORE: tl.constexpr, HAS_AFTER: tl.constexpr, BLOCK: tl.constexpr
):
    """Blocks of `size` items that the positions first..last reach, each from its own -before to its own +after.

    Returns (start, full_start, full_end, end), ordered. All but `end` are multiples of BLOCK (`full_end` and
    `full_start` may equal `end`). Outside start..end nothing is reached; every item of the blocks in
    full_start..full_end is there and reached from every position.
    """
    start = 0
    full_start = 0
    end = size
    full_end = size
    if HAS_BEFORE:
        start = tl.maximum(first - before, 0)
        full_start = tl.maximum(last - before, 0)
    if HAS_AFTER:
        end = tl.minimum(last + after + 1, size)
        full_end = tl.minimum(first + after + 1, size)
    start = start // BLOCK * BLOCK
    end = tl.maximum(end, start)
    full_start = (full_start + BLOCK - 1) // BLOCK * BLOCK
    full_end = tl.maximum(full_end, 0) // BLOCK * BLOCK
    no_full = full_start >= full_end
    full_start = tl.where(no_full, start, full_start)
    full_end = tl.where(no_full, start, full_end)
    return start, full_start, full_end, end


@triton.jit
def key_range(
    first_m, last_m, Sq, Sk, window_left, window_right,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """`block_range` of the keys that the queries first_m..last_m (indices, inclusive) may see."""
    shift = Sk - Sq
    return block_range(first_m + shift, last_m + shift, Sk, window_left, window_right, HAS_LEFT, HAS_RIGHT, BLOCK_N)


@triton.jit
def split_range(start, full_start, full_end, end, split, num_splits, BLOCK_N: tl.constexpr):
    """The part of a `key_range` that one of the splits takes: equal numbers of blocks, the last ones fewer or none."""
    share = tl.cdiv(tl.cdiv(end - start, BLOCK_N), num_splits) * BLOCK_N
    start += split * share
    end = tl.maximum(tl.minimum(end, start + share), start)
    full_start = tl.minimum(tl.maximum(full_start, start), end)
    full_end = tl.minimum(tl.maximum(full_end, start), end)
    return start, full_start, full_end, end


@triton.jit
def query_range(
    first_n, last_n, Sq, Sk, window_left, window_right,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """`block_range` of the queries (indices) that may see the keys first_n..last_n (inclusive)."""
    shift = Sq - Sk
    return block_range(first_n + shift, last_n + shift, Sq, window_right, window_left, HAS_RIGHT, HAS_LEFT, BLOCK_M)
