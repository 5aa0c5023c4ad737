"""Shared-memory layouts of wgmma operands, and kernels of one warpgroup."""

from dataclasses import dataclass

import numpy as np

from tests.ptx.matrix_kernels import ELEMENTS, Kernel, a_fragments, pack, registers

MODES = {"none": 0, "128B": 1, "64B": 2, "32B": 3}
WIDTHS = {"none": 16, "128B": 128, "64B": 64, "32B": 32}


@dataclass(frozen=True)
class Layout:
    """How a matrix lies in shared memory.

    Attributes:
        swizzle: Its mode.
        mn_major: Elements that follow one another do so along m or n, not along k.
        step: Which 32 bytes of a swizzled row along k are the operand (K-major).
        shift: Lines of 128 bytes by which the pattern misses a multiple of its size; told by the base offset.
    """

    swizzle: str
    mn_major: bool = False
    step: int = 0
    shift: int = 0


@dataclass(frozen=True)
class Placed:
    """Bytes of shared memory from `base` on, and the descriptor of the operand among them."""

    image: np.ndarray
    descriptor: int


def place(codes, bits, layout, base, rng):
    """Lay out a matrix [m or n, k]. Bytes that do not belong to it are random."""
    width = WIDTHS[layout.swizzle]
    rows = pack(codes.T if layout.mn_major else codes, bits)  # along k if MN-major, else along m or n
    if not layout.mn_major and width > 32:  # a tile as wide as the swizzle, of which one step is the operand
        tile = rng.integers(0, 256, (len(rows), width), np.uint8)
        tile[:, 32 * layout.step : 32 * layout.step + rows.shape[1]] = rows
    else:
        tile = rows
    blocks = tile.reshape(len(tile) // 8, 8, -1, width)  # [8 rows, units of the width]
    swizzled = np.empty_like(blocks)
    units = width // 16
    for row in range(8):  # a 16-byte unit moves by the number of the row's 128-byte line
        line = row * width // 128
        order = np.arange(units) ^ (line % units)
        moved = blocks[:, row].reshape(len(blocks), -1, units, 16)
        swizzled[:, row] = moved[:, :, order].reshape(len(blocks), -1, width)
    # [unit of the width][block of 8 rows][row][bytes]: with some room between the units.
    atom = 8 * width
    between_blocks, between_units = atom, atom * len(blocks) + 2048
    image = rng.integers(0, 256, layout.shift * 128 + blocks.shape[2] * between_units, np.uint8)
    for unit in range(blocks.shape[2]):
        start = layout.shift * 128 + unit * between_units
        image[start : start + atom * len(blocks)] = swizzled[:, :, unit].reshape(-1)
    leading, stride = between_units, between_blocks
    if layout.mn_major and width == 16:
        leading, stride = stride, leading
    start = base + layout.shift * 128 + (0 if layout.mn_major else 32 * layout.step)
    descriptor = start >> 4 | leading >> 4 << 16 | stride >> 4 << 32
    return Placed(image, descriptor | layout.shift << 49 | MODES[layout.swizzle] << 62)


@dataclass(frozen=True)
class Form:
    """One wgmma.mma_async: modifiers and where its operands are."""

    n: int
    a: str
    b: str
    sums: str
    a_layout: Layout | None = Layout("128B")  # None: A is in registers
    b_layout: Layout = Layout("128B")
    a_sign: int = 1
    b_sign: int = 1
    accumulate: bool = True
    extra: str = ""  # .satfinite or .and.popc
    sparse: bool = False
    selector: int = 0

    @property
    def k(self):
        return (512 if self.sparse else 256) // ELEMENTS[self.a].bits

    @property
    def kept(self):
        return 256 // ELEMENTS[self.a].bits

    @property
    def count(self):
        return self.n // (4 if self.sums == "f16" else 2)

    @property
    def name(self):
        before, after = (self.extra, "") if self.extra == ".satfinite" else ("", self.extra)
        sparse = ".sp" if self.sparse else ""
        return (
            f"wgmma.mma_async{sparse}.sync.aligned.m64n{self.n}k{self.k}{before}.{self.sums}.{self.a}.{self.b}{after}"
        )

    def statement(self, a="%desc0", b="%desc1", d="%d", metadata="%e0"):
        operands = [registers(d, self.count), registers("%a", 4) if self.a_layout is None else a, b]
        if self.sparse:
            operands += [metadata, str(self.selector)]
        operands.append("%accumulate")
        if not ELEMENTS[self.a].integer:
            operands += [str(self.a_sign), str(self.b_sign)]
        if self.a in ("f16", "bf16"):
            operands += [str(int(x.mn_major)) for x in (self.a_layout, self.b_layout) if x is not None]
        return f"{self.name} {', '.join(operands)};"

    def __str__(self):
        def layout(one):
            if one is None:
                return "registers"
            return one.swizzle + ("_mn" if one.mn_major else "") + (f"_step{one.step}" if one.step else "") + (
                f"_shift{one.shift}" if one.shift else ""
            )  # fmt: skip

        signs = {(1, 1): "", (-1, 1): "_negA", (1, -1): "_negB", (-1, -1): "_negAB"}[self.a_sign, self.b_sign]
        zero = "" if self.accumulate else "_zero"
        selector = f"_selector{self.selector}" if self.selector else ""
        name = self.name.partition("aligned.")[2]
        return f"{name}-{layout(self.a_layout)}-{layout(self.b_layout)}{signs}{zero}{selector}"


FILL = """
mov.u64 %place, tile;
cvt.u32.u64 %to, %place;
mov.u32 %local, %tid.x;
shl.b32 %local, %local, 4;
add.u32 %to, %to, %local;
cvt.u64.u32 %offset, %local;
add.u64 %from, %from, %offset;
FILL:
ld.global.v4.b32 {%w0, %w1, %w2, %w3}, [%from];
st.shared.v4.b32 [%to], {%w0, %w1, %w2, %w3};
add.u32 %to, %to, 2048;
add.u64 %from, %from, 2048;
add.u32 %local, %local, 2048;
setp.lt.u32 %more, %local, BYTES;
@%more bra FILL;
fence.proxy.async;
bar.sync 0;
"""


def kernel(form, shared, body=None):
    """A warpgroup that fills shared memory, multiplies as `body` says, and stores its accumulators."""
    made = Kernel()
    made.parameters += [".param .u64 image_ptr", ".param .u64 descriptor_a", ".param .u64 descriptor_b"]
    made.declared += [
        ".reg .b64 %place, %from, %desc<2>; .reg .b32 %to, %local, %w<4>; .reg .pred %more, %accumulate;",
    ]
    made.lines += ["ld.param.u64 %from, [image_ptr];"]
    made.lines += FILL.replace("BYTES", str(shared)).strip().split("\n")
    made.lines += [f"ld.param.u64 %desc{i}, [descriptor_{name}];" for i, name in enumerate("ab")]
    made.lines.append(f"setp.eq.u32 %accumulate, {int(form.accumulate)}, 1;")
    made.load("d", form.count)
    made.load("a", 4)
    made.load("e", 1)
    if body is None:
        body = ["wgmma.fence.sync.aligned;", form.statement(), *WAIT]
    made.lines += body
    made.store("d", form.count)
    return made.text(shared)


WAIT = ["wgmma.commit_group.sync.aligned;", "wgmma.wait_group.sync.aligned 0;"]


def image_of(form, a, b, rng):
    """Shared memory with both operands in it, and their descriptors. b is [k, n]."""
    placed, image = [], np.zeros(0, np.uint8)
    for codes, layout, kind in ((a, form.a_layout, form.a), (b.T, form.b_layout, form.b)):
        if layout is None:
            placed.append(0)
            continue
        one = place(np.ascontiguousarray(codes), ELEMENTS[kind].bits, layout, len(image), rng)
        placed.append(one.descriptor)
        image = np.concatenate([image, one.image, rng.integers(0, 256, -len(one.image) % 2048, np.uint8)])
    return image, placed


def fragments_of_a(a, bits):
    """Registers [128, 4]: each warp has 16 rows."""
    return np.concatenate([a_fragments(a[16 * warp : 16 * warp + 16], bits) for warp in range(4)])
