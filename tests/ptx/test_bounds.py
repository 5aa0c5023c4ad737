"""Accesses that no memory allows: what the message says, and that correct kernels at the very edge are left alone."""

import numpy as np
import pytest
import torch

from fusedops.testing import ptx
from tests.ptx.inline import kernel, launch

START = "mul.wide.u32 %d0, %t, 4; add.s64 %d1, %x, %d0; add.s64 %d2, %out, %d0; mov.u32 %r0, 7;\n"
AREA = ".shared .align 16 .b8 area[128];"


def run(body, count=32, schedule="default", checks="all", **options):
    """One block of 32 threads with int32 tensors x and out of `count` elements each, far from all other memory."""
    x, out = (torch.zeros(4096 + count, dtype=torch.int32)[2048 : 2048 + count] for _ in range(2))
    launch(
        kernel(START + body, declarations=AREA),
        [x, out],
        names=("x", "out"),
        schedule=schedule,
        checks=checks,
        **options,
    )
    return out


GLOBAL = {
    "past_the_end": (
        "ld.global.b32 %r1, [%d1+4];",
        r"thread 31 of block \(0,0,0\): out of bounds: read of 4 bytes of global memory, 0 bytes past the end of 'x'",
    ),
    "further_past_the_end": ("ld.global.b32 %r1, [%x+140];", r"thread 0 .*, 12 bytes past the end of 'x' \(128 by"),
    "before_the_start": ("ld.global.b32 %r1, [%d1+-8];", r"thread 0 .*, 8 bytes before the start of 'x' \(128 bytes\)"),
    "write": ("st.global.b32 [%d2+4], %r0;", r"thread 31 .* write of 4 bytes of global memory, .*'out'"),
    "atomic": ("red.global.add.u32 [%d2+4], %r0;", r"thread 31 .* atomic access of 4 bytes of global memory, .*'out'"),
    "generic": ("ld.b32 %r1, [%d1+4];", r"thread 31 .* past the end of 'x'"),
    "null": ("mov.u64 %d3, 0; ld.global.b32 %r1, [%d3+8];", r"thread 0 .*null pointer: read of 4 bytes at 0x8"),
    "null_write": ("mov.u64 %d3, 0; st.b32 [%d3], %r0;", r"thread 0 .*null pointer: write of 4 bytes at 0x0"),
    "misaligned": (
        "ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%d1];",
        r"thread 1 .*misaligned: read of 16 bytes at global address 0x\w+, not a multiple of 16; 4 bytes into 'x'",
    ),
    "misaligned_write": ("st.global.b32 [%d2+2], %r0;", r"thread 0 .*misaligned: write of 4 bytes at global address"),
    "misaligned_atomic": ("red.global.add.u64 [%d2], 1;", r"thread 1 .*misaligned: atomic access of 8 bytes"),
    "shared_past_the_end": (
        "mov.u32 %r1, area; shl.b32 %r2, %t, 2; add.u32 %r1, %r1, %r2; st.shared.b32 [%r1+8], %r0;",
        r"thread 30 .*out of bounds: write of 4 bytes of shared memory at 128, 0 bytes past its end \(it has 128\)",
    ),
    "shared_before_the_start": (
        "mov.u32 %r1, area; st.shared.b32 [%r1+-4], %r0;",
        r"thread 0 .*out of bounds: shared memory 4 bytes before its start",
    ),
    "shared_misaligned": (
        "mov.u32 %r1, area; shl.b32 %r2, %t, 1; add.u32 %r1, %r1, %r2; st.shared.b32 [%r1], %r0;",
        r"thread 1 .*misaligned: write of 4 bytes at shared address 0x2, not a multiple of 4",
    ),
    "shared_of_no_block": (
        "mov.u32 %r1, 0x5000000; ld.shared::cluster.b32 %r2, [%r1];",
        r"thread 0 .*out of bounds: shared address 0x5000000 is in no block of the cluster",
    ),
    "local": (
        ".local .align 4 .b8 mine[8]; mov.u64 %d3, mine; st.local.b32 [%d3+8], %r0;",
        r"thread 0 .*local access of 4 bytes at 8, a thread has 8",
    ),
}  # fmt: skip


