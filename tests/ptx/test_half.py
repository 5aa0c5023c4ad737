"""f16, bf16 and pairs of them against exact fractions."""

import math
from dataclasses import replace
from fractions import Fraction

import numpy as np

from tests.ptx.conformance import (
    FORMATS,
    Case,
    check,
    exact_product,
    exact_sum,
    numbers,
    parametrize,
    rounded,
)

KINDS = ("f16", "bf16", "f16x2", "bf16x2")


def single(kind):
    return kind.removesuffix("x2")


def as_bits(array):
    return np.ascontiguousarray(array).view("uint16")


def from_bits(bits, kind):
    return bits.astype("uint16").view("float16" if single(kind) == "f16" else "uint16")


def flushed(array, kind):
    """Subnormal numbers as zeros of the same sign."""
    bits = as_bits(array)
    return from_bits(np.where(bits & 0x7FFF < 1 << FORMATS[single(kind)].mantissa, bits & 0x8000, bits), kind)


def clamped(array, kind, modifiers):
    bits, form = as_bits(array), FORMATS[single(kind)]
    nan = bits & 0x7FFF > form.infinity
    if "relu" in modifiers or "sat" in modifiers:
        bits = np.where((bits & 0x8000 != 0) & ~nan, 0, bits)
    if "sat" in modifiers:
        bits = np.where(nan, 0, np.minimum(bits, form.one))
    return from_bits(bits, kind)


def arithmetic(name, count, exact, modifiers):
    cases = []
    for kind in KINDS:
        for suffix in modifiers:
            if single(kind) == "bf16" and ("sat" in suffix or "ftz" in suffix):
                continue

            def expected(*arrays, kind=kind, suffix=suffix):
                if "ftz" in suffix:
                    arrays = [flushed(array, kind) for array in arrays]
                rows = zip(*(numbers(array, single(kind)) for array in arrays))
                out = rounded([exact(*row) for row in rows], single(kind), like=arrays[0])
                out = flushed(out, kind) if "ftz" in suffix else out
                return clamped(out, kind, suffix)

            text = f"{name}{suffix}.{kind} %d, {', '.join('%' + r for r in 'abc'[:count])}"
            cases.append(Case(text, kind, (kind,) * count, expected))
    return cases


def negative(b):
    return -b if b != 0 else 0.0 if str(b) == "-0.0" else -0.0


def extreme(kind, largest, modifiers):
    infinity = FORMATS[single(kind)].infinity

    def of_two(a, b):
        def order(x):
            return np.where(x & 0x8000, -(x & 0x7FFF).astype("int32") - 1, x.astype("int32"))

        nan_a, nan_b = a & 0x7FFF > infinity, b & 0x7FFF > infinity
        plain = np.where((order(a) > order(b)) == largest, a, b)
        if "NaN" in modifiers:
            return np.where(nan_a | nan_b, 0x7FFF, plain).astype("uint16")
        return np.where(nan_a & nan_b, 0x7FFF, np.where(nan_a, b, np.where(nan_b, a, plain))).astype("uint16")

    def expected(*arrays):
        a, *others = (as_bits(flushed(array, kind) if "ftz" in modifiers else array) for array in arrays)
        if "xorsign" in modifiers:
            magnitude = of_two(a & 0x7FFF, others[0] & 0x7FFF)
            return from_bits(np.where(magnitude > infinity, magnitude, magnitude | (a ^ others[0]) & 0x8000), kind)
        for other in others:
            a = of_two(a, other)
        return from_bits(a, kind)

    name = "max" if largest else "min"
    return Case(f"{name}{modifiers}.{kind} %d, %a, %b", kind, (kind,) * 2, expected)


