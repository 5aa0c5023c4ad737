"""Moves, addresses of the state spaces, and control flow."""

import numpy as np
import pytest

from fusedops.testing import ptx
from tests.ptx.conformance import Case, check, parametrize

HEAD = ".version 8.7\n.target sm_90a\n.address_size 64\n"


def run(body, threads=32, schedule="default"):
    """The result of each thread: what the body leaves in the 64 bits of %d."""
    out = np.zeros(threads, "uint64")
    text = f"""{HEAD}
.global .align 8 .b64 somewhere[4] = {{5, 6, 7, 8}};
.const .align 4 .b32 fixed[2] = {{40, 41}};
.visible .entry k(.param .u64 out_ptr)
{{
    .reg .pred %p<8>; .reg .b16 %h<8>; .reg .b32 %r<16>; .reg .b64 %d, %x<8>, %out; .reg .b128 %q<2>;
    .shared .align 16 .b64 here[8]; .local .align 8 .b64 mine[2];
    mov.b64 %d, 0;
    mov.u32 %r0, %tid.x;
    {body}
$STORE:
    ld.param.b64 %out, [out_ptr]; mad.wide.u32 %out, %r0, 8, %out; st.global.b64 [%out], %d;
    ret;
}}
"""
    ptx.load(text).launch("k", (1,), (threads,), [out], schedule=schedule)
    return out


def parts(kind, part):
    """A register taken to pieces in reverse and put together again."""
    bits, piece = int(kind[1:]), int(part[1:])
    count = bits // piece
    names = [f"%y{k}" for k in range(count)]
    text = f".reg .b{max(piece, 16)} {', '.join(names)}; mov.{kind} {{{', '.join(names)}}}, %a; "
    text += f"mov.{kind} %d, {{{', '.join(reversed(names))}}}"

    def expected(a):
        pieces = np.ascontiguousarray(a).view(f"uint{piece}").reshape(-1, count)
        return np.ascontiguousarray(pieces[:, ::-1]).view(f"uint{bits}").reshape(-1)

    return Case(text, kind, (kind,), expected, name=f"mov.{kind}-of-{count}")


CASES = [
    *(Case(f"mov.{k} %d, %a", k, (k,), lambda a: a) for k in ("b16", "b32", "b64", "u16", "s32", "u64", "f32", "f64")),
    Case("mov.pred %d, %a", "pred", ("pred",), lambda a: a),
    Case("mov.pred %d, !%a", "pred", ("pred",), lambda a: ~a, name="mov.pred-not"),
    *(parts(kind, part) for kind, part in (("b16", "b8"), ("b32", "b16"), ("b32", "b8"))),
    *(parts("b64", part) for part in ("b32", "b16")),
    Case(
        ".reg .b16 %y; mov.b32 {_, %y}, %a; cvt.u32.u16 %d, %y", "b32", ("b32",), lambda a: a >> 16, name="mov.b32-sink"
    ),
    Case(
        ".reg .b128 %y; .reg .b64 %z; mov.b128 %y, {%a, %b}; mov.b128 {%z, %d}, %y; xor.b64 %d, %d, %z", "b64",
        ("b64", "b64"), lambda a, b: a ^ b, name="mov.b128",
    ),
    Case("mov.b32 %d, 0f3FC00000", "f32", (), lambda: np.full(512, 1.5, "float32"), name="mov.b32-number"),
    Case("mov.b32 %d, -7", "s32", (), lambda: np.full(512, -7, "int32"), name="mov.b32-negative"),
    Case("mov.f64 %d, 0dBFF8000000000000", "f64", (), lambda: np.full(512, -1.5), name="mov.f64-number"),
    Case("mov.f32 %d, 2.5", "f32", (), lambda: np.full(512, 2.5, "float32"), name="mov.f32-decimal"),
]  # fmt: skip


@parametrize(CASES)
def test_moves(case):
    check(case, CASES)


def test_specials():
    out = run("mov.u32 %r1, %laneid; mov.u32 %r2, %lanemask_le; mov.b64 %d, {%r1, %r2};", threads=64)
    lanes = np.arange(64) % 32
    assert (out & 0xFFFFFFFF == lanes).all()
    assert (out >> np.uint64(32) == (np.uint64(2) << lanes.astype("uint64")) - np.uint64(1)).all()


@pytest.mark.parametrize("clock", ["clock64", "globaltimer"])
def test_clocks_go_on(clock):
    out = run(f"mov.u64 %x0, %{clock}; add.u32 %r1, %r0, 1; mov.u64 %x1, %{clock}; sub.u64 %d, %x1, %x0;")
    assert (out > 0).all() and (out < 100).all()


