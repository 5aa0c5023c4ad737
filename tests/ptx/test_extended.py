"""Sums and products with a carry, and several small integers in a register, against Python's integers."""

import numpy as np

from tests.ptx.conformance import Case, check, parametrize, values
from tests.ptx.test_integer import exactly


def words(array, bits, count):
    return [array >> (bits * k) & ((1 << bits) - 1) for k in range(count)]


def chain(name, bits, third, function):
    """Numbers of three words, by carry chains; the result is word `third` of the sum."""
    kind = f"u{bits}"
    first, next_, last = {
        "add": ("add.cc", "addc.cc", "addc"),
        "sub": ("sub.cc", "subc.cc", "subc"),
    }[name]
    text = f".reg .b{bits} %l, %m, %h; {first}.{kind} %l, %a, %b; {next_}.{kind} %m, %b, %c; {last}.{kind} %h, %c, %a"
    text += f"; mov.b{bits} %d, %{'lmh'[third]}"

    def expected(a, b, c):
        left, right = a | b << bits | c << 2 * bits, b | c << bits | a << 2 * bits
        return function(left, right) >> third * bits

    return Case(text, kind, (kind,) * 3, exactly(expected, kind), name=f"{name}-of-three-{kind}-word-{third}")


def product(bits, third):
    """A product of two words plus a number of two, in three words."""
    kind = f"u{bits}"
    text = (
        f".reg .b{bits} %l, %m, %h; mad.lo.cc.{kind} %l, %a, %b, %c; madc.hi.cc.{kind} %m, %a, %b, %c; "
        f"addc.{kind} %h, 0, 0; mov.b{bits} %d, %{'lmh'[third]}"
    )
    return Case(
        text, kind, (kind,) * 3,
        exactly(lambda a, b, c: (a * b + (c | c << bits)) >> third * bits, kind), name=f"mad-chain-{kind}-word-{third}",
    )  # fmt: skip


def signed_high(bits):
    kind = f"s{bits}"
    text = f".reg .b{bits} %l; add.cc.u{bits} %l, %a, %c; madc.hi.{kind} %d, %a, %b, %c"

    def expected(a, b, c):
        carry = ((a % (1 << bits)) + (c % (1 << bits))) >> bits
        return (a * b >> bits) + c + carry

    return Case(text, kind, (kind,) * 3, exactly(expected, kind), name=f"madc.hi.{kind}")


CARRIES = [
    *(chain("add", bits, third, lambda x, y: x + y) for bits in (32, 64) for third in range(3)),
    *(chain("sub", bits, third, lambda x, y: x - y) for bits in (32, 64) for third in range(3)),
    *(product(bits, third) for bits in (32, 64) for third in range(3)),
    *(signed_high(bits) for bits in (32, 64)),
    Case(
        "add.cc.u32 %d, %a, %b; add.u32 %d, %a, %b; addc.u32 %d, %c, 0", "u32", ("u32",) * 3,
        exactly(lambda a, b, c: c + (a + b >> 32), "u32"), name="add-keeps-the-carry",
    ),
]  # fmt: skip


def elements(x, bits, signed):
    parts = [x >> bits * k & ((1 << bits) - 1) for k in range(32 // bits)]
    return [part - (1 << bits) if signed and part >> (bits - 1) else part for part in parts]


def limited(x, bits, signed):
    low, high = (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if signed else (0, (1 << bits) - 1)
    return min(max(x, low), high)


def average(a, b):
    return (a + b + 1) // 2 if a + b >= 0 else -((-a - b + 1) // 2)


OPERATIONS = {
    "vadd": lambda a, b: a + b,
    "vsub": lambda a, b: a - b,
    "vabsdiff": lambda a, b: abs(a - b),
    "vmin": min,
    "vmax": max,
    "vavrg": average,
}


def video(name, count, kind, suffix=""):
    """One of the operations on 1, 2 or 4 elements; with .add the results are summed into c."""
    bits, signed = 32 // count, kind == "s32"
    function = OPERATIONS[name]

    def expected(a, b, c):
        out = [function(x, y) for x, y in zip(elements(a, bits, signed), elements(b, bits, signed))]
        out = [limited(x, bits, signed) if "sat" in suffix else x for x in out]
        if "add" in suffix:
            return sum(out) + c
        packed = sum((x & ((1 << bits) - 1)) << bits * k for k, x in enumerate(out))
        if "min" in suffix or "max" in suffix:
            whole = elements(packed, 32, signed)[0]
            return (min if "min" in suffix else max)(whole, elements(c, 32, signed)[0])
        return packed

    full = f"{name}{count if count > 1 else ''}.{kind}.{kind}.{kind}{suffix}"
    third = ", %c" if count > 1 or "." in suffix.replace(".sat", "") else ""
    return Case(f"{full} %d, %a, %b{third}", "u32", ("u32",) * 3, exactly(expected, "u32"))


VIDEO = [
    *(
        video(name, count, kind, suffix)
        for name in OPERATIONS
        for count in (1, 2, 4)
        for kind in ("u32", "s32")
        for suffix in ("", ".sat", ".add")
        if not (name == "vavrg" and count == 1)
    ),
    *(video("vabsdiff", 1, kind, suffix) for kind in ("u32", "s32") for suffix in (".min", ".max")),
]


@parametrize(CARRIES)
def test_carries(case):
    check(case, CARRIES)


@parametrize(VIDEO)
def test_video(case):
    check(case, VIDEO)


def test_the_carry_belongs_to_the_lane():
    a, b, c = values("u32", "u32", "u32")
    both = (a.astype("uint64") + b) >> 32
    assert 0 < both.sum() < len(both)  # some lanes of a warp carry and others do not
    lane = Case(
        ".reg .pred %q; setp.lt.u32 %q, %a, %c; add.cc.u32 %d, 0, 0; @%q add.cc.u32 %d, %a, %b; addc.u32 %d, 0, 0",
        "u32", ("u32",) * 3, lambda a, b, c: np.where(a < c, (a.astype("uint64") + b) >> 32, 0),
    )  # fmt: skip
    check(lane, [lane])
