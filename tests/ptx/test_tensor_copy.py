"""Copies of boxes of tensors (TMA): ranks, swizzles, what lies out of bounds, reductions, and maps made by kernels."""

import itertools

import numpy as np
import pytest
import torch

from fusedops.testing import ptx
from tests.ptx.inline import kernel, launch

SCHEDULES = pytest.mark.parametrize("schedule", ptx.SCHEDULES)
HEAD = """
.shared .align 1024 .b8 tile[8192]; .shared .align 8 .b64 bar;
mov.b32 %r20, tile; mov.b32 %r21, bar; setp.eq.u32 %p7, %t, 0;
@%p7 mbarrier.init.shared::cta.b64 [%r21], 1; fence.mbarrier_init.release.cluster; bar.sync 0;
"""
LOAD = """
@%p7 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r21], {bytes};
@%p7 cp.async.bulk.tensor.{rank}d.{to}.global{mode}.mbarrier::complete_tx::bytes [%r20], [{map}, {{{at}}}], [%r21];
"""
WAIT = "$W: mbarrier.try_wait.parity.shared::cta.b64 %p6, [%r21], 0; @!%p6 bra $W;"
DUMP = """
mov.b32 %r1, 0;
$D: shl.b32 %r2, %t, 4; add.u32 %r2, %r2, %r1; setp.ge.u32 %p1, %r2, {bytes}; @%p1 bra $E;
add.u32 %r3, %r20, %r2; ld.shared.v4.b32 {{%r4, %r5, %r6, %r7}}, [%r3];
cvt.u64.u32 %d1, %r2; add.u64 %d1, %d1, %out; st.global.v4.b32 [%d1], {{%r4, %r5, %r6, %r7}};
add.u32 %r1, %r1, 512; bra $D; $E:
"""
FILL = """
mov.b32 %r1, 0;
$D: shl.b32 %r2, %t, 4; add.u32 %r2, %r2, %r1; setp.ge.u32 %p1, %r2, {bytes}; @%p1 bra $E;
add.u32 %r3, %r20, %r2; cvt.u64.u32 %d1, %r2; add.u64 %d1, %d1, %x; ld.global.v4.b32 {{%r4, %r5, %r6, %r7}}, [%d1];
st.shared.v4.b32 [%r3], {{%r4, %r5, %r6, %r7}}; add.u32 %r1, %r1, 512; bra $D; $E:
fence.proxy.async.shared::cta; bar.sync 0;
"""
DONE = "@%p7 cp.async.bulk.commit_group; @%p7 cp.async.bulk.wait_group 0;"


def with_map(body, pointers):
    """A kernel whose last parameter is a tensor map; its generic address is in %map."""
    text = kernel(".reg .b64 %map; mov.b64 %map, map_param; cvta.param.u64 %map, %map;\n" + HEAD + body, pointers)
    return text.replace("_ptr)\n{", "_ptr, .param .align 64 .b8 map_param[128])\n{", 1)


def swizzled(rows, width):
    """The bytes of a box, as rows of it, in the order that shared memory has them: pieces of 16 bytes trade places.

    A line of 128 bytes is the unit: within it the number of a piece is changed by the number of the line.
    """
    if not width:
        return rows.ravel()
    pieces = rows.ravel().reshape(-1, 16)
    moved = np.empty_like(pieces)
    lines = width // 16  # after which the order repeats
    for index, piece in enumerate(pieces):
        line = index // 8
        moved[index ^ line % lines] = piece
    return moved.ravel()


def box_of(tensor, box, at, fill=0):
    """The box that starts at `at`, dimensions in torch's order, as numpy; what lies outside is `fill`."""
    source = tensor.numpy()
    out = np.full(box, fill, source.dtype)
    for index in itertools.product(*map(range, box[:-1])):
        place = [a + i for a, i in zip(at, index)]
        if all(0 <= p < size for p, size in zip(place, source.shape)):
            for k in range(box[-1]):
                if 0 <= at[-1] + k < source.shape[-1]:
                    out[(*index, k)] = source[(*place, at[-1] + k)]
    return out


