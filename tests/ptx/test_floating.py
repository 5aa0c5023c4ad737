"""f32 and f64 against exact fractions, numpy and the errors that PTX documents."""

import math
from fractions import Fraction

import numpy as np
import pytest

from tests.ptx.conformance import (
    FORMATS,
    NUMPY,
    Case,
    check,
    exact_product,
    exact_quotient,
    exact_sum,
    numbers,
    parametrize,
    rounded,
    values,
)

TINY = np.float32(2.0**-126)
NAN = np.uint32(0x7FFFFFFF).view("float32")


def flushed(x):
    return np.where(np.abs(x) < TINY, np.copysign(np.float32(0), x), x)


def saturated(x):
    return np.where(x > 0, np.minimum(x, 1), 0).astype("float32")


def canonical(x):
    return np.where(x != x, NAN, x)


def same(got, expected):
    """Equal bits, or both are NaN: f64 keeps payloads that depend on the processor."""
    return (got.view("uint64") == expected.view("uint64")) | ((got != got) & (expected != expected))


def arithmetic(name, count, exact):
    """An operation with every rounding; `exact` takes fractions and the rounding."""
    cases = []
    for kind in ("f32", "f64"):
        for mode in ("rn", "rz", "rm", "rp"):
            for suffix in ("", ".ftz", ".sat", ".ftz.sat") if kind == "f32" else ("",):

                def expected(*arrays, kind=kind, mode=mode, suffix=suffix):
                    if "ftz" in suffix:
                        arrays = [flushed(array) for array in arrays]
                    rows = zip(*(numbers(array, kind) for array in arrays))
                    out = rounded([exact(*row, mode) for row in rows], kind, mode)
                    out = flushed(out) if "ftz" in suffix else out
                    return saturated(out) if "sat" in suffix else out

                text = f"{name}.{mode}{suffix}.{kind} %d, {', '.join('%' + r for r in 'abc'[:count])}"
                right = same if kind == "f64" else None
                cases.append(Case(text, kind, (kind,) * count, expected, right=right))
    return cases


