"""Bugs planted in the wgmma.sp kernel's source: each is reported by the emulator, or gives wrong numbers."""

import re
import shutil
from dataclasses import dataclass

import pytest
import torch

from fusedops._core import cuda
from fusedops._core.cuda import images, toolchain
from fusedops.ops.sparse_matmul._cuda import wgmma
from fusedops.testing import ptx
from tests.ops.sparse_wgmma_problems import FP8, problem

pytestmark = [
    pytest.mark.emulated,
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on the PATH"),
]
GUARD = "#ifdef __CUDA_ARCH_FEAT_SM90_ALL\n"
HEADERS = '#include "sparse_matmul_epilogue.cuh"\n#include "wgmma_sparse.cuh"\n'
RACE = r"data race on shared memory"
EARLY = "nobody has written|data race on shared memory"


def bf16(m, n, k, **options):
    return problem(torch.bfloat16, m, n, k, **options)


def int8(m, n, k, **options):
    return problem(torch.int8, m, n, k, **options)


def fp8(m, n, k, **options):
    return problem(FP8, m, n, k, **options)


KINDS = {bf16: "Bf16", int8: "Int8", fp8: "Fp8"}


@dataclass(frozen=True)
class Bug:
    """An edit of the source: `old` becomes `new` where it stands for the `nth` time. `says` None: wrong numbers."""

    old: str
    new: str
    says: str | None
    build: object = bf16
    sizes: tuple = (70, 136, 100)
    block_m: int = 64
    nth: int = 0
    float32: bool = False

    def plant(self, body):
        parts = body.split(self.old)
        assert len(parts) > self.nth + 1, f"the source has no {self.old!r} any more"
        return self.old.join(parts[: self.nth + 1]) + self.new + self.old.join(parts[self.nth + 1 :])

    def problem(self):
        return self.build(*self.sizes, out_dtype=torch.float32 if self.float32 else torch.bfloat16)


MANY_STAGES, MANY_TILES = (70, 136, 1600), (200, 264, 100)  # more than the ring has places, than there are blocks
BUGS = {
    "no wait for the products of the last stage": Bug("wgmma_wait<1>();", "", RACE, sizes=MANY_STAGES),
    "no wait for the products of a tile": Bug("wgmma_wait<0>();", "", r"wait_group"),
    "no wait for a full stage": Bug("mbarrier_wait(ring.full(), ring.parity);", "", EARLY),
    "no wait for an empty stage": Bug(
        "mbarrier_wait(ring.empty(), ring.parity ^ 1);", "", f"{RACE}|more arrivals", sizes=MANY_STAGES
    ),
    "parity of empty stages inverted": Bug("ring.parity ^ 1", "ring.parity", "DEADLOCK"),
    "parity that never changes": Bug("stage = 0, parity ^= 1", "stage = 0", f"DEADLOCK|{RACE}|more arrivals",
                                     sizes=MANY_STAGES),
    "one arrival of a warpgroup is enough": Bug(
        "Tile::NUM_GROUPS * 4)", "Tile::NUM_GROUPS)", f"more arrivals|{RACE}|DEADLOCK", sizes=MANY_STAGES
    ),
    "one arrival too many is wanted": Bug(
        "Tile::NUM_GROUPS * 4)", "Tile::NUM_GROUPS * 4 + 1)", "DEADLOCK", sizes=MANY_STAGES
    ),
    "bytes of metadata not expected": Bug(
        "Tile::STAGE_BYTES);", "Tile::STAGE_BYTES - Tile::METADATA_BYTES);", EARLY
    ),
    "more bytes expected than come": Bug("Tile::STAGE_BYTES);", "Tile::STAGE_BYTES + 16);", "DEADLOCK"),
    "a stage is left while it is read": Bug(
        "if (k > 0) leave(last);", "leave(ring.empty());", f"{RACE}|more arrivals", sizes=MANY_STAGES
    ),
    "the last stage of a tile is never left": Bug("leave(last);\n}", "}", "DEADLOCK", sizes=(400, 264, 600)),
    "no fence before products": Bug("wgmma_fence();", "", r"wgmma\.fence"),
    "no proxy fence before a TMA store": Bug("fence_async_proxy();", "", r"fence\.proxy\.async"),
    "no barrier before a TMA store": Bug(
        "barrier_sync(1 + group, Tile::WARPGROUP);", "", f"{EARLY}|proxy", nth=1
    ),
    "no barrier before a buffer is written again": Bug("barrier_sync(1 + group, Tile::WARPGROUP);", "", RACE, bf16,
                                                       (130, 136, 100), 256),
    "no wait for a buffer on its way out": Bug(
        "if (thread == 0) bulk_wait_read<1>();", "", f"{RACE}|bulk", bf16, (130, 136, 100), 256
    ),
    "stores still under way at the end": Bug("if (thread == 0) bulk_wait<0>();", "", "bulk"),
    "both warpgroups store through the same buffers": Bug("(group * 2 + chunk % 2)", "(chunk % 2)", RACE),
    "undefined metadata beyond the weight": Bug(
        "return metadata == 0 ? pairs : metadata;", "return metadata;", "metadata 0x0 is not defined"
    ),
    "a store one row too far": Bug("if (row < M", "if (row <= M", r"out of bounds.* 4 bytes", float32=True),
    "other tiles are loaded than are multiplied": Bug("index += gridDim.x", "index += gridDim.x + 1", "DEADLOCK",
                                                      sizes=MANY_TILES),
    # Wrong numbers.
    "metadata of the other k step": Bug("at + pair * 8)", "at + (pair ^ 1) * 8)", None, sizes=(70, 136, 128)),
    "metadata of the other k step, 8 bits": Bug("at + step * 8)", "at + (step ^ 1) * 8)", None, int8, (70, 136, 256)),
    "metadata of the other half of 128 columns": Bug("k % 2 * 8", "8 - k % 2 * 8", None, block_m=256),
    "selector of the first step for both": Bug("SHARES - 1, true", "0, true", None),
    "metadata rows swapped": Bug("0x5410", "0x1054", None),
    "metadata halves of a row swapped": Bug("lane % 4 * 2 +", "(lane % 4 ^ 1) * 2 +", None),
    "metadata rows swapped, 8 bits": Bug("lane % 2 * 8)", "(1 - lane % 2) * 8)", None, int8, (70, 136, 208)),
    "metadata columns swapped, 8 bits": Bug("lane % 4 / 2 * 4", "(1 - lane % 4 / 2) * 4", None, int8, (70, 136, 208)),
    "values of the other warpgroup": Bug("group * Tile::GROUP_N * Tile::VALUE_ROW", "0", None),
    "swizzle of wider rows": Bug("NUM_BOXES == 1 ? k_major_tile_64(address) : ", "", None, block_m=256),
    "the second box of a never read": Bug("step / 2 * (Tile::BOX_BYTES / 16)", "0", None),
    "parts replace the sum": Bug("sums[i] += part[i]", "sums[i] = part[i]", None, fp8, (70, 136, 528)),
    "parts contain those before": Bug("multiply<Tile, false>", "multiply<Tile, true>", None, fp8, (70, 136, 528)),
    "results stored without the swizzle": Bug("(column_16 ^ row % 8)", "column_16", None),
    "rows of pairs swapped": Bug("x[i + j * 2], x[i + j * 2 + 1]", "x[i + j * 2 + 1], x[i + j * 2]", None),
    "the same sums in every chunk": Bug("sums[CHUNK * 16 + i]", "sums[i]", None),
    "tiles of a narrow group counted as of a wide one": Bug("in_group / width", "in_group / group_n", None,
                                                            sizes=(200, 136, 64)),
}  # fmt: skip


