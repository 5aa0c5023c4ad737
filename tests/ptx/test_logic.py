"""Logic, shifts, bit fields, prmt and carry chains against Python's integers."""

import numpy as np

from tests.ptx.conformance import COUNT, Case, check, parametrize, values
from tests.ptx.test_integer import exactly

B = ("b16", "b32", "b64")


def bits(kind):
    return int(kind[1:])


def two(name, function, kinds):
    return [Case(f"{name}.{k} %d, %a, %b", k, (k, k), function) for k in kinds]


def shifted(kind):
    def left(a, b):
        return a << b if b < bits(kind) else 0

    def right(a, b):
        return a >> min(b, bits(kind))

    return [
        Case(f"{name}.{kind} %d, %a, %b", kind, (kind, "u32"), exactly(function, kind))
        for name, function in (("shl", left), ("shr", right))
        if name == "shr" or kind[0] == "b"
    ]


def funnel(direction, mode):
    def expected(low, high, distance):
        n = distance % 32 if mode == "wrap" else min(distance, 32)
        both = high << 32 | low
        return both << n >> 32 if direction == "l" else both >> n

    return Case(f"shf.{direction}.{mode}.b32 %d, %a, %b, %c", "b32", ("b32",) * 3, exactly(expected, "b32"))


def fields(kind):
    """A value, and a position and a length that mostly lie inside it."""
    a, b, at, length = values(kind, kind, "u32", "u32")
    draw = np.random.default_rng(1)
    some = draw.random(COUNT) < 0.8
    return a, b, np.where(some, at % 70, at), np.where(some[::-1], length % 70, length)


def extract(kind):
    def expected(a, at, length):
        at, length = at & 255, length & 255
        field = (a & ((1 << bits(kind)) - 1)) >> at & ((1 << length) - 1)
        sign = a >> min(at + length - 1, bits(kind) - 1) & 1 if kind[0] == "s" and length else 0
        inside = min(length, max(bits(kind) - at, 0))
        return field - (1 << inside) if sign else field

    def inputs():
        a, _, at, length = fields(kind)
        return a, at, length

    return Case(f"bfe.{kind} %d, %a, %b, %c", kind, (kind, "u32", "u32"), exactly(expected, kind), inputs)


def insert(kind):
    def expected(field, into, at, length):
        at, length = at & 255, length & 255
        mask = ((1 << length) - 1) << at
        return into & ~mask | field << at & mask

    return Case(
        f"bfi.{kind} %d, %a, %b, %c, %e",
        kind,
        (kind, kind, "u32", "u32"),
        exactly(expected, kind),
        lambda: fields(kind),
    )


def mask(mode):
    def expected(at, length):
        if mode == "wrap":
            at, length = at % 32, length % 32
        return ((1 << min(length, 32)) - 1) << at if at < 32 else 0

    return Case(f"bmsk.{mode}.b32 %d, %a, %b", "b32", ("b32", "b32"), exactly(expected, "b32"))


def extension(mode, kind):
    def expected(a, length):
        length = length % 32 if mode == "wrap" else length
        if length >= 32:
            return a
        low = a & ((1 << length) - 1)
        return low - (1 << length) if kind == "s32" and length and low >> (length - 1) else low

    return Case(f"szext.{mode}.{kind} %d, %a, %b", kind, (kind, "u32"), exactly(expected, kind))


def find(kind, distance):
    def expected(a):
        length = (a if a >= 0 else ~a).bit_length()
        if length == 0:
            return -1
        return bits(kind) - length if distance else length - 1

    return Case(f"bfind{'.shiftamt' * distance}.{kind} %d, %a", "u32", (kind,), exactly(expected, "u32"))


def nth(word, base, n):
    n = n - (1 << 32) if n >> 31 else n
    ones = [at for at in range(32) if word >> at & 1]
    if n == 0:
        return base if base in ones else -1
    found = [at for at in ones if at >= base] if n > 0 else [at for at in ones if at <= base][::-1]
    return found[abs(n) - 1] if base < 32 and abs(n) <= len(found) else -1


def nth_inputs():
    word, base, n = values("u32", "u32", "u32")
    return word, base % 34, (n % 20 - np.uint32(8)).astype("uint32")


