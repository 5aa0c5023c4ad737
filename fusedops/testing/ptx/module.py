"""PTX text as something that can be launched on CPU memory."""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass

import torch

from fusedops.testing.ptx import build
from fusedops.testing.ptx.schedules import ASYNC, ORDERS, Schedule, named

# Bits of Checks in machine/launch.h.
CHECKS = {"bounds": 1, "uninitialised": 2, "races": 4, "read_only": 8, "leftovers": 16, "proxies": 32}
_ROOM = 1 << 16


class Fault(RuntimeError):
    """PTX that is not understood, or what a kernel did wrong."""


class _Request(ctypes.Structure):
    """LaunchRequest of machine/api.cpp."""

    _fields_ = [
        ("kernel", ctypes.c_char_p),
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("cluster", ctypes.c_uint32 * 3),
        ("dynamic_shared", ctypes.c_uint32),
        ("parameters", ctypes.c_uint32),
        ("values", ctypes.POINTER(ctypes.c_void_p)),
        ("allocations", ctypes.c_uint32),
        ("begins", ctypes.POINTER(ctypes.c_uint64)),
        ("ends", ctypes.POINTER(ctypes.c_uint64)),
        ("names", ctypes.POINTER(ctypes.c_char_p)),
        ("writable", ctypes.POINTER(ctypes.c_uint8)),
        ("order", ctypes.c_int32),
        ("asynchronous", ctypes.c_int32),
        ("blocks_reversed", ctypes.c_int32),
        ("quantum", ctypes.c_uint32),
        ("seed", ctypes.c_uint64),
        ("checks", ctypes.c_uint32),
        ("max_steps", ctypes.c_uint64),
        ("steps", ctypes.c_uint64),
    ]


@functools.cache
def machine() -> ctypes.CDLL:
    """The machine's library, built if it must be. RuntimeError: it cannot be built here."""
    library = ctypes.CDLL(str(build.library()))
    text, size, handle = ctypes.c_char_p, ctypes.c_size_t, ctypes.c_void_p
    library.ptx_load.restype, library.ptx_load.argtypes = handle, (text, text, size)
    library.ptx_unload.restype, library.ptx_unload.argtypes = None, (handle,)
    library.ptx_describe.argtypes = (handle, text, size)
    library.ptx_instructions.argtypes = (text, size)
    library.ptx_launch.argtypes = (handle, ctypes.POINTER(_Request), text, size)
    return library


@dataclass(frozen=True)
class Parameter:
    """Type as PTX names it (``"u64"``), size in bytes, and name."""

    type: str
    size: int
    name: str


@dataclass(frozen=True)
class Entry:
    """A kernel of a module: its parameters, its static shared memory in bytes, and its threads where PTX says so."""

    parameters: tuple[Parameter, ...]
    static_shared: int
    required_threads: tuple[int, int, int] | None
    required_cluster: tuple[int, int, int] | None


class Module:
    """Loaded PTX. Make it with `load`.

    Attributes:
        text: What it was made from.
        kernels: Name to `Entry`.
    """

    def __init__(self, text: str):
        self.text = text
        self._machine = machine()
        error = ctypes.create_string_buffer(_ROOM)
        self._handle = self._machine.ptx_load(text.encode(), error, _ROOM)
        if not self._handle:
            raise Fault(error.value.decode())
        self.kernels = _entries(_text(functools.partial(self._machine.ptx_describe, self._handle)))

    def __del__(self):
        if getattr(self, "_handle", None):
            self._machine.ptx_unload(self._handle)

    def launch(
        self,
        kernel: str,
        grid: tuple[int, ...],
        block: tuple[int, ...],
        arguments: list | tuple,
        shared: int = 0,
        cluster: tuple[int, ...] = (1, 1, 1),
        schedule: Schedule | str = "default",
        checks: str | tuple[str, ...] = "all",
        read_only: tuple[int, ...] = (),
        names: tuple[str, ...] | None = None,
        memory: list | tuple = (),
        max_steps: int = 0,
    ) -> int:
        """Run a kernel in place.

        Args:
            kernel: Its name.
            grid, block, cluster: Blocks, threads of a block and blocks of a cluster, up to three numbers each.
            arguments: One for each parameter: a CPU tensor or numpy array (its address; the kernel may touch what the
                view spans), an int or float (converted to the parameter's type), bytes (copied as they are), or None
                (a null pointer).
            shared: Bytes of dynamic shared memory.
            schedule: A `Schedule` or the name of one.
            checks: ``"all"``, or the names of the checks to make: keys of ``CHECKS``.
            read_only: Indices of arguments that the kernel must not write.
            names: What messages call the arguments; default: as the PTX does.
            memory: Further tensors, (name, tensor) or (name, tensor, writable), that the kernel may touch through
                addresses it finds elsewhere.
            max_steps: Warp instructions after which a run is given up; 0 means about 17 billion.

        Returns:
            How many instructions warps executed.

        Raises:
            Fault: the kernel did something wrong; the message says what, where and who.
            ValueError: the launch itself is wrong.
        """
        entry = self.kernels.get(kernel)
        if entry is None:
            raise ValueError(f"ptx: no kernel {kernel!r}; there are {', '.join(self.kernels)}")
        if len(arguments) != len(entry.parameters):
            raise ValueError(f"ptx: {kernel} takes {len(entry.parameters)} arguments, got {len(arguments)}")
        names = names or tuple(parameter.name for parameter in entry.parameters)
        values = [packed(argument, parameter) for argument, parameter in zip(arguments, entry.parameters)]
        ranges = [
            (*span(argument), names[i], i not in read_only)
            for i, argument in enumerate(arguments)
            if has_memory(argument)
        ]
        for further in memory:
            name, tensor, *writable = further if isinstance(further, tuple) else ("memory", further)
            ranges.append((*span(tensor), name, all(writable)))
        (schedule,) = named(schedule).values()
        count = len(ranges)
        request = _Request(
            kernel=kernel.encode(),
            grid=three(grid),
            block=three(block),
            cluster=three(cluster),
            dynamic_shared=shared,
            parameters=len(values),
            values=(ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values)),
            allocations=count,
            begins=(ctypes.c_uint64 * count)(*(one[0] for one in ranges)),
            ends=(ctypes.c_uint64 * count)(*(one[1] for one in ranges)),
            names=(ctypes.c_char_p * count)(*(one[2].encode() for one in ranges)),
            writable=(ctypes.c_uint8 * count)(*(one[3] for one in ranges)),
            order=ORDERS.index(schedule.order),
            asynchronous=ASYNC.index(schedule.asynchronous),
            blocks_reversed=schedule.blocks_reversed,
            quantum=schedule.quantum,
            seed=schedule.seed,
            checks=_checks(checks),
            max_steps=max_steps,
        )
        error = ctypes.create_string_buffer(_ROOM)
        if self._machine.ptx_launch(self._handle, ctypes.byref(request), error, _ROOM):
            raise Fault(error.value.decode())
        return request.steps


