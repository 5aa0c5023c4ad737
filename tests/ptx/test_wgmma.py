"""wgmma: every shape, type and layout of operands against numpy, in every schedule."""

from dataclasses import replace

import numpy as np
import pytest

from fusedops.testing import ptx
from tests.ptx.matrix_kernels import (
    ELEMENTS,
    assert_same_bits,
    c_fragments,
    c_matrix,
    expected,
    sums_to_words,
    words_to_sums,
)
from tests.ptx.wgmma_kernels import Form, Layout, fragments_of_a, image_of, kernel


def multiply(a, b):
    with np.errstate(all="ignore"):
        return a @ b


def accumulators(form, rng):
    if form.sums == "s32":
        return rng.choice([2**31 - 1, -(2**31), 5, 2**31 - 9000, -(2**31) + 9000], (64, form.n))
    c = rng.standard_normal((64, form.n)).astype(np.float16 if form.sums == "f16" else np.float32)
    return c.astype(np.float64)


def fragments_of_sums(c, sums):
    return np.concatenate([sums_to_words(c_fragments(c[16 * w : 16 * w + 16]), sums) for w in range(4)])


def sums_of_fragments(d, sums):
    return np.concatenate([c_matrix(words_to_sums(d[32 * w : 32 * w + 32], sums), 16) for w in range(4)])


def operands(form, rng, kind="any"):
    a = ELEMENTS[form.a].random(rng, (64, form.kept), kind)
    b = ELEMENTS[form.b].random(rng, (form.k, form.n), kind)
    return a, b, accumulators(form, rng)


def launch(form, a, b, c, rng, metadata=None, body=None, **options):
    image, descriptors = image_of(form, a, b, rng)
    registers = fragments_of_a(a, ELEMENTS[form.a].bits)
    metadata = rng.integers(0, 2**32, (128, 1), np.uint32) if metadata is None else metadata
    d = fragments_of_sums(c, form.sums)
    text = kernel(form, len(image), body)
    # The tile is the kernel's only shared memory, so it starts at 0.
    ptx.load(text).launch("k", (1,), (128,), [image, *descriptors, d, registers, metadata], **options)
    return sums_of_fragments(d, form.sums)


def check(form, kind="any", **options):
    rng = np.random.default_rng(form.n)
    a, b, c = operands(form, rng, kind)
    d = launch(form, a, b, c, rng, **options)
    product = multiply(ELEMENTS[form.a].values(a) * form.a_sign, ELEMENTS[form.b].values(b) * form.b_sign)
    want = expected(product, c if form.accumulate else np.zeros_like(c), form.sums, form.extra == ".satfinite")
    assert_same_bits(d, want)


TYPES = [
    ("f16", "f16", "f32"), ("f16", "f16", "f16"), ("bf16", "bf16", "f32"), ("tf32", "tf32", "f32"),
    *[(a, b, sums) for a in ("e4m3", "e5m2") for b in ("e4m3", "e5m2") for sums in ("f32", "f16")],
    *[(a, b, "s32") for a in ("s8", "u8") for b in ("s8", "u8")],
]  # fmt: skip
SWIZZLES = ("none", "32B", "64B", "128B")


@pytest.mark.parametrize("n", range(8, 257, 8))
@pytest.mark.parametrize("types", [("bf16", "bf16", "f32"), ("f16", "f16", "f16"), ("e4m3", "e5m2", "f32")])
def test_every_n(n, types):
    check(Form(n, *types))


@pytest.mark.parametrize("n", [8, 16, 24, *range(32, 257, 16)])
def test_every_n_of_integers(n):
    check(Form(n, "s8", "u8", "s32"))


@pytest.mark.parametrize("n", [12, 40, 264])
def test_other_n_are_refused(n):
    with pytest.raises(ptx.Fault, match="this shape"):
        ptx.load(kernel(Form(n, "s8", "u8", "s32"), 2048))


def typed_forms():
    for a, b, sums in TYPES:
        form = Form(24, a, b, sums)
        yield form
        yield replace(form, a_layout=None, accumulate=False)
        if sums == "s32":
            yield replace(form, extra=".satfinite")
        else:
            yield replace(form, a_sign=-1)
            yield replace(form, a_sign=-1, b_sign=-1, accumulate=False)
            yield replace(form, a_layout=None, b_sign=-1)


@pytest.mark.parametrize("form", list(typed_forms()), ids=str)
def test_every_type(form):
    check(form)


@pytest.mark.parametrize("types", [types for types in TYPES if types[2] != "s32"], ids="-".join)
def test_special_values(types):
    check(Form(32, *types), "special")


def layouts(bits):
    for swizzle in SWIZZLES:
        yield Layout(swizzle)
        if bits == 16:
            yield Layout(swizzle, mn_major=True)
    for swizzle, steps in (("64B", 2), ("128B", 4)):
        for step in range(1, steps):
            yield Layout(swizzle, step=step)
    for swizzle in SWIZZLES[1:]:
        yield Layout(swizzle, shift=1)
        if bits == 16:
            yield Layout(swizzle, mn_major=True, shift=5)
    yield Layout("128B", step=2, shift=3)


