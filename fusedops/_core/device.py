"""What a GPU offers a kernel: limits of the device at hand, and of named targets for work without one."""

import contextlib
import functools
import platform
from contextvars import ContextVar
from dataclasses import dataclass, replace

import torch

from fusedops._core import env

KIB = 1024
MIB = 1024 * KIB


@dataclass(frozen=True)
class DeviceLimits:
    """Limits that configurations are computed from.

    Attributes:
        name: Product name.
        arch: Target with suffix, such as ``"sm_90a"``.
        sm_count: Streaming multiprocessors.
        shared_memory: Bytes of shared memory that one block may use.
        l2: Bytes of L2 cache.
        bandwidth: Data-sheet memory bandwidth in bytes per second; None where unknown.
    """

    name: str
    arch: str
    sm_count: int
    shared_memory: int
    l2: int
    bandwidth: float | None = None

    @property
    def capability(self):
        """Compute capability as a number, 90 for ``sm_90a``."""
        return int("".join(c for c in self.arch if c.isdigit()))


TARGETS = {
    limits.arch: limits
    for limits in (
        DeviceLimits("Tesla T4", "sm_75", 40, 64 * KIB, 4 * MIB, 320e9),
        DeviceLimits("A100 SXM 80GB", "sm_80", 108, 163 * KIB, 40 * MIB, 2.039e12),
        DeviceLimits("GeForce RTX 3090", "sm_86", 82, 99 * KIB, 6 * MIB, 936e9),
        DeviceLimits("L40S", "sm_89", 142, 99 * KIB, 96 * MIB, 864e9),
        DeviceLimits("H100 SXM", "sm_90a", 132, 227 * KIB, 50 * MIB, 3.35e12),
        DeviceLimits("B200", "sm_100a", 148, 227 * KIB, 126 * MIB, 8.0e12),
        DeviceLimits("GeForce RTX 5090", "sm_120", 170, 99 * KIB, 96 * MIB, 1.79e12),
    )
}

# On a CPU programs run one after another: few of them keep tests fast.
CPU_SM_COUNT = 4
INTERPRETER = DeviceLimits("Triton interpreter", "sm_90a", CPU_SM_COUNT, 227 * KIB, 50 * MIB)
EMULATED = {
    arch: replace(TARGETS[arch], name=f"emulated {arch}", sm_count=CPU_SM_COUNT, bandwidth=None)
    for arch in env.VARIABLES["FUSEDOPS_EMULATE_TARGET"][0]
}

MIN_CAPABILITY = 80  # what Triton supports
MIN_FP8_CAPABILITY = 89


def cpu_name():
    """The processor's name where Linux tells it, else its architecture."""
    try:
        with open("/proc/cpuinfo") as info:
            return next(line.partition(":")[2].strip() for line in info if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()


_described = ContextVar("limits that tensors without a GPU stand for", default=None)


@contextlib.contextmanager
def described(device_limits):
    """In this block tensors that are not on a GPU stand for some on this device, of which nothing can be run."""
    token = _described.set(device_limits)
    try:
        yield
    finally:
        _described.reset(token)


def limits(device):
    """The limits of a torch device; anything but CUDA stands for the emulated GPU, or for Triton's interpreter."""
    if device.type != "cuda":
        if (found := _described.get()) is not None:
            return found
        return EMULATED[env.emulate_target()] if env.backend() == "emulate" else INTERPRETER
    return _cuda_limits(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def _cuda_limits(index):
    properties = torch.cuda.get_device_properties(index)
    number = properties.major * 10 + properties.minor
    arch = f"sm_{number}a" if number in (90, 100, 103) else f"sm_{number}"
    shared = getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block)
    known = TARGETS.get(arch)
    bandwidth = known.bandwidth if known is not None and known.name.split()[0] in properties.name else None
    return DeviceLimits(
        properties.name, arch, properties.multi_processor_count, shared, properties.L2_cache_size, bandwidth
    )


@functools.cache
def triton_missing():
    """Why Triton cannot be used in this process, or None."""
    try:
        import triton  # noqa: F401
    except Exception as error:  # a broken install fails in many ways; each means the same here
        return f"triton cannot be imported ({type(error).__name__}: {error})"
    return None


@functools.cache
def interpreting():
    """Whether Triton runs its kernels in Python on CPU tensors (TRITON_INTERPRET=1 before its import)."""
    if triton_missing() is not None:
        return False
    import triton

    return bool(triton.knobs.runtime.interpret)


def too_old(device_limits):
    """Why a GPU's compute capability is not enough for Triton kernels, or None."""
    capability = device_limits.capability
    if capability < MIN_CAPABILITY:
        return f"needs compute capability {MIN_CAPABILITY / 10}, the device has {capability / 10}"
    return None


def triton_rejection(device):
    """Why Triton kernels cannot run on tensors of this device, or None."""
    missing = triton_missing()
    if missing is not None:
        return missing
    if device.type == "cuda":
        return too_old(limits(device))
    if device.type == "cpu":
        return None if interpreting() else "CPU tensors need Triton's interpreter (TRITON_INTERPRET=1)"
    return f"Triton kernels run on CUDA tensors, got {device.type}"


def fp8_rejection(*tensors):
    """Why Triton kernels cannot read or write these tensors where some are float8, or None."""
    for tensor in tensors:
        if tensor.dtype == torch.float8_e4m3fn:
            capability = limits(tensor.device).capability
            if capability < MIN_FP8_CAPABILITY:
                return f"float8 needs compute capability {MIN_FP8_CAPABILITY / 10}, the device has {capability / 10}"
    return None
