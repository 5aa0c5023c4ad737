"""Narrow floating-point formats on numpy arrays: round to bits, and read bits, independently of torch."""

from __future__ import annotations

import functools
from dataclasses import dataclass


@dataclass(frozen=True)
class Format:
    """A binary floating-point format narrower than float64.

    Args:
        bits: The width.
        mantissa_bits: The explicit bits of the mantissa.
        max_code: The bits of the largest finite number.
        infinity_code: The bits of +inf; None: the format has none.
        nan_code: The bits of a NaN.
        saturates: Numbers beyond the largest, infinities included, become the largest.
    """

    bits: int
    mantissa_bits: int
    max_code: int
    infinity_code: int | None
    nan_code: int
    saturates: bool = False

    @property
    def min_exponent(self) -> int:
        """The exponent of the smallest normal number."""
        return 2 - (1 << (self.bits - self.mantissa_bits - 2))


BFLOAT16 = Format(16, 7, 0x7F7F, 0x7F80, 0x7FC0)
FLOAT16 = Format(16, 10, 0x7BFF, 0x7C00, 0x7E00)
FLOAT32 = Format(32, 23, 0x7F7FFFFF, 0x7F800000, 0x7FC00000)
FLOAT8_E4M3FN = Format(8, 3, 0x7E, None, 0x7F, saturates=True)
FLOAT8_E5M2 = Format(8, 2, 0x7B, 0x7C, 0x7F, saturates=True)


def encode(values, target: Format, toward_zero: bool = False):
    """Round numbers to a narrow format.

    Args:
        values: A numpy array of floats or integers.
        target: The format.
        toward_zero: Round towards zero; otherwise to nearest, ties to even.

    Returns:
        The bits, an unsigned integer array of the format's width.
    """
    import numpy as np

    values = np.asarray(values, dtype=np.float64)
    finite = np.isfinite(values)
    magnitude = np.where(finite, np.abs(values), 0.0)
    exponent = np.where(magnitude > 0, np.frexp(magnitude)[1] - 1, target.min_exponent)
    exponent = np.maximum(exponent, target.min_exponent)
    steps = np.ldexp(magnitude, target.mantissa_bits - exponent)
    steps = np.trunc(steps) if toward_zero else np.rint(steps)
    # A mantissa that rounds up to the next power of two carries into the exponent by itself.
    code = ((exponent - target.min_exponent).astype(np.int64) << target.mantissa_bits) + steps.astype(np.int64)
    stays_finite = target.saturates or toward_zero
    code = np.where(code > target.max_code, target.max_code if stays_finite else target.infinity_code, code)
    code = np.where(np.isinf(values), target.max_code if target.saturates else target.infinity_code, code)
    code = np.where(np.isnan(values), target.nan_code, code)
    code = code | (np.signbit(values).astype(np.int64) << (target.bits - 1))
    return code.astype(f"uint{target.bits}")


def decode(codes, source: Format):
    """Return the exact float32 values of the bits of a narrow format of at most 16 bits.

    Args:
        codes: A numpy array of unsigned integers.
        source: The format.

    Returns:
        A float32 array of the same shape.
    """
    return _decode_table(source)[codes]


@functools.cache
def _decode_table(source: Format):
    import numpy as np

    codes = np.arange(1 << source.bits)
    magnitude_code = codes & ((1 << (source.bits - 1)) - 1)
    field = magnitude_code >> source.mantissa_bits
    mantissa = magnitude_code - (field << source.mantissa_bits)
    mantissa = mantissa + ((field > 0).astype(np.int64) << source.mantissa_bits)
    exponent = np.maximum(field, 1) - 1 + source.min_exponent - source.mantissa_bits
    values = np.ldexp(mantissa.astype(np.float64), exponent)
    values = np.where(magnitude_code > source.max_code, np.nan, values)
    if source.infinity_code is not None:
        values = np.where(magnitude_code == source.infinity_code, np.inf, values)
    return np.where(codes != magnitude_code, -values, values).astype(np.float32)