def load(tensor, box, at, to="shared::cluster", mode="", schedule="default", edit=lambda text: text, **options):
    """What shared memory holds after a box was loaded."""
    made = ptx.encode_tiled(tensor, box, **options)
    taken = [-(-b // s) for b, s in zip(box, options.get("element_strides") or [1] * len(box))]
    taken[-1] = box[-1]
    size = int(np.prod(taken)) * tensor.element_size()
    step = LOAD.format(bytes=size, rank=len(box), to=to, mode=mode, map="%map", at=", ".join(map(str, reversed(at))))
    out = np.zeros(size, np.uint8)
    text = edit(with_map(step + WAIT + DUMP.format(bytes=size), "out"))
    launch(text, [out, made], memory=[tensor], schedule=schedule)
    return out


def numbers(*shape, dtype=torch.int16):
    return torch.arange(int(np.prod(shape))).reshape(shape).to(dtype)


@pytest.mark.parametrize("rank", [1, 2, 3, 4, 5])
def test_ranks(rank):
    x = numbers(*(3, 4, 5, 6, 16)[5 - rank :])
    box, at = (2, 2, 3, 2, 8)[5 - rank :], (1, 0, 2, 3, 8)[5 - rank :]
    assert (load(x, box, at).view(np.int16) == box_of(x, box, at).ravel()).all()


@SCHEDULES
@pytest.mark.parametrize("to, mode", [("shared::cta", ""), ("shared::cluster", ".tile")])
def test_forms(to, mode, schedule):
    x = numbers(20, 64)
    got = load(x, (8, 32), (4, 16), to, mode, schedule)
    assert (got.view(np.int16) == box_of(x, (8, 32), (4, 16)).ravel()).all()


DTYPES = {"u8": torch.uint8, "i16": torch.int16, "i32": torch.int32, "i64": torch.int64, "f16": torch.float16,
          "bf16": torch.bfloat16, "f32": torch.float32, "f64": torch.float64}  # fmt: skip


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("swizzle", [0, 32, 64, 128])
def test_swizzles(swizzle, name):
    dtype = DTYPES[name]
    columns = (swizzle or 64) // torch.empty(0, dtype=dtype).element_size()
    x = torch.randint(-128, 128, (20, 2 * columns)).to(dtype)
    got = load(x, (16, columns), (2, columns), swizzle=swizzle)
    rows = x[2:18, columns:].contiguous().view(torch.uint8).numpy()
    assert (got == swizzled(rows, swizzle)).all()


def test_a_swizzle_wider_than_the_rows():
    x = numbers(16, 64)
    rows = x[:8, :32].contiguous().view(torch.uint8).numpy()
    assert (load(x, (8, 32), (0, 0), swizzle=128) == swizzled(rows, 128)).all()


PLACES = {"before": (-3, -8), "after": (16, 30), "around": (-2, 26), "outside": (40, 0), "far_before": (-40, -70)}


@pytest.mark.parametrize("swizzle", [0, 64])
@pytest.mark.parametrize("name", PLACES)
def test_out_of_bounds_is_zero(name, swizzle):
    x, at = numbers(20, 40) + 1, PLACES[name]
    rows = box_of(x, (8, 32), at).view(np.uint8)
    assert (load(x, (8, 32), at, swizzle=swizzle) == swizzled(rows, swizzle)).all()


@pytest.mark.parametrize("dtype, nan", [(torch.float16, 0x7FFF), (torch.bfloat16, 0x7FFF), (torch.float32, 0x7FFFFFFF)])
def test_out_of_bounds_is_nan(dtype, nan):
    x = torch.ones(20, 40, dtype=dtype)
    bits = x.view(torch.int16 if x.element_size() == 2 else torch.int32)
    got = load(x, (8, 16), (17, 30), fill_nan=True).view(bits.numpy().dtype)
    assert (got == box_of(bits, (8, 16), (17, 30), nan).ravel()).all()


def test_element_strides():
    x = numbers(3, 20, 16)
    got = load(x, (2, 9, 8), (1, 2, 8), element_strides=(1, 4, 1)).view(np.int16)
    assert (got == x[1:3, 2:11:4, 8:].numpy().ravel()).all()


def test_strided_tensors():
    x = numbers(20, 128)[::2, 64:]
    assert (load(x, (4, 16), (3, 8)).view(np.int16) == x[3:7, 8:24].numpy().ravel()).all()


def store(x, out, box, at, op="", pointers="x", schedule="default", **options):
    """Fills shared memory with the bytes of x and stores it as a box of out."""
    size = int(np.prod(box)) * out.element_size()
    made = ptx.encode_tiled(out, box, **options)
    name = f"cp.reduce.async.bulk.tensor.{len(box)}d" if op else f"cp.async.bulk.tensor.{len(box)}d"
    where = ", ".join(map(str, reversed(at)))
    step = f"@%p7 {name}.global.shared::cta{op}.bulk_group [%map, {{{where}}}], [%r20];"
    text = with_map(FILL.format(bytes=size) + step + DONE, "x")
    launch(text, [x, made], memory=[out], schedule=schedule)


@SCHEDULES
def test_store(schedule):
    x, out = numbers(8, 32), torch.zeros(20, 64, dtype=torch.int16)
    store(x, out, (8, 32), (4, 16), schedule=schedule)
    assert (out[4:12, 16:48] == x).all() and out.count_nonzero() == x.count_nonzero()


@pytest.mark.parametrize("at", PLACES.values(), ids=PLACES)
def test_stores_are_clipped(at):
    x, out = numbers(8, 32) + 1, torch.zeros(20, 40, dtype=torch.int16)
    store(x, out, (8, 32), at)
    expected = np.zeros((20, 40), np.int16)
    for row, column in itertools.product(range(8), range(32)):
        if 0 <= at[0] + row < 20 and 0 <= at[1] + column < 40:
            expected[at[0] + row, at[1] + column] = x[row, column]
    assert (out.numpy() == expected).all()


@pytest.mark.parametrize("swizzle", [32, 64, 128])
def test_swizzled_stores(swizzle):
    columns = swizzle // 2
    rows = numbers(16, columns)
    x = torch.from_numpy(swizzled(rows.view(torch.uint8).numpy(), swizzle).copy())
    out = torch.zeros(16, columns, dtype=torch.int16)
    store(x, out, (16, columns), (0, 0), swizzle=swizzle)
    assert (out == rows).all()


@pytest.mark.parametrize(
    "op, dtype, expected",
    [
        ("add", torch.int32, torch.add), ("add", torch.float32, torch.add), ("add", torch.float16, torch.add),
        ("add", torch.bfloat16, torch.add), ("min", torch.int32, torch.minimum), ("max", torch.float16, torch.maximum),
        ("min", torch.bfloat16, torch.minimum), ("max", torch.int64, torch.maximum),
        ("and", torch.int32, torch.bitwise_and), ("or", torch.int32, torch.bitwise_or),
        ("xor", torch.int64, torch.bitwise_xor),
    ],
)  # fmt: skip
def test_reductions(op, dtype, expected):
    torch.manual_seed(5)
    x, before = (torch.randn(8, 16).mul(100).to(dtype) for _ in range(2))
    out = torch.nn.functional.pad(before, (0, 16))
    store(x, out, (8, 16), (0, 0), f".{op}")
    assert (out[:, :16] == expected(before, x)).all() and not out[:, 16:].any()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"box": (8, 300)}, "box must be 1 to 256 in dimension 0, got 300"),
        ({"box": (0, 8)}, "box must be 1 to 256 in dimension 1, got 0"),
        ({"box": (8, 4)}, "a row of the box must be a multiple of 16 bytes, got 8"),
        ({"box": (8, 64), "swizzle": 64}, "a row of the box must be at most the 64 bytes of the swizzle, got 128"),
        ({"box": (8, 8), "strides": (20, 1)}, "stride of dimension 1 must be a multiple of 16 bytes .* got 40"),
        ({"box": (8, 8), "element_strides": (9, 1)}, "element stride must be 1 to 8 in dimension 1, got 9"),
        ({"box": (8, 8), "fill_nan": True}, "NaN fill must come with a floating-point type"),
        ({"box": (8, 8), "sizes": (2**33, 8)}, r"size of dimension 1 must be below 2\*\*32"),
        ({"box": (1,) * 5 + (8,), "sizes": (1,) * 5 + (8,), "strides": (8,) * 5 + (1,)}, "rank must be 1 to 5, got 6"),
    ],
    ids=["box", "box_0", "row", "swizzle", "stride", "element_stride", "nan", "size", "rank"],
)  # fmt: skip
def test_maps_that_the_driver_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        ptx.encode_tiled(numbers(20, 64), **options)


