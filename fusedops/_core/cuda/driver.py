"""The CUDA driver through its C interface: `libcuda` is all that is needed, of whatever release torch brought along."""

import contextlib
import ctypes
import functools
import struct

LIBRARY = "libcuda.so.1"
# Numbers of cuda.h: CUresult, CUfunction_attribute, CUlaunchAttributeID, CUstreamCaptureMode, CU_LAUNCH_PARAM_*.
_INVALID_CONTEXT = 201
_MAX_DYNAMIC_SHARED = 8
_CLUSTER_DIMENSION = 4
_CAPTURE_RELAXED = 2
_BUFFER_POINTER, _BUFFER_SIZE = 1, 2
MAP_BYTES = 128


class DriverError(RuntimeError):
    """The driver's own words."""


class Attribute(ctypes.Structure):
    """CUlaunchAttribute: an identifier and a union of 64 bytes, of which the cluster's dimensions are used."""

    _fields_ = [
        ("id", ctypes.c_int),
        ("pad", ctypes.c_char * 4),
        ("cluster", ctypes.c_uint * 3),
        ("rest", ctypes.c_char * 52),
    ]


class Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = [
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(Attribute)),
        ("num_attributes", ctypes.c_uint),
    ]


class _Packed(ctypes.Structure):
    """The `extra` of a launch: all parameters in one buffer. A value behind each name, and an end."""

    _fields_ = [
        ("buffer", ctypes.c_void_p),
        ("content", ctypes.c_void_p),
        ("size", ctypes.c_void_p),
        ("count", ctypes.c_void_p),
        ("end", ctypes.c_void_p),
    ]


_SIZES = struct.Struct("=7I4xQ")  # the start of a Config: grid, block, shared memory, stream


class _Memory:
    """What the driver reads of a launch, at addresses that stay: only numbers are written for each.

    Attributes:
        config: The Config, which begins with what `_SIZES` packs.
        content: The kernel's parameters as C lays them out.
        places: Addresses of the Config and of the `extra`.
    """

    def __init__(self, size, cluster):
        self._attribute = Attribute(id=_CLUSTER_DIMENSION, cluster=cluster)
        self._count = ctypes.c_size_t(size)
        self.config = Config(attributes=ctypes.pointer(self._attribute), num_attributes=int(cluster != (1, 1, 1)))
        self.content = ctypes.create_string_buffer(size)
        addresses = ctypes.addressof(self.content), ctypes.addressof(self._count)
        self._packed = _Packed(_BUFFER_POINTER, addresses[0], _BUFFER_SIZE, addresses[1], None)
        self.places = [ctypes.c_void_p(ctypes.addressof(one)) for one in (self.config, self._packed)]


@functools.cache
def library():
    """The driver, initialised. RuntimeError: there is none, or it cannot start."""
    try:
        found = ctypes.CDLL(LIBRARY)
    except OSError as error:
        raise RuntimeError(f"no NVIDIA driver ({error})") from error
    check(found.cuInit(0), "cuInit", found)
    return found


def check(status, function, driver=None):
    """Raise DriverError unless a call of the driver succeeded."""
    if status:
        words = ctypes.c_char_p()
        (driver or library()).cuGetErrorString(status, ctypes.byref(words))
        raise DriverError(f"{function}: {(words.value or b'unknown error').decode()} ({status})")


@contextlib.contextmanager
def _loading(index):
    """In a device's primary context, which is torch's, and allowed while a stream is captured into a graph."""
    driver, mode = library(), ctypes.c_int(_CAPTURE_RELAXED)
    before = _current_context()
    _make_current(index)
    check(driver.cuThreadExchangeStreamCaptureMode(ctypes.byref(mode)), "cuThreadExchangeStreamCaptureMode")
    try:
        yield driver
    finally:
        driver.cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))
        driver.cuCtxSetCurrent(before)


def _current_context():
    context = ctypes.c_void_p()
    check(library().cuCtxGetCurrent(ctypes.byref(context)), "cuCtxGetCurrent")
    return context


