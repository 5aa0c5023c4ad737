"""The arguments of a launch as a compiled kernel's parameters: descriptors become tensor maps, scalars become bytes."""

from __future__ import annotations

import ctypes
import struct
from dataclasses import dataclass, field

import torch

from fusedops.testing.ptx.module import machine

_FORMATS = {
    "i1": "b", "i8": "b", "i16": "h", "i32": "i", "i64": "q", "u1": "B", "u8": "B", "u16": "H", "u32": "I", "u64": "Q",
    "fp16": "e", "fp32": "f", "f32": "f", "fp64": "d",
}  # fmt: skip
# CUtensorMapDataType from the numbers that tensormap.replace and so Triton's metadata use.
_HOST_TYPES = {number: number for number in range(16)} | {8: 10, 9: 8, 10: 9}
_TF32 = 11
_MAP_TYPES = {
    torch.uint8: 0, torch.int8: 0, torch.bool: 0, torch.float8_e4m3fn: 0, torch.float8_e5m2: 0, torch.int16: 1,
    torch.uint16: 1, torch.uint32: 2, torch.int32: 3, torch.uint64: 4, torch.int64: 5, torch.float16: 6,
    torch.float32: 7, torch.float64: 8, torch.bfloat16: 9,
}  # fmt: skip
SWIZZLES = {0: 0, 32: 1, 64: 2, 128: 3}


@dataclass(frozen=True)
class MapRequest:
    """Arguments of ``cuTensorMapEncodeTiled``: the driver's numbers, innermost dimension first, strides in bytes."""

    data_type: int
    address: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    element_strides: tuple[int, ...]
    interleave: int
    swizzle: int
    l2_promotion: int
    fill: int


class TensorMap(bytes):
    """The 128 bytes of an encoded tensor map.

    Attributes:
        tensor: The memory that it leads to.
        request: What it was made from, so that it can be encoded again for another address.
    """

    tensor: torch.Tensor
    request: MapRequest


def encode_tiled(
    tensor,
    box,
    sizes=None,
    strides=None,
    element_strides=None,
    swizzle: int = 0,
    fill_nan: bool = False,
    data_type: int | None = None,
) -> TensorMap:
    """Encode a tensor map for TMA, with the checks of ``cuTensorMapEncodeTiled``.

    Args:
        tensor: The memory.
        box: Elements that one copy takes in each dimension; dimensions in torch's order, the contiguous one last.
        sizes, strides: Of the tensor in elements, where they are not the tensor's own.
        element_strides: Every how many elements one is taken; default: all ones.
        swizzle: Bytes: 0, 32, 64 or 128.
        fill_nan: Elements out of bounds are NaN, else 0.
        data_type: A number of ``CUtensorMapDataType``; default: from the tensor's dtype.

    Returns:
        The 128 bytes to pass as an argument; a launch takes the tensor behind it along.

    Raises:
        ValueError: the driver would refuse to encode it.
    """
    sizes, strides = tuple(sizes or tensor.shape), tuple(strides or tensor.stride())
    rank = len(sizes)
    if not len(strides) == len(box) == rank or strides[-1] != 1:
        raise ValueError(
            f"encode_tiled: sizes, strides and box must agree in rank and end contiguously, "
            f"got {sizes}, {strides}, {tuple(box)}"
        )
    request = MapRequest(
        data_type=_MAP_TYPES[tensor.dtype] if data_type is None else data_type,
        address=tensor.data_ptr(),
        sizes=tuple(reversed(sizes)),
        strides=tuple(stride * tensor.element_size() for stride in reversed(strides[:-1])),
        box=tuple(reversed(box)),
        element_strides=tuple(reversed(element_strides or (1,) * rank)),
        interleave=0,
        swizzle=SWIZZLES[swizzle],
        l2_promotion=2,  # 128 bytes, a hint
        fill=int(fill_nan),
    )
    made = TensorMap(_encode(request))
    made.tensor, made.request = tensor, request
    return made


def tile_arguments(request: MapRequest) -> tuple:
    """What ``cuTensorMapEncodeTiled`` takes after the map itself."""
    rank, word, wide = len(request.sizes), ctypes.c_uint32, ctypes.c_uint64
    return (
        word(request.data_type),
        word(rank),
        wide(request.address),
        (wide * rank)(*request.sizes),
        (wide * rank)(*request.strides),
        (word * rank)(*request.box),
        (word * rank)(*request.element_strides),
        word(request.interleave),
        word(request.swizzle),
        word(request.l2_promotion),
        word(request.fill),
    )


def _encode(request: MapRequest) -> bytes:
    out, error = (ctypes.c_uint8 * 128)(), ctypes.create_string_buffer(4096)
    refused = machine().ptx_encode_tiled(out, *tile_arguments(request), error, ctypes.c_size_t(len(error)))
    if refused:
        raise ValueError(f"encode_tiled: {error.value.decode()}")
    return bytes(out)