def square_root(a, mode):
    """A fraction that rounds as the root does: 130 bits, and a last one that says that there is more."""
    if not isinstance(a, Fraction):
        return a if a != a or a >= 0 else a if str(a) == "-0.0" else float("nan")
    if a <= 0:
        return a if a == 0 else float("nan")
    shift = 2 * (1300 + a.denominator.bit_length())
    scaled = (a.numerator << shift) // a.denominator
    root = math.isqrt(scaled)
    root = 2 * root + (root * root * a.denominator != a.numerator << shift)
    return Fraction(root, 1 << (shift // 2 + 1))


ARITHMETIC = [
    *arithmetic("add", 2, exact_sum),
    *arithmetic("sub", 2, lambda a, b, mode: exact_sum(a, -b if b != 0 else 0.0 if str(b) == "-0.0" else -0.0, mode)),
    *arithmetic("mul", 2, lambda a, b, mode: exact_product(a, b)),
    *arithmetic("fma", 3, lambda a, b, c, mode: exact_sum(exact_product(a, b), c, mode)),
    *(c for c in arithmetic("div", 2, lambda a, b, mode: exact_quotient(a, b)) if "sat" not in c.text),
    *(c for c in arithmetic("rcp", 1, lambda a, mode: exact_quotient(Fraction(1), a)) if "sat" not in c.text),
    *(c for c in arithmetic("sqrt", 1, square_root) if "sat" not in c.text),
]


def extreme(kind, largest, modifiers):
    def of_two(a, b):
        order = np.where(np.signbit(a) & (a == b), a, b) if not largest else np.where(np.signbit(a) & (a == b), b, a)
        plain = np.where(a == b, order, (np.maximum if largest else np.minimum)(a, b))
        if "NaN" in modifiers:
            return np.where((a != a) | (b != b), np.nan, plain)
        return np.where(a != a, b, np.where(b != b, a, plain))

    def expected(*arrays):
        if "ftz" in modifiers:
            arrays = [flushed(array) for array in arrays]
        if "xorsign" in modifiers:
            out = of_two(np.abs(arrays[0]), np.abs(arrays[1]))
            out = np.where(np.signbit(arrays[0]) ^ np.signbit(arrays[1]), -out, out)
        else:
            out = arrays[0]
            for array in arrays[1:]:
                out = of_two(out, array)
        out = out.astype(NUMPY[kind])
        return canonical(out) if kind == "f32" else out

    count = 3 if "three" in modifiers else 2
    name = "max" if largest else "min"
    text = f"{name}{modifiers.replace('.three', '')}.{kind} %d, {', '.join('%' + r for r in 'abc'[:count])}"
    label = f"{name}{modifiers}.{kind}"
    return Case(text, kind, (kind,) * count, expected, right=same if kind == "f64" else None, name=label)


def class_of(name, kind):
    smallest = np.finfo(NUMPY[kind]).tiny
    test = {
        "finite": np.isfinite,
        "infinite": np.isinf,
        "number": lambda a: a == a,
        "notanumber": np.isnan,
        "normal": lambda a: np.isfinite(a) & (np.abs(a) >= smallest),
        "subnormal": lambda a: (a != 0) & (np.abs(a) < smallest),
    }[name]
    return Case(f"testp.{name}.{kind} %d, %a", "pred", (kind,), test)


MODIFIERS = ("", ".ftz", ".NaN", ".ftz.NaN", ".xorsign.abs", ".NaN.xorsign.abs", ".three", ".NaN.three")
SIGNS = [
    *(extreme("f32", largest, modifiers) for largest in (False, True) for modifiers in MODIFIERS),
    *(extreme("f64", largest, "") for largest in (False, True)),
    *(Case(f"abs.{kind} %d, %a", kind, (kind,), np.abs) for kind in ("f32", "f64")),
    *(Case(f"neg.{kind} %d, %a", kind, (kind,), np.negative) for kind in ("f32", "f64")),
    Case("abs.ftz.f32 %d, %a", "f32", ("f32",), lambda a: np.abs(flushed(a))),
    Case("neg.ftz.f32 %d, %a", "f32", ("f32",), lambda a: -flushed(a)),
    *(Case(f"copysign.{k} %d, %a, %b", k, (k, k), lambda a, b: np.copysign(b, a)) for k in ("f32", "f64")),
    *(
        class_of(name, kind)
        for name in ("finite", "infinite", "number", "notanumber", "normal", "subnormal")
        for kind in ("f32", "f64")
    ),
]


# ---- approximations: the errors are those that PTX documents


def within(relative=0.0, absolute=0.0, ulps=0.0):
    """Right is what lies as near to the exact result; NaN, infinities and zeros must be the same."""

    def right(got, expected):
        wide = expected.astype("float64")
        allowed = (
            absolute + relative * np.abs(wide) + ulps * np.spacing(np.abs(wide.astype(got.dtype))).astype("float64")
        )
        with np.errstate(all="ignore"):
            near = np.abs(got.astype("float64") - wide) <= allowed
            past = np.abs(wide) > np.finfo(got.dtype).max
        infinite = np.isinf(got) & (np.signbit(got) == np.signbit(wide))
        return (
            (np.isnan(wide) & (got.view(f"uint{got.itemsize * 8}") == canonical_bits(got))) | near | (past & infinite)
        )

    return right


def canonical_bits(got):
    return got.view("uint64") if got.itemsize == 8 else np.uint32(0x7FFFFFFF)


def of_one(name, function, right, flush, inputs=None):
    def expected(a):
        out = function((flushed(a) if flush else a).astype("float64"))
        return flushed64(out) if flush else out

    suffix = ".ftz" if flush else ""
    return Case(f"{name}{suffix}.f32 %d, %a", "f32", ("f32",), expected, inputs, right)


def flushed64(x):
    return np.where(np.abs(x) < 2.0**-126, np.copysign(0, x), x)


def span(low, high):
    def inputs():
        draw = np.random.default_rng(2)
        some = draw.uniform(low, high, 512).astype("float32")
        some[:5] = 0, -0.0, 1, np.nan, 2.0**-130
        return (some,)

    return inputs


def quotient_approx(a, b):
    out = a.astype("float64") / b
    huge = (np.abs(b) > 2.0**126) & np.isfinite(b)
    return np.where(huge, np.where(np.isinf(a), np.nan, out * 0), out)


def logarithm_near(got, expected):
    near_one = np.abs(expected) < 1
    return np.where(near_one, within(absolute=2.0**-22)(got, expected), within(relative=2.0**-22)(got, expected))


APPROXIMATIONS = [
    *(
        case
        for flush in (False, True)
        for case in (
            of_one("ex2.approx", np.exp2, within(ulps=2), flush),
            of_one("ex2.approx", np.exp2, within(ulps=2), flush, span(-150, 130)),
            of_one("lg2.approx", np.log2, logarithm_near, flush),
            of_one("lg2.approx", np.log2, logarithm_near, flush, span(0.4, 2.1)),
            of_one("sin.approx", np.sin, within(absolute=2.0**-20.5), flush, span(-math.pi, math.pi)),
            of_one("cos.approx", np.cos, within(absolute=2.0**-20.5), flush, span(-math.pi, math.pi)),
            of_one("rcp.approx", lambda a: 1 / a, within(ulps=1), flush),
            of_one("sqrt.approx", np.sqrt, within(relative=2.0**-23), flush),
            of_one("rsqrt.approx", lambda a: 1 / np.sqrt(a), within(relative=2.0**-22.9), flush),
        )
    ),
    of_one("tanh.approx", np.tanh, within(relative=2.0**-11, ulps=0.5), False),
    of_one("tanh.approx", np.tanh, within(relative=2.0**-11, ulps=0.5), False, span(-5, 5)),
    Case(
        "div.full.f32 %d, %a, %b", "f32", ("f32",) * 2, lambda a, b: a.astype("float64") / b, right=within(ulps=2)
    ),
    Case(
        "div.full.ftz.f32 %d, %a, %b", "f32", ("f32",) * 2,
        lambda a, b: flushed64(flushed(a).astype("float64") / flushed(b)), right=within(ulps=2),
    ),
    Case("div.approx.f32 %d, %a, %b", "f32", ("f32",) * 2, quotient_approx, right=within(ulps=2)),
    Case(
        "rcp.approx.ftz.f64 %d, %a", "f64", ("f64",), lambda a: 1 / a,
        lambda: (np.random.default_rng(3).standard_normal(512),), within(relative=2.0**-20),
    ),
    Case(
        "rsqrt.approx.f64 %d, %a", "f64", ("f64",), lambda a: 1 / np.sqrt(a),
        lambda: (np.abs(np.random.default_rng(3).standard_normal(512)),), within(relative=2.0**-20),
    ),
]  # fmt: skip


@parametrize(ARITHMETIC)
def test_arithmetic(case):
    check(case, ARITHMETIC)


@parametrize(SIGNS)
def test_signs_and_classes(case):
    check(case, SIGNS)


@parametrize(APPROXIMATIONS)
def test_approximations(case):
    check(case, APPROXIMATIONS)


@pytest.mark.parametrize("kind", ["f16", "bf16", "f32", "f64"])
def test_the_reference_rounds_as_numpy(kind):
    (array,) = values("f64")
    expected = [FORMATS[kind].round(number) for number in numbers(array, "f64")]
    if kind == "bf16":
        torch = pytest.importorskip("torch")
        odd = [FORMATS["f32"].round(number, "rz") for number in numbers(array, "f64")]
        single = np.array(odd, "uint32").view("float32")
        expected = [FORMATS["bf16"].round(number) for number in numbers(single, "f32")]
        got = torch.from_numpy(single).bfloat16().view(torch.int16).numpy().view("uint16")
    else:
        with np.errstate(all="ignore"):
            got = array.astype(NUMPY[kind])
        got = got.view(f"uint{got.itemsize * 8}")
    numeric = array == array
    assert (got[numeric] == np.array(expected, got.dtype)[numeric]).all()