def test_a_map_at_an_odd_address_is_refused():
    with pytest.raises(ValueError, match="address must be a multiple of 16"):
        ptx.encode_tiled(numbers(20, 64)[:, 4:], (8, 8))


@SCHEDULES
@pytest.mark.parametrize(
    "edit, message",
    [
        (lambda text: text.replace(WAIT, "bar.sync 0;"), "race|nobody has written"),
        (lambda text: text.replace("_, [%r21], 512", "_, [%r21], 528"), r"DEADLOCK(.*\n)+.*16 bytes still expected"),
        (lambda text: text.replace("[%r20], [%map", "[%r20+64], [%map"), "misaligned"),
        (lambda text: text.replace("[%r20], [%map", "[%r20+8064], [%map"), "out of bounds"),
        (lambda text: text.replace("tensor.2d", "tensor.1d").replace("{16, 4}", "{16}"),
         "the tensor map has 2 dimensions, the instruction 1"),
        (lambda text: text.replace("[%map, {16, 4}]", "[%out, {16, 4}]"),
         "must not be 0|is this a tensor map|misaligned|out of bounds"),
    ],
    ids=["no_wait", "bytes", "misaligned", "bounds", "rank", "no_map"],
)  # fmt: skip
def test_misuse(edit, message, schedule):
    with pytest.raises(ptx.Fault, match=message):
        load(numbers(20, 64), (8, 32), (4, 16), schedule=schedule, edit=edit)


