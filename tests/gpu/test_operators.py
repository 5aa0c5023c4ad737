"""Every public operator on a GPU: accuracy, determinism, streams, graphs, size. Operators are found by name."""

import inspect

import pytest
import torch

import fusedops
from fusedops import counters, fallbacks
from fusedops._core import env
from fusedops._core.explain import operator_call
from fusedops.testing import assert_accurate
from tests.gpu.common import DEVICE, needs_gpu, randn, same_bits, sized, wide
from tests.ops.common import DTYPES, as_tuple, opcheck

pytestmark = pytest.mark.gpu

SHAPES = sized([(4, 3, 8, 64), (2, 33, 5, 80), (1, 2048, 32, 128)], [(2, 1, 2, 16), (1, 3, 3, 24)])
SHAPE = sized((2, 33, 4, 64), (1, 3, 2, 16))
OPERATORS = [name for name in fusedops.OPERATORS if not getattr(torch.ops.fusedops, name).default._schema.is_mutable]
TO_FLOATS = [name for name in OPERATORS if "quantize" not in name]  # those that give codes have a file
# attention's gradients have a file; products of quantised numbers have none
WITH_GRADIENTS = [name for name in TO_FLOATS if "attention" not in name and "matmul" not in name]


def call(name, shape, dtype, seed=0):
    """A registered operator and arguments on the GPU, as the public function would pass them."""
    torch.manual_seed(seed)
    args, kwargs = fusedops._core.register.operators()[name].example(shape, dtype, DEVICE)
    return operator_call(getattr(fusedops, name), *args, **kwargs)


def truth(operator, args, dtype):
    """The reference in float64 on the same stored values."""
    reference = getattr(operator._selector.module("reference"), operator.name)
    rounding = {"round_to": dtype} if "round_to" in inspect.signature(reference).parameters else {}
    return as_tuple(reference(*map(wide, args), **rounding))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", TO_FLOATS)
def test_accuracy_and_determinism(name, dtype, shape):
    if name in ("attention", "attention_varlen"):
        shape = (*shape[:2], min(shape[2], 4), shape[3])  # the truth holds all scores in float64
    operator, args = call(name, shape, dtype)
    with env.override("FUSEDOPS_BACKEND", "triton"):
        outs = as_tuple(operator(*args))
        for _ in range(3):
            assert all(same_bits(a, b) for a, b in zip(outs, as_tuple(operator(*args)), strict=True))
    for out, wanted in zip(outs, truth(operator, args, dtype), strict=True):
        assert_accurate(out, wanted, zeros=False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", WITH_GRADIENTS)
def test_gradients_equal_the_interpreted_formula(name, dtype):
    """The backward kernel against torch's composition of the same formula in float32."""
    operator, args = call(name, SHAPE, dtype)
    leaves = [a.detach().requires_grad_() if isinstance(a, torch.Tensor) and a.dtype == dtype else a for a in args]
    if name == "rotary":
        leaves[2:4] = [leaf.detach() for leaf in leaves[2:4]]
    wanted = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.requires_grad]
    found = {}
    for backend in ("triton", "torch"):
        with env.override("FUSEDOPS_BACKEND", backend):
            outs = as_tuple(operator(*leaves))
            torch.manual_seed(1)
            found[backend] = torch.autograd.grad(outs, wanted, [torch.randn_like(out) for out in outs])
    epsilon = torch.finfo(dtype).eps
    for fused, plain in zip(found["triton"], found["torch"], strict=True):
        scale = plain.float().abs().max().item()
        torch.testing.assert_close(fused, plain, rtol=4 * epsilon, atol=max(8 * epsilon, 1e-5) * scale)


@needs_gpu
@pytest.mark.parametrize("name", OPERATORS)
def test_public_call_stays_on_the_fused_path(name):
    args, kwargs = fusedops._core.register.operators()[name].example((2, 5, 4, 64), torch.bfloat16, "cuda")
    getattr(fusedops, name)(*args, **kwargs)
    assert counters() == {(name, "triton"): 1} and fallbacks() == {}


@needs_gpu
@pytest.mark.parametrize("name", OPERATORS)
def test_graph_replay_equals_eager(name):
    operator, args = call(name, SHAPE, torch.bfloat16)
    operator(*args)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = as_tuple(operator(*args))
    _, others = call(name, SHAPE, torch.bfloat16, seed=1)
    for old, new in zip(args, others, strict=True):
        if isinstance(old, torch.Tensor):
            old.copy_(new)
    graph.replay()
    assert all(same_bits(a, b) for a, b in zip(captured, as_tuple(operator(*args)), strict=True))


@needs_gpu
@pytest.mark.parametrize("name", OPERATORS)
def test_runs_on_the_current_stream(name):
    """B40, B41: a delayed producer on a side stream (vllm-project/vllm#13632, NVIDIA/cudnn-frontend#483)."""
    operator, args = call(name, SHAPE, torch.bfloat16)
    expected = [out.clone() for out in as_tuple(operator(*args))]
    late = [torch.empty_like(a) if isinstance(a, torch.Tensor) else a for a in args]  # NaN, or the largest integer
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(50_000_000)
        for target, source in zip(late, args, strict=True):
            if isinstance(target, torch.Tensor):
                target.copy_(source)
        outs = as_tuple(operator(*late))
    torch.cuda.synchronize()
    assert all(same_bits(a, b) for a, b in zip(outs, expected, strict=True))


@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck(name):
    operator, args = call(name, SHAPE, torch.float32)
    opcheck(operator.name, *args)


@pytest.mark.parametrize("dtype", DTYPES)
def test_in_place_as_out_of_place(dtype):
    x, residual, weight = (randn(*size, dtype=dtype, seed=i) for i, size in enumerate([SHAPE, SHAPE, SHAPE[-1:]]))
    with env.override("FUSEDOPS_BACKEND", "triton"):
        wanted = fusedops.add_rms_norm(x, residual, weight)
        fusedops.add_rms_norm_(x, residual, weight)
    assert all(map(torch.equal, (x, residual), wanted))


@needs_gpu
def test_more_than_two_to_the_31_elements():
    """B12: triton-lang/triton#832, on both the elementwise and the row-wise way."""
    x = torch.randn(2**20 + 3, 2048, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(2048, device="cuda", dtype=torch.bfloat16)
    assert torch.equal(fusedops.rms_norm(x, weight)[-2:], fusedops.rms_norm(x[-2:], weight))
    assert torch.equal(fusedops.silu_mul(x, x)[-2:], fusedops.silu_mul(x[-2:], x[-2:]))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs: torch.cuda.device_count() < 2")
@pytest.mark.parametrize("name", OPERATORS)
def test_another_device_than_the_current_one(name):
    """B42: a tensor on cuda:1 while cuda:0 is current (triton-lang/triton#2441)."""
    operator, args = call(name, SHAPE, torch.bfloat16)
    expected = as_tuple(operator(*args))
    moved = [a.to("cuda:1") if isinstance(a, torch.Tensor) else a for a in args]
    outs = as_tuple(operator(*moved))
    assert torch.cuda.current_device() == 0
    assert all(same_bits(a.cpu(), b.cpu()) for a, b in zip(outs, expected, strict=True))
