"""mma.sync: every shape and type against numpy, fragments as the PTX ISA lays them out."""

from fractions import Fraction

import numpy as np
import pytest

from fusedops.testing import ptx
from tests.ptx.matrix_kernels import (
    ELEMENTS,
    Kernel,
    a_fragments,
    assert_same_bits,
    b_fragments,
    c_fragments,
    c_matrix,
    expected,
    registers,
    run,
    sums_to_words,
    words_to_sums,
)


def shapes():
    for kind in ("f16", "bf16", "tf32"):
        for k in {"tf32": (4, 8)}.get(kind, (8, 16)):
            for sums in ("f32", "f16") if kind == "f16" else ("f32",):
                yield 16, k, kind, kind, sums, ""
    for a in ("e4m3", "e5m2"):
        for b in ("e4m3", "e5m2"):
            for k in (16, 32):
                for sums in ("f32", "f16"):
                    yield 16, k, a, b, sums, ""
    for bits, ks in ((8, (16, 32)), (4, (32, 64))):
        for a in (f"s{bits}", f"u{bits}"):
            for b in (f"s{bits}", f"u{bits}"):
                for saturate in ("", ".satfinite"):
                    yield 8, ks[0], a, b, "s32", saturate
                    for k in ks:
                        yield 16, k, a, b, "s32", saturate
    for operation in (".xor.popc", ".and.popc"):
        for m, k in ((8, 128), (16, 128), (16, 256)):
            yield m, k, "b1", "b1", "s32", operation


def name_of(m, k, a, b, sums, extra):
    before, after = (extra, "") if extra == ".satfinite" else ("", extra)
    return f"mma.sync.aligned.m{m}n8k{k}.row.col{before}.{sums}.{a}.{b}.{sums}{after}"


CASES = list(shapes())


def multiply(a, b, operation):
    if operation == ".xor.popc":
        return (a[:, :, None] ^ b[None]).sum(1)
    with np.errstate(all="ignore"):
        return a @ b


def mma_kernel(instruction, count_d, count_a, count_b, bits=32):
    kernel = Kernel()
    for name, count in (("a", count_a), ("b", count_b), ("c", count_d)):
        kernel.load(name, count, bits)
    kernel.out("d", count_d, bits)
    kernel.lines.append(
        f"{instruction} {registers('%d', count_d)}, {registers('%a', count_a)}, {registers('%b', count_b)}, "
        f"{registers('%c', count_d)};"
    )
    kernel.store("d", count_d, bits)
    return kernel.text()


@pytest.mark.parametrize("case", CASES, ids=lambda case: name_of(*case))
def test_dense(case):
    m, k, a_name, b_name, sums, extra = case
    a_kind, b_kind = ELEMENTS[a_name], ELEMENTS[b_name]
    rng = np.random.default_rng(0)
    kinds = ["integers", "any", "any", "special"]
    a = [a_kind.random(rng, (m, k), kind) for kind in kinds]
    b = [b_kind.random(rng, (k, 8), kind) for kind in kinds]
    c = rng.integers(-9, 10, (len(kinds), m, 8)).astype(np.float64)
    if sums == "s32":
        c[1] = rng.choice([2**31 - 1, -(2**31), 2**31 - 700, -(2**31) + 700], (m, 8))
    else:
        c[1:] += rng.standard_normal(c[1:].shape)
        c[1:] = c[1:].astype(np.float16 if sums == "f16" else np.float32)
    a_words = np.stack([a_fragments(x, a_kind.bits) for x in a])
    b_words = np.stack([b_fragments(x, b_kind.bits) for x in b])
    c_words = np.stack([sums_to_words(c_fragments(x), sums) for x in c])
    text = mma_kernel(name_of(*case), c_words.shape[-1], a_words.shape[-1], b_words.shape[-1])
    *_, d = run(text, len(kinds), 32, [a_words, b_words, c_words, np.zeros_like(c_words)])
    for i in range(len(kinds)):
        product = multiply(a_kind.values(a[i]), b_kind.values(b[i]), extra)
        want = expected(product, c[i], sums, extra == ".satfinite")
        assert_same_bits(c_matrix(words_to_sums(d[i], sums), m), want)


@pytest.mark.parametrize("m, k", [(8, 4), (16, 4), (16, 8), (16, 16)])
def test_double(m, k):
    rng = np.random.default_rng(1)
    a, b, c = rng.standard_normal((m, k)), rng.standard_normal((k, 8)), rng.standard_normal((m, 8))
    fragments = [a_fragments(a.view(np.uint64), 64), b_fragments(b.view(np.uint64), 64), c_fragments(c)]
    text = mma_kernel(
        f"mma.sync.aligned.m{m}n8k{k}.row.col.f64.f64.f64.f64", fragments[2].shape[1], fragments[0].shape[1],
        fragments[1].shape[1], 64,
    )  # fmt: skip
    *_, d = run(text, 1, 32, [*fragments, np.zeros_like(fragments[2])])
    want = c.copy()
    for step in range(k):  # each fma rounds once
        for i, j in np.ndindex(m, 8):
            want[i, j] = float(Fraction(a[i, step]) * Fraction(b[step, j]) + Fraction(want[i, j]))
    assert_same_bits(c_matrix(d, m), want)


def test_products_of_one_instruction_are_rounded_once():
    a, b = np.zeros((16, 16)), np.zeros((16, 8))
    a[0, :3] = [1, 2.0**-12, -1]
    b[:3, 0] = [1, 2.0**-12, 1]
    f16 = ELEMENTS["f16"]
    arguments = [a_fragments(f16.codes(a), 16), b_fragments(f16.codes(b), 16), np.zeros((32, 4), np.float32)]
    text = mma_kernel("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32", 4, 4, 2)
    *_, d = run(text, 1, 32, [*arguments, np.zeros((32, 4), np.float32)])
    assert d[0, 0] == 2.0**-24


@pytest.mark.parametrize(
    "instruction, counts, message",
    [
        ("mma.sync.aligned.m16n8k32.row.col.f32.f16.f16.f32", (4, 8, 4), "this shape"),
        ("mma.sync.aligned.m16n16k16.row.col.f32.f16.f16.f32", (4, 4, 2), "m16n16k16"),
        ("mma.sync.aligned.m8n8k4.row.col.f32.f16.f16.f32", (8, 2, 2), "this shape"),
        ("mma.sync.aligned.m16n8k16.row.col.f16.bf16.bf16.f16", (2, 4, 2), "f16 sums of these types"),
        ("mma.sync.aligned.m16n8k16.row.col.f32.f16.bf16.f32", (4, 4, 2), "these types together"),
        ("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f16", (4, 4, 2), "sums of another type than the result"),
        ("mma.sync.aligned.m16n8k16.row.col.satfinite.f32.f16.f16.f32", (4, 4, 2), "satfinite"),
        ("mma.sync.aligned.m16n8k16.row.row.f32.f16.f16.f32", (4, 4, 2), "not supported"),
        ("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32", (4, 2, 2), "a must have 4 registers, got 2"),
        ("mma.sync.aligned.m16n8k32.row.col.kind::f8f6f4.f32.e4m3.e4m3.f32", (4, 4, 2), "kind::f8f6f4"),
        ("mma.sync.aligned.m16n8k32.row.col.f32.e2m1.e2m1.f32", (4, 4, 2), r"\.e2m1"),
    ],
)
def test_what_does_not_exist_is_refused(instruction, counts, message):
    with pytest.raises(ptx.Fault, match=message):
        ptx.load(mma_kernel(instruction, *counts))