@functools.lru_cache(maxsize=256)
def load(text: str) -> Module:
    """Load PTX. Fault: something in it is not understood; the message names instruction, kernel and line."""
    return Module(text)


def instructions() -> dict[str, tuple[str, ...]]:
    """Every instruction that the machine knows, with the sections of the PTX ISA that define it (one for each kind)."""
    known: dict[str, tuple[str, ...]] = {}
    for line in _text(machine().ptx_instructions).splitlines():
        name, section = line.split()
        known[name] = (*known.get(name, ()), section)
    return known


def _text(function) -> str:
    room = _ROOM
    while True:
        buffer = ctypes.create_string_buffer(room)
        if function(buffer, room) == 0:
            return buffer.value.decode()
        room *= 4


def _entries(description: str) -> dict[str, Entry]:
    """Read what ptx_describe writes."""
    entries = {}
    for line in description.splitlines():
        name, shared, threads, cluster, *parameters = line.split()
        read = tuple(Parameter(kind, int(size), label) for kind, size, label in (p.split(":") for p in parameters))
        entries[name] = Entry(read, int(shared), _dimensions(threads), _dimensions(cluster))
    return entries


def _dimensions(text: str) -> tuple[int, int, int] | None:
    numbers = tuple(int(number) for number in text.split(","))
    return numbers if numbers[0] else None


def three(numbers) -> tuple[int, int, int]:
    numbers = tuple(int(number) for number in numbers)
    if not 1 <= len(numbers) <= 3 or min(numbers) < 1:
        raise ValueError(f"ptx: grid, block and cluster must be one to three positive numbers, got {numbers}")
    return numbers + (1,) * (3 - len(numbers))


def _checks(names) -> int:
    if names == "all":
        return sum(CHECKS.values())
    unknown = set(names) - set(CHECKS)
    if isinstance(names, str) or unknown:
        raise ValueError(f"ptx: checks must be 'all' or some of {', '.join(CHECKS)}, got {names!r}")
    return sum(CHECKS[name] for name in names)


def has_memory(argument) -> bool:
    return isinstance(argument, torch.Tensor) or hasattr(argument, "__array_interface__")


def span(argument) -> tuple[int, int]:
    """The first address of a tensor's view, and the one after its last byte."""
    if isinstance(argument, torch.Tensor):
        if argument.device.type != "cpu":
            raise ValueError(f"ptx: kernels run on CPU tensors, got one on {argument.device}")
        if argument.numel() == 0:
            return argument.data_ptr(), argument.data_ptr()
        last = sum((size - 1) * stride for size, stride in zip(argument.shape, argument.stride()))
        return argument.data_ptr(), argument.data_ptr() + (last + 1) * argument.element_size()
    return _numpy_span(argument)


def _numpy_span(array) -> tuple[int, int]:
    import numpy as np

    return np.lib.array_utils.byte_bounds(array)


def packed(argument, parameter: Parameter):
    """A ctypes object that holds what the parameter bank gets."""
    size = parameter.size
    if argument is None or has_memory(argument):
        if size != 8:
            raise ValueError(f"ptx: parameter {parameter.name} has {size} bytes, a pointer has 8")
        return ctypes.c_uint64(0 if argument is None else span(argument)[0])
    if isinstance(argument, (bytes, bytearray)):
        if len(argument) != size:
            raise ValueError(f"ptx: parameter {parameter.name} has {size} bytes, got {len(argument)}")
        return (ctypes.c_ubyte * size).from_buffer_copy(argument)
    if parameter.type in ("f32", "f64"):
        return {"f32": ctypes.c_float, "f64": ctypes.c_double}[parameter.type](argument)
    if isinstance(argument, float):
        # Triton declares bits; the size says which float was meant.
        return {4: ctypes.c_float, 8: ctypes.c_double}[size](argument)
    if not -(1 << (8 * size - 1)) <= argument < 1 << (8 * size):
        raise ValueError(f"ptx: {argument} does not fit parameter {parameter.name} of {size} bytes")
    return {1: ctypes.c_uint8, 2: ctypes.c_uint16, 4: ctypes.c_uint32, 8: ctypes.c_uint64}[size](
        argument & ((1 << (8 * size)) - 1)
    )
