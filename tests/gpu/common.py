"""What GPU tests share: the device, the truth on it, and a dry run, in which the interpreter takes the GPU's place.

With GPU_TESTS_DRY_RUN=1 the same tests run on tiny shapes without a GPU, so that a mistake in them shows before one is
at hand; what only a GPU can show (graphs, streams, large memory) is then left out. A kernel that the interpreter cannot
run is emulated instead, without being asked for.
"""

import os

import pytest
import torch

from fusedops._core.explain import operator_call
from tests.ops.common import as_tuple

DRY_RUN = os.environ.get("GPU_TESTS_DRY_RUN") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not DRY_RUN else "cpu"

needs_gpu = pytest.mark.skipif(DRY_RUN, reason="needs a GPU: this is a dry run")


def sized(real, tiny):
    """A size for a GPU, or the one for a dry run."""
    return tiny if DRY_RUN else real


def randn(*shape, dtype=torch.bfloat16, seed=0):
    """Normal values on the device, the same for the same seed."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return torch.randn(shape, device=DEVICE, generator=generator).to(dtype)


def same_bits(a, b):
    """Whether two tensors are equal, of any dtype; float8 as the bytes that it is."""
    if a.element_size() == 1:
        a, b = a.view(torch.uint8), b.view(torch.uint8)
    return torch.equal(a, b)


def wide(value):
    """A float64 copy of a floating-point tensor; anything else as it is."""
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def truth(function, *args, **options):
    """What the reference gives in float64 for a public call, as a tuple."""
    operator, args = operator_call(function, *args, **options)
    return as_tuple(getattr(operator._selector.module("reference"), operator.name)(*map(wide, args)))
