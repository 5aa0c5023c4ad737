"""weight_only_matmul by torch's own operators: the CPU's way, and other devices'.

Measured on an AVX-512 machine: torch's product with int8 weights is fast in bfloat16 alone. It ends the process where a
row of an operand is not aligned to its vectors, or reads beyond it where K is no multiple of them. Everything else is
faster in float32, by a block of weights at a time that stays in the cache.
"""

import torch

from fusedops._core.activations import activate_, gate_pairs
from fusedops.ops.weight_only_matmul._groups import BLOCK, ZERO_STEPS, group_of

PACK_K = 32  # weights that one step of torch's product with int8 weights reads
PACK_BYTES = 64  # what an operand of that product is aligned to; rows are, as K is a multiple of PACK_K
PACK_ROWS = 32  # beyond so many rows its one weight at a time is slower than float32 with the weights expanded
BLOCK_BYTES = 2**19  # of expanded weights, for any number of rows


def weight_only_matmul(x, values, scale, zero, bias, residual, activation, gated=False):
    """The product, then what is fused behind it, in float32 where the product has not been rounded already."""
    rows = x.reshape(-1, x.shape[-1])
    group = group_of(values.shape[0], x.shape[-1], tuple(scale.shape))
    out = (_packed if _packable(rows, values, scale) else _blocked)(rows, values, scale, zero, group)
    out = out.view(*x.shape[:-1], values.shape[0])
    if bias is not None or activation is not None or residual is not None:
        out = out.float()
    if bias is not None:
        out = out + bias
    out = gate_pairs(out, activation) if gated else activate_(out, activation)
    if residual is not None:
        out = out + residual
    return out.to(x.dtype)


def _packable(rows, values, scale):
    """Whether torch's product with int8 weights takes the call and is the faster way."""
    return (
        rows.is_cpu
        and rows.dtype == torch.bfloat16
        and values.dtype == torch.int8
        and scale.dim() < 2
        and 0 < rows.shape[0] <= PACK_ROWS
        and rows.shape[1] % PACK_K == 0
        and values.is_contiguous()
        and values.data_ptr() % PACK_BYTES == 0
    )


def _packed(rows, values, scale, zero, group):
    """In x's dtype with scales of that dtype; others multiply the rounded sums, in float32."""
    rows = rows.contiguous()
    if rows.data_ptr() % PACK_BYTES:
        rows = rows.clone()
    if scale.dtype == rows.dtype:
        return torch._weight_int8pack_mm(rows, values, scale.expand(values.shape[0]).contiguous())
    ones = torch.ones(values.shape[0], dtype=rows.dtype)
    return torch._weight_int8pack_mm(rows, values, ones).float().mul_(scale)


def _blocked(rows, values, scale, zero, group):
    """In float32, rows of the weight by rows that fit the cache."""
    (M, K), N = rows.shape, values.shape[0]
    wide = rows.float()
    out = wide.new_empty(M, N)
    in_groups = scale.dim() == 2
    if in_groups:
        scale = scale.float()
        if group[0] == BLOCK:
            scale = scale.repeat_interleave(BLOCK, 0)
        zero = None if zero is None else zero.float().div_(ZERO_STEPS)
    step = max(BLOCK_BYTES // (4 * K), 1)
    for first in range(0, N, step):
        part = slice(first, min(first + step, N))
        weight = _expanded(values[part], K, zero is None)
        if in_groups:
            if zero is not None:
                _each_group(weight, group[1], torch.Tensor.sub_, zero[part])
            _each_group(weight, group[1], torch.Tensor.mul_, scale[part])
        torch.mm(wide, weight.t(), out=out[:, part])
    return out if in_groups else out.mul_(scale)


def _each_group(weight, size, change, table):
    """Change each group of `size` columns by its element of the table [rows, groups]."""
    whole = weight.shape[1] // size
    if whole:
        change(weight[:, : whole * size].unflatten(1, (whole, size)), table[:, :whole, None])
    if whole < table.shape[1]:
        change(weight[:, whole * size :], table[:, whole:])


def _expanded(values, K, symmetric):
    """Stored weights as float32, exactly; 4-bit codes less 8 where they are symmetric, with no more passes for it."""
    if values.dtype == torch.uint8:
        pairs = values.to(torch.int16)  # both halves of a byte as two bytes, the lower first
        pairs = (pairs << 4).bitwise_or_(pairs).bitwise_and_(0x0F0F).view(torch.int8)
        return (pairs.sub_(8) if symmetric else pairs).to(torch.float32)[:, :K]
    if values.dtype != torch.float8_e4m3fn:
        return values.to(torch.float32)
    codes = values.view(torch.int8)
    # torch's own cast takes ten times as long. As float16 the bits of an e4m3 number are 2**-8 of it, but for NaN.
    halves = codes.to(torch.int16).mul_(128).bitwise_and_(-0x4001).view(torch.float16)
    weight = halves.to(torch.float32).mul_(256.0)
    numbers = codes & 0x7F
    return weight if int(numbers.amax()) < 0x7F else weight.masked_fill_(numbers == 0x7F, float("nan"))
