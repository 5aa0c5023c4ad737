"""Loads and stores: every width, vector, space and modifier, against numpy."""

import numpy as np
import pytest

from fusedops.testing import ptx
from tests.ptx.inline import kernel, launch

TYPES = ["b8", "u8", "s8", "b16", "u16", "s16", "f16", "bf16", "b32", "u32", "s32", "f32", "b64", "u64", "s64", "f64"]
REGISTER = {2: "%h", 4: "%r", 8: "%d", 16: "%q"}


def size_of(name):
    return int("".join(filter(str.isdigit, name))) // 8


def forms():
    for name in [*TYPES, "b128"]:
        for count in (1, 2, 4, 8):
            if size_of(name) * count <= 32 and (count < 8 or size_of(name) == 4):
                yield name, count


def vector(count):
    return f".v{count}" if count > 1 else ""


def registers(letter, first, count):
    names = ", ".join(f"{letter}{first + i}" for i in range(count))
    return f"{{{names}}}" if count > 1 else names


def random_bytes(count, seed=0):
    return np.random.default_rng(seed).integers(0, 256, count, dtype=np.uint8)


def widened(data, name, width):
    """What a register of `width` bytes holds after the load of each element."""
    size = size_of(name)
    if size == 16:
        return data
    signed = name.startswith("s")
    elements = data.view(f"{'i' if signed else 'u'}{size}")
    return elements.astype(f"i{width}" if signed else f"u{width}").view(np.uint8)


@pytest.mark.parametrize("name,count", list(forms()))
def test_global(name, count):
    size = size_of(name)
    for width in [w for w in (2, 4, 8, 16) if w >= size and (w < 16 or size == 16)]:
        group = registers(REGISTER[width], 8 if width < 16 else 0, count)
        chunk = min(count * width, 32) // width  # stores of more than 32 bytes do not exist
        stores = "\n".join(
            f"st.global{vector(chunk)}.b{8 * width} [%d3+{first * width}], "
            f"{registers(REGISTER[width], (8 if width < 16 else 0) + first, chunk)};"
            for first in range(0, count, chunk)
        )
        text = kernel(
            f"mul.wide.u32 %d0, %t, {size * count}; add.s64 %d1, %x, %d0;\n"
            f"mul.wide.u32 %d2, %t, {width * count}; add.s64 %d3, %out, %d2;\n"
            f"ld.global{vector(count)}.{name} {group}, [%d1];\n{stores}"
        )
        x, out = aligned(random_bytes(32 * size * count)), aligned(np.zeros(32 * width * count, np.uint8))
        launch(text, [x, out])
        np.testing.assert_array_equal(out, widened(x, name, width))


def aligned(data, to=64):
    """A copy that begins at a multiple of `to` bytes."""
    room = np.zeros(data.nbytes + to, np.uint8)
    start = -room.ctypes.data % to
    made = room[start : start + data.nbytes]
    made[:] = data.view(np.uint8).reshape(-1)
    return made


@pytest.mark.parametrize("space", ["shared", "shared::cta", "shared_generic", "local", "local_generic"])
@pytest.mark.parametrize(
    "name,count", [("b8", 1), ("b16", 2), ("b32", 1), ("b32", 4), ("b64", 2), ("b128", 1), ("b8", 4)]
)
def test_other_spaces(space, name, count):
    """Shared: each lane reads what lane * 5 + 3 wrote; local: what it wrote itself."""
    size, whole = size_of(name), size_of(name) * count
    width = max(size, 2)
    letter, first = REGISTER[width], 8 if width < 16 else 0
    group = registers(letter, first, count)
    window = space.split("_")[0]
    generic = space.endswith("generic")
    apart = f"add.s64 %d5, %d5, %d0; mul.wide.u32 %d7, %r0, {whole}; add.s64 %d6, %d6, %d7;"
    to = f"cvta.{window}.u64 %d5, %d5; cvta.{window}.u64 %d6, %d6;" if generic else ""
    where = "" if generic else f".{window}"
    own = window == "local"
    text = kernel(
        f"""
        mul.wide.u32 %d0, %t, {whole}; add.s64 %d1, %x, %d0; add.s64 %d3, %out, %d0;
        ld.global{vector(count)}.{name} {group}, [%d1];
        mul.lo.u32 %r0, %t, 5; add.u32 %r0, %r0, 3; and.b32 %r0, %r0, 31;
        mov.u64 %d5, area; mov.u64 %d6, area; {"" if own else apart}
        {to}
        st{where}{vector(count)}.{name} [%d5+{whole}], {group};
        ld{where}{vector(count)}.{name} {group}, [%d6+{whole}];
        st.global{vector(count)}.{name} [%d3], {group};
        """,
        declarations=f".{'local' if own else 'shared'} .align 16 .b8 area[{(1 if own else 32) * whole + whole}];",
    )
    x, out = aligned(random_bytes(32 * whole)), aligned(np.zeros(32 * whole, np.uint8))
    launch(text, [x, out])
    expected = x.reshape(32, whole)
    np.testing.assert_array_equal(out, (expected if own else expected[(np.arange(32) * 5 + 3) % 32]).reshape(-1))


