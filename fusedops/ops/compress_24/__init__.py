"""Weights of which two in every four consecutive columns are zero ("2:4"): pruning, and their compressed format.

**The format.** A weight ``[N, K]`` becomes two tensors, both row-major and contiguous, the same for every kernel and
device:

- values ``[N, ceil(K / 64) * 32]`` of weight's dtype: of each group of four columns the two that are kept, in order.
- metadata ``[N, ceil(K / 128) * 16]``, uint8: four bits for each group, which hold the places of the two in their
  group, the first in the lower two bits and the second, which is larger, in the upper ones. Byte j of a row has group
  2j in its lower four bits and group 2j + 1 in its upper ones.

Kept are the numbers other than zero (NaN is one of them, -0.0 is not) and, where there are fewer than two, the lowest
places beside them; so one weight has one compressed form. Groups beyond K, which make whole vectors of 16 bytes, are
zeros at the places 0 and 1 (bits ``0100``). The four bits are those of the ordered metadata of PTX's ``mma.sp``.
Compared with a dense weight 16-bit values take 9/16 of the memory, 8-bit ones 5/8, those of 32 bits 17/32.
"""

import torch

from fusedops._core import checks, env
from fusedops._core.numbers import ceil_div
from fusedops._core.register import register

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.int8, torch.float8_e4m3fn)
IMPLEMENTATIONS = ("torch", "reference")
VALUES = 32  # values of 64 columns: rows of values are whole multiples of them
BYTES = 16  # of metadata of 128 columns: so are rows of metadata of these


def prune_24(weight, *, scores=None):
    """Set two of every four consecutive columns of each row to zero: those with the lower scores.

    Args:
        weight: ``[N, K]``, float16, bfloat16, float32, int8 or float8_e4m3fn, with any strides. Of the columns that are
            left beyond a multiple of four, at most two are kept.
        scores: What is kept has the largest of them: weight's shape, float16, bfloat16, float32 or float64, with any
            strides. None is the absolute value; NaN is larger than every number, so that it is not hidden. Of equal
            scores those of the lower columns win.

    Returns:
        Tensor of weight's shape and dtype, contiguous.

    Raises:
        ValueError: a shape or device does not fit, or a score is NaN.
        TypeError: a dtype is not one of the above.

    Numerics: a copy; every element is weight's or 0.
    Runs on: any device, by torch's operators: it is for the time at which a model is converted.
    From: Mishra et al., "Accelerating Sparse Deep Neural Networks", 2021, https://arxiv.org/abs/2104.08378
    """
    op = "prune_24"
    checks.bind_shapes(op, weight=(weight, "N K"), scores=(scores, "N K?"))
    _check_dtype(op, "weight", weight)
    if scores is not None and scores.dtype not in (*checks.FLOATS, torch.float64):
        raise TypeError(f"{op}: scores must be float16, bfloat16, float32 or float64, got {_name(scores.dtype)}")
    return _prune_24(weight, scores)


def is_24(weight):
    """Tell whether at most two of every four consecutive columns of each row are other than zero.

    Args:
        weight: ``[N, K]``, float16, bfloat16, float32, int8 or float8_e4m3fn, with any strides; the last group may have
            fewer columns.

    Returns:
        bool. NaN is not zero, -0.0 is.

    Raises:
        ValueError: a shape does not fit.
        TypeError: a dtype is not one of the above.

    Runs on: any device, by torch's operators; the answer is waited for.
    """
    checks.bind_shapes("is_24", weight=(weight, "N K"))
    _check_dtype("is_24", "weight", weight)
    return bool(_is_24(weight))


def compress_24(weight):
    """Store a weight of which two in every four columns are zero in about half of its memory.

    Args:
        weight: ``[N, K]``, float16, bfloat16, float32, int8 or float8_e4m3fn, with any strides. K is padded to what the
            format needs.

    Returns:
        ``(values, metadata)``, contiguous: ``[N, ceil(K / 64) * 32]`` of weight's dtype, and uint8
        ``[N, ceil(K / 128) * 16]``, in the format described above.

    Raises:
        ValueError: a shape does not fit, or a group has more than two numbers other than zero; the message names the
            first one.
        TypeError: a dtype is not one of the above.

    Numerics: a copy; `decompress_24` gives weight back, equal in every element (a -0.0 may become 0.0).
    Runs on: any device, by torch's operators: it is for the time at which a model is converted, and it waits for the
        device to know whether weight can be stored so.
    From: Mishra et al., "Accelerating Sparse Deep Neural Networks", 2021, https://arxiv.org/abs/2104.08378
    """
    checks.bind_shapes("compress_24", weight=(weight, "N K"))
    _check_dtype("compress_24", "weight", weight)
    return _compress_24(weight)


