"""Kernels whose threads exchange values: scans, sorts, histograms, atomics, gathers, convolutions of tuples."""

import triton
import triton.language as tl


@triton.jit
def _compose(a1, b1, a2, b2):
    """The affine map x -> a1 x + b1 followed by x -> a2 x + b2."""
    return a1 * a2, b1 * a2 + b2


@triton.jit
def scan_kernel(a_ptr, b_ptr, out_ptr, N: tl.constexpr, REVERSE: tl.constexpr):
    """The linear recurrence ``h[i] = a[i] h[i - 1] + b[i]`` of each row, forwards or backwards."""
    offs = tl.program_id(0) * N + tl.arange(0, N)
    pair = (tl.load(a_ptr + offs), tl.load(b_ptr + offs))
    _, h = tl.associative_scan(pair, 0, _compose, reverse=REVERSE)
    tl.store(out_ptr + offs, h)


@triton.jit
def cumulative_kernel(x_ptr, sum_ptr, product_ptr, ROWS: tl.constexpr, N: tl.constexpr):
    """Cumulative sums and products along the second dimension."""
    offs = tl.arange(0, ROWS)[:, None] * N + tl.arange(0, N)[None, :]
    x = tl.load(x_ptr + offs)
    tl.store(sum_ptr + offs, tl.cumsum(x, 1))
    tl.store(product_ptr + offs, tl.cumprod(x, 1))


@triton.jit
def sort_kernel(x_ptr, out_ptr, ROWS: tl.constexpr, N: tl.constexpr, DESCENDING: tl.constexpr):
    """Each row sorted."""
    offs = tl.arange(0, ROWS)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(out_ptr + offs, tl.sort(tl.load(x_ptr + offs), descending=DESCENDING))


@triton.jit
def argmax_kernel(x_ptr, value_ptr, index_ptr, xor_ptr, n, BLOCK: tl.constexpr):
    """A row's largest value, where it first stands, and the exclusive or of its bits."""
    row, offs = tl.program_id(0), tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * n + offs, offs < n, other=float("-inf"))
    value, index = tl.max(x, 0, return_indices=True)
    tl.store(value_ptr + row, value)
    tl.store(index_ptr + row, index)
    bits = tl.where(offs < n, x.to(tl.int32, bitcast=True), 0)
    tl.store(xor_ptr + row, tl.xor_sum(bits, 0))


@triton.jit
def histogram_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr, BINS: tl.constexpr):
    """Counts of a block added to those of all blocks."""
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs, offs < n, other=0)
    tl.atomic_add(out_ptr + tl.arange(0, BINS), tl.histogram(x, BINS, mask=offs < n))


@triton.jit
def atomics_kernel(x_ptr, add_ptr, max_ptr, min_ptr, or_ptr, xor_ptr, ticket_ptr, n, BLOCK: tl.constexpr):
    """Every kind of integer atomic on one place for each of 8 classes, and a lock taken by one program at a time."""
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < n
    x = tl.load(x_ptr + offs, mask, other=0)
    where = offs % 8
    tl.atomic_add(add_ptr + where, x, mask)
    tl.atomic_max(max_ptr + where, x, mask)
    tl.atomic_min(min_ptr + where, x, mask)
    tl.atomic_or(or_ptr + where, x, mask)
    tl.atomic_xor(xor_ptr + where, x, mask)
    while tl.atomic_cas(ticket_ptr, 0, 1) == 1:
        pass
    tl.store(ticket_ptr + 1, tl.load(ticket_ptr + 1) + 1)
    tl.debug_barrier()
    tl.atomic_xchg(ticket_ptr, 0)


@triton.jit
def float_atomics_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    """A sum by atomics; exact values make the order of no consequence."""
    x = tl.load(x_ptr + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK))
    tl.atomic_add(out_ptr + tl.arange(0, BLOCK) % 4, x)


@triton.jit
def gather_kernel(x_ptr, index_ptr, out_ptr, ROWS: tl.constexpr, N: tl.constexpr):
    """``x[index, column]`` along the first dimension."""
    offs = tl.arange(0, ROWS)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(out_ptr + offs, tl.gather(tl.load(x_ptr + offs), tl.load(index_ptr + offs), 0))


@triton.jit
def transpose_kernel(x_ptr, out_ptr, M: tl.constexpr, N: tl.constexpr):
    """``x.T``, and its rows interleaved with their opposites."""
    x = tl.load(x_ptr + tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :])
    both = tl.interleave(x.T, -x.T)
    tl.store(out_ptr + tl.arange(0, N)[:, None] * 2 * M + tl.arange(0, 2 * M)[None, :], both)


@triton.jit
def assert_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    """Stops where a value is negative, and says what it read."""
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs)
    tl.device_assert(x >= 0, "values must not be negative")
    tl.device_print("x is", x)
    tl.store(out_ptr + offs, x)


@triton.jit
def tuple_kernel(pointers, sizes, BLOCK: tl.constexpr):
    """``pointers[1] = pointers[0] * sizes[1]`` for the first sizes[0] values."""
    offs = tl.arange(0, BLOCK)
    mask = offs < sizes[0]
    tl.store(pointers[1] + offs, tl.load(pointers[0] + offs, mask) * sizes[1], mask)
