"""setp, set, selp and slct: every relation of every type, and how a predicate is combined with it."""

import operator

import numpy as np
import pytest

from fusedops.testing import ptx
from tests.ptx.conformance import Case, check, numbers, parametrize

ORDERED = {name: getattr(operator, name) for name in ("eq", "ne", "lt", "le", "gt", "ge")}
UNSIGNED = {"lo": operator.lt, "ls": operator.le, "hi": operator.gt, "hs": operator.ge}
INTEGERS = ("u16", "s16", "u32", "s32", "u64", "s64")
FLOATS = ("f16", "bf16", "f32", "f64")
COMBINE = {"": lambda r, c: r, "and": operator.and_, "or": operator.or_, "xor": operator.xor}


def relation(name):
    """The relation on numbers; a trailing u also holds where one is a NaN."""
    if name in ("num", "nan"):
        return lambda a, b: (a == a and b == b) == (name == "num")
    plain = ORDERED[name.removesuffix("u")]
    return lambda a, b: name.endswith("u") if a != a or b != b else plain(a, b)


def holds(name, kind, flush=False):
    """Arrays in, truth out; a pair's halves are columns."""

    def of(a, b):
        if kind in INTEGERS or kind[0] == "b" and kind not in ("bf16", "bf16x2"):
            return (ORDERED | UNSIGNED)[name](a, b)
        single = kind.removesuffix("x2")
        smallest = 2.0 ** (-14 if single == "f16" else -126)
        left, right = ([0 if flush and abs(x) < smallest else x for x in numbers(array, single)] for array in (a, b))
        one = relation(name)
        return np.array([one(x, y) for x, y in zip(left, right)]).reshape(np.shape(a))

    return of


def setp(name, kind, flush=False):
    of = holds(name, kind, flush)
    return Case(f"setp.{name}{'.ftz' * flush}.{kind} %d, %a, %b", "pred", (kind, kind), of)


def setp_combined(combine, negated, kind="s32", second=False):
    def expected(a, b, c):
        held = (a < b) != second
        return COMBINE[combine](held, ~c if negated else c)

    to = ".reg .pred %q; setp.lt.{}.{} {}, %a, %b, {}%c".format(
        combine, kind, "%q|%d" if second else "%d", "!" * negated
    )
    label = f"setp.lt.{combine}.{kind}{'-not' * negated}{'-second' * second}"
    return Case(to, "pred", (kind, kind, "pred"), expected, name=label)


def setp_pair(name, kind, half):
    of = holds(name, kind)
    to = "%d|%q" if half == 0 else "%q|%d"
    text = f".reg .pred %q; setp.{name}.{kind} {to}, %a, %b"
    return Case(text, "pred", (kind, kind), lambda a, b: of(a, b)[:, half], name=f"setp.{name}.{kind}-{half}")


def set_value(name, result, kind, combine=""):
    of = holds(name, kind)
    yes = {"f32": 1.0, "f16": 1.0, "f16x2": 1.0, "bf16": 0x3F80, "bf16x2": 0x3F80, "s32": -1}.get(result)
    yes = yes if yes is not None else (1 << int(result[1:])) - 1
    dtype = {
        "f32": "float32",
        "f16": "float16",
        "f16x2": "float16",
        "bf16": "uint16",
        "bf16x2": "uint16",
        "s32": "int32",
    }
    zeros = np.zeros(1, dtype.get(result, f"uint{result[1:]}"))

    def expected(a, b, *c):
        return np.where(COMBINE[combine](of(a, b), *(c or (None,))), zeros.dtype.type(yes), zeros[0])

    text = f"set.{name}{'.' * bool(combine)}{combine}.{result}.{kind} %d, %a, %b" + ", %c" * bool(combine)
    return Case(text, result, (kind, kind, "pred")[: 3 if combine else 2], expected)


def set_pair_mask(kind):
    of = holds("lt", kind)

    def expected(a, b):
        low, high = of(a, b).T
        return np.where(low, 0xFFFF, 0) | np.where(high, 0xFFFF0000, 0)

    return Case(f"set.lt.u32.{kind} %d, %a, %b", "u32", (kind, kind), expected)


def slct(kind, by, flush=False):
    def expected(a, b, c):
        if flush:
            c = np.where(np.abs(c) < 2.0**-126, 0, c)
        return np.where(c >= 0, a, b)

    return Case(f"slct{'.ftz' * flush}.{kind}.{by} %d, %a, %b, %c", kind, (kind, kind, by), expected)


CASES = [
    *(setp(name, kind) for kind in INTEGERS for name in ORDERED),
    *(setp(name, kind) for kind in ("u16", "u32", "u64") for name in UNSIGNED),
    *(setp(name, kind) for kind in ("b16", "b32", "b64") for name in ("eq", "ne")),
    *(
        setp(name, kind)
        for kind in FLOATS
        for name in (*ORDERED, "equ", "neu", "ltu", "leu", "gtu", "geu", "num", "nan")
    ),
    *(setp(name, kind, True) for kind in ("f16", "f32") for name in ("eq", "lt", "neu")),
    *(setp_pair(name, kind, half) for kind in ("f16x2", "bf16x2") for name in ("lt", "neu") for half in (0, 1)),
    *(setp_combined(combine, negated) for combine in ("and", "or", "xor") for negated in (False, True)),
    *(setp_combined(combine, False, second=True) for combine in ("and", "or", "xor")),
    *(set_value("lt", result, kind) for result in ("u32", "s32", "f32") for kind in (*INTEGERS, "f32", "f64")),
    *(set_value("geu", result, "f32", "and") for result in ("u32", "f32")),
    *(set_value("lt", result, "f16") for result in ("f16", "u16", "u32")),
    set_value("lt", "bf16", "bf16"),
    *(set_value("gtu", kind, kind) for kind in ("f16x2", "bf16x2")),
    *(set_pair_mask(kind) for kind in ("f16x2", "bf16x2")),
    *(
        Case(f"selp.{kind} %d, %a, %b, %c", kind, (kind, kind, "pred"), lambda a, b, c: np.where(c, a, b))
        for kind in (*INTEGERS, "b16", "b32", "b64", "f32", "f64")
    ),
    Case(
        "selp.b32 %d, %a, %b, !%c", "b32", ("b32", "b32", "pred"), lambda a, b, c: np.where(c, b, a),
        name="selp.b32-not",
    ),
    *(slct(kind, by) for kind in ("u16", "b32", "s64", "f32", "f64") for by in ("s32", "f32")),
    slct("b32", "f32", True),
]  # fmt: skip


@parametrize(CASES)
def test_comparison(case):
    check(case, CASES)


@pytest.mark.parametrize("text", ["setp.lo.s32 %p, 1, 2", "setp.ltu.s32 %p, 1, 2", "setp.between.s32 %p, 1, 2"])
def test_relations_that_a_type_does_not_have_are_refused(text):
    with pytest.raises(ptx.Fault, match="not supported: setp"):
        ptx.load(f".version 8.7\n.target sm_90a\n.address_size 64\n.visible .entry k() {{ .reg .pred %p; {text}; }}")
