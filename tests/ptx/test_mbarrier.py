"""mbarrier: arrivals, bytes, phases and states; and their misuse."""

import numpy as np
import pytest

from fusedops.testing import ptx
from tests.ptx.inline import kernel, launch

SCHEDULES = pytest.mark.parametrize("schedule", ptx.SCHEDULES)
STORE = "mad.wide.u32 %d9, %t, 4, %out; st.global.b32 [%d9], %r1;"
# An mbarrier for COUNT arrivals in %r20; %p7 is true in thread 0.
MAKE = """
.shared .align 8 .b64 bar; .shared .b32 word;
mov.b32 %r20, bar; mov.b32 %r21, word; setp.eq.u32 %p7, %t, 0; mov.b32 %r1, 0;
@%p7 mbarrier.init.shared::cta.b64 [%r20], COUNT;
bar.sync 0;
"""
WAIT = "$W{0}: mbarrier.try_wait.parity.shared::cta.b64 %p6, [%r20], {0}; @!%p6 bra $W{0};"


def run(text, count=64, threads=64, **options):
    out = np.zeros(threads, np.uint32)
    body = MAKE.replace("COUNT", str(count)) + text + STORE
    launch(kernel(body, "out"), [out], (threads,), **options)
    return out


ARRIVALS = {
    "plain": ("mbarrier.arrive.shared::cta.b64 _, [%r20];", 64),
    "shared": ("mbarrier.arrive.shared.b64 %d0, [%r20];", 64),
    "release": ("mbarrier.arrive.release.cta.shared::cta.b64 _, [%r20];", 64),
    "cluster_scope": ("mbarrier.arrive.release.cluster.shared::cta.b64 _, [%r20];", 64),
    "count": ("mbarrier.arrive.shared::cta.b64 _, [%r20], 3;", 192),
    "generic": ("cvt.u64.u32 %d2, %r20; cvta.shared.u64 %d1, %d2; mbarrier.arrive.b64 _, [%d1];", 64),
    "remote_own": (
        "mov.b32 %r9, %cluster_ctarank; mapa.shared::cluster.u32 %r8, %r20, %r9;"
        "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%r8];", 64,
    ),
    "drop": ("mbarrier.arrive_drop.shared::cta.b64 _, [%r20];", 64),
    "bytes": (
        "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r20], 16;"
        "mbarrier.complete_tx.relaxed.cta.shared::cta.b64 [%r20], 16;", 64,
    ),
    "bytes_before_they_are_expected": (
        "mbarrier.complete_tx.shared::cta.b64 [%r20], 16; mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%r20], 16;"
        "mbarrier.arrive.shared::cta.b64 _, [%r20];", 64,
    ),
    "no_complete": (
        "mbarrier.arrive.noComplete.shared::cta.b64 %d0, [%r20], 1; mbarrier.arrive.shared::cta.b64 _, [%r20];", 128,
    ),
}  # fmt: skip


@SCHEDULES
@pytest.mark.parametrize("name", ARRIVALS)
def test_arrivals_release_and_waits_acquire(name, schedule):
    arrive, count = ARRIVALS[name]
    text = f"@%p7 st.shared.b32 [%r21], 5; {arrive} {WAIT.format(0)} ld.shared.b32 %r1, [%r21];"
    assert (run(text, count, schedule=schedule) == 5).all()


@SCHEDULES
@pytest.mark.parametrize(
    "text",
    [
        "mbarrier.arrive.relaxed.cta.shared::cta.b64 _, [%r20];" + WAIT.format(0),
        "mbarrier.arrive.shared::cta.b64 _, [%r20];" + WAIT.format(0).replace("parity", "parity.relaxed.cta"),
        "mbarrier.arrive.shared::cta.b64 _, [%r20]; bar.arrive 1, 96;",
    ],
    ids=["relaxed_arrival", "relaxed_wait", "no_wait"],
)
def test_without_order_it_is_a_race(text, schedule):
    with pytest.raises(ptx.Fault, match="race|nobody has written"):
        run(f"@%p7 st.shared.b32 [%r21], 5; {text} ld.shared.b32 %r1, [%r21];", schedule=schedule)


