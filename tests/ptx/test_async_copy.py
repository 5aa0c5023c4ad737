"""Copies that run on their own: cp.async, bulk copies and reductions, st.async and red.async."""

import numpy as np
import pytest

from fusedops.testing import ptx
from tests.ptx.inline import kernel, launch

SCHEDULES = pytest.mark.parametrize("schedule", ptx.SCHEDULES)
SHARED = ".shared .align 128 .b8 tile[4096]; .shared .align 8 .b64 bar; mov.b32 %r20, tile; mov.b32 %r21, bar;"
DATA = np.random.default_rng(3).integers(0, 256, 4096, dtype=np.uint8)


def run(text, x=DATA, size=4096, out=None, threads=32, **options):
    out = np.zeros(size, np.uint8) if out is None else out
    launch(kernel(f"{SHARED}\nsetp.eq.u32 %p7, %t, 0;\n{text}"), [np.array(x), out], (threads,), **options)
    return out


# Thread t copies 16 bytes from x + 16 t; then it gives out what the next thread brought.
PLACES = "shl.b32 %r1, %t, 4; add.u32 %r2, %r20, %r1; cvt.u64.u32 %d1, %r1; add.u64 %d2, %x, %d1;"
NEXT = """
add.u32 %r3, %t, 1; and.b32 %r3, %r3, 31; shl.b32 %r3, %r3, 4; add.u32 %r3, %r20, %r3;
ld.shared.v4.b32 {%r4, %r5, %r6, %r7}, [%r3]; add.u64 %d3, %out, %d1; st.global.v4.b32 [%d3], {%r4, %r5, %r6, %r7};
"""
COPY = "cp.async.cg.shared.global [%r2], [%d2], 16;"
ROLLED = np.roll(DATA[:512].reshape(32, 16), -1, 0).ravel()
WAITS = {
    "wait_group": "cp.async.commit_group; cp.async.wait_group 0;",
    "wait_all": "cp.async.wait_all;",
    "older_group": "cp.async.commit_group; cp.async.commit_group; cp.async.wait_group 1;",
}


@SCHEDULES
@pytest.mark.parametrize("wait", WAITS)
def test_cp_async(wait, schedule):
    got = run(f"{PLACES} {COPY} {WAITS[wait]} bar.sync 0; {NEXT}", size=512, schedule=schedule)
    assert (got == ROLLED).all()


FORMS = {
    "ca_4": ("cp.async.ca.shared.global [%r2], [%d2], 4;", 4, 4),
    "ca_8": ("cp.async.ca.shared::cta.global [%r2], [%d2], 8;", 8, 8),
    "prefetch": ("cp.async.cg.shared.global.L2::128B [%r2], [%d2], 16;", 16, 16),
    "cache_policy": ("cp.async.cg.shared.global.L2::cache_hint [%r2], [%d2], 16, %d9;", 16, 16),
    "source_size": ("cp.async.ca.shared.global [%r2], [%d2], 16, 5;", 16, 5),
    "source_size_0": ("mov.b32 %r9, 0; cp.async.cg.shared.global [%r2], [%d2], 16, %r9;", 16, 0),
    "ignore_source": ("cp.async.ca.shared.global [%r2], [%d2], 8, %p1;", 8, 0),
    "do_not_ignore": ("cp.async.ca.shared.global [%r2], [%d2], 8, !%p1;", 8, 8),
}


@pytest.mark.parametrize("name", FORMS)
def test_cp_async_forms(name):
    form, size, read = FORMS[name]
    clear = "mov.b32 %r9, -1; st.shared.v4.b32 [%r2], {%r9, %r9, %r9, %r9}; setp.eq.u32 %p1, 0, 0;"
    got = run(f"{PLACES} {clear} {form} {WAITS['wait_all']} bar.sync 0; {NEXT}", size=512).reshape(32, 16)
    expected = np.full((32, 16), 255, np.uint8)
    expected[:, :size] = 0
    expected[:, :read] = DATA[:512].reshape(32, 16)[:, :read]
    assert (got == np.roll(expected, -1, 0)).all()


MAKE = "@%p7 mbarrier.init.shared::cta.b64 [%r21], {}; fence.mbarrier_init.release.cluster; bar.sync 0;"
WAIT = "$W: mbarrier.try_wait.parity.shared::cta.b64 %p6, [%r21], 0; @!%p6 bra $W;"


@SCHEDULES
@pytest.mark.parametrize("form, count", [(".noinc", 64), ("", 32)], ids=["noinc", "inc"])
def test_cp_async_that_arrives_at_an_mbarrier(form, count, schedule):
    own = "mbarrier.arrive.shared::cta.b64 _, [%r21];"
    text = f"{MAKE.format(count)} {PLACES} {COPY} cp.async.mbarrier.arrive{form}.shared.b64 [%r21]; {own} {WAIT} {NEXT}"
    assert (run(text, size=512, schedule=schedule) == ROLLED).all()


