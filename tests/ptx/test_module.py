"""PTX text, launches and schedules: what is read, what is refused, and with which words."""

import numpy as np
import pytest
import torch

from fusedops.testing import ptx

HEAD = ".version 8.7\n.target sm_90a\n.address_size 64\n"

COUNTER = (
    HEAD
    + """
.visible .entry count(.param .u64 x_ptr, .param .u64 out_ptr, .param .u32 n)
.reqntid 64
{
    .reg .pred %p<3>; .reg .b32 %r<4>; .reg .b64 %rd<3>;
    ld.param.b64 %rd1, [x_ptr]; ld.param.b64 %rd2, [out_ptr]; ld.param.b32 %r1, [n];
    mov.u32 %r2, %tid.x;
    setp.lt.s32 %p1, %r2, %r1;
    @!%p1 bra $END;                     // lanes part here
    {
        .reg .b32 %r2;                  // hides the outer one
        mov.u32 %r2, 0;
    $LOOP:
        add.s32 %r2, %r2, 1;
        setp.lt.s32 %p2, %r2, 7;
        @%p2 bra $LOOP;
        mov.u32 %r3, %r2;
    }
    ld.global.b32 %r1, [%rd1];
    add.s32 %r1, %r1, %r3;
    st.global.b32 [%rd2+4], %r1;
$END:
    ret;
}
"""
)


def kernel(body, parameters="", name="k"):
    return f"{HEAD}.visible .entry {name}({parameters})\n{{\n{body}\n}}\n"


def launch(text, arguments=(), name="k", block=(32,), **options):
    return ptx.load(text).launch(name, (1,), block, arguments, **options)


