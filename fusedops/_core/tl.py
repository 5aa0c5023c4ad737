"""Helpers that Triton kernels of several operators share: offsets of rows, activations, codes, attention's arithmetic.

Codes are the stored values of narrow types, "int8", "fp8e4nv" or "fp8e5"; `_core/codes.py` says the same in torch.

A query at position p among the keys (p = i + Sk - Sq) may see the keys p - window_left to p + window_right; a bound
that is not there is HAS_LEFT or HAS_RIGHT False. Causal is HAS_RIGHT with window_right = 0. Scores are in natural
units, as the operators define them; weights are powers of two, `exp2((s - m) * LOG2E)`.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LEAST_SCALE = tl.constexpr(2.0**-126)  # the smallest normal number: zeros have a scale too
ROUNDER = tl.constexpr(12582912.0)  # 1.5 * 2**23: in the sum's last bits stands the integer, rounded to nearest even


@triton.jit
def row_offsets(rows, inner, stride_outer, stride_inner):
    """Element offsets of rows laid out as by `rows.collapse`, in int64 before any multiplication."""
    rows = rows.to(tl.int64)
    return (rows // inner) * stride_outer + (rows % inner) * stride_inner


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """An activation of float32 values, or "none"; where exp overflows, the quotient is the zero that it tends to."""
    if ACTIVATION == "silu":
        y = x / (1.0 + tl.exp(-x))
    elif ACTIVATION == "gelu":
        y = 0.5 * x * (1.0 + tl.math.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":  # x * (1 + tanh(u)) / 2 = x / (1 + exp(-2 u)) with 2 sqrt(2 / pi) = 1.59...
        y = x / (1.0 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))
    elif ACTIVATION == "relu":
        y = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    else:
        tl.static_assert(ACTIVATION == "none")
        y = x
    return y


@triton.jit
def paired_rows(rows):
    """Which row of a matrix each row of a tile is read from, so that 2i and 2i + 1 reach one thread.

    Where the tile's rows are those of a product, a thread of the tensor cores has its rows i and i + 8 of every 16.
    """
    return rows // 16 * 16 + rows % 8 * 2 + rows // 8 % 2


@triton.jit
def split_paired_rows(acc):
    """Rows 2i and rows 2i + 1 of a product whose tile was read by `paired_rows`; no number changes its thread."""
    HALF: tl.constexpr = acc.shape[0] // 2
    COLUMNS: tl.constexpr = acc.shape[1]
    even, odd = tl.split(acc.reshape(HALF // 8, 2, 8, COLUMNS).permute(0, 2, 3, 1))
    return even.reshape(HALF, COLUMNS), odd.reshape(HALF, COLUMNS)


@triton.jit
def split_columns(acc):
    """Columns 2i and columns 2i + 1 of a product, which stand in one thread of the tensor cores."""
    return tl.split(acc.reshape(acc.shape[0], acc.shape[1] // 2, 2))


@triton.jit
def times(x, y):
    """x * y, rounded, whatever is added behind: compilers would make one rounding of both where they stand together."""
    return tl.fma(x, y, 0.0)


@triton.jit
def size_bits(x):
    """Absolute values as bits, whose order as integers is that of the values; those of NaN are the largest."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def largest_bits(x, axis: tl.constexpr):
    """The largest absolute value along an axis, as bits; NaN where there is one."""
    return tl.max(size_bits(x), axis)


@triton.jit
def scale_of(bits, CODE: tl.constexpr):
    """The scale that brings the largest absolute value to the largest code; NaN stays NaN."""
    top = bits.to(tl.float32, bitcast=True)
    largest: tl.constexpr = 127.0 if CODE == "int8" else 448.0 if CODE == "fp8e4nv" else 57344.0
    scale = tl.div_rn(top, tl.zeros_like(top) + largest)
    return tl.maximum(scale, LEAST_SCALE, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def inverse_of(scale):
    """What a row's values are multiplied with to give its codes."""
    return tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)


@triton.jit
def encoded(x, CODE: tl.constexpr, LOWEST: tl.constexpr, BY_INTEGERS: tl.constexpr):
    """float32 values as codes, rounded to nearest even and cut to the range, for int8 from LOWEST; there NaN is 0.

    BY_INTEGERS gives the bits of a float8, as uint8, on GPUs that have no instruction for the cast.
    """
    if CODE == "int8":
        x = tl.where(x == x, tl.minimum(tl.maximum(x, LOWEST), 127.0), 0.0)
        return (x + ROUNDER).to(tl.int32, bitcast=True).to(tl.int8)
    elif BY_INTEGERS:
        return _float8_bits(x, CODE)
    elif CODE == "fp8e4nv":
        return x.to(tl.float8e4nv)  # the instruction saturates, infinity too
    else:
        return x.to(tl.float8e5)