@dataclass
class Parameters:
    """What `Module.launch` takes: values and names of parameters, and memory that they lead to.

    Attributes:
        values, names: Of the parameters of the PTX, in order.
        owners: For each value the index of the kernel's parameter in Python that it comes from.
        memory: Name, tensor and owner of what is behind tensor maps.
        constant: Indices of values that the kernel declares constant.
    """

    values: list = field(default_factory=list)
    names: list = field(default_factory=list)
    owners: list = field(default_factory=list)
    memory: list = field(default_factory=list)
    constant: set = field(default_factory=set)

    def add(self, name: str, value, owner: int, kind: str = "") -> None:
        """Append a parameter of a Triton type."""
        if kind.startswith("*k"):
            self.constant.add(len(self.values))
        if isinstance(value, TensorMap):
            self.memory.append((name, value.tensor, owner))
        self.values.append(_packed(value, kind) if kind in _FORMATS or kind == "bf16" else value)
        self.names.append(name)
        self.owners.append(owner)

    def tensors(self) -> list[tuple[str, torch.Tensor]]:
        """Every tensor that a launch may touch, with its name."""
        direct = [(name, value) for name, value in zip(self.names, self.values) if isinstance(value, torch.Tensor)]
        return direct + [(name, tensor) for name, tensor, _ in self.memory]

    def launch(self, read_only: set[int]) -> dict:
        """The keywords of `Module.launch`; `read_only` holds indices of the kernel's parameters in Python."""
        kept = (i for i, owner in enumerate(self.owners) if owner in read_only or i in self.constant)
        return {
            "arguments": self.values,
            "names": tuple(self.names),
            "read_only": tuple(kept),
            "memory": [(name, tensor, owner not in read_only) for name, tensor, owner in self.memory],
        }


def flatten(binding, metadata: dict) -> Parameters:
    """Turn the arguments of a bound kernel into the parameters of its PTX, scratch memory left out."""
    made = Parameters()
    maps = iter(metadata.get("tensordesc_meta") or ())

    def visit(name, kind, value, owner):
        if isinstance(kind, (tuple, list)):
            for index, (inner_kind, inner) in enumerate(zip(kind, value)):
                visit(f"{name}[{index}]", inner_kind, inner, owner)
        elif kind.startswith("tensordesc"):
            _add_descriptor(made, name, value, owner, next(maps, None))
        elif kind.startswith("*"):
            made.add(name, getattr(value, "base", value), owner, kind)
        elif kind != "constexpr":
            made.add(name, value, owner, kind)

    for owner, (name, kind) in enumerate(binding.signature.items()):
        visit(name, kind, binding.values[name], owner)
    return made


def _add_descriptor(made: Parameters, name: str, descriptor, owner: int, layout: dict | None) -> None:
    """A descriptor is a tensor map, shape and strides; without TMA a pointer, both and options come first."""
    if layout is None:
        made.add(name, descriptor.base, owner)
        _add_sizes(made, name, descriptor, owner, "i64")
        made.add(f"{name}.padding", descriptor.padding == "nan", owner, "i1")
        if hasattr(descriptor, "round_f32_to_tf32"):  # Triton 3.7
            made.add(f"{name}.round_f32_to_tf32", descriptor.round_f32_to_tf32, owner, "i1")
    else:
        made.add(name, _tensor_map(descriptor, layout), owner)
    _add_sizes(made, name, descriptor, owner, "i32")


def _add_sizes(made: Parameters, name: str, descriptor, owner: int, size_type: str) -> None:
    for index, size in enumerate(descriptor.shape):
        made.add(f"{name}.shape[{index}]", size, owner, size_type)
    for index, stride in enumerate(descriptor.strides):
        made.add(f"{name}.strides[{index}]", stride, owner, "i64")


def _tensor_map(descriptor, layout: dict) -> bytes:
    sizes = list(descriptor.shape)
    if layout["fp4_padded"]:
        sizes[-1] *= 2
    rounds = getattr(descriptor, "round_f32_to_tf32", False)
    return encode_tiled(
        descriptor.base,
        layout["block_size"],
        sizes,
        descriptor.strides,
        swizzle={number: count for count, number in SWIZZLES.items()}[layout["swizzle"]],
        fill_nan=descriptor.padding == "nan",
        data_type=_TF32 if rounds else _HOST_TYPES[layout["elem_type"]],
    )


def _packed(value, kind: str) -> bytes:
    if kind == "bf16":  # cut off, as Triton's launcher does
        return struct.pack("<f", value)[2:]
    return struct.pack(f"<{_FORMATS[kind]}", value)


def aligned_memory(count: int, align: int) -> torch.Tensor:
    """Bytes at an aligned address, filled with a pattern since fresh GPU memory is not zero."""
    room = torch.full((count + align,), 0xA5, dtype=torch.uint8)
    return room[-room.data_ptr() % align :][:count]