def test_a_map_of_more_than_the_tensor_is_found():
    x = numbers(20, 64)
    with pytest.raises(ptx.Fault, match="(?s)out of bounds.*cp.async.bulk.tensor"):
        load(x, (8, 32), (16, 0), sizes=(24, 64))


REPLACE = "@%p7 tensormap.replace.tile.{field}.shared::cta.b1024.b{bits} [%r20]{order}, {value};"
FIELDS = [
    ("global_address", 64, "", "%x"), ("rank", 32, "", 1), ("box_dim", 32, ", 0", 32), ("box_dim", 32, ", 1", 8),
    ("global_dim", 32, ", 0", 64), ("global_dim", 32, ", 1", 20), ("global_stride", 64, ", 0", 128),
    ("element_stride", 32, ", 0", 1), ("element_stride", 32, ", 1", 1), ("elemtype", 32, "", 1),
    ("interleave_layout", 32, "", 0), ("swizzle_mode", 32, "", 2), ("fill_mode", 32, "", 0),
]  # fmt: skip
MADE = (
    "shl.b32 %r1, %t, 2; add.u32 %r1, %r20, %r1; st.shared.b32 [%r1], 0; bar.sync 0;"
    + "\n".join(REPLACE.format(field=f, bits=b, order=o, value=v) for f, b, o, v in FIELDS)
    + "bar.sync 0;\n"
    "tensormap.cp_fenceproxy.global.shared::cta.tensormap::generic.release.gpu.sync.aligned [%map], [%r20], 128;\n"
    "fence.proxy.tensormap::generic.acquire.gpu [%map], 128;\nbar.sync 0; fence.proxy.async.shared::cta;"
)


