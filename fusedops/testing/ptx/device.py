"""PTX on a real GPU through the driver's C interface: needs `libcuda` and nothing else."""

from __future__ import annotations

import ctypes
import functools
from dataclasses import replace

from fusedops._core.cuda.driver import Attribute, Config
from fusedops.testing.ptx.tensors import tile_arguments

_LOG_BYTES = 8192
# CUjit_option, CUfunction_attribute, CUdevice_attribute, CUlaunchAttributeID of cuda.h
_JIT_ERROR_LOG, _JIT_ERROR_LOG_BYTES = 5, 6
_MAX_DYNAMIC_SHARED = 8
_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76
_CLUSTER_DIMENSION = 4
_MAP_BYTES = 128


class DeviceError(RuntimeError):
    """The driver's own words."""


class Device:
    """The first GPU of this machine. RuntimeError: there is no driver or no GPU."""

    def __init__(self, library: str = "libcuda.so.1"):
        try:
            self._driver = ctypes.CDLL(library)
        except OSError as problem:
            raise RuntimeError(f"golden: needs an NVIDIA driver, {problem}") from None
        self._call("cuInit", 0)
        device, context, number = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_int()
        self._call("cuDeviceGet", ctypes.byref(device), 0)
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        self._call("cuCtxSetCurrent", context)
        name = ctypes.create_string_buffer(256)
        self._call("cuDeviceGetName", name, 256, device)
        capability = []
        for attribute in (_CAPABILITY_MAJOR, _CAPABILITY_MINOR):
            self._call("cuDeviceGetAttribute", ctypes.byref(number), attribute, device)
            capability.append(number.value)
        self._call("cuDriverGetVersion", ctypes.byref(number))
        self.capability = tuple(capability)
        version = f"{number.value // 1000}.{number.value % 1000 // 10}"
        self.description = f"{name.value.decode()}, compute capability {capability[0]}.{capability[1]}, CUDA {version}"
        self._module = functools.lru_cache(maxsize=64)(self._load)

    def _call(self, function: str, *arguments) -> None:
        code = getattr(self._driver, function)(*arguments)
        if code:
            words = ctypes.c_char_p()
            self._driver.cuGetErrorString(code, ctypes.byref(words))
            raise DeviceError(f"{function}: {(words.value or b'unknown error').decode()} ({code})")

    def _load(self, text: str) -> ctypes.c_void_p:
        """Compile PTX with the driver's own compiler."""
        module, log = ctypes.c_void_p(), ctypes.create_string_buffer(_LOG_BYTES)
        options = (ctypes.c_int * 2)(_JIT_ERROR_LOG, _JIT_ERROR_LOG_BYTES)
        values = (ctypes.c_void_p * 2)(ctypes.addressof(log), _LOG_BYTES)
        try:
            self._call("cuModuleLoadDataEx", ctypes.byref(module), text.encode(), 2, options, values)
        except DeviceError as problem:
            raise DeviceError(f"{problem} {log.value.decode()}".strip()) from None
        return module

    def run(self, text, kernel, grid, block, cluster, shared, parameters, buffers) -> list[bytes]:
        """Launch a kernel on copies of `buffers` and return what they hold afterwards.

        Args:
            parameters: One for each parameter: bytes as they are, ``("pointer", buffer, offset)``, or
                ``("map", buffer, offset, request)`` for a tensor map of what lies there.
            buffers: (bytes, remainder): the device's address is the remainder modulo 256, as the host's was.
        """
        function = ctypes.c_void_p()
        self._call("cuModuleGetFunction", ctypes.byref(function), self._module(text), kernel.encode())
        self._call("cuFuncSetAttribute", function, _MAX_DYNAMIC_SHARED, shared)
        allocations, places = [], []
        try:
            for content, remainder in buffers:
                base = ctypes.c_uint64()
                self._call("cuMemAlloc_v2", ctypes.byref(base), ctypes.c_size_t(len(content) + 256))
                allocations.append(base)
                places.append(base.value + remainder)
                if content:
                    self._call("cuMemcpyHtoD_v2", ctypes.c_uint64(places[-1]), content, ctypes.c_size_t(len(content)))
            values = [self._parameter(parameter, places) for parameter in parameters]
            self._launch(function, grid, block, cluster, shared, values)
            return [self._read(place, len(content)) for place, (content, _) in zip(places, buffers)]
        finally:
            for base in allocations:
                self._driver.cuMemFree_v2(base)

    def _launch(self, function, grid, block, cluster, shared, values):
        # Aligned for tensor maps, which must start at multiples of 64.
        room = ctypes.create_string_buffer(sum(_rounded(len(value)) for value in values) + 64)
        address = _rounded(ctypes.addressof(room))
        pointers = (ctypes.c_void_p * max(1, len(values)))()
        for i, value in enumerate(values):
            ctypes.memmove(address, value, len(value))
            pointers[i] = address
            address += _rounded(len(value))
        attribute = Attribute(id=_CLUSTER_DIMENSION, cluster=tuple(cluster))
        several = tuple(cluster) != (1, 1, 1)
        config = Config(tuple(grid), tuple(block), shared, None, ctypes.pointer(attribute), int(several))
        self._call("cuLaunchKernelEx", ctypes.byref(config), function, pointers, None)
        self._call("cuCtxSynchronize")

    def _read(self, place, size) -> bytes:
        content = ctypes.create_string_buffer(max(1, size))
        if size:
            self._call("cuMemcpyDtoH_v2", content, ctypes.c_uint64(place), ctypes.c_size_t(size))
        return content.raw[:size]

    def _parameter(self, parameter, places) -> bytes:
        if isinstance(parameter, bytes):
            return parameter
        kind, buffer, offset, *request = parameter
        address = places[buffer] + offset
        return address.to_bytes(8, "little") if kind == "pointer" else self._encoded(address, *request)

    def _encoded(self, address, request) -> bytes:
        """A tensor map by cuTensorMapEncodeTiled; `request` is that of the emulated map."""
        room = ctypes.create_string_buffer(_MAP_BYTES + 64)
        place = _rounded(ctypes.addressof(room))
        self._call("cuTensorMapEncodeTiled", ctypes.c_void_p(place), *tile_arguments(replace(request, address=address)))
        return ctypes.string_at(place, _MAP_BYTES)


def _rounded(number: int) -> int:
    return -(-number // 64) * 64
