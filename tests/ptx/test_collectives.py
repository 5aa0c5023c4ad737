"""Lanes that look at each other: shfl, redux, vote, match, elect, and what happens when some do not come."""

import numpy as np
import pytest

from fusedops.testing import ptx
from tests.ptx.inline import kernel, launch

LOAD = "mad.wide.u32 %d0, %t, 4, %x; ld.global.b32 %r2, [%d0];"
STORE = "mad.wide.u32 %d1, %t, 4, %out; st.global.b32 [%d1], %r1;"
LANES = np.arange(32)
VALUES = np.random.default_rng(0).integers(0, 2**32, 32, dtype=np.uint32)
SPECIAL = np.random.default_rng(1).standard_normal(32).astype(np.float32)
SPECIAL[[3, 4, 17, 20]] = np.float32("nan"), -np.float32("inf"), -0.0, 0.0


def run(text, x=VALUES, **options):
    out = np.zeros(32, np.uint32)
    launch(kernel(f"{LOAD}\n{text}\n{STORE}"), [np.ascontiguousarray(x), out], **options)
    return out


def shuffled(mode, by, width):
    """The lane that each one reads, or itself where that is out of its part of `width` lanes, as CUDA describes it."""
    first = LANES // width * width
    if mode == "up":
        return np.where(LANES - by >= first, LANES - by, LANES)
    if mode == "down":
        return np.where(LANES + by < first + width, LANES + by, LANES)
    if mode == "bfly":
        return np.where((LANES ^ by) < first + width, LANES ^ by, LANES)
    return first + by % width


@pytest.mark.parametrize("width", [32, 16, 4])
@pytest.mark.parametrize("by", [0, 1, 3, 16])
@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
def test_shfl(mode, by, width):
    clamp = (32 - width) << 8 | (0 if mode == "up" else 31)
    assert (run(f"shfl.sync.{mode}.b32 %r1, %r2, {by}, {clamp}, -1;") == VALUES[shuffled(mode, by, width)]).all()


@pytest.mark.parametrize("mode", ["up", "down", "bfly"])
def test_shfl_tells_which_lanes_are_in_range(mode):
    clamp = 24 << 8 | (0 if mode == "up" else 31)  # parts of 8 lanes
    got = run(f"shfl.sync.{mode}.b32 %r3|%p1, %r2, 5, {clamp}, -1; selp.b32 %r1, 1, 0, %p1;")
    assert (got == (shuffled(mode, 5, 8) != LANES)).all()


def test_shfl_by_a_register():
    index = np.random.default_rng(2).integers(0, 32, 32).astype(np.uint32)
    got = run("mul.lo.u32 %r3, %t, 3; shfl.sync.idx.b32 %r1, %r3, %r2, 31, -1;", index)
    assert (got == index * 3).all()


def test_shfl_in_part_of_a_warp():
    got = run("mov.b32 %r1, 7; setp.ge.u32 %p1, %t, 16; @%p1 bra $END;"
              "shfl.sync.bfly.b32 %r1, %r2, 8, 31, 0xffff; $END:")  # fmt: skip
    assert (got == np.where(LANES < 16, VALUES[LANES ^ 8], 7)).all()


REDUCTIONS = {
    "add.u32": lambda x: x.sum(dtype=np.uint32), "add.s32": lambda x: x.sum(dtype=np.uint32),
    "min.u32": np.min, "max.u32": np.max, "min.s32": lambda x: x.view(np.int32).min().view(np.uint32),
    "max.s32": lambda x: x.view(np.int32).max().view(np.uint32), "and.b32": np.bitwise_and.reduce,
    "or.b32": np.bitwise_or.reduce, "xor.b32": np.bitwise_xor.reduce,
}  # fmt: skip
HALVES = "setp.lt.u32 %p1, %t, 16; selp.b32 %r3, 0xffff, 0xffff0000, %p1;"


@pytest.mark.parametrize("name", REDUCTIONS)
def test_redux(name):
    assert (run(f"redux.sync.{name} %r1, %r2, -1;") == REDUCTIONS[name](VALUES)).all()


@pytest.mark.parametrize("name", ["add.u32", "min.s32", "xor.b32"])
def test_redux_of_two_teams(name):
    expected = np.repeat([REDUCTIONS[name](VALUES[:16]), REDUCTIONS[name](VALUES[16:])], 16)
    assert (run(f"{HALVES} redux.sync.{name} %r1, %r2, %r3;") == expected).all()


@pytest.mark.parametrize("keep_nan", ["", ".NaN"])
@pytest.mark.parametrize("absolute", ["", ".abs"])
@pytest.mark.parametrize("op", ["min", "max"])
def test_redux_of_floats(op, absolute, keep_nan):
    x = np.abs(SPECIAL) if absolute else SPECIAL
    expected = np.float32("nan") if keep_nan else getattr(np, f"nan{op}")(x)
    got = run(f"redux.sync.{op}{absolute}{keep_nan}.f32 %r1, %r2, -1;", SPECIAL.view(np.uint32))
    assert (got == (0x7FFFFFFF if keep_nan else expected.view(np.uint32))).all()


