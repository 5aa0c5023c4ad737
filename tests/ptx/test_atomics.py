"""Atomic operations of every type and space, against numpy and Python's own arithmetic."""

import numpy as np
import pytest
import torch

from fusedops.testing import ptx
from tests.ptx.inline import kernel, launch

REGISTER = {2: "%h", 4: "%r", 8: "%d"}
U32 = (1 << 32) - 1

INTEGERS = {
    "add": lambda a, b: a + b,
    "min": min,
    "max": max,
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "xor": lambda a, b: a ^ b,
    "exch": lambda a, b: b,
    "inc": lambda a, b: 0 if a >= b else a + 1,
    "dec": lambda a, b: b if a == 0 or a > b else a - 1,
}
CASES = [
    *[("add", name) for name in ("u32", "s32", "u64", "s64")],
    *[(op, name) for op in ("min", "max") for name in ("u32", "s32", "u64", "s64")],
    *[(op, name) for op in ("and", "or", "xor", "exch") for name in ("b32", "b64")],
    ("inc", "u32"), ("dec", "u32"),
]  # fmt: skip


def numbers(name, count, rng):
    bits = int(name[1:])
    kind = f"{'i' if name[0] == 's' else 'u'}{bits // 8}"
    values = np.frombuffer(rng.bytes(count * bits // 8), kind).copy()
    values[: count // 2] %= 5  # small ones too: inc and dec wrap
    return rng.permutation(values)


def body(instruction, size, space="global", returns=True, operands="V"):
    """Each lane's operand comes from b, its target is the element of x that `index` names, old values go to out."""
    register = REGISTER[size]
    target = f"{register}8, " if returns else ""
    keep = f"st.global.b{8 * size} [%d4], {register}8;" if returns else ""
    copy_in = copy_out = ""
    address = "[%d2]"
    if space != "global":
        copy_in = f"mov.u64 %d6, area; add.s64 %d2, %d6, %d3; ld.global.b{8 * size} {register}11, [%d5];"
        copy_in += f"add.s64 %d7, %d6, %d1; st.shared.b{8 * size} [%d7], {register}11;"
        copy_out = f"ld.shared.b{8 * size} {register}11, [%d7]; st.global.b{8 * size} [%d5], {register}11;"
        if space == "generic":
            copy_in += "cvta.shared.u64 %d2, %d2;"
    operands = operands.replace("V", f"{register}9").replace("W", f"{register}10")
    return kernel(
        f"""
        mul.wide.u32 %d1, %t, {size}; mul.wide.u32 %d0, %t, 4; add.s64 %d0, %index, %d0; ld.global.b32 %r0, [%d0];
        mul.wide.u32 %d3, %r0, {size}; add.s64 %d2, %x, %d3; add.s64 %d5, %x, %d1; add.s64 %d4, %out, %d1;
        add.s64 %d0, %b, %d1; ld.global.b{8 * size} {register}9, [%d0];
        add.s64 %d0, %c, %d1; ld.global.b{8 * size} {register}10, [%d0];
        {copy_in} {instruction} {target}{address}, {operands}; {keep} {copy_out}
        """,
        "x index b c out",
        declarations=f".shared .align 16 .b8 area[{32 * size}];",
    )


def run(text, x, index, b, c=None, schedule="default"):
    x, out = x.copy(), np.zeros_like(b)
    launch(text, [x, index.astype(np.int32), b, b if c is None else c, out], schedule=schedule)
    return x, out


def in_order(f, x, index, *operands):
    """The lanes one after another, as Python integers."""
    x, old = x.copy(), []
    for lane, at in enumerate(index):
        old.append(x[at])
        wide = f(int(x[at]), *(int(one[lane]) for one in operands))
        x[at] = np.array(wide & ((1 << 8 * x.itemsize) - 1), f"u{x.itemsize}").view(x.dtype)
    return x, np.array(old, x.dtype)


@pytest.mark.parametrize("space", ["global", "shared", "generic"])
@pytest.mark.parametrize("op,name", CASES)
def test_integers(op, name, space):
    rng = np.random.default_rng(1)
    size = int(name[1:]) // 8
    x, b, index = numbers(name, 32, rng), numbers(name, 32, rng), rng.integers(0, 5, 32)
    where = "" if space == "generic" else f".{space}"
    made = run(body(f"atom{where}.{op}.{name}", size, space), x, index, b)
    for got, expected in zip(made, in_order(INTEGERS[op], x, index, b)):
        np.testing.assert_array_equal(got, expected)
    reduced, _ = run(body(f"red.relaxed.gpu{where}.{op}.{name}", size, space, returns=False), x, index, b)
    if op != "exch":
        np.testing.assert_array_equal(reduced, made[0])


@pytest.mark.parametrize("name", ["b16", "b32", "b64"])
def test_compare_and_swap(name):
    rng = np.random.default_rng(2)
    size = int(name[1:]) // 8
    x, b, c = (rng.integers(0, 3, 32).astype(f"u{size}") for _ in range(3))
    index = rng.integers(0, 8, 32)
    made = run(body(f"atom.acq_rel.cta.global.cas.{name}", size, operands="V, W"), x, index, b, c)
    for got, expected in zip(made, in_order(lambda a, b, c: c if a == b else a, x, index, b, c)):
        np.testing.assert_array_equal(got, expected)


def test_128_bits():
    text = kernel(
        "ld.global.b128 %q1, [%b]; ld.global.b128 %q2, [%b+16];\n"
        "atom.global.exch.b128 %q0, [%x], %q1; st.global.b128 [%out], %q0;\n"
        "atom.global.cas.b128 %q0, [%x], %q1, %q2; st.global.b128 [%out+16], %q0;\n"
        "atom.global.cas.b128 %q0, [%x], %q1, %q1; st.global.b128 [%out+32], %q0;",
        "x b out",
    )
    x, b, out = (torch.arange(first, first + 2 * n) for first, n in ((1, 1), (10, 2), (0, 3)))
    launch(text, [x, b, out], block=(1,))
    assert out.tolist() == [1, 2, 10, 11, 12, 13] and x.tolist() == [12, 13]


HALVES = {"f16": torch.float16, "bf16": torch.bfloat16}
SPECIAL = [0.0, -0.0, 1.0, -1.0, float("inf"), float("-inf"), float("nan"), 6e-8, -6e-8, 65504.0, 1 / 3]


def pairs(dtype):
    special = torch.tensor([(a, b) for a in SPECIAL for b in SPECIAL]).to(dtype)
    generator = torch.Generator().manual_seed(3)
    random = torch.randint(-(1 << 15), 1 << 15, (512, 2), generator=generator, dtype=torch.int16).view(dtype)
    both = torch.cat([special, random])[: (len(special) + 512) // 32 * 32]
    return both[:, 0].contiguous(), both[:, 1].contiguous()


def expected_half(op, a, b):
    if op == "add":
        made = (a.double() + b.double()).to(a.dtype)
    else:
        low = op == "min"
        made = torch.where(a.isnan(), b, torch.where(b.isnan(), a, torch.minimum(a, b) if low else torch.maximum(a, b)))
        zeros = (a == 0) & (b == 0)
        sign = (a.signbit() | b.signbit()) if low else (a.signbit() & b.signbit())
        made = torch.where(zeros, torch.where(sign, -0.0, 0.0).to(a.dtype), made)
    bits = made.view(torch.int16)
    return torch.where(made.isnan(), torch.tensor(0x7FFF, dtype=torch.int16), bits)


@pytest.mark.parametrize(
    "form", ["f16", "bf16", "f16x2", "bf16x2", "v2.f16", "v4.bf16", "v8.f16", "v2.bf16x2", "v4.f16x2"]
)
@pytest.mark.parametrize("op", ["add", "min", "max"])
def test_halves(op, form):
    name = form.split(".")[-1]
    a, b = pairs(HALVES[name.removesuffix("x2")])
    size = 4 if name.endswith("x2") else 2
    count = int(form[1]) if form[0] == "v" else 1
    whole = size * count
    register = REGISTER[size]
    group = lambda first: "{" + ", ".join(f"{register}{first + i}" for i in range(count)) + "}"  # noqa: E731
    moved = "\n".join(f"ld.global.b{8 * size} {register}{20 + i}, [%d1+{i * size}];" for i in range(count))
    kept = "\n".join(f"st.global.b{8 * size} [%d2+{i * size}], {register}{8 + i};" for i in range(count))
    one = lambda first: group(first) if count > 1 else f"{register}{first}"  # noqa: E731
    suffix = f"{op}.noftz.{form}"
    text = kernel(
        f"mul.wide.u32 %d0, %t, {whole}; add.s64 %d3, %x, %d0; add.s64 %d1, %b, %d0; add.s64 %d2, %out, %d0;\n{moved}\n"
        f"atom.global.{suffix} {one(8)}, [%d3], {one(20)};\n{kept}",
        "x b out",
    )
    threads = len(a) * 2 // whole // 32 * 32
    x, old = a.clone(), torch.zeros_like(a)
    launch(text, [x, b, old], block=(threads,))
    used = threads * whole // 2
    torch.testing.assert_close(x.view(torch.int16)[:used], expected_half(op, a, b)[:used], rtol=0, atol=0)
    assert torch.equal(old.view(torch.int16)[:used], a.view(torch.int16)[:used])


@pytest.mark.parametrize("space", ["global", "shared", "generic"])
def test_f32_is_flushed_in_global_memory_only(space):
    x = np.array([1e-40, 1.5, -1e-40, 2e-38, np.nan, 3.0] + [1.0] * 26, np.float32)
    b = np.array([1e-40, 2.25, -1e-40, -1.5e-38, 1.0, -3.0] + [0.5] * 26, np.float32)
    where = "" if space == "generic" else f".{space}"
    got, old = run(body(f"atom{where}.add.f32", 4, space), x, np.arange(32), b)
    expected = x + b
    if space == "global":
        flush = lambda v: np.where(np.abs(v) < 2.0**-126, np.copysign(np.float32(0), v), v)  # noqa: E731
        expected = flush(flush(x) + flush(b))
    expected.view(np.uint32)[4] = 0x7FFFFFFF
    np.testing.assert_array_equal(got.view(np.uint32), expected.astype(np.float32).view(np.uint32))
    np.testing.assert_array_equal(old.view(np.uint32), x.view(np.uint32))


@pytest.mark.parametrize("vector", ["", ".v2", ".v4"])
def test_floats_are_added(vector):
    count = int(vector[2:] or 1)
    group = ", ".join(f"%r{8 + i}" for i in range(count))
    group = f"{{{group}}}" if vector else group
    loads = "".join(f"ld.global.b32 %r{8 + i}, [%d1+{4 * i}];" for i in range(count))
    text = kernel(
        f"mul.wide.u32 %d0, %t, {4 * count}; add.s64 %d1, %x, %d0; {loads}\nred.global.add{vector}.f32 [%out], {group};"
    )
    x = np.random.default_rng(0).integers(-99, 99, (64, count)).astype(np.float32)
    out = np.zeros(4, np.float32)
    launch(text, [x, out], block=(64,))
    np.testing.assert_array_equal(out[:count], x.sum(0))


def test_f64_is_added():
    x, b = np.random.default_rng(0).standard_normal((2, 32))
    got, _ = run(body("atom.shared.add.f64", 8, "shared"), x, np.arange(32), b)
    np.testing.assert_array_equal(got, x + b)


def test_lanes_take_turns_in_any_order_under_random_schedules():
    text = body("atom.global.add.u32", 4)
    x, index, b = np.zeros(32, np.uint32), np.zeros(32), np.ones(32, np.uint32)
    np.testing.assert_array_equal(run(text, x, index, b)[1], np.arange(32))
    _, old = run(text, x, index, b, schedule="random_0")
    assert sorted(old) == list(range(32)) and list(old) != list(range(32))


@pytest.mark.parametrize(
    "instruction",
    ["atom.global.add.b32 %r8, [%x], %r9;", "atom.global.inc.s32 %r8, [%x], %r9;", "red.global.and.u32 [%x], %r9;",
     "atom.global.add.v2.u32 {%r8, %r7}, [%x], {%r9, %r9};", "atom.global.add.v4.f32 %r8, [%x], {%r9, %r9};"],
)  # fmt: skip
def test_refused(instruction):
    with pytest.raises(ptx.Fault, match="not supported"):
        ptx.load(kernel(instruction))
