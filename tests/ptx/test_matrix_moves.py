"""ldmatrix, stmatrix and movmatrix against numpy."""

import numpy as np
import pytest

from fusedops.testing import ptx
from tests.ptx.matrix_kernels import Kernel, registers, run

SHARED = 8192


def fragment(matrix):
    """Registers [32] of an 8 x 8 matrix of 16-bit elements: lane / 4 is the row, lane % 4 the pair of columns."""
    return np.array([matrix[lane // 4, 2 * (lane % 4) :][:2] for lane in range(32)]).view(np.uint32)[:, 0]


def filled_tile():
    """A kernel of one warp that copies its image into shared memory, 16 bytes a lane and turn."""
    kernel = Kernel()
    kernel.declared.append(".reg .b32 %at, %top; .reg .b64 %generic;")
    kernel.load("image", SHARED // 128)
    kernel.load("address", 1)
    kernel.lines += ["mov.u32 %top, tile;", "mov.u32 %at, %tid.x;", "shl.b32 %at, %at, 8;", "add.u32 %at, %at, %top;"]
    kernel.lines += [f"st.shared.b32 [%at+{4 * i}], %image{i};" for i in range(SHARED // 128)]
    kernel.lines += ["bar.warp.sync 0xffffffff;", "add.u32 %address0, %address0, %top;"]
    return kernel


def address(kernel, generic):
    if not generic:
        return "[%address0+16]"
    kernel.lines += ["cvt.u64.u32 %generic, %address0;", "cvta.shared.u64 %generic, %generic;"]
    return "[%generic+16]"


@pytest.mark.parametrize("space", [".shared", ".shared::cta", ""])
@pytest.mark.parametrize("trans", ["", ".trans"])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_ldmatrix(count, trans, space):
    rng = np.random.default_rng(count)
    image = rng.integers(0, 2**16, (SHARED // 16, 8), np.uint16)
    rows = rng.permutation(SHARED // 16 - 1)[:32]  # any row may lie anywhere
    kernel = filled_tile()
    kernel.out("d", count)
    place = address(kernel, not space)
    kernel.lines.append(f"ldmatrix.sync.aligned.m8n8.x{count}{trans}{space}.b16 {registers('%d', count)}, {place};")
    kernel.store("d", count)
    d = np.zeros((32, count), np.uint32)
    addresses = (16 * rows).astype(np.uint32)
    addresses[8 * count :] = 0xFFFFFFF0  # lanes whose addresses are not used
    run(kernel.text(SHARED), 1, 32, [image.view(np.uint32).reshape(32, -1), addresses, d])
    for i in range(count):
        matrix = image[rows[8 * i : 8 * i + 8] + 1]
        np.testing.assert_array_equal(d[:, i], fragment(matrix.T if trans else matrix))


@pytest.mark.parametrize("space", [".shared", ""])
@pytest.mark.parametrize("trans", ["", ".trans"])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_stmatrix(count, trans, space):
    rng = np.random.default_rng(count)
    image = rng.integers(0, 2**16, (SHARED // 16, 8), np.uint16)
    matrices = rng.integers(0, 2**16, (count, 8, 8), np.uint16)
    rows = rng.permutation(SHARED // 16 - 1)[:32]
    kernel = filled_tile()
    kernel.load("m", count)
    kernel.out("d", SHARED // 128)
    place = address(kernel, not space)
    kernel.lines.append(f"stmatrix.sync.aligned.m8n8.x{count}{trans}{space}.b16 {place}, {registers('%m', count)};")
    kernel.lines.append("bar.warp.sync 0xffffffff;")
    kernel.lines += [f"ld.shared.b32 %d{i}, [%at+{4 * i}];" for i in range(SHARED // 128)]
    kernel.store("d", SHARED // 128)
    d = np.zeros((32, SHARED // 128), np.uint32)
    fragments = np.stack([fragment(matrix.T if trans else matrix) for matrix in matrices], 1)
    addresses = (16 * rows).astype(np.uint32)
    run(kernel.text(SHARED), 1, 32, [image.view(np.uint32).reshape(32, -1), addresses, fragments, d])
    image[rows[: 8 * count] + 1] = matrices.reshape(-1, 8)
    np.testing.assert_array_equal(d.view(np.uint16).reshape(-1, 8), image)


def test_movmatrix():
    matrix = np.random.default_rng(0).integers(0, 2**16, (8, 8), np.uint16)
    kernel = Kernel()
    kernel.load("a", 1)
    kernel.out("d", 1)
    kernel.lines.append("movmatrix.sync.aligned.m8n8.trans.b16 %d0, %a0;")
    kernel.store("d", 1)
    d = np.zeros(32, np.uint32)
    run(kernel.text(), 1, 32, [fragment(matrix), d])
    np.testing.assert_array_equal(d, fragment(matrix.T))


def loads(instruction, count):
    kernel = filled_tile()
    kernel.out("d", count)
    kernel.lines.append(f"{instruction} {registers('%d', count)}, [%address0];")
    return kernel.text(SHARED)


@pytest.mark.parametrize(
    "instruction, count, message",
    [
        ("ldmatrix.sync.aligned.m16n16.x1.trans.shared.b8", 2, r"\.m16n16 needs sm_100a"),
        ("ldmatrix.sync.aligned.m8n16.x2.shared.b8x16.b6x16_p32", 2, r"\.m8n16 needs sm_100a"),
        ("ldmatrix.sync.aligned.m8n8.x2.shared.b16", 4, r"\.x2 with another number of registers"),
        ("ldmatrix.sync.aligned.m8n8.x3.shared.b16", 3, "not supported"),
        ("ldmatrix.sync.aligned.m8n8.x4.global.b16", 4, r"\.global"),
    ],
)
def test_other_forms_are_refused(instruction, count, message):
    with pytest.raises(ptx.Fault, match=message):
        ptx.load(loads(instruction, count))


@pytest.mark.parametrize(
    "offset, message", [(8, "misaligned"), (SHARED, "out of bounds")], ids=["misaligned", "out of bounds"]
)
def test_addresses_are_checked(offset, message):
    text = loads("ldmatrix.sync.aligned.m8n8.x4.shared.b16", 4)
    addresses = np.arange(0, 512, 16, dtype=np.uint32)
    addresses[21] += offset
    with pytest.raises(ptx.Fault, match=rf"thread 21 of block \(0,0,0\)[\s\S]*{message}|{message}[\s\S]*ldmatrix"):
        run(text, 1, 32, [np.zeros((32, SHARED // 128), np.uint32), addresses, np.zeros((32, 4), np.uint32)])


def test_lanes_that_are_not_there_are_reported():
    text = loads("@%half ldmatrix.sync.aligned.m8n8.x1.shared.b16", 1)
    text = text.replace("@%half", ".reg .pred %half; setp.lt.u32 %half, %thread, 16; @%half")
    with pytest.raises(ptx.Fault, match="divergence: ldmatrix.* needs all 32 lanes"):
        run(text, 1, 32, [np.zeros((32, SHARED // 128), np.uint32), np.zeros(32, np.uint32), np.zeros(32, np.uint32)])
