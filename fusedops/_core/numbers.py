"""Whole numbers of tiles and grids on the host; Triton's own functions take many times as long."""


def power_of_2(size):
    """The least power of two that is not smaller than size, 1 where that is 0."""
    return 1 << max(size - 1, 0).bit_length()


def ceil_div(a, b):
    """a / b, rounded up."""
    return -(-a // b)