@triton.jit
def _float8_bits(x, CODE: tl.constexpr):
    """The cast to float8 by integers; for denormal numbers by an addition whose last bits are theirs."""
    MANTISSA: tl.constexpr = 3 if CODE == "fp8e4nv" else 2
    BIAS: tl.constexpr = 7 if CODE == "fp8e4nv" else 15
    CUT: tl.constexpr = 23 - MANTISSA
    LARGEST: tl.constexpr = 0x7E if CODE == "fp8e4nv" else 0x7B
    UNIT: tl.constexpr = 2.0 ** (24 - BIAS - MANTISSA)  # its last bit is the smallest denormal number
    UNIT_BITS: tl.constexpr = (127 + 24 - BIAS - MANTISSA) << 23
    bits = x.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    normal = ((size + ((1 << (CUT - 1)) - 1) + ((size >> CUT) & 1)) >> CUT) - ((127 - BIAS) << MANTISSA)
    denormal = (tl.abs(x) + UNIT).to(tl.int32, bitcast=True) - UNIT_BITS
    code = tl.where(size < ((128 - BIAS) << 23), denormal, tl.minimum(normal, LARGEST))
    code = tl.where(x == x, code, 0x7F)
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def float8_as_half(x):
    """Bytes of float8_e4m3fn as float16 of 2**-8 times their value, for GPUs that have no instruction for it.

    A shift puts exponent and mantissa in place, whose bias is 8 less; NaN has the bits of a number there.
    """
    bits = x.to(tl.int16)
    low = bits & 0x7F
    half = ((bits & 0x80) << 8) | tl.where(low == 0x7F, 0x7E00, low << 7)
    return half.to(tl.int16).to(tl.float16, bitcast=True)


@triton.constexpr_function
def _is_interpreted():
    """Asked where the kernel is compiled, which may be another process than the one that launches it."""
    return bool(triton.knobs.runtime.interpret)


@triton.jit
def take_bytes(word, selector):
    """The bytes of a uint32 that the selector's four lowest nibbles name, 0 to 3, or zeros, 4 to 7."""
    if _is_interpreted():  # there are no instructions
        taken = word & 0
        for place in tl.static_range(4):
            nibble = (selector >> (4 * place)) & 7
            byte = (word >> ((nibble & 3) * 8)) & 0xFF
            taken = taken | (tl.where(nibble < 4, byte, 0) << (8 * place)).to(tl.uint32)
        return taken
    else:
        return tl.inline_asm_elementwise("prmt.b32 $0, $1, 0, $2;", "=r,r,r", [word, selector], tl.uint32, True, 1)


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
def online_softmax(s, m_i, l_i, unit, NATURAL: tl.constexpr):
    """Weights of a block of scores, the factor of what was summed before, and the new maximum and sum of each row."""
    if NATURAL:
        m_new = tl.maximum(m_i, tl.max(s, 1))
        m_finite = tl.where(m_new == float("-inf"), 0.0, m_new)  # a row that has seen nothing keeps weights of 0
        p = tl.exp2((s - m_finite[:, None]) * LOG2E)
        alpha = tl.exp2((m_i - m_finite) * LOG2E)
    else:
        m_new = tl.maximum(m_i, tl.max(s, 1) * unit)
        m_finite = tl.where(m_new == float("-inf"), 0.0, m_new)
        p = tl.exp2(s * unit - m_finite[:, None])
        alpha = tl.exp2(m_i - m_finite)
    return p, alpha, m_new, l_i * alpha + tl.sum(p, 1)


@triton.jit
def close_rows(acc, m, l_i, sink, HAS_SINKS: tl.constexpr, NATURAL: tl.constexpr):
    """(out, lse) of rows from maxima, sums and weighted values; the sink is one more column, without a value."""
    to_natural: tl.constexpr = 1.0 if NATURAL else LN2
    to_log2: tl.constexpr = LOG2E if NATURAL else 1.0
    if HAS_SINKS:
        sink = sink * (1.0 if NATURAL else LOG2E)
        m_all = tl.maximum(m, sink)
        m_finite = tl.where(m_all == float("-inf"), 0.0, m_all)
        share = tl.exp2((m - m_finite) * to_log2)
        acc *= share[:, None]
        l_i = l_i * share + tl.exp2((sink - m_finite) * to_log2)
        m = m_all
    empty = l_i == 0.0
    divisor = tl.where(empty, 1.0, l_i)
    out = tl.where(empty[:, None], 0.0, acc / divisor[:, None])
    return out, tl.where(empty, float("-inf"), m * to_natural + tl.log(divisor))


@triton.jit
def settled(acc):
    """float32 sums as they are, by an instruction that the compiler does not look through.

    Where a product's first operand is in registers and its sums go straight into the next one, Triton 3.7 lets the last
    products of a step run on while the next step writes those registers, which PTX forbids. Sums that something reads
    are waited for.
    """
    if not _is_interpreted():
        acc = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [acc], tl.float32, True, 1)
    return acc