def device_made(text, schedule="default", version="8.7"):
    x, out = numbers(20, 64), np.zeros(512, np.uint8)
    space = torch.zeros(256, dtype=torch.uint8)
    start = -space.data_ptr() % 64
    step = LOAD.format(bytes=512, rank=2, to="shared::cluster", mode="", map="%map", at="16, 4")
    body = HEAD + text + step + WAIT + DUMP.format(bytes=512)
    text = kernel(body, "x map out").replace(".version 8.7", f".version {version}")
    launch(text, [x, space[start : start + 128], out], schedule=schedule)
    return out, swizzled(x[4:12, 16:48].contiguous().view(torch.uint8).numpy(), 64)


@SCHEDULES
def test_maps_made_by_the_kernel(schedule):
    got, expected = device_made(MADE, schedule)
    assert (got == expected).all()


def test_strides_of_older_ptx_are_in_units_of_16_bytes():
    got, expected = device_made(MADE.replace("b64 [%r20], 0, 128;", "b64 [%r20], 0, 8;"), version="8.4")
    assert (got == expected).all()


@SCHEDULES
@pytest.mark.parametrize(
    "old, new, message",
    [
        ("fence.proxy.tensormap::generic.acquire.gpu [%map], 128;", "", "without fence.proxy.tensormap"),
        ("box_dim.shared::cta.b1024.b32 [%r20], 0, 32", "box_dim.shared::cta.b1024.b32 [%r20], 0, 4",
         "a row of the box must be a multiple of 16 bytes, got 8"),
        ("swizzle_mode.shared::cta.b1024.b32 [%r20], 2", "swizzle_mode.shared::cta.b1024.b32 [%r20], 9",
         "swizzle_mode of 9, at most 3"),
    ],
    ids=["no_fence", "row", "value"],
)  # fmt: skip
def test_maps_made_wrongly(old, new, message, schedule):
    assert old in MADE
    with pytest.raises(ptx.Fault, match=message):
        device_made(MADE.replace(old, new), schedule)


IN_PLACE = (
    "@%p7 tensormap.replace.tile.box_dim.global.b1024.b32 [%map], 1, 4;"
    "fence.proxy.tensormap::generic.release.gpu; fence.proxy.tensormap::generic.acquire.gpu [%map], 128; bar.sync 0;"
)


@SCHEDULES
def test_maps_changed_in_global_memory(schedule):
    x, out = numbers(20, 64), np.zeros(256, np.uint8)
    space = torch.zeros(256, dtype=torch.uint8)
    place = space[-space.data_ptr() % 64 :][:128]
    place.copy_(torch.frombuffer(bytearray(ptx.encode_tiled(x, (8, 32))), dtype=torch.uint8))
    step = LOAD.format(bytes=256, rank=2, to="shared::cluster", mode="", map="%map", at="16, 4")
    text = HEAD + IN_PLACE + step + WAIT + DUMP.format(bytes=256)
    launch(kernel(text, "map out"), [place, out], memory=[x], schedule=schedule)
    assert (out == x[4:8, 16:48].contiguous().view(torch.uint8).numpy().ravel()).all()
    with pytest.raises(ptx.Fault, match="without fence.proxy.tensormap"):
        launch(kernel(text.replace(IN_PLACE[IN_PLACE.index("fence") :], ""), "map out"), [place, out], memory=[x],
               schedule=schedule)  # fmt: skip