def near(kind, relative=0.0, absolute=0.0):
    """Right is what lies as near, or rounds to the nearest of the format; NaN is the only one."""

    def right(got, expected):
        form = FORMATS[single(kind)]
        out = []
        for bits, wanted in zip(np.ravel(as_bits(got)), np.ravel(expected)):
            value = form.value(int(bits))
            if math.isnan(wanted):
                out.append(bits == 0x7FFF)
            elif isinstance(value, Fraction) and math.isfinite(wanted):
                step = float(abs(form.value(int(bits) ^ 1) - value))
                out.append(abs(float(value) - wanted) <= max(relative * abs(wanted) + step / 2, absolute + step / 2))
            else:
                out.append(bits == form.round(wanted))
        return np.array(out).reshape(got.shape)

    return right


def function(name, compute, kind, flush, **errors):
    def expected(a):
        a = flushed(a, kind) if flush else a
        exact = np.array([float(number) for number in numbers(a, single(kind))]).reshape(np.shape(a))
        out = compute(exact)
        return np.where(np.abs(out) < 2.0 ** (1 - FORMATS[single(kind)].bias), 0, out) if flush else out

    return Case(f"{name}.{kind} %d, %a", kind, (kind,), expected, right=near(kind, **errors))


CASES = [
    *arithmetic("add", 2, exact_sum, ("", ".rn", ".ftz", ".sat")),
    *arithmetic("sub", 2, lambda a, b: exact_sum(a, negative(b)), ("", ".ftz", ".sat")),
    *arithmetic("mul", 2, exact_product, ("", ".ftz", ".sat")),
    *arithmetic("fma", 3, lambda a, b, c: exact_sum(exact_product(a, b), c), (".rn", ".rn.relu", ".rn.ftz", ".rn.sat")),
    *(
        extreme(kind, largest, modifiers)
        for kind in KINDS
        for largest in (False, True)
        for modifiers in ("", ".NaN", ".ftz", ".xorsign.abs", ".NaN.xorsign.abs")
        if not ("ftz" in modifiers and single(kind) == "bf16")
    ),
    *(Case(f"neg.{k} %d, %a", k, (k,), lambda a, k=k: from_bits(as_bits(a) ^ 0x8000, k)) for k in KINDS),
    *(Case(f"abs.{k} %d, %a", k, (k,), lambda a, k=k: from_bits(as_bits(a) & 0x7FFF, k)) for k in KINDS),
    Case("neg.ftz.f16 %d, %a", "f16", ("f16",), lambda a: -flushed(a, "f16")),
    Case("abs.ftz.f16x2 %d, %a", "f16x2", ("f16x2",), lambda a: np.abs(flushed(a, "f16x2"))),
    *(function("ex2.approx", np.exp2, k, False, relative=2.0**-9.9) for k in ("f16", "f16x2")),
    *(function("ex2.approx.ftz", np.exp2, k, True, relative=2.0**-7) for k in ("bf16", "bf16x2")),
    *(function("tanh.approx", np.tanh, k, False, absolute=2.0**-10.987) for k in ("f16", "f16x2")),
    *(function("tanh.approx", np.tanh, k, False, absolute=2.0**-8) for k in ("bf16", "bf16x2")),
]


@parametrize(CASES)
def test_half(case):
    check(case, CASES)


def test_a_sum_just_off_the_middle_of_two_bf16_is_rounded_once():
    # (1 + 2^-7) * (1 + 2^-1) lies between two bf16; what c adds is below the last place of a double.
    a, b = np.full(256, 0x3F81, "uint16"), np.full(256, 0x3FC0, "uint16")
    c = np.array([0x0001, 0x8001, 0x0000, 0x0080] * 64, "uint16")
    product = FORMATS["bf16"].value(0x3F81) * FORMATS["bf16"].value(0x3FC0)
    assert FORMATS["bf16"].round(product + Fraction(1, 2**200)) != FORMATS["bf16"].round(product - Fraction(1, 2**200))
    fma = next(case for case in CASES if case.text.startswith("fma.rn.bf16 "))
    case = replace(fma, inputs=lambda: (a, b, c))
    check(case, [case])
