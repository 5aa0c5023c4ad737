"""Conversions between every two types, against exact fractions and torch."""

import functools
import math
from fractions import Fraction

import numpy as np
import torch

from tests.ptx.conformance import FORMATS, Case, check, numbers, parametrize, rounded, specials, values

INTEGERS = ("u8", "s8", "u16", "s16", "u32", "s32", "u64", "s64")
FLOATS = ("f16", "bf16", "f32", "f64")
INTO_WHOLE = {"rni": round, "rzi": math.trunc, "rmi": math.floor, "rpi": math.ceil}
NAN = float("nan")


def width(kind):
    return int(kind.lstrip("usbf"))


def limits(kind):
    return (-(1 << (width(kind) - 1)), (1 << (width(kind) - 1)) - 1) if kind[0] == "s" else (0, (1 << width(kind)) - 1)


def integer_array(results, kind):
    """Python integers, cut off, in a register of at least 16 bits."""
    low = limits(kind)[0]
    cut = [(int(x) - low) % (1 << width(kind)) + low for x in results]
    return np.array(cut, dtype=f"{'int' if low else 'uint'}{max(width(kind), 16)}")


def flushed(a, kind):
    if kind != "f32" or not isinstance(a, Fraction):
        return a
    return a if abs(a) >= Fraction(1, 2**126) else 0.0 if a >= 0 else -0.0


def to_one(a):
    if a != a:
        return Fraction(0)
    return a if 0 < a < 1 else Fraction(1) if a >= 1 else Fraction(0)


def positive(a):
    return a if a != a or a > 0 else Fraction(0)


def same(got, expected):
    return (got.view("uint64") == expected.view("uint64")) | ((got != got) & (expected != expected))


def between_integers(to, source, sat):
    def expected(a):
        low, high = limits(to)
        return integer_array([min(max(x, low), high) if sat else x for x in a.tolist()], to)

    return Case(f"cvt{'.sat' * sat}.{to}.{source} %d, %a", to, (source,), expected)


def from_integer(to, source, mode):
    return Case(
        f"cvt.{mode}.{to}.{source} %d, %a", to, (source,), lambda a: rounded(map(Fraction, a.tolist()), to, mode)
    )


def to_integer(to, source, mode, ftz=""):
    def one(a):
        a = flushed(a, source) if ftz else a
        if a != a:  # PTX ISA: 0, or the first bit alone where either side has 64 bits
            return 1 << (width(to) - 1) if source == "f64" or width(to) == 64 else 0
        if abs(a) == float("inf"):
            return limits(to)[a > 0]
        return min(max(INTO_WHOLE[mode](a), limits(to)[0]), limits(to)[1])

    def expected(a):
        return integer_array([one(x) for x in numbers(a, source)], to)

    return Case(f"cvt.{mode}{ftz}.{to}.{source} %d, %a", to, (source,), expected, lambda: near_limits(to, source))


@functools.cache
def near_limits(to, source):
    """Values of a float type, half of them of the size of an integer type."""
    (array,) = values(source)
    draw = np.random.default_rng(5)
    sized = draw.uniform(-2, 2, 256) * 2.0 ** draw.integers(0, width(to) + 1, 256)
    array[256:] = rounded(np.round(sized * 4) / 4, source)
    return (array,)


def between_floats(to, source, modifiers):
    mode = next((m for m in modifiers.split(".") if m in ("rn", "rz", "rm", "rp", "rna", *INTO_WHOLE)), "rn")

    def one(a):
        a = flushed(a, source) if "ftz" in modifiers else a
        if mode in INTO_WHOLE and isinstance(a, Fraction):
            a = Fraction(INTO_WHOLE[mode](a)) or (a and math.copysign(0.0, a))
        return (
            to_one(a)
            if ".sat" in f"{modifiers}." and "satfinite" not in modifiers
            else positive(a)
            if "relu" in modifiers
            else a
        )

    def expected(a):
        form, rounding = FORMATS[to], mode if mode not in INTO_WHOLE else "rn"
        results = [form.round(one(x), rounding, "satfinite" in modifiers) for x in numbers(a, source)]
        out = np.array(results, f"uint{form.bits}")
        if "ftz" in modifiers and to == "f32":
            out = np.where(out & 0x7F800000, out, out & 0x80000000).astype("uint32")
        return out if to == "bf16" else out.view(f"float{form.bits}")

    right = same if to == "f64" else None
    return Case(
        f"cvt{modifiers}.{to}.{source} %d, %a", to, (source,), expected, lambda: float_inputs(to, source), right
    )


