"""2:4 sparsity: mma.sp and wgmma.mma_async.sp, metadata as the PTX ISA draws it, against numpy."""

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
from tests.ptx.test_wgmma import launch, operands
from tests.ptx.wgmma_kernels import Form, Layout

PAIRS = [(0, 1), (0, 2), (1, 2), (0, 3), (1, 3), (2, 3)]  # what ordered metadata may choose of four


def compress(rng, shape, element):
    """A random choice of 2 units of 4: columns [rows, kept] that are kept, and the 4 bits of each group [rows, groups].

    A unit is an element; half of a .tf32, of which both halves go together; two elements of 4 bits.
    """
    rows, k = shape
    units = {32: 2 * k, 16: k, 8: k, 4: k // 2}[element.bits]
    pairs = np.array([(0, 1), (2, 3)] if element.bits == 32 else PAIRS)
    chosen = pairs[rng.integers(0, len(pairs), (rows, units // 4))]
    kept = 4 * np.arange(units // 4)[:, None] + chosen
    if element.bits == 32:
        kept = kept[..., :1] // 2
    elif element.bits == 4:
        kept = np.stack([2 * kept, 2 * kept + 1], -1)
    return kept.reshape(rows, -1), chosen[..., 0] | chosen[..., 1] << 2


def metadata_of(nibbles, element, selector, rng):
    """Registers [32] of the metadata of 16 rows; lanes that do not count hold other bits."""
    groups = nibbles.shape[1]
    lanes = rng.integers(0, 2**32, 32, np.uint32)
    written = np.zeros(32, bool)
    for row in range(16):
        for group in range(groups):
            quad = 4 * (row % 8)
            if element.bits >= 16 and groups == 4:  # one lane of a quad: row in the low half, row + 8 in the high one
                lane, bit = quad + selector, 16 * (row // 8) + 4 * group
            elif element.bits >= 16:  # two lanes, four groups each
                lane, bit = quad + 2 * selector + group // 4, 16 * (row // 8) + 4 * (group % 4)
            elif groups == 8:  # two lanes, a row each
                lane, bit = quad + 2 * selector + row // 8, 4 * group
            else:  # all four: rows, then halves of k
                lane, bit = quad + row // 8 + 2 * (group // 8), 4 * (group % 8)
            if not written[lane]:
                lanes[lane], written[lane] = 0, True
            lanes[lane] |= np.uint32(nibbles[row, group]) << np.uint32(bit)
    return lanes


def name_of(k, a, b, sums, extra, ordered):
    kind = "sp::ordered_metadata" if ordered else "sp"
    return f"mma.{kind}.sync.aligned.m16n8k{k}.row.col{extra}.{sums}.{a}.{b}.{sums}"


def cases():
    for ordered in (False, True):
        for kind, ks in (("f16", (16, 32)), ("bf16", (16, 32)), ("tf32", (8, 16))):
            for k, selectors in zip(ks, (4, 2)):
                for selector in range(selectors):
                    for sums in ("f32", "f16") if kind == "f16" else ("f32",):
                        yield k, kind, kind, sums, "", ordered, selector
        for a, b in (("e4m3", "e4m3"), ("e5m2", "e4m3")):
            for sums in ("f32", "f16"):
                yield 64, a, b, sums, "", ordered, 0
        for bits, ks in ((8, (32, 64)), (4, (64, 128))):
            for k, selectors in zip(ks, (2, 1)):
                for selector in range(selectors):
                    for a, b, extra in (("s", "s", ""), ("u", "s", ".satfinite"), ("s", "u", ""), ("u", "u", "")):
                        yield k, f"{a}{bits}", f"{b}{bits}", "s32", extra, ordered, selector


def sparse_kernel(instruction, selector, counts):
    kernel = Kernel()
    for name, count in zip("abce", (*counts, 1)):
        kernel.load(name, count)
    kernel.out("d", counts[2])
    used = ", ".join(registers(f"%{name}", count) for name, count in zip("dabc", (counts[2], *counts)))
    kernel.lines.append(f"{instruction} {used}, %e0, {selector};")
    kernel.store("d", counts[2])
    return kernel.text()


def dense(values, kept, k):
    """What compressed values are in full, zeros in between."""
    full = np.zeros((len(values), k), values.dtype)
    np.put_along_axis(full, kept, values, 1)
    return full


def sparse_product(a, kept, b):
    """Only the rows of b that are chosen count: a NaN in another one does not."""
    with np.errstate(all="ignore"):
        return np.einsum("mk,mkn->mn", a, b[kept])


@pytest.mark.parametrize("case", list(cases()), ids=lambda case: f"{name_of(*case[:-1])}-{case[-1]}")
def test_sparse(case):
    k, a_name, b_name, sums, extra, ordered, selector = case
    a_kind, b_kind = ELEMENTS[a_name], ELEMENTS[b_name]
    rng = np.random.default_rng(0)
    kinds = ["integers", "any", "special"]
    a = [a_kind.random(rng, (16, k // 2), kind) for kind in kinds]
    b = [b_kind.random(rng, (k, 8), kind) for kind in kinds]
    chosen = [compress(rng, (16, k), a_kind) for _ in kinds]
    c = rng.integers(-9, 10, (len(kinds), 16, 8)).astype(np.float64)
    words = [
        np.stack([a_fragments(x, a_kind.bits) for x in a]),
        np.stack([b_fragments(x, b_kind.bits) for x in b]),
        np.stack([sums_to_words(c_fragments(x), sums) for x in c]),
        np.stack([metadata_of(nibbles, a_kind, selector, rng) for _, nibbles in chosen]),
    ]
    text = sparse_kernel(name_of(*case[:-1]), selector, [x.shape[-1] for x in words[:3]])
    *_, d = run(text, len(kinds), 32, [*words, np.zeros_like(words[2])])
    for i in range(len(kinds)):
        product = sparse_product(a_kind.values(a[i]), chosen[i][0], b_kind.values(b[i]))
        if kinds[i] == "integers":
            np.testing.assert_array_equal(product, dense(a_kind.values(a[i]), chosen[i][0], k) @ b_kind.values(b[i]))
        want = expected(product, c[i], sums, extra == ".satfinite")
        assert_same_bits(c_matrix(words_to_sums(d[i], sums), 16), want)


@pytest.mark.parametrize("ordered, nibble, fails", [(True, 0b0001, True), (False, 0b0001, False), (False, 0b1010, True),
                                                   (True, 0b1111, True), (True, 0b1110, False)])  # fmt: skip
def test_metadata_that_is_not_defined_is_reported(ordered, nibble, fails):
    f16 = ELEMENTS["f16"]
    rng = np.random.default_rng(0)
    nibbles = np.full((16, 4), 0b0100)
    nibbles[3, 2] = nibble
    metadata = metadata_of(nibbles, f16, 1, rng)
    a, b = f16.random(rng, (16, 8)), f16.random(rng, (16, 8))
    c = np.zeros((32, 4), np.float32)
    text = sparse_kernel(name_of(16, "f16", "f16", "f32", "", ordered), 1, (2, 2, 4))
    arguments = [a_fragments(a, 16), b_fragments(b, 16), c, metadata, c.copy()]
    if fails:
        with pytest.raises(ptx.Fault, match=rf"row 3 of A, columns 8 to 11: metadata {hex(nibble)} is not defined"):
            run(text, 1, 32, arguments)
    else:
        run(text, 1, 32, arguments)


@pytest.mark.parametrize(
    "instruction, selector, counts",
    [
        (name_of(32, "f16", "f16", "f32", "", True), 2, (4, 4, 4)),
        (name_of(64, "s8", "s8", "s32", "", True), 1, (4, 4, 4)),
        (name_of(16, "tf32", "tf32", "f32", "", True), 2, (4, 4, 4)),
    ],
)
def test_selectors_that_do_not_exist_are_refused(instruction, selector, counts):
    with pytest.raises(ptx.Fault, match="this sparsity selector"):
        ptx.load(sparse_kernel(instruction, selector, counts))


def wgmma_forms():
    for a, b, sums in (
        ("f16", "f16", "f32"), ("f16", "f16", "f16"), ("bf16", "bf16", "f32"), ("tf32", "tf32", "f32"),
        ("e4m3", "e5m2", "f32"), ("e5m2", "e5m2", "f16"), ("s8", "u8", "s32"), ("u8", "u8", "s32"),
    ):  # fmt: skip
        for selector in range(2 if ELEMENTS[a].bits >= 16 else 1):
            for a_layout in (Layout("128B"), None):
                yield Form(32, a, b, sums, a_layout=a_layout, sparse=True, selector=selector)
        for b_layout in (Layout("none"), Layout("32B"), Layout("64B"), Layout("128B", step=2)):
            yield Form(32, a, b, sums, b_layout=b_layout, sparse=True)
    for swizzle in ("none", "32B", "64B", "128B"):
        mn = Layout(swizzle, mn_major=True)
        yield Form(64, "f16", "f16", "f32", a_layout=mn, sparse=True)
        yield Form(64, "bf16", "bf16", "f32", b_layout=mn, sparse=True, selector=1, a_sign=-1)
    for n in (8, 72, 256):
        yield Form(n, "bf16", "bf16", "f32", sparse=True)


@pytest.mark.parametrize("form", list(wgmma_forms()), ids=str)
def test_sparse_wgmma(form):
    rng = np.random.default_rng(form.n)
    a, b, c = operands(form, rng, "any")
    kind = ELEMENTS[form.a]
    kept, nibbles = compress(rng, (64, form.k), kind)
    warps = [metadata_of(nibbles[16 * w : 16 * w + 16], kind, form.selector, rng) for w in range(4)]
    d = launch(form, a, b, c, rng, metadata=np.concatenate(warps))
    product = sparse_product(kind.values(a) * form.a_sign, kept, ELEMENTS[form.b].values(b))
    assert_same_bits(d, expected(product, c, form.sums))
