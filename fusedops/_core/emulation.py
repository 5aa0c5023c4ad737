"""The way to the emulator of compiled kernels, a testing tool that is loaded by the first call that wants it."""

import functools

from fusedops._core import env
from fusedops._core.device import triton_missing


def rejection(device):
    """Why compiled kernels cannot be emulated on tensors of this device, or None."""
    missing = triton_missing()
    if missing is not None:
        return missing
    if device.type != "cpu":
        return f"compiled kernels are emulated on CPU tensors, got {device.type}"
    from fusedops.testing.ptx import build

    return build.missing()


def encode_tiled(tensor, box, swizzle):
    """A tensor map for a diverted launch."""
    from fusedops.testing.ptx.tensors import encode_tiled

    return encode_tiled(tensor, box, swizzle=swizzle)


def emulated(function):
    """A function of a Triton or CUDA implementation as it is, except that what it launches runs compiled on the CPU."""
    from fusedops.testing.ptx.launches import diverted

    @functools.wraps(function)
    def run(*args, **kwargs):
        with diverted({"schedules": "default"}, target=env.emulate_target()):
            return function(*args, **kwargs)

    return run