@SCHEDULES
@pytest.mark.parametrize(
    "text, message",
    [
        (f"{PLACES} {COPY} cp.async.commit_group; bar.sync 0; {NEXT} cp.async.wait_group 0;",
         "race|nobody has written"),
        (f"{PLACES} {COPY} cp.async.commit_group; cp.async.wait_group 1; bar.sync 0; {NEXT} cp.async.wait_all;",
         "race|nobody has written"),
        (f"{PLACES} {COPY} cp.async.commit_group;",
         "left over at exit: a cp.async that lanes 0xffffffff have not waited"),
        (f"{PLACES} st.shared.b32 [%r2], 0; {COPY} st.shared.b32 [%r2], 1; cp.async.wait_all;", "race"),
        (f"{PLACES} cp.async.cg.shared.global [%r2], [%d2+8], 16; cp.async.wait_all;", "misaligned"),
        (f"{PLACES} cp.async.ca.shared.global [%r2], [%d2], 4, 5; cp.async.wait_all;",
         "cp.async of 4 bytes from .* of 5"),
        (f"{PLACES} cp.async.cg.shared.global [%r2], [%d2+3840], 16; cp.async.wait_all;", "(?s)out of bounds.*in k"),
    ],
    ids=["no_wait", "wait_for_less", "left_over", "overwritten", "misaligned", "source_size", "bounds"],
)  # fmt: skip
def test_cp_async_misuse(text, message, schedule):
    with pytest.raises(ptx.Fault, match=message):
        run(text, size=512, schedule=schedule)


# Bulk copies of thread 0: x to the tile, then the tile to out.
LOAD = (
    "@%p7 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r21], {size};"
    "@%p7 cp.async.bulk.{to}.global.mbarrier::complete_tx::bytes{cache} [%r20], [%x], {size}, [%r21]{policy};"
)
STORE = "@%p7 cp.async.bulk.global.shared::cta.bulk_group [%out], [%r20], {size};"
DONE = "@%p7 cp.async.bulk.commit_group; @%p7 cp.async.bulk.wait_group{} 0;"
FENCE = "fence.proxy.async.shared::cta; bar.sync 0;"


def load(size=2048, to="shared::cluster", cache="", policy=""):
    return MAKE.format(1) + LOAD.format(size=size, to=to, cache=cache, policy=policy)


@SCHEDULES
@pytest.mark.parametrize(
    "options",
    [{}, {"to": "shared::cta"}, {"size": 16}, {"cache": ".L2::cache_hint", "policy": ", %d9"}],
    ids=["cluster", "cta", "16", "policy"],
)
def test_bulk_copies(options, schedule):
    size = options.get("size", 2048)
    text = load(**options) + WAIT + FENCE + STORE.format(size=size) + DONE.format("")
    got = run(text, schedule=schedule)
    assert (got[:size] == DATA[:size]).all() and not got[size:].any()


def filled():
    """The first bytes of the tile are written by the threads, 16 each."""
    return f"{PLACES} ld.global.v4.b32 {{%r4, %r5, %r6, %r7}}, [%d2]; st.shared.v4.b32 [%r2], {{%r4, %r5, %r6, %r7}};"


REDUCTIONS = {
    "add.u32": np.add, "add.s32": np.add, "add.u64": np.add, "min.u32": np.minimum, "max.u32": np.maximum,
    "min.s32": np.minimum, "max.s32": np.maximum, "min.s64": np.minimum, "max.s64": np.maximum, "min.u64": np.minimum,
    "max.u64": np.maximum, "and.b32": np.bitwise_and, "or.b64": np.bitwise_or, "xor.b32": np.bitwise_xor,
    "inc.u32": lambda a, b: np.where(a >= b, 0, a + 1), "dec.u32": lambda a, b: np.where((a == 0) | (a > b), b, a - 1),
    "add.f32": np.add, "add.f64": np.add, "add.noftz.f16": np.add, "min.f16": np.minimum, "max.f16": np.maximum,
}  # fmt: skip
TYPES = {
    "u32": "u4",
    "s32": "i4",
    "b32": "u4",
    "u64": "u8",
    "s64": "i8",
    "b64": "u8",
    "f32": "f4",
    "f64": "f8",
    "f16": "f2",
}


