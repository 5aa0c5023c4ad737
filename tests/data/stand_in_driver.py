"""A GPU that runs nothing, for Triton's real launch path without a driver: what is compiled is counted.

For processes that imported triton without TRITON_INTERPRET=1.
"""

import contextlib
from types import SimpleNamespace

import torch
import triton
from triton.backends.compiler import GPUTarget

from fusedops._core import device, dispatch
from fusedops._core.device import TARGETS, described


class Driver:
    """What `JITFunction.run` and `CompiledKernel` ask a driver for."""

    def __init__(self, limits):
        self.limits, self.launches = limits, []
        loaded = (None, None, 32, 0, 1024)
        self.utils = SimpleNamespace(
            get_device_properties=lambda index: {"max_shared_mem": limits.shared_memory},
            load_binary=lambda name, *rest: loaded,
        )

    def get_current_device(self):
        return 0

    def get_current_stream(self, index):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", self.limits.capability, 32)

    def launcher_cls(self, source, metadata):
        return lambda *arguments: self.launches.append(metadata.name)


@contextlib.contextmanager
def standing_in(target):
    """CPU tensors stand for those of a GPU in this block; gives (launched kernels, compiled, found in the cache)."""
    driver = Driver(TARGETS[target])
    compiled, found = [], []

    def listen(*, src, cache_hit, **others):
        (found if cache_hit else compiled).append(src.name)

    triton.runtime.driver.set_active(driver)
    triton.knobs.compilation.listener = listen
    originals = device.triton_rejection, dispatch.triton_rejection
    device.triton_rejection = dispatch.triton_rejection = lambda place: None
    try:
        with torch.no_grad(), described(driver.limits):
            yield driver.launches, compiled, found
    finally:
        device.triton_rejection, dispatch.triton_rejection = originals
        triton.knobs.compilation.listener = None
