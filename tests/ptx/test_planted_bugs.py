"""Bugs planted into PTX that is right: each is reported, or gives wrong results, under every schedule.

Races, missing waits and missing fences are found by what happened before what, not by luck: so all schedules show them.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from fusedops.testing import ptx
from tests.ptx import cuda_problems as problems


@dataclass(frozen=True)
class Bug:
    """Edits of a kernel's PTX: (pattern, replacement, which of the places that fit; None: all of them).

    `says` must be found in the report; None: nothing is reported, but the results are wrong.
    """

    problem: Callable
    edits: tuple
    says: str | None

    def plant(self, launch):
        return lambda text: edited(text, launch.kernel, self.edits)


def edited(text, kernel, edits):
    """PTX in which the places of one kernel are changed."""
    begin = text.index(f".entry {kernel}(")
    end = text.find(".visible .entry", begin)
    body = text[begin : None if end < 0 else end]
    for pattern, replacement, which in edits:
        places = list(re.finditer(pattern, body, re.MULTILINE))
        assert places, f"{pattern} is not in {kernel}"
        for place in reversed(places if which is None else [places[which]]):
            body = body[: place.start()] + place.expand(replacement) + body[place.end() :]
    return text[:begin] + body + ("" if end < 0 else text[end:])


def removed(pattern, which=0):
    return ((pattern, "", which),)


# The two instructions of a loop that waits for an mbarrier.
WAIT = r"^ *mbarrier\.try_wait.*\n *@!done bra .*$"
ONE_LANE_IN_TWO = r"{ .reg .pred half; .reg .b32 lane; mov.u32 lane, %laneid; setp.lt.u32 half, lane, 16; @half \g<0> }"
NOT_ATOMIC = r"{ .reg .b32 count; ld.shared.u32 count, \1; add.u32 count, count, 1; st.shared.u32 \1, count; }"
RACE = r"race .*shared"
UNWRITTEN = r"reads shared memory that nobody has written"
EARLY = f"{RACE}|{UNWRITTEN}"  # where it is seen first depends on the schedule, whether it is seen does not

BUGS = {
    # Barriers of a block, and copies that nobody waited for.
    "no syncthreads after a tile is read": Bug(
        lambda: problems.gemm_mma(64, 64, 128), removed(r"bar\.sync +0;", 1), RACE
    ),
    "no syncthreads before a tile is read": Bug(
        lambda: problems.gemm_mma(64, 64, 64), removed(r"bar\.sync +0;", 0), EARLY
    ),
    "no cp.async.wait_group": Bug(
        lambda: problems.gemm_mma(64, 64, 64), removed(r"cp\.async\.wait_group .;", None), EARLY
    ),
    "no syncthreads around the shared tile of a sum": Bug(
        lambda: problems.gemm_split_k(16, 16, 32, 1), removed(r"bar\.sync +0;", 1), RACE
    ),
    "bar.sync with too many threads": Bug(
        lambda: problems.ping_pong_sum(4), ((r"bar\.sync 1, 64;", "bar.sync 1, 96;", 0),), r"barrier 1\b"
    ),
    "bar.sync with too few threads": Bug(
        lambda: problems.ping_pong_sum(4), ((r"bar\.sync 1, 64;", "bar.sync 1, 32;", 0),),
        f"barrier 1\\b|{EARLY}",
    ),
    "no bar.arrive": Bug(
        lambda: problems.ping_pong_sum(4), removed(r"bar\.arrive 1, 64;"),
        r"DEADLOCK[\s\S]*barrier 1: 32 of 64 threads have arrived",
    ),
    "no bar.sync before a row is overwritten": Bug(
        lambda: problems.ping_pong_sum(6), removed(r"bar\.(sync|arrive) 3, 64;", None), f"{RACE}|DEADLOCK"
    ),
    # mbarriers, TMA and warpgroup products.
    "no wait for an empty stage": Bug(
        lambda: problems.gemm_wgmma(128, 64, 320), removed(WAIT, 0), f"{RACE}|more arrivals than expected"
    ),
    "no wait for a full stage": Bug(
        lambda: problems.gemm_wgmma(128, 64, 128), removed(WAIT, 1), EARLY
    ),
    "expect_tx too small": Bug(
        lambda: problems.gemm_wgmma(128, 64, 128),
        ((r"(expect_tx\S* _, \[\S+\]), \S+;", r"\1, 16384;", 0),), f"{EARLY}|bytes .*expected",
    ),
    "expect_tx too large": Bug(
        lambda: problems.gemm_wgmma(128, 64, 128),
        ((r"(expect_tx\S* _, \[\S+\]), \S+;", r"\1, 24592;", 0),), r"DEADLOCK[\s\S]*mbarrier .*16 bytes still expected",
    ),
    "no wgmma.wait_group": Bug(
        lambda: problems.gemm_wgmma(128, 64, 320), removed(r"wgmma\.wait_group\S* 0;", None),
        r"wait_group|race .*shared",
    ),
    "no mbarrier.arrive": Bug(
        lambda: problems.gemm_wgmma(128, 64, 320), removed(r"mbarrier\.arrive\.shared.*;"),
        r"DEADLOCK[\s\S]*warp 8 .*mbarrier .*2 of 2 arrivals missing",
    ),
    "mbarrier.arrive counted too often": Bug(
        lambda: problems.gemm_wgmma(128, 64, 320),
        ((r"(mbarrier\.arrive\.shared\S* _, \[\S+\]);", r"\1, 3;", 0),),
        "more arrivals than expected, 3 at once: mbarrier",
    ),
    "mbarrier.arrive twice": Bug(
        lambda: problems.gemm_wgmma(128, 64, 640),
        ((r"mbarrier\.arrive\.shared.*;", r"\g<0> \g<0>", 0),), f"{RACE}|DEADLOCK|more arrivals than expected",
    ),
    "no fence between stores and a bulk copy": Bug(
        lambda: problems.bulk_axpy(300), removed(r"fence\.proxy\.async\S*;"), r"fence\.proxy\.async"
    ),
    "no fence between stores and a TMA store": Bug(
        lambda: problems.grouped_scale((5, 40), 40), removed(r"fence\.proxy\.async\S*;"), r"fence\.proxy\.async"
    ),
    "copies still under way at the end": Bug(
        lambda: problems.bulk_axpy(300), removed(r"cp\.async\.bulk\.wait_group 0;"), r"bulk"
    ),
    # Clusters.
    "a stage of another block is overwritten": Bug(
        lambda: problems.cluster_matvec(128, 640, 2), removed(WAIT.replace("try_wait", r"try_wait.*acquire"), None),
        RACE,
    ),
    "no cluster barrier before another block is read": Bug(
        lambda: problems.cluster_column_sum(9, 64, 2),
        removed(r"barrier\.cluster\.arrive\S*;", 0) + removed(r"barrier\.cluster\.wait\S*;", 0),
        EARLY,
    ),
    "a block leaves while others read it": Bug(
        lambda: problems.cluster_column_sum(9, 64, 2),
        removed(r"barrier\.cluster\.arrive\S*;", 1) + removed(r"barrier\.cluster\.wait\S*;", 1),
        r"exited",
    ),
    # Lanes.
    "mma in half a warp": Bug(
        lambda: problems.gemm_mma(64, 64, 64), ((r"mma\.sync.*;", ONE_LANE_IN_TWO, 0),), r"divergence.*mma\.sync"
    ),
    "shfl by lanes that are not in its mask": Bug(
        lambda: problems.ragged_row_sum(4), ((r"(shfl\.sync.*), %r5;", r"\1, 1;", 0),), r"mask[\s\S]*shfl\.sync"
    ),
    "vote in half a warp": Bug(
        lambda: problems.ragged_row_sum(4), ((r"vote\.sync.*;", ONE_LANE_IN_TWO, 0),), r"lanes?\b[\s\S]*vote\.sync"
    ),
    "a tensor map that was made here and not acquired": Bug(
        lambda: problems.grouped_scale((5, 40), 40), removed(r"fence\.proxy\.tensormap\S* \[.*;"),
        r"made by the kernel and is used without fence\.proxy\.tensormap",
    ),
    # Memory.
    "store one element past the end": Bug(
        lambda: problems.ping_pong_sum(4), ((r"(st\.global\.f32 +\[%rd\d+)\]", r"\1+4]", 0),), r"4 bytes .*\bout\b"
    ),
    "load one element past the end": Bug(
        lambda: problems.ping_pong_sum(4), ((r"(ld\.global\.f32 .*)\+128\]", r"\1+132]", 0),), r"4 bytes .*\bx\b"
    ),
    "load one vector past the end": Bug(
        lambda: problems.scale_vectors(260), ((r"setp\.ge\.s32", "setp.gt.s32", 0),), r"16 bytes .*\bx\b"
    ),
    "misaligned vector": Bug(
        lambda: problems.scale_vectors(256), ((r"(ld\.global\.v4.*\[%rd\d+)\]", r"\1+4]", 0),), r"misaligned"
    ),
    "a tensor map that ends after its tensor": Bug(
        lambda: problems.grouped_scale((40, 5), 40), removed(r"tensormap\.replace\S*global_dim.*;", 1), r"\bout\b"
    ),
    "write to a const argument": Bug(
        lambda: problems.scale_vectors(256), ((r"scale_vectors_param_1\];", "scale_vectors_param_0];", 0),),
        r"\bx\b.*(const|read.only)|(const|read.only).*\bx\b",
    ),
    "shared counters that nobody set to zero": Bug(
        lambda: problems.histogram(300), removed(r"st\.shared\.u32.*;"), UNWRITTEN
    ),
    "a histogram without atomics": Bug(
        lambda: problems.histogram(300), ((r"atom\.shared\.add\.u32 .*(\[.*\]), 1;", NOT_ATOMIC, 0),), RACE
    ),
    # Wrong results.
    "wrong swizzle": Bug(lambda: problems.gemm_mma(64, 64, 64), ((r"xor\.b32", "or.b32", 2),), None),
    "metadata rows swapped": Bug(
        lambda: problems.gemm_sparse_mma(64, 64, 64),
        ((r"(mma\.sp.*), (%r\d+), 0;", r"{ .reg .b32 e; prmt.b32 e, \2, 0, 0x1032; \1, e, 0; }", None),), None,
    ),
    "metadata rows swapped, wgmma": Bug(
        lambda: problems.gemm_sparse_wgmma(64, 64, 128),
        ((r"(wgmma\.mma_async\.sp.*%rd\d+), (%r\d+), 0, 1, 1, 1, 0, 0;",
          r"{ .reg .b32 e; prmt.b32 e, \2, 0, 0x1032; \1, e, 0, 1, 1, 1, 0, 0; }", None),), None,
    ),
    "the wrong half of a row": Bug(
        lambda: problems.gemm_registers_wgmma(64, 128, 64), ((r", 1, 1, 1, 1;", ", 1, 1, 1, 0;", 0),), None
    ),
}  # fmt: skip


@pytest.mark.parametrize("schedule", ptx.SCHEDULES)
@pytest.mark.parametrize("name", BUGS)
def test_planted(name, schedule):
    bug = BUGS[name]
    launch = bug.problem()
    if bug.says is None:
        launch.run(schedule, bug.plant(launch))
        assert not launch.right()
    else:
        with pytest.raises(ptx.Fault, match=bug.says) as report:
            launch.run(schedule, bug.plant(launch))
        assert launch.kernel in str(report.value)


@pytest.mark.parametrize("name", BUGS)
def test_without_the_bug(name):
    for schedule in ptx.SCHEDULES:
        launch = BUGS[name].problem()
        launch.run(schedule)
        assert launch.right(), schedule
