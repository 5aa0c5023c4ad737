"""int8_matmul and fp8_matmul by torch's own operators, for the CPU and other devices."""

import functools

import torch

from fusedops._core.activations import activate_, gate_pairs

BLOCK = 128
CHUNK = 2**18  # elements of b that are float32 at once: they stay in a core's cache, and no large memory is asked for
EXACT_K = 1024  # so many products of -128 sum up to 2**24, to which float32 counts without a gap
TOP = -(2**31)  # what 2**31 wraps to in int32; no sum that fits is as low


def int8_matmul(a, b, scale_a, scale_b, bias, out_dtype, activation, residual, gated=False):
    """The integer product, then torch's operators one by one."""
    acc = _integer_product(a, b) if a.shape[0] else a.new_empty((0, b.shape[0]), dtype=torch.float32)
    return _finished(acc, scale_a, scale_b, bias, out_dtype, activation, residual, gated)


def fp8_matmul(a, b, scale_a, scale_b, bias, out_dtype, activation, residual, gated=False):
    """The product of float32 copies, in which blocks have their scales already; of b some rows at a time."""
    a, scale_a = _without_blocks(_values(a), scale_a, 1)
    acc = a.new_empty((len(a), len(b)))
    step = max(CHUNK // b.shape[1] // BLOCK, 1) * BLOCK
    for first in range(0, len(b), step):
        rows = slice(first, first + step)
        part = scale_b[first // BLOCK : (first + step) // BLOCK] if scale_b.dim() == 2 else scale_b
        part, _ = _without_blocks(_values(b[rows]), part, BLOCK)
        acc[:, rows] = a @ part.T
    scale_b = None if scale_b.dim() == 2 else scale_b
    return _finished(acc, scale_a, scale_b, bias, out_dtype, activation, residual, gated)


def _integer_product(a, b):
    """a @ b.T in float32, from the exact sum."""
    # Of depth 1 `torch._int_mm` of torch 2.13 gives memory that nobody wrote.
    if a.device.type == "cpu" and a.shape[1] > 1 and int_mm_is_exact():
        acc = torch._int_mm(_row_major(a), _row_major(b).T)
        return torch.where(acc == TOP, float(2**31), acc.float()) if a.shape[1] > 2**16 else acc.float()
    if a.shape[1] <= EXACT_K:
        return a.float() @ b.float().T
    parts = (x.float() @ y.float().T for x, y in zip(a.split(EXACT_K, 1), b.split(EXACT_K, 1)))
    return functools.reduce(torch.add, (part.double() for part in parts)).float()


def _row_major(x):
    """The matrix, or a copy where rows share memory or strides say nothing, which `torch._int_mm` reads wrongly."""
    return x if x.stride(0) >= x.shape[1] else x.clone(memory_format=torch.contiguous_format)


@functools.cache
def int_mm_is_exact():
    """Whether `torch._int_mm` adds without saturating; on processors without VNNI it does not.

    Its products are pairs of int16 there, and 127 * 255 * 2 is beyond them.
    """
    for size in (1, 32):
        a, b = (torch.full(shape, 127, dtype=torch.int8) for shape in ((size, 64), (64, size)))
        for x, y in ((a, b), (a, -b - 1), (-a - 1, b), (-a - 1, -b - 1)):
            wanted = 64 * int(x[0, 0]) * int(y[0, 0])
            if not bool((torch._int_mm(x, y) == wanted).all()):
                return False
    return True


def _values(x):
    """float8 as float32 by a table, which takes a tenth of the time of torch's conversion."""
    codes = torch.arange(256, dtype=torch.uint8, device=x.device).view(x.dtype).float()
    return codes.index_select(0, x.view(torch.uint8).flatten().int()).view(x.shape)


def _without_blocks(x, scale, block_rows):
    """Apply a scale of blocks to the values, and give 1 in its place."""
    if scale.dim() < 2:
        return x, scale
    rows = scale if block_rows == 1 else scale.repeat_interleave(block_rows, 0)[: len(x)]
    return x * rows.repeat_interleave(BLOCK, 1)[:, : x.shape[1]], None


def _finished(acc, scale_a, scale_b, bias, out_dtype, activation, residual, gated):
    """Scales, bias, activation and residual of a float32 product that is ours to change."""
    if scale_a is not None:
        acc *= scale_a if scale_a.numel() == 1 else scale_a[:, None]
    if scale_b is not None:
        acc *= scale_b
    if bias is not None:
        acc += bias
    acc = gate_pairs(acc, activation) if gated else activate_(acc, activation)
    if residual is not None:
        acc += residual
    return acc.to(out_dtype)
