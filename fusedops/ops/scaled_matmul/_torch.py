"""int8_matmul and fp8_matmul by torch's own operators, for the CPU and other devices."""

from fusedops._core.activations import activate_, gate_pairs
from fusedops._core.codes import as_float32
from fusedops._core.int_mm import integer_product

BLOCK = 128
CHUNK = 2**18  # elements of b that are float32 at once: they stay in a core's cache, and no large memory is asked for


def int8_matmul(a, b, scale_a, scale_b, bias, out_dtype, activation, residual, gated=False):
    """The integer product, then torch's operators one by one."""
    acc = integer_product(a, b)
    return _finished(acc, scale_a, scale_b, bias, out_dtype, activation, residual, gated)


def fp8_matmul(a, b, scale_a, scale_b, bias, out_dtype, activation, residual, gated=False):
    """The product of float32 copies, in which blocks have their scales already; of b some rows at a time."""
    a, scale_a = _without_blocks(as_float32(a), scale_a, 1)
    acc = a.new_empty((len(a), len(b)))
    step = max(CHUNK // b.shape[1] // BLOCK, 1) * BLOCK
    for first in range(0, len(b), step):
        rows = slice(first, first + step)
        part = scale_b[first // BLOCK : (first + step) // BLOCK] if scale_b.dim() == 2 else scale_b
        part, _ = _without_blocks(as_float32(b[rows]), part, BLOCK)
        acc[:, rows] = a @ part.T
    scale_b = None if scale_b.dim() == 2 else scale_b
    return _finished(acc, scale_a, scale_b, bias, out_dtype, activation, residual, gated)


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
