"""Data races and reads of unwritten bytes in shared memory: every planted bug is found, its correct twin is not."""

import re

import numpy as np
import pytest

from fusedops.testing import ptx
from tests.ptx.inline import kernel, launch

# FIX stands where the correct kernel has something that the wrong one lacks. Two warps; %r0 is the address of the
# thread's own word in `area`, %r1 that of the thread at the same lane of the other warp.
START = """
    mov.u32 %r9, area; shl.b32 %r0, %t, 2; add.u32 %r0, %r0, %r9;
    xor.b32 %r1, %t, 32; shl.b32 %r1, %r1, 2; add.u32 %r1, %r1, %r9;
    setp.lt.u32 %p0, %t, 32; setp.eq.u32 %p1, %t, 0; and.b32 %r2, %t, 31; shl.b32 %r2, %r2, 2; add.u32 %r2, %r2, %r9;
    mul.wide.u32 %d0, %t, 4; add.s64 %d1, %x, %d0; add.s64 %d2, %out, %d0; mov.u32 %r10, bar; mov.u32 %r11, flag;
"""
AREA = (
    ".shared .align 128 .b8 area[512]; .shared .align 8 .b64 bar; .shared .align 4 .b32 flag;"
    ".shared .align 128 .b8 other[512];"
)
BARRIER = "bar.sync 0;"
OUT = "st.global.b32 [%d2], %r3;"

RACES = {
    "read_after_write": (f"st.shared.b32 [%r0], %t; FIX ld.shared.b32 %r3, [%r1]; {OUT}", BARRIER),
    "write_after_read": (
        f"st.shared.b32 [%r0], %t; bar.sync 0; ld.shared.b32 %r3, [%r1]; FIX st.shared.b32 [%r0], %r2; {OUT}",
        BARRIER,
    ),
    "write_after_write": ("@%p0 st.shared.b32 [%r2], %t; FIX @!%p0 st.shared.b32 [%r2], %t;", BARRIER),
    "overlap_of_one_byte": (
        "@%p0 st.shared.b16 [%r2], 1; FIX @!%p0 st.shared.b8 [%r2+1], 2; @!%p0 st.shared.b8 [%r2+2], 2;",
        BARRIER,
    ),
    "vector": (
        f"and.b32 %r4, %t, 3; setp.eq.u32 %p2, %r4, 0; st.shared.b32 [%r0], %t; FIX"
        f"@%p2 ld.shared.v4.b32 {{%r3, %r5, %r6, %r7}}, [%r1]; {OUT}",
        BARRIER,
    ),
    "barrier_of_another_name": (
        f"@%p0 bra $ONE; FIX bar.sync 2, 32; ld.shared.b32 %r3, [%r1]; bra $END;\n"
        f"$ONE: st.shared.b32 [%r0], %t; mov.u32 %r3, 0; bar.sync 3, 32; bar.arrive 1, 64;\n$END: {OUT}",
        "bar.sync 1, 64;",
    ),
    "read_of_atomics": (
        f"st.shared.b32 [%r0], 0; bar.sync 0; red.shared.add.u32 [%r9], %t; FIX ld.shared.b32 %r3, [%r9]; {OUT}",
        BARRIER,
    ),
    "relaxed_flag": (
        f"@%p1 st.shared.b32 [%r11], 0; bar.sync 0; @!%p0 bra $READER;\n"
        "st.shared.b32 [%r0], %t; bar.warp.sync -1; FIX @%p1 st.relaxed.cta.shared.b32 [%r11], 1; bra $END;\n"
        "$READER: ld.relaxed.cta.shared.b32 %r4, [%r11]; setp.eq.u32 %p2, %r4, 0; @%p2 bra $READER; FIX\n"
        f"ld.shared.b32 %r3, [%r1]; {OUT}\n$END:",
        "fence.acq_rel.cta;",
    ),
    "relaxed_counter": (
        f"@%p1 st.shared.b32 [%r11], 0; bar.sync 0; @!%p0 bra $READER;\n"
        "st.shared.b32 [%r0], %t; bar.warp.sync -1; FIX @%p1 red.shared.add.u32 [%r11], 1; bra $END;\n"
        "$READER: atom.shared.add.u32 %r4, [%r11], 0; setp.eq.u32 %p2, %r4, 0; @%p2 bra $READER; FIX\n"
        f"ld.shared.b32 %r3, [%r1]; {OUT}\n$END:",
        "membar.cta;",
    ),
    "copy_without_wait": (
        "shl.b32 %r4, %t, 2; cp.async.ca.shared.global [%r0], [%d1], 4; cp.async.commit_group; FIX"
        f" ld.shared.b32 %r3, [%r0]; {OUT} cp.async.wait_all;",
        "cp.async.wait_group 0;",
    ),
    "copy_without_barrier": (
        "cp.async.ca.shared.global [%r0], [%d1], 4; cp.async.commit_group; cp.async.wait_group 0; FIX"
        f" ld.shared.b32 %r3, [%r1]; {OUT}",
        BARRIER,
    ),
    "copy_waits_for_the_wrong_group": (
        "cp.async.ca.shared.global [%r0], [%d1], 4; cp.async.commit_group;\n"
        "cp.async.ca.shared.global [%r0+256], [%d1], 4; cp.async.commit_group; cp.async.wait_group 1; FIX\n"
        f"ld.shared.b32 %r3, [%r0+256]; {OUT} cp.async.wait_all;",
        "cp.async.wait_group 0;",
    ),
    "bulk_copy_without_wait": (
        "@%p1 mbarrier.init.shared.b64 [%r10], 1; fence.proxy.async; bar.sync 0;\n"
        "@%p1 mbarrier.arrive.expect_tx.shared.b64 %d5, [%r10], 256;\n"
        "@%p1 cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r9], [%x], 256, [%r10];\n"
        f"FIX ld.shared.b32 %r3, [%r0]; {OUT} bar.sync 0;\n"
        "$LAST: mbarrier.try_wait.parity.shared.b64 %p3, [%r10], 0; @!%p3 bra $LAST;",
        "$WAIT: mbarrier.try_wait.parity.shared.b64 %p2, [%r10], 0; @!%p2 bra $WAIT;",
    ),
    "buffer_reused_under_a_bulk_store": (
        "st.shared.b32 [%r0], %t; fence.proxy.async; bar.sync 0;\n"
        "@%p1 cp.async.bulk.global.shared::cta.bulk_group [%out], [%r9], 256; @%p1 cp.async.bulk.commit_group;\n"
        "FIX bar.sync 0; st.shared.b32 [%r0], 7; cp.async.bulk.wait_group 0;",
        "cp.async.bulk.wait_group.read 0;",
    ),
}