def operands(name):
    kind = np.dtype(TYPES[name.split(".")[-1]])
    if kind.kind == "f":
        random = np.random.default_rng(4)
        return [random.standard_normal(512 // kind.itemsize).astype(kind) for _ in range(2)]
    return [DATA[:512].view(kind), DATA[1024:1536].view(kind)]


@pytest.mark.parametrize("name", REDUCTIONS)
def test_bulk_reductions_to_global_memory(name):
    x, before = operands(name)
    out = before.copy()
    text = filled() + FENCE + f"@%p7 cp.reduce.async.bulk.global.shared::cta.bulk_group.{name} [%out], [%r20], 512;"
    run(text + DONE.format(""), x, out=out)
    assert (out == REDUCTIONS[name](before, x).astype(out.dtype)).all()


@SCHEDULES
def test_bulk_reduction_to_shared_memory(schedule):
    text = MAKE.format(1) + filled() + FENCE
    text += "@%p7 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r21], 256;"
    text += "@%p7 cp.reduce.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes.add.u32 "
    text += "[%r20], [%r20+256], 256, [%r21];" + WAIT + NEXT
    got = run(text, size=512, schedule=schedule).view(np.uint32)
    words = DATA[:512].view(np.uint32).copy()
    words[:64] += words[64:]
    assert (got == np.roll(words.reshape(32, 4), -1, 0).ravel()).all()


def test_bulk_copy_of_masked_bytes():
    text = filled() + FENCE + "mov.b16 %h1, 0x00f1;"
    text += "@%p7 cp.async.bulk.global.shared::cta.bulk_group.cp_mask [%out], [%r20], 512, %h1;" + DONE.format("")
    mask = (0xF1 >> (np.arange(512) % 16)) & 1
    assert (run(text, size=512) == np.where(mask, DATA[:512], 0)).all()


@SCHEDULES
def test_sources_may_be_overwritten_after_wait_group_read(schedule):
    again = "add.u32 %r4, %r4, 1; st.shared.b32 [%r2], %r4;"
    text = filled() + FENCE + STORE.format(size=512) + DONE.format(".read") + "bar.sync 0;" + again
    assert (run(text, size=512, schedule=schedule) == DATA[:512]).all()
    too_soon = text.replace(DONE.format(".read") + "bar.sync 0;", "") + DONE.format("")
    with pytest.raises(ptx.Fault, match="race"):
        run(too_soon, size=512, schedule=schedule)


@SCHEDULES
@pytest.mark.parametrize(
    "text, message",
    [
        (load() + "bar.sync 0;" + PLACES + NEXT + WAIT, "race|nobody has written"),
        (load(), "left over at exit"),
        (load().replace("], 2048;", "], 2064;") + WAIT, r"DEADLOCK(.*\n)+.*0 of 1 arrivals missing, 16 bytes still"),
        (load().replace("], 2048;", "], 2032;") + WAIT, r"DEADLOCK(.*\n)+.*0 of 1 .*, 16 bytes more than expected"),
        (load(24) + WAIT, "a bulk copy of 24 bytes: the size must be a multiple of 16"),
        (load().replace("[%x]", "[%x+8]") + WAIT, "misaligned"),
        (load().replace("[%x]", "[%x+2064]") + WAIT, "(?s)out of bounds.*in k.*cp.async.bulk"),
        (filled() + "bar.sync 0;" + STORE.format(size=512) + DONE.format(""), "fence.proxy.async"),
        (filled() + FENCE + STORE.format(size=512), "left over at exit: a bulk copy that was never committed"),
        (filled() + FENCE + STORE.format(size=512) + "@%p7 cp.async.bulk.commit_group;",
         "left over at exit: a bulk copy that its thread has not waited for"),
    ],
    ids=["no_wait", "left_over", "expects_more", "expects_less", "size", "misaligned", "bounds", "no_fence",
         "not_committed", "not_awaited"],
)  # fmt: skip
def test_bulk_misuse(text, message, schedule):
    with pytest.raises(ptx.Fault, match=message):
        run(text, schedule=schedule)


@SCHEDULES
@pytest.mark.parametrize(
    "statement, bytes_each, expected",
    [
        ("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b32 [%r2], %t, [%r21];", 4, [7]),
        ("st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.b32 [%r2], {%t, %r8}, [%r21];", 8, [7, 9]),
        ("red.async.relaxed.cluster.mbarrier::complete_tx::bytes.shared::cluster.add.u32 [%r2], %r8, [%r21];", 4, [12]),
        ("red.async.relaxed.cluster.mbarrier::complete_tx::bytes.shared::cluster.max.s32 [%r2], %r8, [%r21];", 4, [9]),
        ("red.async.relaxed.cluster.mbarrier::complete_tx::bytes.shared::cluster.xor.b32 [%r2], %r8, [%r21];", 4, [10]),
    ],
    ids=["st", "st_v2", "red_add", "red_max", "red_xor"],
)
def test_asynchronous_stores_of_values(statement, bytes_each, expected, schedule):
    text = (
        MAKE.format(32)
        + PLACES
        + "mov.b32 %r8, 9; mov.b32 %r9, 3; st.shared.v4.b32 [%r2], {%r9, %r9, %r9, %r9}; bar.sync 0;"
    )
    text += f"mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r21], {bytes_each}; {statement} {WAIT} {NEXT}"
    got = run(text, size=512, schedule=schedule).view(np.uint32).reshape(32, 4)
    assert got[6, : len(expected)].tolist() == expected


def test_st_bulk_clears():
    text = filled() + "bar.sync 0; mov.b64 %d5, 256; @%p7 st.bulk.weak.shared::cta [%r20], %d5, 0; bar.sync 0;" + NEXT
    cleared = DATA[:512].copy()
    cleared[:256] = 0
    assert (run(text, size=512) == np.roll(cleared.reshape(32, 16), -1, 0).ravel()).all()