def lop(table, a, b, c):
    return sum((table >> ((a >> k & 1) * 4 + (b >> k & 1) * 2 + (c >> k & 1)) & 1) << k for k in range(32))


def permute(mode):
    def expected(a, b, selector):
        source = [(b << 32 | a) >> 8 * k & 255 for k in range(8)]
        n = selector & 3
        if mode == "":
            picked = []
            for k in range(4):
                which = selector >> 4 * k & 15
                byte = source[which & 7]
                picked.append((255 if byte >> 7 else 0) if which & 8 else byte)
        else:
            order = {
                "f4e": [n, n + 1, n + 2, n + 3],
                "b4e": [n, n - 1, n - 2, n - 3],
                "rc8": [n, n, n, n],
                "ecl": [max(k, n) for k in range(4)],
                "ecr": [min(k, n) for k in range(4)],
                "rc16": [2 * (n % 2) + k % 2 for k in range(4)],
            }[mode]
            picked = [source[k % 8] for k in order]
        return sum(byte << 8 * k for k, byte in enumerate(picked))

    return Case(f"prmt.b32{'.' * bool(mode)}{mode} %d, %a, %b, %c", "b32", ("b32",) * 3, exactly(expected, "b32"))


CASES = [
    *two("and", np.bitwise_and, (*B, "pred")),
    *two("or", np.bitwise_or, (*B, "pred")),
    *two("xor", np.bitwise_xor, (*B, "pred")),
    *(Case(f"not.{k} %d, %a", k, (k,), np.invert) for k in (*B, "pred")),
    *(Case(f"cnot.{k} %d, %a", k, (k,), lambda a: a == 0) for k in B),
    *(case for k in (*B, "s16", "s32", "s64", "u16", "u32", "u64") for case in shifted(k)),
    *(funnel(direction, mode) for direction in "lr" for mode in ("wrap", "clamp")),
    *(extract(kind) for kind in ("u32", "s32", "u64", "s64")),
    *(insert(kind) for kind in ("b32", "b64")),
    *(mask(mode) for mode in ("wrap", "clamp")),
    *(extension(mode, kind) for mode in ("wrap", "clamp") for kind in ("u32", "s32")),
    *(find(kind, distance) for kind in ("u32", "s32", "u64", "s64") for distance in (False, True)),
    *(Case(f"popc.{k} %d, %a", "u32", (k,), exactly(lambda a: a.bit_count(), "u32")) for k in ("b32", "b64")),
    *(
        Case(f"clz.{k} %d, %a", "u32", (k,), exactly(lambda a, k=k: bits(k) - a.bit_length(), "u32"))
        for k in ("b32", "b64")
    ),
    *(
        Case(f"brev.{k} %d, %a", k, (k,), exactly(lambda a, k=k: int(f"{a:0{bits(k)}b}"[::-1], 2), k))
        for k in ("b32", "b64")
    ),
    Case("fns.b32 %d, %a, %b, %c", "b32", ("b32",) * 3, exactly(nth, "b32"), nth_inputs),
    *(
        Case(
            f"lop3.b32 %d, %a, %b, %c, {table}", "b32", ("b32",) * 3,
            exactly(lambda a, b, c, table=table: lop(table, a, b, c), "b32"), name=f"lop3.b32-{table:#x}",
        )
        for table in (0x00, 0x80, 0xFE, 0x96, 0xE8, 0xCA, 0x1B, 0xFF)
    ),
    *(
        Case(
            f".reg .b32 %x; lop3.{name}.b32 %x|%d, %a, %b, 0, {0xC0}, %c", "pred", ("b32", "b32", "pred"),
            lambda a, b, q, combine=combine: combine((a & b) != 0, q), name=f"lop3.{name}.b32",
        )
        for name, combine in (("and", np.logical_and), ("or", np.logical_or), ("xor", np.logical_xor))
    ),
    *(permute(mode) for mode in ("", "f4e", "b4e", "rc8", "ecl", "ecr", "rc16")),
]  # fmt: skip


@parametrize(CASES)
def test_logic(case):
    check(case, CASES)
