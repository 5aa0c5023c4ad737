"""Blocks of a cluster: their barrier, each other's shared memory, multicast; fences and what only guides hardware."""

import numpy as np
import pytest
import torch

from fusedops.testing import ptx
from tests.ptx.inline import kernel, launch

SCHEDULES = pytest.mark.parametrize("schedule", ptx.SCHEDULES)
SIZES = pytest.mark.parametrize("blocks", [2, 4, 16])
# %r30 is the rank, %r31 the rank of the next block; `word` and `bar` have the same place in each.
HEAD = """
.shared .b32 word; .shared .align 8 .b64 bar; .shared .align 128 .b8 tile[1024];
mov.b32 %r20, word; mov.b32 %r21, bar; mov.b32 %r22, tile; setp.eq.u32 %p7, %t, 0; mov.b32 %r1, 0;
mov.b32 %r30, %cluster_ctarank; mov.b32 %r29, %cluster_nctarank; add.u32 %r31, %r30, 1; rem.u32 %r31, %r31, %r29;
"""
SYNC = "barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;"
STORE = "mov.b32 %r8, %ctaid.x; shl.b32 %r8, %r8, 2; cvt.u64.u32 %d1, %r8; add.u64 %d1, %d1, %out;"
STORE += "@%p7 st.global.b32 [%d1], %r1;"


def run(text, blocks=2, threads=64, x=None, **options):
    out = np.zeros(blocks, np.uint32)
    arguments = [out] if x is None else [x, out]
    body = kernel(HEAD + text + STORE, "out" if x is None else "x out")
    launch(body, arguments, (threads,), (blocks,), cluster=(blocks,), **options)
    return out


def following(blocks):
    return (np.arange(blocks) + 1) % blocks


@SCHEDULES
@SIZES
def test_reading_the_next_block(blocks, schedule):
    text = f"@%p7 st.shared.b32 [%r20], %r30; {SYNC} mapa.shared::cluster.u32 %r2, %r20, %r31;"
    text += f"ld.shared::cluster.b32 %r1, [%r2]; {SYNC}"
    assert (run(text, blocks, schedule=schedule) == following(blocks)).all()


WRITES = {
    "shared": "mapa.shared::cluster.u32 %r2, %r20, %r31; @%p7 st.shared::cluster.b32 [%r2], %r30;",
    "generic": "cvt.u64.u32 %d2, %r20; cvta.shared.u64 %d2, %d2; mapa.u64 %d3, %d2, %r31; @%p7 st.b32 [%d3], %r30;",
    "atomic": "mapa.shared::cluster.u32 %r2, %r20, %r31; @%p7 atom.shared::cluster.add.u32 %r3, [%r2], %r30;",
}


@SCHEDULES
@pytest.mark.parametrize("how", WRITES)
def test_writing_to_the_next_block(how, schedule):
    text = f"@%p7 st.shared.b32 [%r20], 0; {SYNC} {WRITES[how]} {SYNC} ld.shared.b32 %r1, [%r20];"
    assert (run(text, 4, schedule=schedule) == (np.arange(4) - 1) % 4).all()


def test_addresses_know_their_block():
    text = "mapa.shared::cluster.u32 %r2, %r20, %r31; getctarank.shared::cluster.u32 %r1, %r2;"
    assert (run(text, 4) == following(4)).all()
    text = "cvt.u64.u32 %d2, %r20; cvta.shared.u64 %d2, %d2; mapa.u64 %d3, %d2, %r31; getctarank.u64 %r1, %d3;"
    assert (run(text, 4) == following(4)).all()
    assert (run("getctarank.shared::cluster.u32 %r1, %r20;", 4) == np.arange(4)).all()


MAKE = f"@%p7 mbarrier.init.shared::cta.b64 [%r21], {{}}; fence.mbarrier_init.release.cluster; {SYNC}"
WAIT = "$W: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 %p6, [%r21], 0; @!%p6 bra $W;"


@SCHEDULES
@SIZES
def test_arriving_at_the_next_block(blocks, schedule):
    text = MAKE.format(64) + "mapa.shared::cluster.u32 %r2, %r21, %r31; mapa.shared::cluster.u32 %r3, %r20, %r31;"
    text += "@%p7 st.shared::cluster.b32 [%r3], %r30;"
    text += f"mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%r2]; {WAIT} ld.shared.b32 %r1, [%r20]; {SYNC}"
    assert (run(text, blocks, schedule=schedule) == (np.arange(blocks) - 1) % blocks).all()


@SCHEDULES
def test_storing_asynchronously_to_the_next_block(schedule):
    text = MAKE.format(1) + "mapa.shared::cluster.u32 %r2, %r21, %r31; mapa.shared::cluster.u32 %r3, %r20, %r31;"
    text += "@%p7 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r21], 4;"
    text += "@%p7 st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%r3], %r30, [%r2];"
    text += f"{WAIT} ld.shared.b32 %r1, [%r20]; {SYNC}"
    assert (run(text, 4, schedule=schedule) == (np.arange(4) - 1) % 4).all()


@SCHEDULES
def test_copying_to_the_next_block(schedule):
    text = MAKE.format(1) + "mapa.shared::cluster.u32 %r2, %r21, %r31; mapa.shared::cluster.u32 %r3, %r22, %r31;"
    text += "add.u32 %r4, %r22, 512; shl.b32 %r5, %t, 2; add.u32 %r5, %r4, %r5; st.shared.b32 [%r5], %r30;"
    text += "fence.proxy.async.shared::cta; bar.sync 0; @%p7 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r21], 256;"
    text += "@%p7 cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%r3], [%r4], 256, [%r2];"
    text += f"{WAIT} ld.shared.b32 %r1, [%r22+252]; {SYNC}"
    assert (run(text, 4, schedule=schedule) == (np.arange(4) - 1) % 4).all()