@SCHEDULES
@pytest.mark.parametrize("kind", ["test_wait", "try_wait", "try_wait_hint", "acquire"])
def test_waiting_by_state(kind, schedule):
    call = {
        "test_wait": "mbarrier.test_wait.shared::cta.b64 %p6, [%r20], %d0;",
        "try_wait": "mbarrier.try_wait.shared::cta.b64 %p6, [%r20], %d0;",
        "try_wait_hint": "mbarrier.try_wait.shared::cta.b64 %p6, [%r20], %d0, 1000;",
        "acquire": "mbarrier.try_wait.acquire.cluster.shared::cta.b64 %p6, [%r20], %d0;",
    }[kind]
    text = f"@%p7 st.shared.b32 [%r21], 6; mbarrier.arrive.shared::cta.b64 %d0, [%r20]; $W: {call} @!%p6 bra $W;"
    assert (run(text + "ld.shared.b32 %r1, [%r21];", schedule=schedule) == 6).all()


@SCHEDULES
def test_phases_follow_one_another(schedule):
    text = "".join(
        "mbarrier.arrive.shared::cta.b64 _, [%r20];" + WAIT.format(phase).replace("], ", "], ") + "add.u32 %r1, %r1, 1;"
        for phase in (0, 1)
    )
    assert (run(text, schedule=schedule) == 2).all()


def test_test_wait_of_a_phase_under_way_is_false():
    text = "mbarrier.test_wait.parity.shared::cta.b64 %p1, [%r20], 0; selp.b32 %r1, 1, 0, %p1; bar.sync 0;"
    assert (run(text) == 0).all()
    assert (run(text.replace("], 0", "], 1")) == 1).all()  # the phase before the first counts as complete


def test_pending_count_of_a_state():
    text = "mbarrier.arrive.shared::cta.b64 %d0, [%r20]; mbarrier.pending_count.b64 %r1, %d0;"
    assert sorted(run(text, 32, 32)) == list(range(1, 33))


@SCHEDULES
def test_a_dropped_arrival_is_not_expected_again(schedule):
    text = f"""
    setp.ge.u32 %p1, %t, 32; @%p1 bra $LEAVES;
    mbarrier.arrive.shared::cta.b64 _, [%r20]; {WAIT.format(0)}
    mbarrier.arrive.shared::cta.b64 _, [%r20]; {WAIT.format(1)} mov.b32 %r1, 1; bra $END;
$LEAVES: mbarrier.arrive_drop.shared::cta.b64 _, [%r20];
$END:"""
    assert (run(text, schedule=schedule) == (np.arange(64) < 32)).all()


@SCHEDULES
def test_made_anew_after_inval(schedule):
    text = """bar.sync 0; @%p7 mbarrier.inval.shared::cta.b64 [%r20]; @%p7 st.shared.b64 [%r20], 12345;
    @%p7 mbarrier.init.shared::cta.b64 [%r20], 64; bar.sync 0; mbarrier.arrive.shared::cta.b64 _, [%r20];"""
    assert (run(text + WAIT.format(0), schedule=schedule) == 0).all()


ARRIVE = "mbarrier.arrive.shared::cta.b64 _, [%r20];"