def forms_of_layouts():
    for kind in ("f16", "tf32", "s8"):
        form = Form(64, kind, kind, "s32" if kind == "s8" else "f32")
        for layout in layouts(ELEMENTS[kind].bits):
            yield replace(form, a_layout=layout)
            yield replace(form, b_layout=layout)
            yield replace(form, a_layout=layout, b_layout=layout)


@pytest.mark.parametrize("form", list(forms_of_layouts()), ids=str)
def test_every_layout(form):
    check(form)


def test_bits():
    form = Form(32, "b1", "b1", "s32", extra=".and.popc")
    check(form)
    check(replace(form, a_layout=None))


@pytest.mark.parametrize("schedule", ptx.SCHEDULES)
def test_chains_groups_and_two_sets_of_accumulators(schedule):
    form = Form(16, "bf16", "bf16", "f32")
    second = replace(form, a_sign=-1)
    body = [
        ".reg .b32 %f<8>;",
        *[f"mov.b32 %f{i}, %d{i};" for i in range(8)],
        "wgmma.fence.sync.aligned;",
        form.statement(),
        form.statement(),
        "wgmma.commit_group.sync.aligned;",
        second.statement(d="%f"),
        "wgmma.commit_group.sync.aligned;",
        form.statement(),
        "wgmma.commit_group.sync.aligned;",
        "wgmma.wait_group.sync.aligned 1;",  # the second set is there, the first goes on
        *[f"add.f32 %f{i}, %f{i}, %f{i};" for i in range(8)],
        "wgmma.wait_group.sync.aligned 0;",
        *[f"sub.f32 %d{i}, %d{i}, %f{i};" for i in range(8)],
    ]
    rng = np.random.default_rng(2)
    a, b, c = operands(form, rng, "integers")
    d = launch(form, a, b, np.rint(c), rng, body=body, schedule=schedule)
    product = multiply(ELEMENTS["bf16"].values(a), ELEMENTS["bf16"].values(b))
    np.testing.assert_array_equal(d, np.rint(c) + 3 * product - 2 * (np.rint(c) - product))


OVERWRITE = "setp.eq.u32 %more, %local, 0;\n@%more st.shared.b32 [%local], %w0;"  # by one thread
PLANTED = {
    "operand overwritten before wait_group": (
        ["FENCE", "MMA", "wgmma.commit_group.sync.aligned;", OVERWRITE,
         "wgmma.wait_group.sync.aligned 0;"],
        r"data race on shared memory[\s\S]*wgmma",
    ),
    "operand overwritten after another group was waited for": (
        ["FENCE", "MMA", "wgmma.commit_group.sync.aligned;", "MMA", "wgmma.commit_group.sync.aligned;",
         "wgmma.wait_group.sync.aligned 1;", OVERWRITE, "wgmma.wait_group.sync.aligned 0;"],
        r"data race on shared memory[\s\S]*wgmma",
    ),
    "accumulator written": (
        ["FENCE", "MMA", "mov.b32 %d3, 0;", "WAIT"],
        r"accumulator register %d3 was written before wgmma\.wait_group: the wgmma\.mma_async in PTX line \d+",
    ),
    "register of A written": (
        ["FENCE", "MMA", "add.u32 %a2, %a2, 1;", "WAIT"],
        r"register %a2 of operand A was written before wgmma\.wait_group",
    ),
    "no fence": (["MMA", "WAIT"], "needs a wgmma.fence"),
    "no fence after accumulators were written": (
        ["FENCE", "MMA", "WAIT", "mov.b32 %d3, 0;", "MMA", "WAIT"], r"no wgmma\.fence\.sync\.aligned followed",
    ),
    "no wait": (
        ["FENCE", "MMA", "wgmma.commit_group.sync.aligned;"],
        r"ended without wgmma\.wait_group for 1 of its wgmma\.mma_async;",
    ),
    "no commit": (["FENCE", "MMA", "wgmma.wait_group.sync.aligned 0;"], r"1 of its wgmma\.mma_async \(not committed\)"),
    "one warp stays away": (
        ["FENCE", "setp.ne.u32 %more, %w0, 2;", "@%more MMA", "WAIT"],
        r"warp 2 ended without the wgmma\.mma_async|for warp 2 to execute the wgmma\.mma_async",
    ),
    "descriptors that differ": (
        ["FENCE", "cvt.u64.u32 %from, %w0;", "add.u64 %desc1, %desc1, %from;", "MMA", "WAIT"],
        "the descriptor of B differs",
    ),
    "descriptors that differ in a warp": (
        ["FENCE", "cvt.u64.u32 %from, %local;", "add.u64 %desc1, %desc1, %from;", "MMA", "WAIT"],
        "the descriptor of B differs between lanes 0 and 1",
    ),
    "half a warp": (["FENCE", "setp.lt.u32 %more, %w1, 16;", "@%more MMA", "WAIT"], "divergence"),
    "accumulators that overlap": (
        ["FENCE", "MMA", "SHIFTED", "WAIT"], r"register %d\d is used by another wgmma\.mma_async",
    ),
}  # fmt: skip


