"""Products of int8 matrices by torch's own operators, exact on every processor."""

import functools

import torch

EXACT_K = 1024  # so many products of -128 sum up to 2**24, to which float32 counts without a gap
TOP = -(2**31)  # what 2**31 wraps to in int32; no sum that fits is as low


def integer_product(a, b):
    """a @ b.T in float32, from the exact sum; K is at most 2**17."""
    if not len(a):
        return a.new_empty((0, len(b)), dtype=torch.float32)
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