@functools.cache
def float_inputs(to, source):
    """Values of one format, half of them about the size that the other one can hold, and in the middle of two."""
    (array,) = values(source)
    draw = np.random.default_rng(6)
    form = FORMATS[to]
    some = draw.integers(0, form.infinity, 200, dtype="uint64")
    middle = [
        form.value(int(x)) + (form.value(int(x) + 1) - form.value(int(x))) / 2 for x in some if x + 1 < form.infinity
    ]
    array[312 : 312 + len(middle)] = rounded([m * (-1) ** k for k, m in enumerate(middle)], source)
    return (array,)


# ---- packed and narrow formats


def packed(to, modifiers):
    """Two f32 in one register, the first above."""
    element = to.removesuffix("x2")
    form = FORMATS[element]
    mode = "rz" if ".rz" in modifiers else "rn"

    def code(a):
        a = positive(a) if "relu" in modifiers else a
        return form.round(a, mode, "satfinite" in modifiers)

    def expected(high, low):
        highs, lows = ([code(x) for x in numbers(a, "f32")] for a in (high, low))
        return np.array([h << form.bits | low for h, low in zip(highs, lows)], f"uint{2 * form.bits}")

    kind = f"b{2 * form.bits}"
    return Case(
        f"cvt{modifiers}.{to}.f32 %d, %a, %b", kind, ("f32", "f32"), expected,
        lambda: (float_inputs(element, "f32")[0], float_inputs(element, "f32")[0][::-1].copy()),
    )  # fmt: skip


def narrowed(to, modifiers):
    form = FORMATS[to.removesuffix("x2")]

    def expected(pairs):
        codes = [form.round(positive(x) if "relu" in modifiers else x, "rn", True) for x in numbers(pairs, "f16")]
        return np.array([low | high << 8 for low, high in zip(codes[::2], codes[1::2])], "uint16")

    def inputs():
        return (np.stack([float_inputs(to.removesuffix("x2"), "f16")[0], values("f16")[0][::-1]], 1),)

    return Case(f"cvt{modifiers}.{to}.f16x2 %d, %a", "b16", ("f16x2",), expected, inputs)


def widened(source, modifiers):
    form = FORMATS[source.removesuffix("x2")]

    def expected(a):
        def one(bits):
            value = form.value(bits)
            return FORMATS["f16"].round(positive(value) if "relu" in modifiers else value)

        return np.array([[one(int(x) & 255), one(int(x) >> 8)] for x in a], "uint16").view("float16")

    def inputs():
        every = np.arange(256, dtype="uint16")
        return (np.concatenate([every << 8 | every[::-1], every << 8 | (every * 7 & 255)]),)

    return Case(f"cvt{modifiers}.f16x2.{source} %d, %a", "f16x2", ("b16",), expected, inputs)


def packed_integers(to):
    bits = width(to)
    low, high = limits(to)
    third = bits < 16

    def expected(a, b, *c):
        a, b = (np.clip(x, low, high).astype("int64") & ((1 << bits) - 1) for x in (a, b))
        return (a << bits | b | (c[0].astype("int64") << 2 * bits if third else 0)).astype("uint32")

    text = f"cvt.pack.sat.{to}.s32{'.b32' * third} %d, %a, %b{', %c' * third}"
    return Case(text, "b32", ("s32", "s32", "b32")[: 2 + third], expected)


def tf32(modifiers):
    mode = next(m for m in ("rna", "rn", "rz") if f".{m}" in modifiers)

    def expected(a):
        bits = [FORMATS["tf32"].round(positive(x) if "relu" in modifiers else x, mode) for x in numbers(a, "f32")]
        return np.array([0x7FFFFFFF if b == (1 << 18) - 1 else b << 13 for b in bits], "uint32")

    return Case(f"cvt{modifiers}.tf32.f32 %d, %a", "b32", ("f32",), expected, lambda: float_inputs("tf32", "f32"))