def texts(body, fix):
    """The wrong kernel and the correct one."""
    lines = (body.replace("FIX", line).replace("; ", ";\n") for line in ("", fix))
    return tuple(kernel(START + line, declarations=AREA) for line in lines)


def run(text, schedule, checks="all"):
    x, out = np.arange(64, dtype=np.int32), np.zeros(64, np.int32)
    launch(text, [x, out], block=(64,), schedule=schedule, checks=checks)
    return out


@pytest.mark.parametrize("schedule", ptx.SCHEDULES)
@pytest.mark.parametrize("name", RACES)
def test_race_is_found(name, schedule):
    with pytest.raises(ptx.Fault, match=r"data race on shared memory of block \(0,0,0\), byte \d+") as caught:
        run(texts(*RACES[name])[0], schedule, checks=("races",))
    # Both accesses; where the race comes to light later, the place of that, too.
    assert len(set(re.findall(r"PTX line \d+", str(caught.value)))) >= 2


@pytest.mark.parametrize("schedule", ptx.SCHEDULES)
@pytest.mark.parametrize("name", RACES)
def test_correct_twin_is_clean(name, schedule):
    run(texts(*RACES[name])[1], schedule)


def test_both_accesses_are_named():
    with pytest.raises(ptx.Fault) as caught:
        run(texts(*RACES["read_after_write"])[0], "ahead", checks=("races",))
    text = str(caught.value)
    assert re.search(r"the write by warp 1 of block \(0,0,0\), PTX line \d+: st.shared.b32 \[%r0\], %t", text)
    assert re.search(r"after the read by warp 0 of block \(0,0,0\), PTX line \d+: ld.shared.b32 %r3, \[%r1\]", text)


def test_an_asynchronous_operation_is_named():
    with pytest.raises(ptx.Fault, match="the write by an asynchronous operation of warp 0 of .*: cp.async.ca"):
        run(texts(*RACES["copy_without_wait"])[0], "ahead_early", checks=("races",))


def test_races_can_be_switched_off():
    others = tuple(name for name in ptx.CHECKS if name not in ("races", "uninitialised"))
    assert run(texts(*RACES["read_after_write"])[0], "lockstep", checks=others).tolist() == [
        *range(32, 64),
        *range(32),
    ]


