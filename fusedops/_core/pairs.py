"""Rows of two weights in turn, as products with gated pairs want them."""

import torch


def interleave_rows(gate, up):
    """Join two tensors so that row 2i is gate's row i and row 2i + 1 is up's.

    ``int8_matmul``, ``fp8_matmul`` and ``weight_only_matmul`` take a gate and an up projection as one weight with
    ``gated=True``: its values, scales of rows or groups, zeros and bias are each joined by this function. Scales of
    blocks of 128 rows span both: join the weights first, then quantise.

    Args:
        gate: ``[N, ...]``, any dtype.
        up: gate's shape, dtype and device.

    Returns:
        ``[2 N, ...]``, contiguous.

    Raises:
        TypeError: an argument is not a tensor, or the dtypes differ.
        ValueError: the shapes or devices differ, or there are no rows to join: a scale for a whole tensor.
    """
    for name, tensor in (("gate", gate), ("up", up)):
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"interleave_rows: {name} must be a torch.Tensor, got {type(tensor).__name__}")
    if gate.dim() == 0:
        raise ValueError("interleave_rows: gate must have rows, got shape []")
    if up.dtype != gate.dtype:
        raise TypeError(f"interleave_rows: up must be {gate.dtype}, got {up.dtype}")
    if up.shape != gate.shape or up.device != gate.device:
        place = f"{list(gate.shape)} on {gate.device}"
        raise ValueError(f"interleave_rows: up must have shape {place}, got {list(up.shape)} on {up.device}")
    return torch.stack((gate, up), 1).flatten(0, 1)