@pytest.mark.parametrize("schedule", ptx.SCHEDULES)
def test_scopes_labels_and_parted_lanes(schedule):
    x, out = torch.tensor([100], dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
    steps = launch(COUNTER, [x, out, 48], "count", (64,), schedule=schedule)
    assert out.tolist() == [0, 107]
    # Six before the branch, 1 + 3 * 7 + 1 for the loop, four after it; lanes that left early meet the others at `ret`.
    assert steps == 2 * 33 or schedule.startswith("random")


def test_entries_are_described():
    entry = ptx.load(COUNTER).kernels["count"]
    assert [(p.type, p.size, p.name) for p in entry.parameters] == [
        ("u64", 8, "x_ptr"), ("u64", 8, "out_ptr"), ("u32", 4, "n"),
    ]  # fmt: skip
    assert entry.required_threads == (64, 1, 1) and entry.required_cluster is None


@pytest.mark.parametrize(
    "text, message",
    [
        (kernel("frobnicate.b32 %r1;"), r"k, PTX line 6: not supported: frobnicate\.b32 %r1 \(unknown instruction\)"),
        (kernel(".reg .b32 %r<2>;\nadd.wobble.s32 %r1, %r1, 1;"), r"PTX line 7: not supported: .*\(\.wobble\)"),
        (kernel("add.s32 %r1, %r1, 1;"), r"%r1 is not a register"),
        (kernel(".reg .b64 %rd<2>;\nadd.s32 %rd1, %rd1, 1;"), r"the width of %rd1"),
        (kernel(".reg .b32 %r<2>;\nadd.s32 %r1, %r0;"), "too few operands"),
        (kernel(".reg .b32 %r<2>;\nmov.u32 %r1, nothing;"), "unknown name nothing"),
        (kernel("bra nowhere;"), "unknown label nowhere"),
        (kernel(".reg .b32 %r<2>;\nadd.s32 %r1, %r1, 0x;"), "PTX line 7: not a number"),
        (kernel("ret"), "PTX line 7: unexpected '}"),
        (HEAD + ".visible .entry k() {", "unclosed '{'"),
        (HEAD + ".wrong 1;", "PTX line 4: unknown directive .wrong"),
        (HEAD + ".func f() { ret; }", "functions that are not inlined"),
    ],
)
def test_text_that_is_not_understood_is_refused_with_its_line(text, message):
    with pytest.raises(ptx.Fault, match=message):
        ptx.load(text)


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"name": "other"}, ValueError, "no kernel 'other'; there are count"),
        ({"arguments": [1]}, ValueError, "takes 3 arguments, got 1"),
        ({"block": (32,)}, ptx.Fault, "must be launched with 64x1x1 threads, got 32x1x1"),
        ({"block": (0,)}, ValueError, "positive numbers"),
        ({"schedule": "wrong"}, ValueError, "no schedule 'wrong'; there are all, default"),
        ({"checks": ("bounds", "wrong")}, ValueError, "checks must be"),
        ({"cluster": (2,)}, ptx.Fault, "not a multiple of the cluster"),
        ({"shared": 1 << 20}, ptx.Fault, "1048576 bytes of shared memory, a block has 232448"),
        ({"arguments": [None, None, 1 << 40]}, ValueError, "does not fit parameter n of 4 bytes"),
        ({"arguments": [b"123", None, 1]}, ValueError, "parameter x_ptr has 8 bytes, got 3"),
        ({"arguments": [None, None, torch.zeros(1)]}, ValueError, "parameter n has 4 bytes, a pointer has 8"),
        ({"max_steps": 10}, ptx.Fault, "no end after 10 instructions"),
    ],
)
def test_launches_that_are_wrong_are_refused(changes, error, message):
    x, out = torch.zeros(1, dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
    options = {"text": COUNTER, "arguments": [x, out, 48], "name": "count", "block": (64,), **changes}
    with pytest.raises(error, match=message):
        launch(**options)
    assert out.tolist() == [0, 0]


def test_a_fault_names_kernel_block_warp_line_and_statement():
    x, out = torch.zeros(1, dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
    line = COUNTER[: COUNTER.index("st.global")].count("\n") + 1
    where = rf"in count, block \(0,0,0\) warp 0, PTX line {line}: st\.global\.b32 \[%rd2\+4\], %r1"
    with pytest.raises(ptx.Fault, match=where):
        launch(COUNTER, [x, out[:1], 48], "count", (64,))


STORE = kernel(
    ".reg .b64 %rd<2>; .reg .b32 %r<2>; ld.param.u64 %rd1, [out]; ld.param.{type} {register}, [value];"
    "st.global.{type} [%rd1], {register}; ret;",
    ".param .u64 out, .param .{declared} value",
)


@pytest.mark.parametrize(
    "declared, kind, register, value, dtype",
    [
        ("u32", "b32", "%r1", -5, torch.int32), ("f32", "b32", "%r1", 0.5, torch.float32),
        ("b32", "b32", "%r1", 0.5, torch.float32), ("f32", "b32", "%r1", 3, torch.float32),
        ("u64", "b64", "%rd0", -(2**40), torch.int64), ("f64", "b64", "%rd0", 0.1, torch.float64),
        ("u32", "b32", "%r1", 2**32 - 1, torch.uint32),
    ],
)  # fmt: skip
def test_arguments_become_the_parameters_type(declared, kind, register, value, dtype):
    out = torch.zeros(1, dtype=dtype)
    text = STORE.replace("{type}", kind).replace("{register}", register).replace("{declared}", declared)
    launch(text, [out, value])
    assert out.item() == value


def test_numpy_arrays_are_memory_too():
    out = np.zeros(1, np.int32)
    launch(STORE.replace("{type}", "b32").replace("{register}", "%r1").replace("{declared}", "u32"), [out, 7])
    assert out[0] == 7


def test_special_registers():
    names = ["%tid.x", "%tid.y", "%ntid.x", "%ctaid.x", "%nctaid.y", "%laneid", "%warpid", "%lanemask_lt", "%smid"]
    body = ".reg .b32 %r<9>; .reg .b64 %rd<2>; ld.param.u64 %rd1, [out];\n"
    body += "mov.u32 %r1, %tid.y; mov.u32 %r2, %tid.x; .reg .pred %p; setp.lt.u32 %p, %r1, 3; @%p bra $END;"
    body += "setp.lt.u32 %p, %r2, 10; @%p bra $END;"
    for i, name in enumerate(names):
        body += f"mov.u32 %r3, {name}; st.global.b32 [%rd1+{4 * i}], %r3;\n"
    out = torch.zeros(len(names), dtype=torch.int32)
    ptx.load(kernel(body + "$END: ret;", ".param .u64 out")).launch("k", (1, 1), (11, 4), [out])
    assert out.tolist() == [10, 3, 11, 0, 1, 11, 1, (1 << 11) - 1, 0]


def test_a_loop_without_end_between_lanes_is_given_up():
    body = ".reg .pred %p; .reg .b32 %r; mov.u32 %r, %laneid; setp.lt.u32 %p, %r, 16; $A: @%p bra $A; ret;"
    with pytest.raises(ptx.Fault, match="no end after 5000 instructions"):
        launch(kernel(body), max_steps=5000)


def test_every_instruction_names_its_section():
    known = ptx.instructions()
    assert {"add", "bra", "ld", "setp"} <= set(known)
    assert all(section.startswith("9.7.") for sections in known.values() for section in sections)
    assert known["add"] == ("9.7.1.1", "9.7.3.3", "9.7.4.1")  # integers, floats, halves


def test_the_alignment_of_a_pointer_is_of_what_it_points_to():
    kernel = (
        HEAD
        + """
.visible .entry copy(.param .u32 n, .param .u64 .ptr .global .align 1 out_ptr) {
    .reg .b32 %r<2>; .reg .b64 %rd<2>;
    ld.param.b64 %rd1, [out_ptr]; ld.param.b32 %r1, [n];
    st.global.b32 [%rd1], %r1;
    ret;
}
"""
    )
    out = torch.zeros(1, dtype=torch.int32)
    ptx.load(kernel).launch("copy", (1,), (1,), [7, out])
    assert out.item() == 7