MODIFIERS = [
    "ld.weak.global.b32 A;", "ld.volatile.global.b32 A;", "ld.relaxed.gpu.global.b32 A;",
    "ld.acquire.sys.global.b32 A;",
    "ld.acquire.cta.b32 A;", "ld.relaxed.cluster.global.b32 A;", "ld.mmio.relaxed.sys.global.b32 A;",
    "ld.global.nc.b32 A;", "ld.global.ca.b32 A;", "ld.global.cg.b32 A;", "ld.global.cs.b32 A;", "ld.global.lu.b32 A;",
    "ld.global.cv.b32 A;", "ld.global.L1::evict_last.b32 A;", "ld.global.L1::no_allocate.b32 A;",
    "ld.global.L1::evict_first.L2::128B.b32 A;", "ld.global.L1::evict_last.L2::cache_hint.b32 A, %d9;",
    "ld.global.nc.L1::no_allocate.L2::256B.b32 A;", "ld.global.L2::64B.b32 A;", "ldu.global.b32 A;", "ld.b32 A;",
    "ld.global.b32 A.unified;",
]  # fmt: skip
STORES = [
    "st.weak.global.b32 B;", "st.volatile.global.b32 B;", "st.relaxed.gpu.global.b32 B;",
    "st.release.cta.global.b32 B;",
    "st.release.sys.b32 B;", "st.mmio.relaxed.sys.global.b32 B;", "st.global.wb.b32 B;", "st.global.cg.b32 B;",
    "st.global.cs.b32 B;", "st.global.wt.b32 B;", "st.global.L1::evict_last.L2::cache_hint.b32 B, %d9;", "st.b32 B;",
]  # fmt: skip


@pytest.mark.parametrize("load", MODIFIERS)
def test_loads_with_modifiers(load):
    check_copy(load, "st.global.b32 B;")


@pytest.mark.parametrize("store", STORES)
def test_stores_with_modifiers(store):
    check_copy("ld.global.b32 A;", store)


@pytest.mark.parametrize(
    "hint",
    [
        "prefetch.global.L1 [%d1];", "prefetch.L2 [%d1];", "prefetch.global.L2::evict_last [%d1];",
        "prefetchu.L1 [%d1];",
        "applypriority.global.L2::evict_normal [%d1], 128;", "discard.global.L2 [%d1], 128;",
        "createpolicy.fractional.L2::evict_last.b64 %d9, 0.5;",
        "createpolicy.fractional.L2::evict_last.L2::evict_first.b64 %d9;",
    ],
)  # fmt: skip
def test_hints_change_nothing(hint):
    check_copy(f"{hint} ld.global.b32 A;", "st.global.b32 B;")


def check_copy(load, store):
    text = kernel(
        "mov.u64 %d9, 0; mul.wide.u32 %d0, %t, 4; add.s64 %d1, %x, %d0; add.s64 %d3, %out, %d0;\n"
        + (load + store).replace("A", "%r8, [%d1]", 1).replace("B;", "[%d3], %r8;").replace("B,", "[%d3], %r8,")
    )
    x, out = np.arange(32, dtype=np.int32), np.zeros(32, np.int32)
    launch(text, [x, out])
    np.testing.assert_array_equal(out, x)


def test_parted_lanes_touch_only_their_own():
    text = kernel(
        "and.b32 %r0, %t, 1; setp.eq.u32 %p0, %r0, 1; mul.wide.u32 %d0, %t, 4; add.s64 %d1, %x, %d0;\n"
        "add.s64 %d3, %out, %d0; mov.u32 %r8, 7; @%p0 ld.global.b32 %r8, [%d1]; @!%p0 st.global.b32 [%d3], %r8;\n"
        "@%p0 st.global.b32 [%d3+128], %r8;"
    )
    x, out = np.arange(100, 132, dtype=np.int32), np.zeros(64, np.int32)
    launch(text, [x, out])
    odd = np.arange(32) % 2 == 1
    np.testing.assert_array_equal(out[:32], np.where(odd, 0, 7))
    np.testing.assert_array_equal(out[32:], np.where(odd, x, 0))


def test_parameters_and_constants():
    text = """
    .version 8.7\n.target sm_90a\n.address_size 64
    .const .align 8 .b32 table[4] = {11, 12, 13, 14};
    .global .align 8 .b32 kept[2];
    .visible .entry k(.param .u64 out_ptr, .param .align 8 .b8 many[16], .param .s8 small, .param .f64 wide)
    {
        .reg .b64 %out; .reg .b32 %r<12>; .reg .b64 %d<4>;
        ld.param.u64 %out, [out_ptr];
        ld.param.v2.b32 {%r0, %r1}, [many+8];
        ld.param.s8 %r2, [small];
        ld.param.b64 %d0, [wide];
        ld.const.v2.b32 {%r3, %r4}, [table+8];
        mov.u64 %d1, many; ld.param.b32 %r5, [%d1+4];
        st.global.b32 [kept+4], %r5; ld.global.b32 %r6, [kept+4]; ld.global.b32 %r7, [kept];
        st.global.v4.b32 [%out], {%r0, %r1, %r2, %r3};
        st.global.v4.b32 [%out+16], {%r4, %r5, %r6, %r7};
        st.global.b64 [%out+32], %d0;
        ret;
    }"""
    out = np.zeros(10, np.int32)
    launch(text, [out, np.arange(1, 5, dtype=np.int32).tobytes(), -3, 2.5], block=(1,))
    assert out[:8].tolist() == [3, 4, -3, 13, 14, 2, 2, 0]
    assert out[8:].view(np.float64)[0] == 2.5


@pytest.mark.parametrize(
    "body,word",
    [
        ("ld.global.nonsense.b32 %r0, [%x];", "nonsense"),
        ("ld.global.v2.b32 %r0, [%x];", "number of elements"),
        ("ld.global.b64 %r0, [%x];", "width"),
        ("st.global.L3::hint.b32 [%x], %r0;", "L3::hint"),
    ],
)
def test_refused(body, word):
    with pytest.raises(ptx.Fault, match=word):
        ptx.load(kernel(body))