MULTICAST = (
    "@%p7 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r21], 64; setp.eq.and.u32 %p1, %r30, 0, %p7;"
    "mov.b16 %h1, {mask}; @%p1 {copy} {wait} ld.shared.b32 %r1, [%r22+4]; " + SYNC
)
BULK = "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"


@SCHEDULES
@SIZES
def test_multicast(blocks, schedule):
    x = np.arange(100, 116, dtype=np.uint32)
    text = MAKE.format(1) + MULTICAST.format(
        mask=(1 << blocks) - 1, copy=f"{BULK} [%r22], [%x], 64, [%r21], %h1;", wait=WAIT
    )
    assert (run(text, blocks, x=x, schedule=schedule) == 101).all()


@SCHEDULES
def test_multicast_of_a_box(schedule):
    x, blocks = torch.arange(64, dtype=torch.int32).reshape(8, 8), 4
    copy = (
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster"
        " [%r22], [%map, {4, 2}], [%r21], %h1;"
    )
    text = HEAD + MAKE.format(1) + MULTICAST.format(mask=0b1111, copy=copy, wait=WAIT) + STORE
    text = kernel(".reg .b64 %map; mov.b64 %map, map_param; cvta.param.u64 %map, %map;\n" + text, "out")
    text = text.replace("out_ptr)\n{", "out_ptr, .param .align 64 .b8 map_param[128])\n{", 1)
    out = np.zeros(blocks, np.uint32)
    launch(text, [out, ptx.encode_tiled(x, (4, 4))], (64,), (blocks,), cluster=(blocks,), memory=[x], schedule=schedule)
    assert (out == x[2, 5].item()).all()


@pytest.mark.parametrize(
    "statement",
    [
        "fence.acq_rel.gpu;", "fence.sc.cta;", "fence.acquire.sync_restrict::shared::cluster.cluster;", "membar.gl;",
        "fence.proxy.async;", "fence.proxy.async.global;", "fence.proxy.alias;", "griddepcontrol.wait;",
        "fence.proxy.async::generic.acquire.sync_restrict::shared::cluster.cluster;",
        "griddepcontrol.launch_dependents;", "setmaxnreg.dec.sync.aligned.u32 24;",
        "setmaxnreg.inc.sync.aligned.u32 256;",
        "fence.proxy.tensormap::generic.release.gpu;", "cp.async.bulk.prefetch.L2.global [%out], 16;",
    ],
)  # fmt: skip
def test_instructions_that_change_no_values(statement):
    assert (run(f"mov.b32 %r1, 3; {statement}") == 3).all()


READ = "mapa.shared::cluster.u32 %r2, %r20, %r31; ld.shared::cluster.b32 %r1, [%r2];"


@SCHEDULES
@pytest.mark.parametrize(
    "text, message",
    [
        (f"@%p7 st.shared.b32 [%r20], %r30; bar.sync 0; {READ} {SYNC}", "race|nobody has written"),
        (f"@%p7 st.shared.b32 [%r20], %r30; barrier.cluster.arrive.relaxed; barrier.cluster.wait; {READ} {SYNC}",
         "race|nobody has written"),
        (f"@%p7 st.shared.b32 [%r20], %r30; {SYNC} {READ}", "exited"),
        ("mapa.shared::cluster.u32 %r2, %r20, 2;", "mapa to block 2 of a cluster of 2"),
        ("barrier.cluster.wait;", "barrier.cluster.wait by lanes 0xffffffff that have not arrived"),
        ("barrier.cluster.arrive; barrier.cluster.arrive;", "that have arrived and not waited yet"),
        ("setp.lt.u32 %p1, %t, 8; @%p1 barrier.cluster.arrive.aligned;", r"divergence: barrier\.cluster.*0xffffff00"),
        (f"setp.eq.u32 %p1, %r30, 1; @%p1 bra $OTHER; {SYNC} bra $END; $OTHER: bar.sync 1, 96; $END:",
         r"DEADLOCK(.*\n)+.*barrier.cluster: not there are block 1 warp 0 lanes 0xffffffff, block 1 warp 1"),
        (MAKE.format(1) + MULTICAST.format(mask=0, copy=f"{BULK} [%r22], [%out], 64, [%r21], %h1;", wait=WAIT),
         "a multicast to no block"),
        (MAKE.format(1) + "mapa.shared::cluster.u32 %r2, %r20, %r31;"
         "@%p7 st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%r2], 1, [%r21];" + SYNC + SYNC,
         "lies in another block than its destination"),
    ],
    ids=["no_sync", "relaxed", "leaves", "rank", "wait", "arrive", "guard", "one_block", "no_block", "mbarrier"],
)  # fmt: skip
def test_misuse(text, message, schedule):
    with pytest.raises(ptx.Fault, match=message):
        run(text, schedule=schedule)


@pytest.mark.parametrize("count", [16, 100, 264])
def test_setmaxnreg_wants_a_number_that_the_hardware_has(count):
    with pytest.raises(ptx.Fault, match="24 to 256 registers, a multiple of 8"):
        run(f"setmaxnreg.dec.sync.aligned.u32 {count};")