def test_redux_orders_the_zeros():
    zeros = np.where(LANES % 2, np.float32(0.0), np.float32(-0.0)).view(np.uint32)
    assert (run("redux.sync.min.f32 %r1, %r2, -1;", zeros) == 1 << 31).all()
    assert (run("redux.sync.max.f32 %r1, %r2, -1;", zeros) == 0).all()


@pytest.mark.parametrize("limit", [0, 5, 32])
@pytest.mark.parametrize("kind", ["all", "any", "uni"])
def test_vote(kind, limit):
    yes = LANES < limit
    expected = {"all": yes.all(), "any": yes.any(), "uni": yes.all() or not yes.any()}[kind]
    got = run(f"setp.lt.u32 %p1, %t, {limit}; vote.sync.{kind}.pred %p2, %p1, -1; selp.b32 %r1, 1, 0, %p2;")
    assert (got == expected).all()


def test_vote_ballot():
    bits = int(sum(1 << int(lane) for lane in LANES[VALUES % 2 == 0]))
    text = "and.b32 %r3, %r2, 1; setp.eq.u32 %p1, %r3, {}; vote.sync.ballot.b32 %r1, {}%p1, -1;"
    assert (run(text.format(0, "")) == bits).all()
    assert (run(text.format(1, "!")) == bits).all()


def matching(x):
    return np.array([sum(1 << int(k) for k in LANES[x == value]) for value in x], np.uint32)


def test_match_any():
    x = VALUES % 5
    assert (run("match.any.sync.b32 %r1, %r2, -1;", x) == matching(x)).all()
    wide = "cvt.u64.u32 %d2, %r2; shl.b64 %d2, %d2, 32; match.any.sync.b64 %r1, %d2, -1;"
    assert (run(wide, x) == matching(x)).all()


@pytest.mark.parametrize("x, expected", [(np.full(32, 9, np.uint32), 0xFFFFFFFF), (VALUES, 0)], ids=["same", "other"])
def test_match_all(x, expected):
    assert (run("match.all.sync.b32 %r1|%p1, %r2, -1;", x) == expected).all()
    assert (run("match.all.sync.b32 %r3|%p1, %r2, -1; selp.b32 %r1, 1, 0, %p1;", x) == (expected != 0)).all()


def test_elect_and_activemask():
    assert (run("elect.sync %r3|%p1, -1; selp.b32 %r1, 1, 0, %p1;") == (LANES == 0)).all()
    got = run("mov.b32 %r1, 0; setp.lt.u32 %p1, %t, 10; @%p1 bra $END; elect.sync %r1|%p2, 0xfffffc00; $END:")
    assert (got == np.where(LANES < 10, 0, 10)).all()
    got = run("mov.b32 %r1, 0; setp.lt.u32 %p1, %t, 10; @%p1 bra $END; activemask.b32 %r1; $END:")
    assert (got == np.where(LANES < 10, 0, 0xFFFFFC00)).all()


@pytest.mark.parametrize("schedule", ptx.SCHEDULES)
def test_bar_warp_sync_from_different_places(schedule):
    text = """
    .shared .b32 word;
    setp.ge.u32 %p1, %t, 16; mov.b32 %r4, word;
    @%p1 bra $UPPER;
    setp.eq.u32 %p2, %t, 0; @%p2 st.shared.b32 [%r4], 41;
    bar.warp.sync -1; mov.b32 %r1, 1; bra $END;
$UPPER:
    bar.warp.sync -1; ld.shared.b32 %r1, [%r4];
$END:"""
    assert (run(text, schedule=schedule) == np.where(LANES < 16, 1, 41)).all()


PARTED = "setp.ge.u32 %p1, %t, 16; @%p1 bra $END; {} $END:"


@pytest.mark.parametrize("schedule", ptx.SCHEDULES)
@pytest.mark.parametrize(
    "text, message",
    [
        ("setp.lt.u32 %p1, %t, 9; @%p1 redux.sync.add.u32 %r1, %r2, -1;", r"divergence: redux.*0xfffffe00"),
        ("setp.lt.u32 %p1, %t, 9; @%p1 shfl.sync.bfly.b32 %r1, %r2, 1, 31, -1;", r"divergence: shfl.*0xfffffe00"),
        (PARTED.format("redux.sync.add.u32 %r1, %r2, 0xff;"), "lanes 0x0000ff00 run it .* leaves them out"),
        (PARTED.format("shfl.sync.idx.b32 %r1, %r2, 20, 31, 0xffff;"), "shfl reads lane 20, which does not take part"),
        (f"{HALVES} selp.b32 %r3, -1, 0xffff0000, %p1; redux.sync.add.u32 %r1, %r2, %r3;", "give another mask"),
        ("setp.ge.u32 %p1, %t, 16; @%p1 bra $A; shfl.sync.bfly.b32 %r1, %r2, 1, 31, -1; bra $END;"
         "$A: vote.sync.ballot.b32 %r1, %p1, -1; $END:",
         r"(?s)DEADLOCK.*lanes 0x0000ffff, PTX line \d+: shfl.*lanes 0xffff0000, PTX line \d+: vote"),
    ],
    ids=["guard", "guard_shfl", "left_out", "absent_lane", "masks_differ", "two_places"],
)  # fmt: skip
def test_lanes_that_do_not_come_together(text, message, schedule):
    with pytest.raises(ptx.Fault, match=message):
        run(f"mov.b32 %r1, 0; {text}", schedule=schedule)
