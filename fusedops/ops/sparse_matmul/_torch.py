"""sparse_matmul by torch's own operators, with some rows of the weight decompressed at a time.

A CPU has no use for the zeros: each call decompresses the weight, about a nanosecond an element on one core, and
multiplies as if it were dense. It saves memory, not time; `benchmarks/bench_sparse_matmul.py` measures how little that
is of many rows, and how much of one.
"""

import functools

import torch

from fusedops._core.activations import activate_
from fusedops._core.codes import as_float32
from fusedops._core.int_mm import integer_product

CHUNK = 2**18  # elements of the weight that are decompressed at once: they stay in a core's cache
GPU_CHUNK = 2**24  # where no cache has to hold them, and each chunk costs launches


def sparse_matmul(a, values, metadata, scale_a, scale_b, bias, out_dtype, activation):
    """The product, in int8 exact and else of float32 copies, then what is fused behind it."""
    (M, K), N = a.shape, values.shape[0]
    acc = a.new_empty((M, N), dtype=torch.float32)
    integers = a.dtype == torch.int8
    wide = a if integers else _widened(a)
    step = max((CHUNK if a.is_cpu else GPU_CHUNK) // K, 1)
    for first in range(0, N, step):
        rows = slice(first, min(first + step, N))
        if integers:
            acc[:, rows] = integer_product(wide, _shifted(values[rows], metadata[rows], K))
        else:
            torch.mm(wide, _scattered(values[rows], metadata[rows], K).t(), out=acc[:, rows])
    if scale_a is not None:
        acc *= scale_a.reshape(-1, 1)
    if scale_b is not None:
        acc *= scale_b
    if bias is not None:
        acc += bias
    return activate_(acc, activation).to(out_dtype)


def _widened(x):
    return as_float32(x) if x.dtype == torch.float8_e4m3fn else x.float()


def _scattered(values, metadata, K):
    """Rows of the weight as float32: pairs of values go to their places of four."""
    N, groups = values.shape[0], values.shape[1] // 2
    codes = metadata[:, : groups // 2].flatten().int()
    places = _places(metadata.device).index_select(0, codes).view(N, groups, 2)
    pairs = _widened(values).view(N, groups, 2)
    return pairs.new_zeros(N, groups, 4).scatter_(-1, places, pairs).flatten(1)[:, :K]


@functools.cache
def _places(device):
    """The four places that each byte of metadata names."""
    return (torch.arange(256, device=device)[:, None] >> torch.tensor([0, 2, 4, 6], device=device)) & 3


def _shifted(values, metadata, K):
    """Rows of an int8 weight: of a group, which is 32 bits, each of two bytes is shifted to its place."""
    groups = values.shape[1] // 2
    even = values.clone() if values.storage_offset() % 2 else values  # torch views two bytes as one number there alone
    pairs = even.view(torch.int16).int()
    nibbles = torch.stack((metadata, metadata >> 4), -1).flatten(1)[:, :groups].int()
    low, high = pairs & 0xFF, pairs.bitwise_right_shift_(8).bitwise_and_(0xFF)
    first = (nibbles & 3).mul_(8)
    second = nibbles.bitwise_right_shift_(2).bitwise_and_(3).mul_(8)
    shifted = low.bitwise_left_shift_(first).bitwise_or_(high.bitwise_left_shift_(second))
    return shifted.view(torch.int8)[:, :K]
