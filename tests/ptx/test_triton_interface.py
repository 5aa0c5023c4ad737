"""`ptx.run`: how arguments are bound, what is compiled and kept, and what messages say."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl

from fusedops._core import fingerprint
from fusedops._core.binding import bind
from fusedops.testing import ptx
from fusedops.testing.ptx import compiler
from tests.ptx.kernels import elementwise, interface

HEAD = ".version 8.7\n.target sm_90a\n.address_size 64\n"
STORE = """
.visible .entry {name}(.param .u64 out_ptr, .param .u32 value)
{{
    .reg .b32 %r<2>; .reg .b64 %rd<2>;
    ld.param.b64 %rd1, [out_ptr]; ld.param.b32 %r1, [value];
    st.global.b32 [%rd1], %r1;
    ret;
}}
"""


def add(x, n, **options):
    out = torch.empty_like(x)
    ptx.run(elementwise.add_kernel, (1,), x, x, out, n, BLOCK=128, schedules="default", **options)
    return out


def test_every_kind_of_argument():
    out = torch.zeros(8, dtype=torch.float64)
    ptx.run(interface.arguments_kernel, (1,), out, None, 1, 1 << 40, True, 0.1, 0.1, 0.1, text="yes")
    floats = [torch.tensor(0.1, dtype=dtype).item() for dtype in (torch.float32, torch.float16, torch.float64)]
    assert out.tolist() == [1, 1, 1 << 40, 1, *floats, 1]


def test_binding_specialises_as_a_launch_does():
    x = torch.zeros(64)
    bound = bind(interface.arguments_kernel, "sm_80", (x, x[1:], 1, 32, False, 0.5, 1.0, 2.0), {"text": "no"})
    assert list(bound.signature.values()) == [
        "*fp32", "*fp32", "constexpr", "i32", "u1", "fp32", "fp16", "fp64", "constexpr",
    ]  # fmt: skip
    assert {path for path, known in bound.attributes.items() if known} == {
        (0,),
        (3,),
    }  # x[1:] is not aligned, 32 is a multiple of 16
    assert bound.constants == {(2,): 1, (8,): "no"}
    assert bound.options.num_warps == 4


def test_grids_of_every_form():
    expected = torch.tensor([[[100 * z + 10 * y + x + 5 for x in range(4)] for y in range(3)] for z in range(2)])
    out = torch.zeros(2, 3, 4, dtype=torch.int32)
    ptx.run(interface.grid_kernel, (4, 3, 2), out, EXTRA=5)
    assert torch.equal(out, expected.int())
    ptx.run(interface.grid_kernel, lambda meta: (meta["EXTRA"],), out, EXTRA=1, schedules="default")
    assert out[0, 0, 0] == 1
    ptx.run(interface.grid_kernel, (4, 0), out, EXTRA=100)
    assert out.max() < 200


def test_heuristics_choose():
    out = torch.zeros(1, dtype=torch.int32)
    ptx.run(interface.heuristic_kernel, (1,), out, 100)
    assert out.item() == 128


def test_each_schedule_starts_from_the_same_memory():
    x = torch.zeros(5)[::2]
    ptx.run(interface.increment_kernel, (1,), x)
    assert x.tolist() == [1, 0, 0]


def test_results_that_depend_on_the_order_are_reported():
    counter, out = torch.zeros(1, dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
    with pytest.raises(ptx.Fault, match=r"(?s)ticket_kernel.*out_ptr\[0\] is 1 and was 0 .*behind, before default"):
        ptx.run(interface.ticket_kernel, (2,), counter, out)


def test_a_fault_names_argument_line_kernel_and_schedule():
    with pytest.raises(ptx.Fault) as caught:
        add(torch.zeros(100), 120)
    for word in ("x_ptr", "add_kernel", "elementwise.py:12", "schedule: default"):
        assert word in str(caught.value)


def test_read_only_arguments():
    x = torch.zeros(100)
    with pytest.raises(ptx.Fault, match="out_ptr"):
        add(x, 100, read_only=("out_ptr",))
    with pytest.raises(ValueError, match="y_prt"):
        add(x, 100, read_only=("y_prt",))
    add(x, 100, read_only=(0, "y_ptr"))


@pytest.mark.parametrize(
    "options, error, words",
    [
        ({}, TypeError, "BLOCK"),
        ({"BLOCK": 16, "num_wraps": 2}, TypeError, "num_wraps"),
        ({"BLOCK": 16, "target": "hopper"}, ValueError, "target must look like"),
        ({"BLOCK": 16, "schedules": "fast"}, ValueError, "no schedule 'fast'"),
        ({"BLOCK": 16, "checks": ("speed",)}, ValueError, "checks must be"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_misuse_is_refused(options, error, words):
    x = torch.zeros(16)
    with pytest.raises(error, match=words):
        ptx.run(elementwise.add_kernel, (1,), x, x, x, 16, **options)
    with pytest.raises(TypeError, match="kernel must be"):
        ptx.run(add, (1,), x)


def test_what_triton_refuses_is_told_in_its_words():
    with pytest.raises(ptx.CompileError, match=r"(?s)refused_kernel.*power of 2"):
        ptx.run(interface.refused_kernel, (1,), torch.zeros(4))


@triton.jit
def local_helper(x):
    return x * 2


@triton.jit
def kernel_of_this_file(x_ptr):
    tl.store(x_ptr, local_helper(tl.load(x_ptr)))


def test_kernels_of_test_files():
    x = torch.full((1,), 21.0)
    ptx.run(kernel_of_this_file, (1,), x)
    assert x.item() == 42


def test_kernels_inside_functions_are_refused_where_a_child_compiles():
    @triton.jit
    def inner(x_ptr):
        tl.store(x_ptr, 1.0)

    with pytest.raises(ValueError, match="inner stands inside a function"):
        ptx.run(inner, (1,), torch.zeros(1))


def test_a_compiled_kernel_is_found_on_disk(monkeypatch):
    add(torch.zeros(8), 8)
    monkeypatch.setattr(compiler, "_known", {})
    monkeypatch.setattr(compiler, "_compile_anywhere", None)
    add(torch.zeros(8), 8)


def test_the_fingerprint_follows_globals_and_called_functions(monkeypatch):
    before = fingerprint.of(interface.global_kernel), fingerprint.of(kernel_of_this_file)
    assert before == (fingerprint.of(interface.global_kernel), fingerprint.of(kernel_of_this_file))
    monkeypatch.setattr(interface, "OFFSET", tl.constexpr(4))
    monkeypatch.setitem(globals(), "local_helper", interface.increment_kernel)
    assert fingerprint.of(interface.global_kernel) != before[0]
    assert fingerprint.of(kernel_of_this_file) != before[1]


def test_a_global_changed_after_the_import_is_refused(monkeypatch):
    monkeypatch.setattr(interface, "OFFSET", tl.constexpr(5))
    with pytest.raises(ptx.CompileError, match="changed after the import"):
        ptx.run(interface.global_kernel, (1,), torch.zeros(1))


def test_a_process_that_does_not_interpret_compiles_itself():
    program = (
        "import torch\nfrom fusedops._core.binding import bind\n"
        "from fusedops.testing import ptx\nfrom fusedops.testing.ptx import compiler\n"
        "from tests.ptx.kernels.interface import global_kernel\n"
        "binding = bind(global_kernel, 'sm_80', (torch.zeros(1),), {})\n"
        "assert '.entry global_kernel' in compiler.compile_here(binding)[0]\n"
        "x = torch.zeros(1)\nptx.run(global_kernel, (1,), x)\nassert x.item() == 3\n"
    )
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment)


def test_ptx_text_and_files(tmp_path):
    text = HEAD + STORE.format(name="first") + STORE.format(name="second")
    out = torch.zeros(1, dtype=torch.int32)
    ptx.run(text, (1,), out, 7, kernel_name="second", block=(1,))
    assert out.item() == 7
    path = tmp_path / "store.ptx"
    path.write_text(HEAD + STORE.format(name="only"))
    ptx.run(path, 1, out.numpy(), 8, block=(1,))
    assert out.item() == 8
    for options, words in ({"block": (1,)}, "kernel_name must be"), ({"kernel_name": "first"}, "block must be given"):
        with pytest.raises(ValueError, match=words):
            ptx.run(text, (1,), out, 7, **options)