SPACES = {
    "shared": "mov.u64 %x0, here; cvta.shared.u64 %x1, %x0;",
    "local": "mov.u64 %x0, mine; cvta.local.u64 %x1, %x0;",
    "global": "mov.u64 %x0, somewhere; cvta.global.u64 %x1, %x0;",
    "const": "mov.u64 %x0, fixed; cvta.const.u64 %x1, %x0;",
    "param": "mov.u64 %x0, out_ptr; cvta.param.u64 %x1, %x0;",
}


@pytest.mark.parametrize("space", SPACES)
def test_addresses_there_and_back(space):
    asked = "".join(
        f"isspacep.{name} %p0, %x1; selp.b64 %x2, {1 << k}, 0, %p0; or.b64 %d, %d, %x2;"
        for k, name in enumerate(SPACES)
    )
    back = f"cvta.to.{space}.u64 %x3, %x1; setp.ne.u64 %p1, %x3, %x0; selp.b64 %x2, 256, 0, %p1; or.b64 %d, %d, %x2;"
    assert (run(SPACES[space] + asked + back) == 1 << list(SPACES).index(space)).all()


def test_generic_addresses_reach_every_space():
    body = """
    mov.u64 %x0, here; cvta.shared.u64 %x1, %x0; mov.u64 %x5, 11; st.b64 [%x1+8], %x5; ld.shared.b64 %x6, [here+8];
    mov.u64 %x0, mine; cvta.local.u64 %x1, %x0; st.b64 [%x1+8], %x5; ld.local.b64 %x7, [mine+8];
    add.u64 %x6, %x6, %x7; mov.u64 %x0, somewhere; cvta.global.u64 %x1, %x0; ld.b64 %x7, [%x1+24];
    add.u64 %x6, %x6, %x7; mov.u64 %x0, fixed; cvta.const.u64 %x1, %x0; ld.u32 %r1, [%x1+4]; ld.const.u32 %r2, [fixed];
    add.u32 %r1, %r1, %r2; cvt.u64.u32 %x7, %r1; add.u64 %d, %x6, %x7;
    """
    assert (run(body, threads=1) == 11 + 11 + 8 + 41 + 40).all()


@pytest.mark.parametrize("schedule", ["default", "random_0", "random_1"])
def test_indexed_branches_part_the_lanes(schedule):
    body = """
    and.b32 %r1, %r0, 3; setp.eq.u32 %p1, %r1, 3; mov.b64 %d, 7;
    $LIST: .branchtargets $A, $B, $C;
    @!%p1 brx.idx %r1, $LIST;
    bra.uni $STORE;
    $A: mov.b64 %d, 100; bra $STORE;
    $B: mov.b64 %d, 101; bra $STORE;
    $C: mov.b64 %d, 102;
    """
    lanes = np.arange(64) % 4
    assert (run(body, threads=64, schedule=schedule) == np.array([100, 101, 102, 7])[lanes]).all()


def test_an_index_past_the_targets_is_a_fault():
    body = "$LIST: .branchtargets $A, $B; brx.idx %r0, $LIST; $A: mov.b64 %d, 1; bra $STORE; $B: mov.b64 %d, 2;"
    with pytest.raises(ptx.Fault, match="index 2, there are 2 targets"):
        run(body)


def test_lanes_that_return_early_leave_nothing_behind():
    out = run("setp.gt.u32 %p1, %r0, 4; @%p1 exit; mov.b64 %d, 9;")
    assert out.tolist() == [9] * 5 + [0] * 27


def test_a_loop_with_a_different_end_in_every_lane():
    body = "mov.u32 %r1, 0; $L: add.u32 %r1, %r1, 1; setp.le.u32 %p1, %r1, %r0; @%p1 bra $L; cvt.u64.u32 %d, %r1;"
    assert (run(body) == np.arange(1, 33)).all()


@pytest.mark.parametrize("instruction", ["trap", "brkpt"])
def test_a_kernel_that_stops_itself(instruction):
    with pytest.raises(ptx.Fault, match="stops itself"):
        run(f"setp.eq.u32 %p1, %r0, 5; @%p1 {instruction};")


@pytest.mark.parametrize("schedule", ptx.SCHEDULES)
def test_who_sleeps_lets_others_run(schedule):
    body = """
    mov.b64 %x0, 0; setp.eq.u32 %p0, %r0, 0; @%p0 st.volatile.shared.b64 [here], %x0; bar.sync 0;
    setp.ge.u32 %p1, %r0, 32; @%p1 bra $SET;
    $POLL: nanosleep.u32 100; ld.volatile.shared.b64 %d, [here]; setp.ne.u64 %p2, %d, 3; @%p2 bra $POLL; bra $STORE;
    $SET: mov.b64 %d, 3; setp.eq.u32 %p2, %r0, 32; @%p2 st.volatile.shared.b64 [here], %d; pmevent 1;
    """
    assert (run(body, threads=64, schedule=schedule) == 3).all()