@pytest.mark.parametrize("schedule", ptx.SCHEDULES)
@pytest.mark.parametrize("neighbours", ["b8", "b16"])
def test_neighbouring_bytes_do_not_race(schedule, neighbours):
    size = int(neighbours[1:]) // 8
    body = f"mul.lo.u32 %r4, %t, 2; add.u32 %r4, %r4, %r9; and.b32 %r5, %t, 31; mul.lo.u32 %r5, %r5, {2 * size};"
    body += (
        f"add.u32 %r5, %r5, %r9; @%p0 st.shared.{neighbours} [%r5], 1; @!%p0 st.shared.{neighbours} [%r5+{size}], 2;"
    )
    run(kernel(START + body, declarations=AREA), schedule)


@pytest.mark.parametrize("schedule", ptx.SCHEDULES)
def test_atomics_do_not_race(schedule):
    body = "@%p1 st.shared.b32 [%r9], 0; bar.sync 0; red.shared.add.u32 [%r9], 1; atom.shared.add.u32 %r4, [%r9], 1;"
    body += f"bar.sync 0; ld.shared.b32 %r3, [%r9]; {OUT}"
    assert set(run(kernel(START + body, declarations=AREA), schedule)) == {128}


@pytest.mark.parametrize("space", ["shared", "global"])
@pytest.mark.parametrize("schedule", ptx.SCHEDULES)
def test_lanes_of_one_store(space, schedule):
    target = "[%r9]" if space == "shared" else "[%out]"
    with pytest.raises(ptx.Fault, match=r"thread 1 of block \(0,0,0\): data race .* lanes 0 and 1 write different"):
        run(kernel(f"{START} @%p0 st.{space}.b32 {target}, %t;", declarations=AREA), schedule)
    run(kernel(f"{START} @%p0 st.{space}.b32 {target}, 7;", declarations=AREA), schedule)


UNWRITTEN = {
    "never_written": (f"FIX ld.shared.b32 %r3, [%r0]; {OUT}", "st.shared.b32 [%r0], %t;"),
    "one_byte_missing": (
        f"st.shared.b16 [%r0], 1; st.shared.b8 [%r0+2], 1; FIX ld.shared.b32 %r3, [%r0]; {OUT}",
        "st.shared.b8 [%r0+3], 1;",
    ),
    "atomic": (f"FIX atom.shared.add.u32 %r3, [%r0], 1; {OUT}", "st.shared.b32 [%r0], 1;"),
    "bulk_store": (
        "FIX fence.proxy.async; bar.sync 0; @%p1 cp.async.bulk.global.shared::cta.bulk_group [%out], [%r9], 256;\n"
        "@%p1 cp.async.bulk.commit_group; cp.async.bulk.wait_group 0;",
        "st.shared.b32 [%r0], %t;",
    ),
}


@pytest.mark.parametrize("schedule", ptx.SCHEDULES)
@pytest.mark.parametrize("name", UNWRITTEN)
def test_read_of_unwritten_memory(name, schedule):
    wrong, correct = texts(*UNWRITTEN[name])
    with pytest.raises(ptx.Fault, match=r"reads shared memory that nobody has written: byte \d+"):
        run(wrong, schedule)
    run(correct, schedule)


PROXY = (
    "st.shared.b32 [%r0], %t; BEFORE bar.sync 0; AFTER\n"
    "@%p1 cp.async.bulk.global.shared::cta.bulk_group [%out], [%r9], 256; @%p1 cp.async.bulk.commit_group;\n"
    "cp.async.bulk.wait_group 0;"
)


@pytest.mark.parametrize("schedule", ptx.SCHEDULES)
def test_missing_proxy_fence(schedule):
    def text(before, after):
        return kernel(START + PROXY.replace("BEFORE", before).replace("AFTER", after), declarations=AREA)

    with pytest.raises(ptx.Fault, match=r"no fence.proxy.async between the generic write of shared byte \d+ by warp"):
        run(text("", ""), schedule)
    fence = "fence.proxy.async.shared::cta;"
    for before, after in ((fence, ""), ("", fence)):
        np.testing.assert_array_equal(run(text(before, after), schedule), np.arange(64))


def test_fence_before_the_write_is_no_fence():
    with pytest.raises(ptx.Fault, match="no fence.proxy.async"):
        run(
            kernel(f"{START} fence.proxy.async; {PROXY.replace('BEFORE', '').replace('AFTER', '')}", declarations=AREA),
            "default",
        )


CLUSTER = """
    mov.u32 %r4, %cluster_ctarank; xor.b32 %r5, %r4, 1; mapa.shared::cluster.u32 %r6, %r0, %r5;
    st.shared.b32 [%r0], 5; barrier.cluster.arrive; barrier.cluster.wait;
    st.shared::cluster.b32 [%r6], %t; FIX ld.shared.b32 %r3, [%r0];
    mov.u32 %r8, %ctaid.x; mul.wide.u32 %d3, %r8, 256; add.s64 %d2, %d2, %d3; st.global.b32 [%d2], %r3;
"""


