"""What the tests of matrix instructions share: element types, packing, fragments as the PTX ISA draws them, kernels."""

from dataclasses import dataclass

import numpy as np
import torch

from fusedops.testing import ptx

HEAD = ".version 8.7\n.target sm_90a\n.address_size 64\n"
LANES = np.arange(32)


@dataclass(frozen=True)
class Element:
    """A type of matrix elements: how many bits a code has, and the value of each code."""

    name: str
    bits: int

    @property
    def integer(self):
        return self.name in ("s8", "u8", "s4", "u4", "b1")

    def values(self, codes):
        codes = np.asarray(codes, np.uint64)
        if self.name in ("u8", "u4", "b1"):
            return codes.astype(np.int64)
        if self.name in ("s8", "s4"):
            return codes.astype(np.int64) - ((codes >> np.uint64(self.bits - 1)).astype(np.int64) << self.bits)
        if self.name == "f64":
            return codes.view(np.float64)
        if self.name in ("f32", "tf32"):
            kept = 0xFFFFE000 if self.name == "tf32" else 0xFFFFFFFF
            return (codes.astype(np.uint32) & np.uint32(kept)).view(np.float32).astype(np.float64)
        if self.name == "bf16":
            return (codes.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
        if self.name == "f16":
            return codes.astype(np.uint16).view(np.float16).astype(np.float64)
        kind = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}[self.name]
        return torch.from_numpy(codes.astype(np.uint8)).view(kind).double().numpy()

    def random(self, rng, shape, kind="any"):
        """Codes: of small integers, of any finite number near 1, or of numbers that are hard."""
        if self.integer:
            return rng.integers(0, 2 ** min(self.bits, 32), shape, np.uint64)
        small = {"integers": [-4, -3, -2, -1, 0, 1, 2, 3, 4], "any": None, "special": None}[kind]
        if small is not None:
            return self.codes(rng.choice(small, shape))
        codes = self.codes(rng.standard_normal(shape))
        if kind == "special":
            hard = np.array([0, 1, 2, 1 << (self.bits - 1)] + self.extremes(), np.uint64)
            chosen = rng.random(shape) < 0.02
            codes = np.where(chosen, rng.choice(hard, shape), codes)
        return codes

    def extremes(self):
        """Infinity, NaN and the largest number, where the type has them."""
        return {
            "f16": [0x7C00, 0xFC00, 0x7E01, 0x7BFF], "bf16": [0x7F80, 0xFF80, 0x7FC1, 0x7F7F],
            "tf32": [0x7F800000, 0xFF800000, 0x7FC02000, 0x7F7FE000, 0x3F801FFF], "e4m3": [0x7F, 0xFF, 0x7E],
            "e5m2": [0x7C, 0xFC, 0x7F, 0x7B], "f64": [0x7FF << 52, 0xFFF << 52],
        }[self.name]  # fmt: skip

    def codes(self, numbers):
        numbers = np.asarray(numbers, np.float64)
        if self.name == "f64":
            return numbers.view(np.uint64).copy()
        if self.name in ("f32", "tf32"):
            return numbers.astype(np.float32).view(np.uint32).astype(np.uint64)
        kind = {"f16": torch.float16, "bf16": torch.bfloat16, "e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
        raw = torch.from_numpy(np.ascontiguousarray(numbers)).to(kind[self.name])
        bits = raw.view(torch.uint8 if self.bits == 8 else torch.int16).numpy()
        return bits.astype(f"u{self.bits // 8}").astype(np.uint64)


ELEMENTS = {
    name: Element(name, bits)
    for name, bits in [
        ("f16", 16), ("bf16", 16), ("tf32", 32), ("f32", 32), ("f64", 64), ("e4m3", 8), ("e5m2", 8), ("s8", 8),
        ("u8", 8), ("s4", 4), ("u4", 4), ("b1", 1),
    ]
}  # fmt: skip


def pack(codes, bits):
    """Codes along the last axis, as the bytes that hold them, the first in the lowest bits."""
    codes = np.asarray(codes, np.uint64)
    if bits < 8:
        groups = codes.reshape(*codes.shape[:-1], -1, 8 // bits)
        return (groups << (bits * np.arange(8 // bits, dtype=np.uint64))).sum(-1).astype(np.uint8)
    return np.ascontiguousarray(codes.astype(f"<u{bits // 8}")).view(np.uint8)


def words(codes, bits):
    return pack(codes, bits).view("<u4")


def a_fragments(a, bits):
    """Registers [32, n] of A [16 or 8, K]: lane / 4 (the ISA's groupID) gives the row, lane % 4 the columns."""
    rows, count = a.shape
    each = max(32 // bits, 1)
    elements = np.empty((32, rows // 8 * count // (4 * each), each), np.uint64)
    for lane in range(32):
        for register in range(elements.shape[1]):
            half, step = register % (rows // 8), register // (rows // 8)
            column = lane % 4 * each + 4 * each * step
            elements[lane, register] = a[lane // 4 + 8 * half, column : column + each]
    return elements.reshape(32, -1) if bits == 64 else words(elements.reshape(32, -1), bits)


def b_fragments(b, bits):
    """Registers of B [K, 8]: groupID is the column."""
    return a_fragments(np.ascontiguousarray(b.T), bits)


def c_fragments(c):
    """Elements [32, n] of C [rows, columns], 8 columns at a time: row lane / 4, columns 2 * (lane % 4) and the next."""
    panels = [
        c[half * 8 + LANES // 4, 8 * panel + 2 * (LANES % 4) + side]
        for panel in range(c.shape[1] // 8)
        for half in range(c.shape[0] // 8)
        for side in (0, 1)
    ]
    return np.stack(panels, 1)


def c_matrix(elements, rows):
    """The inverse of c_fragments."""
    columns = elements.shape[1] * 32 // rows
    places = c_fragments(np.arange(rows * columns).reshape(rows, columns))
    c = np.empty(rows * columns, elements.dtype)
    c[places.ravel()] = elements.ravel()
    return c.reshape(rows, columns)


def sums_to_words(sums, kind):
    """Accumulator elements [..., n] to registers."""
    if kind == "f16":
        return np.ascontiguousarray(sums.astype(np.float16)).view("<u4")
    return np.ascontiguousarray(sums.astype({"f32": np.float32, "s32": np.int32}[kind])).view("<u4")


def words_to_sums(registers, kind):
    return np.ascontiguousarray(registers).view({"f16": np.float16, "f32": np.float32, "s32": np.int32}[kind])


def expected(product, c, kind, saturate=False):
    """product + c rounded once to the accumulators' type; every NaN is the one that matrix instructions give."""
    if kind == "s32":
        total = product.astype(np.int64) + c.astype(np.int64)
        return np.clip(total, -(2**31), 2**31 - 1).astype(np.int32) if saturate else total.astype(np.int32)
    with np.errstate(all="ignore"):
        total = (product + c.astype(np.float64)).astype({"f32": np.float32, "f16": np.float16}[kind])
    bits = total.view({"f32": np.uint32, "f16": np.uint16}[kind])
    bits[np.isnan(total)] = {"f32": 0x7FFFFFFF, "f16": 0x7FFF}[kind]
    return total


def assert_same_bits(got, want):
    kind = f"u{got.dtype.itemsize}"
    assert got.shape == want.shape and got.dtype == want.dtype
    np.testing.assert_array_equal(np.ascontiguousarray(got).view(kind), np.ascontiguousarray(want).view(kind))


def registers(prefix, count):
    return "{" + ", ".join(f"{prefix}{i}" for i in range(count)) + "}"


class Kernel:
    """Builds a kernel whose threads load registers from arrays, run a body, and store registers.

    Array `name` holds [threads of the grid, registers] values of `bits` bits.
    """

    def __init__(self):
        self.parameters, self.lines, self.declared = [], [], []

    def array(self, name, count, bits=32):
        self.parameters.append(f".param .u64 {name}_ptr")
        self.declared += [f".reg .b{bits} %{name}<{count}>;", f".reg .b64 %at_{name};"]
        return [
            f"ld.param.u64 %at_{name}, [{name}_ptr];",
            f"mul.wide.u32 %offset, %thread, {count * bits // 8};",
            f"add.u64 %at_{name}, %at_{name}, %offset;",
        ]

    def load(self, name, count, bits=32):
        self.lines += self.array(name, count, bits)
        self.lines += [f"ld.global.b{bits} %{name}{i}, [%at_{name}+{i * bits // 8}];" for i in range(count)]

    def store(self, name, count, bits=32):
        self.lines += [f"st.global.b{bits} [%at_{name}+{i * bits // 8}], %{name}{i};" for i in range(count)]

    def out(self, name, count, bits=32):
        """Declare an array that is stored to later."""
        self.lines += self.array(name, count, bits)

    def text(self, shared=0):
        memory = f".shared .align 1024 .b8 tile[{shared}];\n" if shared else ""
        body = "\n".join([*self.declared, *self.lines])
        return (
            f"{HEAD}.visible .entry k({', '.join(self.parameters)})\n{{\n{memory}"
            ".reg .b32 %thread, %block; .reg .b64 %offset;\n{{ .reg .b32 %threads;\n".replace("{{", "{")
            + "mov.u32 %thread, %tid.x; mov.u32 %block, %ctaid.x; mov.u32 %threads, %ntid.x;\n"
            + "mad.lo.u32 %thread, %block, %threads, %thread;\n}\n"
            + f"{body}\nret;\n}}\n"
        )


def run(text, blocks, threads, arguments, **options):
    arguments = [np.ascontiguousarray(argument) for argument in arguments]
    ptx.load(text).launch("k", (blocks,), (threads,), arguments, **options)
    return arguments
