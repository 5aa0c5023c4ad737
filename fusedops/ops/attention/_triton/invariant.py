"""What batch-invariant mode lets the choice of a kernel and its splits look at: one sequence by itself."""

import torch

from fusedops._core import invariance
from fusedops.ops.attention._triton import hopper_launch

LONG = 2**30  # the lengths of packed sequences as far as choices go: the longest is not every row's own
MAX_SPLITS = 16  # of one tile's keys; the parts of every sequence are in memory


def lengths(max_q, max_k, packed):
    """The lengths that tiles, bounds and the kernel follow from."""
    return (LONG, LONG) if packed and invariance.enabled() else (max_q, max_k)


def sequences(batch):
    """How many sequences share the device as far as splits go."""
    return 1 if invariance.enabled() else batch


def splits(num_splits, tile, num_rows):
    """Of the splits of a sequence that has the device for itself those of one tile of rows, some of them."""
    if not invariance.enabled():
        return num_splits
    return min(num_splits, MAX_SPLITS) if num_rows <= tile.block_m else 1


def aligned(device_limits, *tensors):
    """Copies where a tensor map cannot describe them as they lie, which may be so in a batch and not alone."""
    if not invariance.enabled() or device_limits.arch != hopper_launch.ARCH:
        return tensors
    return tuple(
        tensor if hopper_launch.mappable(tensor) else tensor.clone(memory_format=torch.contiguous_format)
        for tensor in tensors
    )