@SCHEDULES
@pytest.mark.parametrize(
    "text, count, message",
    [
        (f"add.u32 %r20, %r21, 8; and.b32 %r20, %r20, 0xfffffff8; {ARRIVE}", 64, "used before mbarrier.init"),
        (f"@%p7 mbarrier.inval.shared::cta.b64 [%r20]; bar.sync 0; {ARRIVE}", 64, "used after mbarrier.inval"),
        (f"@%p7 st.shared.b64 [%r20], 9; bar.sync 0; {ARRIVE}", 64, r"data was written over it, it holds 0x0+9\b"),
        (ARRIVE + "mbarrier.expect_tx.shared::cta.b64 [%r20], 1; bar.sync 0;" + ARRIVE, 63,
         "more arrivals than expected|DEADLOCK"),
        ("mbarrier.arrive.shared::cta.b64 _, [%r20], 65;", 64, "more arrivals than expected, 65 at once: mbarrier"),
        ("mbarrier.arrive.noComplete.shared::cta.b64 %d0, [%r20], 1;", 64, "would complete the phase"),
        ("@%p7 mbarrier.init.shared::cta.b64 [%r21+4], 0;", 64, "misaligned|count of 0"),
        ("mbarrier.expect_tx.shared::cta.b64 [%r20], 1000000;", 64, "tx-count of 2000000 bytes, the limit is 1048575"),
        (ARRIVE + WAIT.format(0), 65,
         r"DEADLOCK(.*\n)+.*waits for parity 0 of mbarrier at shared offset 0 .* phase 0 \(parity 0\): 1 of 65"),
        ("@%p7 mbarrier.expect_tx.shared::cta.b64 [%r20], 48; bar.sync 0;" + ARRIVE + WAIT.format(0), 64,
         r"DEADLOCK(.*\n)+.*0 of 64 arrivals missing, 48 bytes still expected"),
        ("@%p7 mbarrier.complete_tx.shared::cta.b64 [%r20], 32; bar.sync 0;" + ARRIVE + WAIT.format(0), 64,
         r"DEADLOCK(.*\n)+.*32 bytes more than expected"),
        ("mbarrier.expect_tx.shared::cta.b64 [%r20], 2;", 64, "left over at exit: .* 128 bytes still expected"),
        ("bar.sync 0; @%p7 mbarrier.arrive.shared::cta.b64 _, [%r20];"
         "@%p7 mbarrier.init.shared::cta.b64 [%r20], 4;", 64, "mbarrier.init of one that is in use"),
        ("setp.ge.u32 %p1, %t, 32; @%p1 bra $OTHER; mbarrier.arrive.shared::cta.b64 %d0, [%r20]; $L0:"
         "mbarrier.try_wait.shared::cta.b64 %p2, [%r20], %d0; @!%p2 bra $L0; bra $END; $OTHER:"
         "mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r20], 0; @!%p2 bra $OTHER; $END:", 33,
         r"DEADLOCK(.*\n)+.*1 of 33 arrivals missing"),
        ("cvt.u64.u32 %d1, %r20; mbarrier.arrive.b64 _, [%d1];", 64, "not an address in shared memory"),
    ],
    ids=["no_init", "inval", "overwritten", "too_many", "too_many_at_once", "no_complete", "init_0", "overflow",
         "missing", "bytes_missing", "bytes_left", "left_over", "init_in_use", "waiters", "generic"],
)  # fmt: skip
def test_misuse(text, count, message, schedule):
    with pytest.raises(ptx.Fault, match=message):
        run(text, count, schedule=schedule)


def test_polling_that_never_ends_is_given_up():
    text = "$W: mbarrier.test_wait.parity.shared::cta.b64 %p6, [%r20], 0; @!%p6 bra $W;"
    with pytest.raises(ptx.Fault, match="no end after|polled"):
        run(text, 1, 32, max_steps=100_000)


def test_who_does_not_ask_try_wait_again_goes_on_too_soon():
    """try_wait may give up before the phase is complete; under shuffled schedules it does."""
    text = f"@%p7 st.shared.b32 [%r21], 5; {ARRIVE} mbarrier.try_wait.parity.shared::cta.b64 %p6, [%r20], 0;"
    text += "selp.b32 %r1, 1, 0, %p6;"
    shuffled = [ptx.Schedule("random", 7, "shuffled", seed=seed) for seed in range(8)]
    assert any(not run(text, schedule=one).all() for one in shuffled)
    assert run(text, schedule="default").all()