def decompress_24(values, metadata, *, in_features=None):
    """Give the dense weight back that `compress_24` stored.

    Args:
        values, metadata: As `compress_24` returns them, with any strides.
        in_features: Columns of the result, K of the weight; None gives those of all values, a multiple of 64.

    Returns:
        ``[N, in_features]`` of values' dtype, contiguous.

    Raises:
        ValueError: a shape or device does not fit, or in_features is not of values' size; with FUSEDOPS_VALIDATE=2 also
            metadata in which the second place of a group is not larger than the first.
        TypeError: a dtype is not one of the above, or in_features is no int.

    Numerics: a copy. Metadata that `compress_24` cannot have written gives numbers without a meaning, but is followed
        nowhere outside its own group.
    Runs on: any device, by torch's operators.
    """
    op = "decompress_24"
    check_compressed(op, values, metadata)
    K = 2 * values.shape[1]
    if in_features is not None:
        if isinstance(in_features, bool) or not isinstance(in_features, (int, torch.SymInt)):
            raise TypeError(f"{op}: in_features must be an int, got {type(in_features).__name__}")
        if ceil_div(in_features, 64) * VALUES != values.shape[1]:
            raise ValueError(f"{op}: in_features must be more than {K - 64} and at most {K}, got {in_features}")
        K = in_features
    return _decompress_24(values, metadata, K)


def check_compressed(op, values, metadata):
    """Raise where two tensors are no compressed weight; at level 2 of validation also what metadata's bits say."""
    checks.bind_shapes(op, values=(values, "N columns"), metadata=(metadata, "N bytes"))
    _check_dtype(op, "values", values)
    if metadata.dtype != torch.uint8:
        raise TypeError(f"{op}: metadata must be uint8, got {_name(metadata.dtype)}")
    N, columns = values.shape
    if columns % VALUES:
        raise ValueError(f"{op}: values must have a multiple of {VALUES} columns, got {list(values.shape)}")
    num_bytes = ceil_div(columns, 2 * VALUES) * BYTES
    if metadata.shape[1] != num_bytes:
        wanted = f"[{N}, {num_bytes}] for {columns} columns of values"
        raise ValueError(f"{op}: metadata must have shape {wanted}, got {list(metadata.shape)}")
    if env.validate() == 2 and not torch.compiler.is_compiling() and not metadata.is_meta:
        _check_places(op, metadata)


def _check_places(op, metadata):
    """Raise ValueError where the places of a group are not in order; it reads the tensor, so it is for level 2."""
    places = torch.stack((metadata & 15, metadata >> 4), -1).flatten(1)
    wrong = (places & 3) >= (places >> 2)
    if bool(wrong.any()):
        row, group = divmod(int(wrong.flatten().to(torch.uint8).argmax()), wrong.shape[1])
        first, second = int(places[row, group]) & 3, int(places[row, group]) >> 2
        raise ValueError(
            f"{op}: metadata must name two places of each group in order, got {first} and {second} "
            f"in row {row}, group {group}"
        )


def _check_dtype(op, name, tensor):
    if tensor.dtype not in DTYPES:
        known = "float16, bfloat16, float32, int8 or float8_e4m3fn"
        raise TypeError(f"{op}: {name} must be {known}, got {_name(tensor.dtype)}")


def _name(dtype):
    return str(dtype).removeprefix("torch.")


def _fake_compress(weight):
    N, K = weight.shape
    metadata = weight.new_empty(N, ceil_div(K, 128) * BYTES, dtype=torch.uint8)
    return weight.new_empty(N, ceil_div(K, 64) * VALUES), metadata


def _cost(dense, *stored):
    """What is read and written once, and a comparison with zero for each element of the dense weight."""
    return sum(x.numel() * x.element_size() for x in (dense, *stored) if x is not None), dense.numel()


def _cost_of_decompression(values, metadata, in_features):
    dense = values.shape[0] * in_features
    return _cost(values, metadata)[0] + dense * values.element_size(), dense


def _register(schema, fake, cost):
    return register(schema, package=__name__, implementations=IMPLEMENTATIONS, fake=fake, cost=cost)


_prune_24 = _register(
    "prune_24(Tensor weight, Tensor? scores) -> Tensor",
    lambda weight, scores: weight.new_empty(weight.shape),
    lambda weight, scores: _cost(weight, weight, scores),
)
_is_24 = _register("is_24(Tensor weight) -> Tensor", lambda weight: weight.new_empty((), dtype=torch.bool), _cost)
_compress_24 = _register(
    "compress_24(Tensor weight) -> (Tensor, Tensor)",
    _fake_compress,
    lambda weight: _cost(weight, *_fake_compress(weight.to("meta"))),
)
_decompress_24 = _register(
    "decompress_24(Tensor values, Tensor metadata, SymInt in_features) -> Tensor",
    lambda values, metadata, in_features: values.new_empty(values.shape[0], in_features),
    _cost_of_decompression,
)