def instance(number, bug, body):
    """The kernel with a bug, in a namespace of its own."""
    space = f"planted_{number}"
    body = bug.plant(body).replace("namespace fusedops {", f"namespace {space} {{\nusing namespace fusedops;")
    for name in ("WgmmaTile", "sparse_matmul_wgmma"):
        body = re.sub(rf"fusedops::{name}\b", f"{space}::{name}", body)
    return body


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """PTX of the kernel with each bug, compiled in one go, and what each kernel is called."""
    _, _, body = (images.sources() / "sparse_matmul_wgmma.cuh").read_text().partition(GUARD)
    body = body[: body.rindex("#endif")]
    text, names = HEADERS + GUARD, {}
    for number, (title, bug) in enumerate(BUGS.items()):
        names[title], kind = f"planted_{number}", KINDS[bug.build]
        text += f"{instance(number, bug, body)}\nSPARSE_MATMUL_WGMMA({names[title]}, {kind}, {bug.block_m})\n"
        text += "#undef SPARSE_MATMUL_WGMMA\n"
    folder = tmp_path_factory.mktemp("planted")
    for header in images.sources().glob("*.cuh"):
        shutil.copy(header, folder)
    (folder / "planted.cu").write_text(text + "#endif\n")
    return toolchain.compile_source(folder / "planted.cu", "sm_90a.ptx").decode(), names


@pytest.mark.parametrize("title", BUGS)
def test_planted(title, planted, monkeypatch):
    text, names = planted
    bug = BUGS[title]
    case = bug.problem()
    monkeypatch.setitem(wgmma.NAMES, case.a.dtype, names[title])
    monkeypatch.setattr(cuda.Kernel, "ptx", lambda kernel: text)
    if bug.says is None:
        assert not torch.equal(case.run(bug.block_m, 2), case.truth().to(case.out_dtype))
    else:
        with pytest.raises(ptx.Fault, match=bug.says):
            case.run(bug.block_m, 2)


SOUND = {(bug.build, bug.sizes, bug.block_m, bug.float32): bug for bug in BUGS.values()}


@pytest.mark.parametrize("bug", SOUND.values(), ids=lambda bug: f"{bug.build.__name__}-{bug.sizes}-{bug.block_m}")
def test_without_a_bug(bug):
    case = bug.problem()
    assert torch.equal(case.run(bug.block_m, 2), case.truth().to(case.out_dtype))
