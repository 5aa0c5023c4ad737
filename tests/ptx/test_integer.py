"""Integer arithmetic against numpy and Python's integers."""

import numpy as np

from tests.ptx.conformance import NUMPY, Case, check, parametrize

WIDTHS = ("u16", "s16", "u32", "s32", "u64", "s64")


def exactly(function, result, *shapes):
    """Python's integers through `function`, cut off to the result's width."""

    def expected(*arrays):
        rows = zip(*(array.tolist() for array in arrays))
        bits = 8 * np.dtype(NUMPY[result]).itemsize
        wanted = [function(*row) & ((1 << bits) - 1) for row in rows]
        return np.array(wanted, f"uint{bits}").view(NUMPY[result])

    return expected


def limits(kind):
    bits = int(kind[1:])
    return (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if kind[0] == "s" else (0, (1 << bits) - 1)


def clamp(x, kind="s32"):
    low, high = limits(kind)
    return max(low, min(high, x))


def quotient(a, b):
    if b == 0:
        return -1
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def remainder(a, b):
    return a if b == 0 else a - quotient(a, b) * b


def simple(name, function, kinds=WIDTHS, operands=2):
    text = f"{{}} %d, {', '.join('%' + r for r in 'abc'[:operands])}"
    return [Case(text.format(f"{name}.{k}"), k, (k,) * operands, exactly(function, k)) for k in kinds]


def widening(name, function, operands):
    cases = []
    for kind in WIDTHS[:4]:
        wide = kind[0] + str(2 * int(kind[1:]))
        types = (kind, kind, wide)[:operands]
        text = f"{name}.wide.{kind} %d, {', '.join('%' + r for r in 'abc'[:operands])}"
        cases.append(Case(text, wide, types, exactly(function, wide)))
    return cases


def high(kind):
    return int(kind[1:])


def low24(x, kind):
    x &= 0xFFFFFF
    return x - (1 << 24) if kind == "s32" and x >> 23 else x


def dot(a, b, c, a_signed, b_signed, half=None):
    def byte(x, k, signed):
        x = x >> (8 * k) & 255
        return x - 256 if signed and x > 127 else x

    def word(x, k, signed):
        x = x >> (16 * k) & 65535
        return x - 65536 if signed and x > 32767 else x

    if half is None:
        return c + sum(byte(a, k, a_signed) * byte(b, k, b_signed) for k in range(4))
    return c + sum(word(a, k, a_signed) * byte(b, k + 2 * half, b_signed) for k in range(2))


CASES = [
    *simple("add", lambda a, b: a + b),
    *simple("sub", lambda a, b: a - b),
    *simple("add.sat", lambda a, b: clamp(a + b), ("s32",)),
    *simple("sub.sat", lambda a, b: clamp(a - b), ("s32",)),
    *simple("mul.lo", lambda a, b: a * b),
    *simple("mad.lo", lambda a, b, c: a * b + c, operands=3),
    *(c for k in WIDTHS for c in simple("mul.hi", lambda a, b, k=k: a * b >> high(k), (k,))),
    *(c for k in WIDTHS for c in simple("mad.hi", lambda a, b, c, k=k: (a * b >> high(k)) + c, (k,), 3)),
    *simple("mad.hi.sat", lambda a, b, c: clamp((a * b >> 32) + c), ("s32",), 3),
    *widening("mul", lambda a, b: a * b, 2),
    *widening("mad", lambda a, b, c: a * b + c, 3),
    *(c for k in ("u32", "s32") for c in simple("mul24.lo", lambda a, b, k=k: low24(a, k) * low24(b, k), (k,))),
    *(c for k in ("u32", "s32") for c in simple("mul24.hi", lambda a, b, k=k: low24(a, k) * low24(b, k) >> 16, (k,))),
    *(
        case
        for k in ("u32", "s32")
        for case in simple("mad24.lo", lambda a, b, c, k=k: low24(a, k) * low24(b, k) + c, (k,), 3)
    ),
    *simple("mad24.hi", lambda a, b, c: (low24(a, "s32") * low24(b, "s32") >> 16) + c, ("s32",), 3),
    *simple("mad24.hi.sat", lambda a, b, c: clamp((low24(a, "s32") * low24(b, "s32") >> 16) + c), ("s32",), 3),
    *simple("sad", lambda a, b, c: abs(a - b) + c, operands=3),
    *simple("div", quotient),
    *simple("rem", remainder),
    *simple("abs", abs, ("s16", "s32", "s64"), 1),
    *simple("neg", lambda a: -a, ("s16", "s32", "s64"), 1),
    *simple("min", min),
    *simple("max", max),
    *simple("min.relu", lambda a, b: max(min(a, b), 0), ("s32",)),
    *simple("max.relu", lambda a, b: max(a, b, 0), ("s32",)),
    *(
        Case(f"{name}.{k} %d, %a, %b", k, (k, k), function)
        for k in ("u16x2", "s16x2")
        for name, function in (("add", np.add), ("min", np.minimum), ("max", np.maximum))
    ),
    Case("min.relu.s16x2 %d, %a, %b", "s16x2", ("s16x2",) * 2, lambda a, b: np.maximum(np.minimum(a, b), 0)),
    Case("max.relu.s16x2 %d, %a, %b", "s16x2", ("s16x2",) * 2, lambda a, b: np.maximum(np.maximum(a, b), 0)),
    Case("neg.s16x2 %d, %a", "s16x2", ("s16x2",), np.negative),
    *(
        Case(
            f"dp4a.{a}.{b} %d, %a, %b, %c", "u32", ("u32",) * 3,
            exactly(lambda x, y, z, a=a, b=b: dot(x, y, z, a == "s32", b == "s32"), "u32"),
        )
        for a in ("u32", "s32")
        for b in ("u32", "s32")
    ),
    *(
        Case(
            f"dp2a.{half}.{a}.{b} %d, %a, %b, %c", "u32", ("u32",) * 3,
            exactly(lambda x, y, z, a=a, b=b, half=half: dot(x, y, z, a == "s32", b == "s32", half == "hi"), "u32"),
        )
        for half in ("lo", "hi")
        for a in ("u32", "s32")
        for b in ("u32", "s32")
    ),
]  # fmt: skip


@parametrize(CASES)
def test_integer(case):
    check(case, CASES)