@pytest.mark.parametrize("schedule", ptx.SCHEDULES)
@pytest.mark.parametrize("name", GLOBAL)
def test_refused(name, schedule):
    body, message = GLOBAL[name]
    with pytest.raises(ptx.Fault, match=message):
        run(body, schedule=schedule)


def test_a_wide_access_that_begins_inside():
    x = np.zeros(64, np.int64)[:16].view(np.int32)[:31]
    text = kernel("mul.wide.u32 %d0, %t, 8; add.s64 %d1, %x, %d0; ld.global.v2.b32 {%r0, %r1}, [%d1];", "x")
    with pytest.raises(ptx.Fault, match=r"thread 15 .* read of 8 bytes .*the last 4 of them past the end of 'x_ptr'"):
        launch(text, [x], block=(16,))


@pytest.mark.parametrize("schedule", ptx.SCHEDULES)
def test_the_nearest_tensor_is_named(schedule):
    room = np.zeros(3000, np.int32)
    x, out = room[:100], room[2000:2100]
    launch_it = lambda offset: launch(  # noqa: E731
        kernel(f"ld.global.b32 %r0, [%x+{offset}];"), [x, out], names=("x", "out"), schedule=schedule
    )
    with pytest.raises(ptx.Fault, match=r"12 bytes past the end of 'x' \(400 bytes\)"):
        launch_it(412)
    with pytest.raises(ptx.Fault, match=r"400 bytes before the start of 'out' \(400 bytes\)"):
        launch_it(7600)
    launch_it(396)
    launch_it(8000)


@pytest.mark.parametrize("write", ["st.global.b32 [%d1], %r0;", "red.global.add.u32 [%d1], %r0;", "st.b32 [%d1], %r0;"])
def test_read_only(write):
    with pytest.raises(
        ptx.Fault, match=r"thread 0 of block \(0,0,0\): writes to 'x', which is read-only: 4 bytes, 0 byt"
    ):
        run(write, read_only=(0,))
    run(write)
    run(write, read_only=(0,), checks=("bounds",))
    run("ld.global.b32 %r1, [%d1];", read_only=(0,))


def test_constants_are_read_only():
    text = kernel("mov.u64 %d0, table; st.global.b32 [%d0], 1;", "x", module=".const .align 4 .b32 table[4];")
    with pytest.raises(ptx.Fault, match="writes to 'table', which is read-only"):
        launch(text, [np.zeros(1)], block=(1,))


def test_an_argument_may_be_given_twice():
    """In place: the read-only view of a tensor does not forbid writes through the other."""
    x = np.zeros(32, np.int32)
    launch(kernel(START + "st.global.b32 [%d2], %r0;"), [x, x], read_only=(0,))
    assert set(x) == {7}


def test_switched_off():
    room = np.zeros(64, np.int32)
    text = kernel(START + "st.global.b32 [%d2+128], %r0;")
    with pytest.raises(ptx.Fault, match="out of bounds"):
        launch(text, [room[:32], room[:32]])
    launch(text, [room[:32], room[:32]], checks=("races",))
    assert set(room[32:]) == {7}


@pytest.mark.parametrize("schedule", ptx.SCHEDULES)
def test_the_last_element_is_allowed(schedule):
    out = run("ld.global.b32 %r1, [%d1]; add.u32 %r1, %r1, %t; st.global.b32 [%d2], %r1;", schedule=schedule)
    assert out.tolist() == list(range(32))


def test_block_is_named():
    x = np.zeros(10, np.int32)
    text = kernel("mov.u32 %r0, %ctaid.y; mul.wide.u32 %d0, %r0, 4; add.s64 %d0, %x, %d0; st.global.b32 [%d0], 1;", "x")
    with pytest.raises(
        ptx.Fault, match=r"thread 0 of block \(0,10,0\)[\s\S]*in k, block \(0,10,0\) warp 0, PTX line \d+"
    ):
        launch(text, [x], block=(1,), grid=(1, 20))