CASES = [
    *(between_integers(to, source, False) for to in INTEGERS for source in INTEGERS if to != source),
    *(between_integers(to, source, True) for to in INTEGERS for source in INTEGERS if to != source),
    *(
        from_integer(to, source, mode)
        for to in FLOATS
        for source in INTEGERS
        for mode in ("rn", "rz", "rm", "rp")
        if width(source) > 8 or mode == "rn"
    ),
    *(to_integer(to, source, mode) for source in FLOATS for to in INTEGERS for mode in INTO_WHOLE),
    *(to_integer(to, "f32", "rzi", ".ftz") for to in ("s32", "u64")),
    *(between_floats("f64", source, "") for source in ("f16", "bf16", "f32")),
    *(between_floats("f32", source, "") for source in ("f16", "bf16")),
    *(between_floats("f32", "f64", f".{mode}{ftz}") for mode in ("rn", "rz", "rm", "rp") for ftz in ("", ".ftz")),
    *(between_floats("f16", source, f".{mode}") for source in ("f32", "f64") for mode in ("rn", "rz", "rm", "rp")),
    *(
        between_floats(to, "f32", modifiers)
        for to in ("f16", "bf16")
        for modifiers in (".rn.relu", ".rz.relu", ".rn.satfinite", ".rn.relu.satfinite", ".rz", ".rn")
        if (to, modifiers) not in {("f16", ".rz"), ("f16", ".rn")}
    ),
    *(between_floats("f16", "bf16", f".{mode}") for mode in ("rn", "rz")),
    *(between_floats("bf16", source, ".rn") for source in ("f16", "f64")),
    *(between_floats(kind, kind, f".{mode}") for kind in ("f16", "f32", "f64") for mode in INTO_WHOLE),
    between_floats("f32", "f32", ".rni.ftz"),
    between_floats("f32", "f32", ".ftz"),
    between_floats("f32", "f32", ".sat"),
    between_floats("f32", "f32", ".ftz.sat"),
    between_floats("f32", "f16", ".ftz"),
    between_floats("f16", "f32", ".rn.ftz"),
    between_floats("f16", "f32", ".rn.sat"),
    between_floats("f32", "f64", ".rn.sat"),
    between_floats("f64", "f64", ".sat"),
    *(packed(to, f".{mode}{relu}") for to in ("f16x2", "bf16x2") for mode in ("rn", "rz") for relu in ("", ".relu")),
    *(packed(to, f".rn.satfinite{relu}") for to in ("f16x2", "bf16x2", "e4m3x2", "e5m2x2") for relu in ("", ".relu")),
    *(narrowed(to, f".rn.satfinite{relu}") for to in ("e4m3x2", "e5m2x2") for relu in ("", ".relu")),
    *(widened(source, f".rn{relu}") for source in ("e4m3x2", "e5m2x2") for relu in ("", ".relu")),
    *(packed_integers(to) for to in ("u16", "s16", "u8", "s8", "u4", "s4", "u2", "s2")),
    *(tf32(modifiers) for modifiers in (".rna", ".rn", ".rz", ".rn.relu", ".rz.relu")),
    Case(
        ".reg .b32 %x; cvt.s8.u32 %x, %a; mov.b32 %d, %x", "s32", ("u32",),
        lambda a: a.astype("uint8").view("int8").astype("int32"), name="cvt.s8.u32-in-32-bits",
    ),
    Case(
        ".reg .b32 %x; cvt.u8.s64 %x, %a; mov.b32 %d, %x", "u32", ("s64",),
        lambda a: (a & 255).astype("uint32"), name="cvt.u8.s64-in-32-bits",
    ),
    Case(
        "cvt.u32.u16 %d, %a", "u32", ("u32",), lambda a: a & 0xFFFF, name="cvt.u32.u16-of-32-bits",
    ),
    Case(
        ".reg .b64 %x; cvt.rzi.s16.f32 %x, %a; mov.b64 %d, %x", "s64", ("f32",),
        lambda a: np.clip(np.nan_to_num(np.trunc(a.astype("float64"))), -(2**15), 2**15 - 1).astype("int64"),
        name="cvt.rzi.s16.f32-in-64-bits",
    ),
]  # fmt: skip


@parametrize(CASES)
def test_conversion(case):
    check(case, CASES)


def test_the_reference_reads_and_writes_eight_bits_as_torch():
    for kind, dtype in (("e4m3", torch.float8_e4m3fn), ("e5m2", torch.float8_e5m2)):
        every = torch.arange(256, dtype=torch.uint8)
        theirs = every.view(dtype).float().numpy()
        ours = np.array([float(FORMATS[kind].value(code)) for code in range(256)])
        assert ((theirs == ours) | (np.isnan(theirs) & np.isnan(ours))).all()
        (some,) = values("f32")
        some = some[np.abs(some) < 400]
        codes = torch.from_numpy(some).to(dtype).view(torch.uint8).tolist()
        assert codes == [FORMATS[kind].round(number) for number in numbers(some, "f32")]


def test_special_values_are_among_the_inputs():
    (array,) = values("f32")
    assert set(specials("f32")) <= set(array.view("uint32").tolist())
