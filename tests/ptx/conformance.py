"""One instruction at a time: a kernel that runs it on many values, and numbers rounded exactly to compare with."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import pytest

from fusedops.testing import ptx

COUNT = 512  # values of a case; a block has half as many threads, so two blocks run
NUMPY = {"f16": "float16", "f32": "float32", "f64": "float64", "bf16": "uint16", "pred": "bool"}
NUMPY |= {
    f"{kind}{bits}": f"{name}{bits}"
    for kind, name in (("s", "int"), ("u", "uint"), ("b", "uint"))
    for bits in (8, 16, 32, 64)
}


@dataclass(frozen=True)
class Case:
    """An instruction, such as ``add.s32 %d, %a, %b``.

    Attributes:
        text: The statements; ``%d`` is the result, ``%a``, ``%b``, ``%c``, ``%e`` the operands.
        result: The result's type. Pairs of halves ("f16x2") are arrays of shape [n, 2], the lower half first.
        operands: The operands' types.
        expected: Takes the operands' arrays (bf16 as its bits), returns the result's.
        inputs: Makes the arrays; default: special values of the types, all with all, and random bits.
        right: None compares bits; else a function of (got, expected) that says which results are right.
        name: Default: the instruction.
    """

    text: str
    result: str
    operands: tuple[str, ...]
    expected: Callable
    inputs: Callable | None = None
    right: Callable | None = None
    name: str = ""

    @property
    def label(self):
        return self.name or self.text.split()[0]


def parametrize(cases):
    """The mark for a test that takes ``case``; instructions that occur twice are numbered by pytest."""
    return pytest.mark.parametrize("case", cases, ids=[case.label for case in cases])


def bits_of(kind):
    return {"pred": 16, "f16x2": 32, "bf16x2": 32, "u16x2": 32, "s16x2": 32}.get(kind) or max(
        int(kind.lstrip("bfsu")), 16
    )


def kernel(case, name):
    """PTX of one case: each thread reads its operands and writes its result, all as bits."""
    lines, registers = [], []
    for position, (register, kind) in enumerate(zip("dabce", (case.result, *case.operands))):
        registers += [f".reg .{'pred' if kind == 'pred' else f'b{bits_of(kind)}'} %{register}; .reg .b16 %s{register};"]
        pointer = f"ld.param.b64 %p, [p{position}]; mad.wide.u32 %p, %i, {bits_of(kind) // 8}, %p;"
        if position == 0:
            end = [pointer]
            end += [f"selp.b16 %s{register}, 1, 0, %{register};"] if kind == "pred" else []
            end += [f"st.global.b{bits_of(kind)} [%p], %{'sd' if kind == 'pred' else 'd'};"]
        else:
            lines += [pointer, f"ld.global.b{bits_of(kind)} %{'s' * (kind == 'pred')}{register}, [%p];"]
            lines += [f"setp.ne.b16 %{register}, %s{register}, 0;"] if kind == "pred" else []
    parameters = ", ".join(f".param .u64 p{i}" for i in range(len(case.operands) + 1))
    index = (
        "mov.u32 %i, %ctaid.x; mov.u32 %n, %ntid.x; mad.lo.u32 %i, %i, %n, 0; mov.u32 %n, %tid.x; add.u32 %i, %i, %n;"
    )
    body = "\n".join(
        [".reg .b64 %p; .reg .b32 %i, %n;", *registers, index, *lines, case.text.rstrip("; ") + ";", *end, "ret;"]
    )
    return f".visible .entry {name}({parameters})\n{{\n{body}\n}}\n"


@functools.cache
def module(cases):
    kernels = "\n".join(kernel(case, f"k{i}") for i, case in enumerate(cases))
    return ptx.load(".version 8.7\n.target sm_90a\n.address_size 64\n" + kernels)


def check(case, cases):
    """Run one of the cases of a module and compare."""
    arrays = case.inputs() if case.inputs else values(*case.operands)
    count = len(arrays[0]) if arrays else COUNT
    width = f"uint{bits_of(case.result)}"
    out = np.full(count, 0xA5, width)
    stored = [_stored(array, kind) for array, kind in zip(arrays, case.operands)]
    module(tuple(cases)).launch(f"k{cases.index(case)}", (count // 256,), (256,), [out, *stored])
    with np.errstate(all="ignore"):
        expected = case.expected(*arrays)
        got = _loaded(out, case.result)
        if case.right:
            good = case.right(got, expected)
        else:
            expected = np.asarray(expected).astype(got.dtype)
            good = _bits(got) == _bits(expected)
    if not good.all():
        wrong = np.argwhere(~good)[0][0]
        operands = ", ".join(_show(array[wrong]) for array in arrays)
        raise AssertionError(
            f"{case.text}: of ({operands}) got {_show(got[wrong])}, expected {_show(np.asarray(expected)[wrong])}; "
            f"{(~good).sum()} of {good.size} differ"
        )


def _bits(array):
    array = np.ascontiguousarray(array)
    return array.view(f"uint{8 * array.itemsize}") if array.dtype != bool else array


def _show(value):
    return f"{value} (0x{int(np.ravel(_bits(np.atleast_1d(value)))[0]):x})" if np.ndim(value) == 0 else f"{value}"


def _half_dtype(kind):
    return {"f16x2": "float16", "bf16x2": "uint16", "u16x2": "uint16", "s16x2": "int16"}.get(kind)


def _stored(array, kind):
    if _half_dtype(kind):
        return np.ascontiguousarray(array).view("uint32").reshape(-1)
    if array.dtype.itemsize == 1:
        array = array.astype("int16" if array.dtype == "int8" else "uint16")
    return _bits(array)


def _loaded(out, kind):
    if _half_dtype(kind):
        return out.view(_half_dtype(kind)).reshape(-1, 2)
    if kind in ("pred", "u8", "s8", "b8"):
        return out.astype(NUMPY[kind]) if kind == "pred" else out.view("int16" if kind == "s8" else "uint16")
    return out.view(NUMPY[kind])


# ---- values


def specials(kind):
    """Values of a type at which something changes, as bits."""
    if kind == "pred":
        return [0, 1]
    if kind in ("f16", "bf16", "f32", "f64"):
        form = FORMATS[kind]
        one, infinity = form.bias << form.mantissa, form.infinity
        magnitudes = [
            0,
            1,
            2,
            (1 << form.mantissa) - 1,
            1 << form.mantissa,
            (1 << form.mantissa) + 1,
            one,
            one - 1,
            one + 1,
        ]
        magnitudes += [
            one + (1 << (form.mantissa - 1)),
            one + (1 << form.mantissa),
            infinity - 1,
            infinity,
            infinity + 1,
        ]
        magnitudes += [infinity | 1 << (form.mantissa - 1), one - (1 << form.mantissa)]
        return [m | sign for m in magnitudes for sign in (0, 1 << (form.bits - 1))]
    bits = int(kind.lstrip("bus"))
    top = 1 << (bits - 1)
    return [0, 1, 2, 3, 7, 8, 31, 32, 33, 63, 64, 100, top - 1, top, top + 1, 2 * top - 1, 2 * top - 2, 2 * top - 32]


def values(*kinds, count=COUNT, seed=0):
    """Arrays of `count` values of each type: special values combined, then random bits."""
    draw = np.random.default_rng([seed, *map(ord, "".join(kinds))])
    arrays = []
    for kind in kinds:
        half = _half_dtype(kind)
        single = {"f16x2": "f16", "bf16x2": "bf16", "u16x2": "u16", "s16x2": "s16"}.get(kind, kind)
        shape = (count, 2) if half else (count,)
        some = np.array(specials(single), dtype="uint64")
        bits = draw.integers(0, 2**64, size=shape, dtype="uint64")
        chosen = np.where(draw.random(shape) < 0.6, draw.choice(some, shape), bits)
        if single.startswith(("f", "bf")):  # numbers near each other, so that sums and products are not all extreme
            form = FORMATS[single]
            exponent = draw.integers(form.bias - 6, form.bias + 6, shape, dtype="uint64") << form.mantissa
            near = exponent | bits & ((1 << form.mantissa) - 1 | 1 << (form.bits - 1))
            chosen = np.where(draw.random(shape) < 0.4, near, chosen)
        dtype = half or NUMPY[single]
        if single == "pred":
            arrays.append(chosen % 2 == 1)
        else:
            arrays.append(chosen.astype(f"uint{8 * np.dtype(dtype).itemsize}").view(dtype))
    if len(kinds) == 1 and not _half_dtype(kinds[0]):  # one operand: every special value is there
        some = np.array(specials(kinds[0]), dtype="uint64")
        arrays[0][: len(some)] = some.astype(f"uint{8 * arrays[0].itemsize}").view(arrays[0].dtype)
    return arrays


# ---- exact rounding


@dataclass(frozen=True)
class Form:
    """A binary format: its widths, and its numbers as fractions."""

    exponent: int
    mantissa: int
    infinities: bool = True

    @property
    def bits(self):
        return 1 + self.exponent + self.mantissa

    @property
    def bias(self):
        return (1 << (self.exponent - 1)) - 1

    @property
    def one(self):
        return self.bias << self.mantissa

    @property
    def infinity(self):  # of e4m3: the NaN, which stands where the infinity would
        return ((1 << self.exponent) - 1) << self.mantissa if self.infinities else (1 << (self.bits - 1)) - 1

    @functools.lru_cache(maxsize=1 << 16)  # noqa: B019 (formats live as long as the process)
    def value(self, bits):
        """A Fraction, or a float for what is none: NaN, infinities and -0."""
        sign, magnitude = -1 if bits >> (self.bits - 1) else 1, bits & ((1 << (self.bits - 1)) - 1)
        if magnitude >= self.infinity:
            return sign * float("inf") if magnitude == self.infinity and self.infinities else float("nan")
        if magnitude == 0 and sign < 0:
            return -0.0
        exponent, mantissa = magnitude >> self.mantissa, magnitude & ((1 << self.mantissa) - 1)
        mantissa += (1 << self.mantissa) if exponent else 0
        power = max(exponent, 1) - self.bias - self.mantissa
        return Fraction(sign * mantissa << power) if power >= 0 else Fraction(sign * mantissa, 1 << -power)

    def round(self, number, mode="rn", finite=False):
        """The bits of a number. NaN: all ones but the sign. finite: past the largest number comes the largest."""
        if number != number:
            return (1 << (self.bits - 1)) - 1
        sign = 1 << (self.bits - 1) if number < 0 or str(number) == "-0.0" else 0
        if number in (float("inf"), float("-inf")):
            return sign | (self.infinity - 1 if finite else self.infinity)
        number = abs(Fraction(number))
        if number == 0:
            return sign
        top, bottom = number.numerator, number.denominator
        power = top.bit_length() - bottom.bit_length()
        power -= top < bottom << power if power >= 0 else top << -power < bottom
        power = max(power, 1 - self.bias)
        shift = self.mantissa - power
        top, bottom = (top << shift, bottom) if shift >= 0 else (top, bottom << -shift)
        whole, rest = divmod(top, bottom)
        away = {"rn": 2 * rest > bottom or (2 * rest == bottom and whole % 2), "rna": 2 * rest >= bottom}
        away |= {"rz": False, "rm": rest > 0 and bool(sign), "rp": rest > 0 and not sign}
        magnitude = whole + bool(away[mode]) + ((power + self.bias - 1) << self.mantissa)
        if magnitude >= self.infinity:
            kept = finite or mode == "rz" or (mode == "rm" and not sign) or (mode == "rp" and sign)
            magnitude = self.infinity - 1 if kept else self.infinity
        return sign | magnitude


FORMATS = {"f16": Form(5, 10), "bf16": Form(8, 7), "f32": Form(8, 23), "f64": Form(11, 52), "tf32": Form(8, 10)}
FORMATS |= {"e4m3": Form(4, 3, False), "e5m2": Form(5, 2)}


def widened(bits):
    """bf16 bits as float32."""
    return (np.asarray(bits).astype("uint32") << 16).view("float32")


def numbers(array, kind):
    """An array as Python numbers: fractions, and floats where there is no fraction."""
    return [FORMATS[kind].value(int(bits)) for bits in np.ravel(_bits(np.asarray(array)))]


def rounded(results, kind, mode="rn", like=None):
    """Numbers as an array of the format; f32 and f64 as floats."""
    bits = np.array([FORMATS[kind].round(number, mode) for number in results], dtype=f"uint{FORMATS[kind].bits}")
    if kind in ("f16", "f32", "f64"):
        bits = bits.view(NUMPY[kind])
    return bits if like is None else bits.reshape(np.shape(like))


def _is_number(*operands):
    return all(isinstance(operand, Fraction) for operand in operands)


def _as_float(x):
    return x if isinstance(x, float) else (1.0 if x > 0 else -1.0 if x < 0 else 0.0)


def _negative(x):
    return x < 0 or str(x) == "-0.0"


def exact_product(a, b):
    if _is_number(a, b) and a * b != 0:
        return a * b
    a, b = _as_float(a), _as_float(b)
    if {0.0, float("inf")} <= {abs(a), abs(b)}:
        return float("nan")
    return a * b if a * b != 0 else -0.0 if _negative(a) != _negative(b) else 0.0


def exact_sum(a, b, mode="rn"):
    if _is_number(a, b) and a + b != 0:
        return a + b
    if a == 0 and b == 0 or (_is_number(a, b) and a + b == 0):
        if _negative(a) == _negative(b):
            return a
        return -0.0 if mode == "rm" else 0.0
    if abs(_as_float(a)) in (float("inf"),) or abs(_as_float(b)) in (float("inf"),) or a != a or b != b:
        return (a if isinstance(a, float) else 0.0) + (b if isinstance(b, float) else 0.0)
    return a if b == 0 else b


def exact_quotient(a, b):
    if _is_number(a, b) and a != 0 and b != 0:
        return a / b
    sign = -1.0 if _negative(a) != _negative(b) else 1.0
    x, y = abs(_as_float(a)), abs(_as_float(b))
    if x != x or y != y or (x == y and x in (0.0, float("inf"))):
        return float("nan")
    return sign * (float("inf") if y == 0 or x == float("inf") else 0.0)