@pytest.mark.parametrize("schedule", ptx.SCHEDULES)
def test_shared_memory_of_another_block(schedule):
    wrong, correct = texts(CLUSTER, "barrier.cluster.arrive.release; barrier.cluster.wait.acquire;")
    out = np.zeros(128, np.int32)
    with pytest.raises(ptx.Fault, match="data race on shared memory of block"):
        launch(wrong, [out, out], block=(64,), grid=(2,), cluster=(2,), schedule=schedule)
    launch(correct, [out, out], block=(64,), grid=(2,), cluster=(2,), schedule=schedule)
    np.testing.assert_array_equal(out, np.tile(np.arange(64), 2))


@pytest.mark.parametrize("schedule", ptx.SCHEDULES)
def test_long_pipeline_is_clean(schedule):
    """Numbers of asynchronous operations are given again and again; nothing may be taken for another operation's."""
    body = f"""
        mov.u32 %r4, 0; mov.u32 %r3, 0; cp.async.ca.shared.global [%r0], [%d1], 4; cp.async.commit_group;
        $LOOP: and.b32 %r5, %r4, 1; shl.b32 %r5, %r5, 8; xor.b32 %r6, %r5, 256;
        add.u32 %r7, %r0, %r6; cp.async.ca.shared.global [%r7], [%d1], 4; cp.async.commit_group;
        cp.async.wait_group 1; bar.sync 0; add.u32 %r7, %r1, %r5; ld.shared.b32 %r8, [%r7]; add.u32 %r3, %r3, %r8;
        bar.sync 0; add.u32 %r4, %r4, 1; setp.lt.u32 %p2, %r4, 300; @%p2 bra $LOOP;
        cp.async.wait_all; {OUT}
    """
    out = run(kernel(START + body, declarations=AREA), schedule)
    np.testing.assert_array_equal(out, 300 * (np.arange(64) ^ 32))


def run_blocks(body, schedule, **options):
    x, out = np.zeros(64, np.int32), np.zeros(64, np.int32)
    launch(
        kernel(f"{START} mov.u32 %r8, %ctaid.x; {body}", declarations=AREA),
        [x, out],
        grid=(2,),
        schedule=schedule,
        **options,
    )
    return out


@pytest.mark.parametrize("schedule", [name for name, one in ptx.SCHEDULES.items() if not one.blocks_reversed])
def test_block_reads_what_another_wrote(schedule):
    body = "setp.eq.u32 %p2, %r8, 0; @%p2 st.global.b32 [%out+4], 1; @!%p2 ld.global.b32 %r3, [%out+{}];"
    with pytest.raises(
        ptx.Fault, match=r"data race on global memory: reads what block \(0,0,0\) has written .* 4 bytes in"
    ):
        run_blocks(body.format(4), schedule)
    run_blocks(body.format(8), schedule)


@pytest.mark.parametrize("schedule", ptx.SCHEDULES)
def test_blocks_write_different_values(schedule):
    with pytest.raises(
        ptx.Fault, match=r"data race on global memory: block \(\d,0,0\) and block \(\d,0,0\) write diff"
    ):
        run_blocks("@%p1 st.global.b32 [%out], %r8;", schedule)
    run_blocks("@%p1 st.global.b32 [%out], 7;", schedule)
    run_blocks("@%p1 st.global.b32 [%out], %r8;", schedule, checks=("bounds",))
    out = run_blocks("mul.wide.u32 %d5, %r8, 2; add.s64 %d5, %out, %d5; @%p1 st.global.b16 [%d5], 3;", schedule)
    assert out[0] == 3 + (3 << 16)


@pytest.mark.parametrize("schedule", ptx.SCHEDULES)
def test_blocks_that_take_turns_are_clean(schedule):
    """The last block to arrive at a counter adds up what all have written."""
    body = """
        mul.wide.u32 %d5, %r8, 4; add.s64 %d5, %out, %d5; mov.u32 %r4, 0;
        @%p1 st.global.b32 [%d5+8], 5; fence.acq_rel.gpu; @%p1 atom.global.add.u32 %r4, [%out], 1; fence.acq_rel.gpu;
        setp.eq.u32 %p2, %r4, 1; @%p2 ld.global.v2.b32 {%r5, %r6}, [%out+8]; add.u32 %r5, %r5, %r6;
        @%p2 st.global.b32 [%out+4], %r5;
    """
    assert run_blocks(body, schedule)[1] == 10
