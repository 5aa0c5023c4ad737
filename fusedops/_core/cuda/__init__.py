"""Kernels written in CUDA: load one by its name and launch it, on a GPU or, diverted, in the emulator.

Shipped machine code is loaded through the driver's C interface, so no CUDA toolkit, no torch ABI and no further package
is needed. `images` finds what is loaded and `driver` loads it.
"""

import ctypes
import functools
import operator
import struct
import threading

import torch

from fusedops._core import diversion, emulation
from fusedops._core.cuda import driver, images
from fusedops._core.device import limits, too_old
from fusedops._core.relaunch import current_stream

# CUtensorMapDataType: unsigned integers of 1, 2, 4 and 8 bytes, and the floats.
_MAP_TYPES = {
    torch.uint8: 0, torch.int8: 0, torch.float8_e4m3fn: 0, torch.float8_e5m2: 0, torch.int16: 1, torch.int32: 3,
    torch.int64: 5, torch.float16: 6, torch.float32: 7, torch.bfloat16: 9,
}  # fmt: skip
_FORMATS = {ctypes.c_int32: "i", ctypes.c_uint32: "I", ctypes.c_int64: "q", ctypes.c_uint64: "Q", ctypes.c_float: "f"}
_VALUES = {
    torch.Tensor: torch.Tensor.data_ptr, torch.nn.Parameter: torch.Tensor.data_ptr, type(None): lambda _: 0,
    **dict.fromkeys(_FORMATS, operator.attrgetter("value")),
}  # fmt: skip
_SWIZZLES = {0: 0, 32: 1, 64: 2, 128: 3}
_lock = threading.Lock()


def rejection(device):
    """Why CUDA kernels cannot run on tensors of this device, or None."""
    if device.type != "cuda":
        return f"CUDA kernels run on CUDA tensors, got {device.type}"
    return too_old(limits(device)) or _no_driver()


def _no_driver():
    try:
        driver.library()
    except RuntimeError as error:
        return str(error)
    return None


def target(device):
    """The architecture that kernels are loaded for: ``"sm_80"``, ``"sm_90a"``, ..."""
    return limits(device).arch


@functools.cache
def load(source, symbol, target):
    """The Kernel that ``extern "C"`` names `symbol` in ``csrc/cuda/<source>.cu``; read at its first launch."""
    return Kernel(source, symbol, target)


class TensorMap(bytes):
    """An encoded tensor map, to be given as an argument."""


_VALUES[TensorMap] = bytes


def tensor_map(tensor, box, swizzle=0):
    """A tensor map of a matrix, whose rows may lie apart.

    Args:
        tensor: Two dimensions, the last contiguous. It must outlive the launch.
        box: (rows, columns) of what one copy takes.
        swizzle: 0, 32, 64 or 128 bytes.
    """
    if tensor.is_meta:  # of a launch that is only recorded
        return TensorMap(driver.MAP_BYTES)
    if diversion.handler() is not None:
        return emulation.encode_tiled(tensor, box, swizzle)
    return _encoded(
        _MAP_TYPES[tensor.dtype], tensor.data_ptr(), tensor.element_size(), tuple(tensor.shape), tensor.stride(0), *box,
        _SWIZZLES[swizzle],
    )  # fmt: skip


@functools.lru_cache(maxsize=4096)
def _encoded(data_type, address, item_bytes, shape, stride, rows, columns, swizzle):
    """Encoding follows from these alone and takes as long as a launch."""
    return TensorMap(
        driver.encode_tiled(data_type, address, (shape[1], shape[0]), (stride * item_bytes,), (columns, rows), swizzle)
    )


class Kernel:
    """A kernel for one target.

    Attributes:
        source, symbol, target: Stem of its file, its name, and the architecture.
    """

    def __init__(self, source, symbol, target):
        self.source, self.symbol, self.target = source, symbol, target
        self._functions = {}
        self._layout = None

    def __repr__(self):
        return f"{self.symbol} ({self.source}.cu for {self.target})"

    def ptx(self):
        """PTX of the source, for the emulator."""
        return images.ptx(self.source, self.target)

    def launch(self, grid, block, arguments, *, shared=0, cluster=(1, 1, 1), device=None):
        """Launch on the current stream.

        Args:
            grid, block, cluster: Blocks, threads of a block, blocks of a cluster: three numbers each.
            arguments: Tensors (their address), None (a null pointer), ctypes scalars, tensor maps.
            shared: Bytes of dynamic shared memory.
            device: Default: that of the first tensor.
        """
        divert = diversion.handler()
        if divert is not None:
            divert(self, grid, arguments, {"block": block, "shared": shared, "cluster": cluster})
            return
        if device is None:
            device = next(argument for argument in arguments if isinstance(argument, torch.Tensor)).device
        index = torch.cuda.current_device() if device.index is None else device.index
        function = self._functions.get(index) or self._load(index)
        layout = self._layout or self._lay_out(arguments)
        try:
            function.launch(grid, block, layout, _values(arguments), shared, cluster, current_stream(index))
        except struct.error as error:
            raise ValueError(
                f"{self.source}: {self.symbol} must be launched with the types of its first launch ({error})"
            ) from error

    def _load(self, index):
        with _lock:
            module = _module(self.source, self.target, index)
            function = self._functions[index] = driver.Function(module, self.symbol, index)
        return function

    def _lay_out(self, arguments):
        """How C lays out the parameters; a kernel's have the same types in every launch."""
        self._layout = driver.structure([self._format(argument) for argument in arguments])
        return self._layout

    def _format(self, argument):
        if argument is None or isinstance(argument, torch.Tensor):
            return "Q"
        if isinstance(argument, bytes):
            return f"{len(argument)}s"
        if type(argument) not in _FORMATS:
            raise TypeError(
                f"{self.source}: arguments of {self.symbol} must be tensors, None, ctypes scalars or tensor maps, got "
                f"{type(argument).__name__}"
            )
        return _FORMATS[type(argument)]


@functools.cache
def _module(source, target, index):
    image = images.find(source, target)
    try:
        return driver.load_module(image.content, index)
    except driver.DriverError as error:
        raise driver.DriverError(f"{source}: the driver refuses the {image.origin} {image.product}: {error}") from error


def _values(arguments):
    try:
        return [_VALUES[type(argument)](argument) for argument in arguments]
    except KeyError:  # a type that derives from these
        return [one.data_ptr() if isinstance(one, torch.Tensor) else getattr(one, "value", one) for one in arguments]