def _make_current(index):
    check(library().cuCtxSetCurrent(_primary_context(index)), "cuCtxSetCurrent")


@functools.cache
def _primary_context(index):
    driver, device, context = library(), ctypes.c_int(), ctypes.c_void_p()
    check(driver.cuDeviceGet(ctypes.byref(device), index), "cuDeviceGet")
    check(driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device), "cuDevicePrimaryCtxRetain")
    return context


def load_module(content, index):
    """Load machine code, or PTX that the driver compiles, on a device. DriverError: it refused."""
    module = ctypes.c_void_p()
    with _loading(index) as driver:
        check(driver.cuModuleLoadData(ctypes.byref(module), content), "cuModuleLoadData")
    return module


class Function:
    """One kernel on one device, ready to be launched."""

    def __init__(self, module, symbol, index):
        self._index = index
        self._shared = 0  # dynamic shared memory that the kernel was told it may have
        self._function = ctypes.c_void_p()
        with _loading(index) as driver:
            status = driver.cuModuleGetFunction(ctypes.byref(self._function), module, symbol.encode())
            check(status, f"cuModuleGetFunction {symbol}")
        self._launch = driver.cuLaunchKernelEx
        self._free = {}  # by cluster: the memory of launches that are over

    def launch(self, grid, block, layout, values, shared, cluster, stream):
        """Launch on a stream; `layout` is the `struct.Struct` of the kernel's parameters.

        Raises:
            struct.error: a value is not of the type that the layout has in its place.
        """
        if shared > self._shared:
            self._allow(shared)
        free = self._free.setdefault(cluster, [])
        try:
            memory = free.pop()  # nobody else has it then: another thread, or what runs when something is collected
        except IndexError:
            memory = _Memory(layout.size, cluster)
        _SIZES.pack_into(memory.config, 0, *grid, *block, shared, stream)
        layout.pack_into(memory.content, 0, *values)
        config, extra = memory.places
        status = self._launch(config, self._function, None, extra)
        if status == _INVALID_CONTEXT and not _current_context():  # a thread in which torch has not used a GPU yet
            _make_current(self._index)
            status = self._launch(config, self._function, None, extra)
        free.append(memory)
        if status:
            check(status, "cuLaunchKernelEx")

    def _allow(self, shared):
        with _loading(self._index) as driver:
            status = driver.cuFuncSetAttribute(self._function, _MAX_DYNAMIC_SHARED, shared)
            check(status, f"cuFuncSetAttribute of {shared} bytes of shared memory")
        self._shared = shared


def encode_tiled(data_type, address, sizes, strides, box, swizzle):
    """The 128 bytes of a tensor map: the driver's numbers, the innermost dimension first, strides in bytes."""
    rank, word, wide = len(sizes), ctypes.c_uint32, ctypes.c_uint64
    room = ctypes.create_string_buffer(MAP_BYTES + 64)
    place = -(-ctypes.addressof(room) // 64) * 64  # tensor maps start at multiples of 64 bytes
    no_interleave, l2_promotion, fill_zero = word(0), word(2), word(0)
    status = library().cuTensorMapEncodeTiled(
        ctypes.c_void_p(place), word(data_type), word(rank), ctypes.c_void_p(address), (wide * rank)(*sizes),
        (wide * rank)(*strides), (word * rank)(*box), (word * rank)(*(1,) * rank), no_interleave, word(swizzle),
        l2_promotion, fill_zero,
    )  # fmt: skip
    check(status, "cuTensorMapEncodeTiled")
    return ctypes.string_at(place, MAP_BYTES)


def structure(formats):
    """The `struct.Struct` of parameters: each at a multiple of its size, a tensor map at one of 64 bytes."""
    text, offset = "<", 0
    for letter in formats:
        size = struct.calcsize(f"<{letter}")
        pad = -offset % (64 if size == MAP_BYTES else size)
        text += f"{pad}x{letter}"
        offset += pad + size
    return struct.Struct(text)
