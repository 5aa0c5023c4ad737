"""Hypothesis strategies for the arguments of row-wise kernels; the seed of the values is drawn too.

Everything shrinks towards the plain case: few rows, short rows, contiguous, magnitude 1, no special values, seed 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from fusedops.testing import inputs

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

# Widths on both sides of vector widths, warps and tiles, and the odd hidden sizes of real models.
EDGE_SIZES = (
    *(1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 127, 128, 129),
    *(255, 256, 257, 511, 513, 576, 1000),
)


def dtypes(choices: Sequence[torch.dtype] = (torch.float32, torch.float16, torch.bfloat16)) -> SearchStrategy:
    """Draw a dtype.

    Args:
        choices: The dtypes to draw from, the simplest first.

    Returns:
        A strategy of ``torch.dtype``.

    Raises:
        ImportError: hypothesis is not installed.
    """
    return _hypothesis().sampled_from(list(choices))


def row_shapes(max_rows: int = 8, max_n: int = 300, *, min_rows: int = 0, min_n: int = 1) -> SearchStrategy:
    """Draw a shape ``(*leading, N)`` whose leading dimensions hold at most `max_rows` rows.

    Args:
        max_rows: The largest number of rows (a program of the interpreter costs milliseconds).
        max_n: The largest last dimension.
        min_rows: 0 allows an empty batch.
        min_n: The smallest last dimension.

    Returns:
        A strategy of tuples of two or three sizes; half of the time N is one of ``EDGE_SIZES``.

    Raises:
        ImportError: hypothesis is not installed.
    """
    st = _hypothesis()
    edges = [size for size in EDGE_SIZES if min_n <= size <= max_n]
    widths = st.integers(min_n, max_n)
    if edges:
        widths = st.one_of(st.sampled_from(edges), widths)
    flat = st.tuples(st.integers(min_rows, max_rows), widths)
    if max_rows < 2:
        return flat
    batches = [batch for batch in range(1, max_rows + 1) if -(-min_rows // batch) <= max_rows // batch]
    batched = st.sampled_from(batches).flatmap(
        lambda batch: st.tuples(st.just(batch), st.integers(-(-min_rows // batch), max_rows // batch), widths)
    )
    return st.one_of(flat, batched)


def layouts(ndim: int = 2) -> SearchStrategy:
    """Draw a layout of ``make_tensor`` that keeps the last dimension contiguous.

    Args:
        ndim: The number of dimensions of the tensor; 3 and more add "transposed", 1 leaves out "expanded".

    Returns:
        A strategy of strings; storage offsets are 1 to 15 elements.

    Raises:
        ImportError: hypothesis is not installed.
    """
    st = _hypothesis()
    names = ["contiguous", "padded", "sliced"]
    names += ["expanded"] if ndim >= 2 else []
    names += ["transposed"] if ndim >= 3 else []
    return st.one_of(st.sampled_from(names), st.integers(1, 15).map(lambda elements: f"offset:{elements}"))


def magnitudes() -> SearchStrategy:
    """Draw a scale of the values: 1, or a power of two from 2**-12 to 2**8, where no product of two leaves float16.

    Returns:
        A strategy of floats.

    Raises:
        ImportError: hypothesis is not installed.
    """
    st = _hypothesis()
    return st.one_of(st.just(1.0), st.integers(-12, 8).map(lambda exponent: 2.0**exponent))


def seeds() -> SearchStrategy:
    """Draw a seed for ``make_tensor``.

    Returns:
        A strategy of integers of 32 bits.

    Raises:
        ImportError: hypothesis is not installed.
    """
    return _hypothesis().integers(0, 2**32 - 1)


def specials(dtype: torch.dtype = torch.float32, max_size: int = 3, *, finite: bool = False) -> SearchStrategy:
    """Draw special values for ``make_tensor``, none of them half of the time.

    Args:
        dtype: The dtype whose special values are meant.
        max_size: The largest number of values.
        finite: Leave out NaN and the infinities.

    Returns:
        A strategy of tuples of floats.

    Raises:
        ImportError: hypothesis is not installed.
    """
    st = _hypothesis()
    values = [value for value in inputs.special_values(dtype) if not finite or abs(value) <= torch.finfo(dtype).max]
    return st.one_of(st.just(()), st.lists(st.sampled_from(values), min_size=1, max_size=max_size).map(tuple))


def tensors(shape: Sequence[int], dtype: torch.dtype, *, layout: bool = True, special: bool = False) -> SearchStrategy:
    """Draw a tensor: seed and magnitude always, layout and special values on request.

    Args:
        shape: The shape.
        dtype: The dtype.
        layout: Draw the layout too.
        special: Draw special values too.

    Returns:
        A strategy of CPU tensors.

    Raises:
        ImportError: hypothesis is not installed.
    """
    st = _hypothesis()
    return st.builds(
        lambda seed, magnitude, kind, values: inputs.make_tensor(
            shape, dtype, seed=seed, magnitude=magnitude, layout=kind, specials=values
        ),
        seeds(),
        magnitudes(),
        layouts(len(shape)) if layout else st.just("contiguous"),
        specials(dtype) if special else st.just(()),
    )


def _hypothesis():
    try:
        import hypothesis.strategies
    except ImportError as error:
        raise ImportError("fusedops.testing.strategies needs hypothesis: pip install 'fusedops[dev]'") from error
    return hypothesis.strategies
