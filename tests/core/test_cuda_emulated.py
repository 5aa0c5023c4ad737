"""CUDA kernels in the emulator, by the launch that a GPU gets; and which kernels FUSEDOPS_BACKEND=emulate runs."""

import ctypes
import sys
import types

import pytest
import torch

from fusedops import counters
from fusedops._core import cuda, device, env
from fusedops._core.cuda import images
from fusedops._core.dispatch import Selector
from fusedops.testing import ptx

PTX = """
.version 8.0
.target sm_80
.address_size 64
.visible .entry fusedops_add(.param .u64 x, .param .u64 out, .param .u32 N, .param .f32 value)
{
  .reg .pred %p;
  .reg .b32 %r<6>;
  .reg .f32 %f<3>;
  .reg .b64 %a<6>;
  .shared .align 4 .b8 fixed[4];
  mov.u32 %r1, %ctaid.x;
  mov.u32 %r2, %ntid.x;
  mov.u32 %r3, %tid.x;
  mad.lo.s32 %r4, %r1, %r2, %r3;
  ld.param.u32 %r5, [N];
  setp.ge.s32 %p, %r4, %r5;
  @%p bra DONE;
  ld.param.u64 %a1, [x];
  ld.param.u64 %a2, [out];
  mul.wide.s32 %a3, %r4, 4;
  add.s64 %a4, %a1, %a3;
  add.s64 %a5, %a2, %a3;
  ld.param.f32 %f2, [value];
  ld.global.f32 %f1, [%a4];
  add.f32 %f1, %f1, %f2;
  st.global.f32 [%a5], %f1;
DONE:
  ret;
}
"""
pytestmark = [
    pytest.mark.emulated,
    pytest.mark.skipif(ptx.missing() is not None, reason=f"the emulator cannot be built here: {ptx.missing()}"),
]


@pytest.fixture
def kernel(monkeypatch):
    asked = []
    monkeypatch.setattr(images, "ptx", lambda name, target: asked.append((name, target)) or PTX)
    kernel = cuda.Kernel("add", "fusedops_add", "sm_80")
    kernel.asked = asked
    return kernel


def add(kernel, x, out, value=2.0, **options):
    arguments = [x, out, ctypes.c_int32(x.numel()), ctypes.c_float(value)]
    kernel.launch((3, 1, 1), (32, 1, 1), arguments, **options)


def test_a_diverted_launch_runs_on_cpu_tensors(kernel):
    x, out = torch.arange(70.0), torch.zeros(70)
    with ptx.diverted(target="sm_80"):
        add(kernel, x, out)
    assert torch.equal(out, x + 2) and kernel.asked == [("add", "sm_80")]


def test_the_emulator_checks_the_launch(kernel):
    with ptx.diverted(target="sm_80"), pytest.raises(ptx.Fault, match="out"):
        add(kernel, torch.zeros(70), torch.zeros(69))
    with ptx.diverted(target="sm_80"), pytest.raises(ptx.Fault, match="x|null|0x"):
        add(kernel, torch.zeros(70), None)


def test_other_kernels_of_a_diverted_block_are_noted(kernel):
    from fusedops._core.diversion import diverted

    seen = []
    with diverted(lambda *launch: seen.append(launch)):
        add(kernel, torch.zeros(70), torch.zeros(70), shared=64, cluster=(2, 1, 1))
    ((noted, grid, arguments, keywords),) = seen
    assert noted is kernel and grid == (3, 1, 1) and len(arguments) == 4
    assert keywords == {"block": (32, 1, 1), "shared": 64, "cluster": (2, 1, 1)}


def test_tensor_maps_of_the_emulator_lead_to_their_tensor():
    matrix = torch.zeros(40, 64, dtype=torch.bfloat16)
    with ptx.diverted(target="sm_90a"):
        mapped = cuda.tensor_map(matrix, (8, 32), swizzle=64)
    assert mapped.tensor is matrix and mapped.request.box == (32, 8) and mapped.request.swizzle == 2


@pytest.fixture
def operator(kernel, monkeypatch):
    """A selector of an operator whose CUDA kernel takes up to 70 elements, and whose Triton one does the rest."""
    name = "planted_operator_package"

    def made(add_to, supports):
        module = types.ModuleType("implementation")
        module.add, module.supports = add_to, supports
        return module

    def by_cuda(x):
        out = torch.empty_like(x)
        add(kernel, x, out, 1.0)
        return out

    modules = {
        "_cuda": made(by_cuda, lambda x: None if x.numel() <= 70 else "at most 70 elements"),
        "_triton": made(lambda x: x - 1, lambda x: None if x.dim() == 1 else "one dimension"),
    }
    modules["_torch"] = made(torch.clone, None)
    monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    for module, content in modules.items():
        monkeypatch.setitem(sys.modules, f"{name}.{module}", content)
    return Selector("add", name, ("cuda", "triton", "torch", "reference"), torch.empty_like)


def test_emulate_runs_the_first_kernel_that_supports_the_call(operator):
    with env.override("FUSEDOPS_BACKEND", "emulate"):
        x = torch.arange(64.0)
        assert torch.equal(operator.run(x), x + 1)
        assert operator.module("emulate", (x,)) is operator.module("cuda")
        longer = torch.arange(99.0)
        assert torch.equal(operator.run(longer), longer - 1)
        assert operator.module("emulate", (longer,)) is operator.module("triton")
        assert counters() == {("add", "emulate"): 2}
        with pytest.raises(RuntimeError, match="emulate: cuda: at most 70 elements; triton: one dimension"):
            operator.run(torch.zeros(9, 9))


def test_cuda_is_tried_first_on_a_gpu_and_judged_by_its_own_rule(operator, monkeypatch):
    limits = device.TARGETS["sm_80"]
    assert operator.select((torch.zeros(70),), limits) == ("cuda", [])
    assert operator.select((torch.zeros(71),), limits) == ("triton", [("cuda", "at most 70 elements")])
    old = operator.select((torch.zeros(70),), device.TARGETS["sm_75"])[1]
    assert old[0] == ("cuda", "needs compute capability 8.0, the device has 7.5")
    with env.override("FUSEDOPS_BACKEND", "cuda"):
        with pytest.raises(RuntimeError, match="cuda: CUDA kernels run on CUDA tensors, got cpu"):
            operator.run(torch.zeros(70))


def test_an_operator_of_cuda_kernels_alone_is_emulated(operator):
    alone = Selector("add", operator.package, ("cuda", "torch"), torch.empty_like)
    with env.override("FUSEDOPS_BACKEND", "emulate"):
        x = torch.arange(64.0)
        assert torch.equal(alone.run(x), x + 1)
        with pytest.raises(RuntimeError, match=r"emulate: at most 70 elements\)"):
            alone.run(torch.zeros(99))