@pytest.mark.parametrize("schedule", ptx.SCHEDULES)
@pytest.mark.parametrize("bug", PLANTED)
def test_planted_bugs(bug, schedule):
    lines, message = PLANTED[bug]
    form = Form(16, "bf16", "bf16", "f32", a_layout=None if bug == "register of A written" else Layout("128B"))
    shifted = form.statement().replace("{%d0, %d1,", "{%d1, %d0,")
    short = {
        "FENCE": "wgmma.fence.sync.aligned;", "MMA": form.statement(), "SHIFTED": shifted,
        "WAIT": "wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 0;",
    }  # fmt: skip
    body = ["mov.u32 %local, %tid.x;", "shr.u32 %w0, %local, 5;", "and.b32 %w1, %local, 31;"]
    for line in lines:
        body.append(line.replace("MMA", short["MMA"]) if line.startswith("@") else short.get(line, line))
    rng = np.random.default_rng(3)
    with pytest.raises(ptx.Fault, match=message):
        launch(form, *operands(form, rng), rng, body=body, schedule=schedule)


@pytest.mark.parametrize("schedule", ptx.SCHEDULES)
def test_a_may_share_a_register_with_the_accumulators(schedule):
    """LLVM does so where both hold the same value; what A was when the product was issued counts."""
    form = Form(16, "bf16", "bf16", "f32", a_layout=None)
    rest = ["wgmma.commit_group.sync.aligned;", "wgmma.wait_group.sync.aligned 0;"]
    results = []
    for statement in (form.statement(), form.statement().replace("%a3", "%d0")):
        rng = np.random.default_rng(6)
        body = ["mov.b32 %a3, %d0;", "wgmma.fence.sync.aligned;", statement, *rest]
        results.append(launch(form, *operands(form, rng), rng, body=body, schedule=schedule))
    assert statement != form.statement()
    assert_same_bits(*results)


def test_operands_out_of_bounds_are_named():
    form = Form(64, "bf16", "bf16", "f32")
    rng = np.random.default_rng(4)
    body = ["add.u64 %desc1, %desc1, 1024;", "wgmma.fence.sync.aligned;", form.statement(),
            "wgmma.commit_group.sync.aligned;", "wgmma.wait_group.sync.aligned 0;"]  # fmt: skip
    with pytest.raises(ptx.Fault, match=r"out of bounds[\s\S]*operand B of the wgmma\.mma_async in PTX line \d+"):
        launch(form, *operands(form, rng), rng, body=body)


def test_a_proxy_fence_is_needed_after_stores():
    form = Form(16, "bf16", "bf16", "f32")
    rng = np.random.default_rng(5)
    a, b, c = operands(form, rng)
    image, descriptors = image_of(form, a, b, rng)
    text = kernel(form, len(image)).replace("fence.proxy.async;", "")
    registers, metadata = fragments_of_a(a, 16), np.zeros((128, 1), np.uint32)
    with pytest.raises(ptx.Fault, match=r"fence\.proxy\.async"):
        arguments = [image, *descriptors, fragments_of_sums(c, "f32"), registers, metadata]
        ptx.load(text).launch("k", (1,), (128,), arguments)


@pytest.mark.parametrize("schedule", ptx.SCHEDULES)
@pytest.mark.parametrize("place, races", [("row 16 of A", False), ("row 0 of A", True), ("row 0 of B", True)])
def test_a_warp_may_write_its_own_rows_of_a_without_a_barrier(place, races, schedule):
    form = Form(16, "bf16", "bf16", "f32")
    rng = np.random.default_rng(6)
    a, b, c = operands(form, rng)
    _, (_, of_b) = image_of(form, a, b, rng)
    address = {"row 16 of A": 16 * 128, "row 0 of A": 0, "row 0 of B": (of_b & 0x3FFF) << 4}[place]
    body = [
        "mov.u32 %local, %tid.x;", "setp.eq.u32 %more, %local, 32;",  # a thread of warp 1
        f"mov.u32 %local, {address};", "@%more st.shared.b32 [%local], %w0;", "fence.proxy.async;",
        "wgmma.fence.sync.aligned;", form.statement(), "wgmma.commit_group.sync.aligned;",
        "wgmma.wait_group.sync.aligned 0;",
    ]  # fmt: skip
    if races:
        with pytest.raises(ptx.Fault, match=r"data race on shared memory[\s\S]*warp 1[\s\S]*wgmma"):
            launch(form, a, b, c, rng, body=body, schedule=schedule)
    else:
        launch(form, a, b, c, rng, body=body, schedule=schedule)
