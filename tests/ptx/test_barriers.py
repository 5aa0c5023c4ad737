"""bar and barrier in all forms, and their misuse."""

import numpy as np
import pytest

from fusedops.testing import ptx
from tests.ptx.inline import kernel, launch

SCHEDULES = pytest.mark.parametrize("schedule", ptx.SCHEDULES)
STORE = "mad.wide.u32 %d1, %t, 4, %out; st.global.b32 [%d1], %r1;"
# Each thread leaves its number in shared memory and reads that of the thread 32 further on.
EXCHANGE = """
.shared .b32 word[128];
mov.b32 %r2, word; shl.b32 %r3, %t, 2; add.u32 %r3, %r2, %r3; st.shared.b32 [%r3], %t;
BARRIER
add.u32 %r4, %t, 32; rem.u32 %r4, %r4, THREADS; shl.b32 %r4, %r4, 2; add.u32 %r4, %r2, %r4; ld.shared.b32 %r1, [%r4];
"""


def run(text, threads=64, **options):
    out = np.zeros(threads, np.uint32)
    launch(kernel(f"{text}\n{STORE}", "out"), [out], (threads,), **options)
    return out


def exchange(barrier, threads=64, **options):
    return run(EXCHANGE.replace("BARRIER", barrier).replace("THREADS", str(threads)), threads, **options)


@SCHEDULES
@pytest.mark.parametrize(
    "barrier",
    [
        "bar.sync 0;", "bar.cta.sync 3;", "bar.sync 15, 64;", "barrier.sync 2;", "barrier.cta.sync.aligned 2, 64;",
        "mov.b32 %r5, 7; mov.b32 %r6, 64; bar.sync %r5, %r6;", "bar.red.popc.u32 %r6, 1, %p1;",
    ],
)  # fmt: skip
def test_threads_see_what_came_before(barrier, schedule):
    assert (exchange(barrier, schedule=schedule) == (np.arange(64) + 32) % 64).all()


@SCHEDULES
def test_no_barrier_is_a_race(schedule):
    with pytest.raises(ptx.Fault, match=r"race|nobody has written"):
        exchange("", schedule=schedule)


@SCHEDULES
def test_producers_arrive_and_do_not_wait(schedule):
    text = """
    .shared .b32 word;
    mov.b32 %r2, word; mov.b32 %r1, 0;
    setp.ge.u32 %p1, %t, 32; @%p1 bra $CONSUMER;
    setp.eq.u32 %p2, %t, 0; @%p2 st.shared.b32 [%r2], 77; bar.arrive 4, 96; bra $END;
$CONSUMER:
    bar.sync 4, 96; ld.shared.b32 %r1, [%r2];
$END:"""
    assert (run(text, 96, schedule=schedule) == np.where(np.arange(96) < 32, 0, 77)).all()


@SCHEDULES
def test_warps_that_exited_are_not_waited_for(schedule):
    text = "mov.b32 %r1, 5; setp.ge.u32 %p1, %t, 32; @%p1 ret; bar.sync 0; bar.sync 0;"
    assert (run(text, 64, schedule=schedule) == np.where(np.arange(64) < 32, 5, 0)).all()


@pytest.mark.parametrize("op, result", [("popc.u32", 40), ("and.pred", 0), ("or.pred", 1)], ids=["popc", "and", "or"])
def test_reductions(op, result):
    to = "%r1" if "popc" in op else "%p2"
    text = f"setp.lt.u32 %p1, %t, 40; bar.red.{op} {to}, 1, %p1; " + "selp.b32 %r1, 1, 0, %p2;" * (to == "%p2")
    assert (run(text) == result).all()
    negated = text.replace("%p1;", "!%p1;", 1)
    assert (run(negated) == {40: 24, 0: 0, 1: 1}[result]).all()


def test_a_reduction_without_aligned_counts_threads():
    text = "setp.lt.u32 %p1, %t, 40; barrier.red.popc.u32 %r1, 1, 64, %p1;"
    assert (run(text) == 40).all()


@SCHEDULES
def test_a_barrier_is_used_again_and_again(schedule):
    text = """
    .shared .b32 sum;
    mov.b32 %r2, sum; setp.eq.u32 %p1, %t, 0; @%p1 st.shared.b32 [%r2], 0; mov.b32 %r3, 0;
$AGAIN:
    bar.sync 0; setp.eq.u32 %p2, %t, 32; @%p2 bra $ADD; bra $ON;
$ADD: ld.shared.b32 %r4, [%r2]; add.u32 %r4, %r4, 3; st.shared.b32 [%r2], %r4;
$ON: bar.sync 0; ld.shared.b32 %r1, [%r2];
    add.u32 %r3, %r3, 1; setp.lt.u32 %p3, %r3, 5; @%p3 bra $AGAIN;"""
    assert (run(text, schedule=schedule) == 15).all()


BY_WARP = "setp.ge.u32 %p1, %t, 32; @%p1 bra $B; {} bra $END; $B: {} $END: mov.b32 %r1, 0;"


@SCHEDULES
@pytest.mark.parametrize(
    "text, message",
    [
        ("bar.sync 1, 48;", "barrier 1 for 48 threads: not a multiple of the warp size"),
        ("mov.b32 %r2, 16; bar.sync %r2;", "barrier 16: a block has barriers 0 to 15"),
        (BY_WARP.format("bar.sync 1, 64;", "bar.sync 1, 96;"), r"barrier 1 is for \d+ threads here and was for \d+"),
        (BY_WARP.format("bar.sync 1, 64;", "bar.sync 2, 64;"),
         r"(?s)DEADLOCK.*barrier 1: 32 of 64 threads have arrived, those of warps 0; not those of warps 1.*barrier 2"),
        (BY_WARP.format("bar.sync 1, 96;", "bar.sync 1, 96;"), r"DEADLOCK.*\n.*barrier 1: 64 of 96 threads"),
        ("setp.lt.u32 %p1, %t, 40; @%p1 bar.sync 0;", r"divergence: bar\.sync .* lanes 0xffffff00"),
        ("setp.lt.u32 %p1, %t, 40; @!%p1 bra $E; bar.sync 0; $E: bar.sync 1;",
         r"(?s)DEADLOCK.*lanes 0x000000ff, PTX line \d+.*lanes 0xffffff00, PTX line"),
        ("setp.lt.u32 %p1, %t, 48; @%p1 barrier.sync 1, 64; @!%p1 barrier.arrive 1, 32; ",
         r"barrier 1 is for \d+ threads here and was for \d+ before|DEADLOCK"),
        ("rem.u32 %r2, %t, 2; barrier.sync %r2;", "the barrier differs between lanes"),
    ],
    ids=["count", "number", "counts_differ", "others_elsewhere", "too_few", "guard", "branch", "mixed", "lanes_differ"],
)  # fmt: skip
def test_misuse(text, message, schedule):
    with pytest.raises(ptx.Fault, match=message):
        run(f"mov.b32 %r1, 0; {text}", schedule=schedule)


def test_more_arrivals_than_expected():
    text = "mov.b32 %r1, 0; setp.lt.u32 %p1, %t, 16; @%p1 barrier.arrive 1, 32; barrier.arrive 1, 32;"
    with pytest.raises(ptx.Fault, match="more arrivals than expected: barrier 1: 48 of 32"):
        run(text, 32)
