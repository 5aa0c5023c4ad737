"""fusedops.nn and fusedops.nn.functional stand in for torch's."""

import copy
import inspect

import pytest
import torch

import fusedops
import fusedops.nn.functional as F
from fusedops import counters
from fusedops.testing import assert_accurate, make_tensor

PAIRS = [
    (fusedops.nn.RMSNorm, torch.nn.RMSNorm, {"eps": 1e-6}),
    (fusedops.nn.RMSNorm, torch.nn.RMSNorm, {"eps": 1e-5, "elementwise_affine": False}),
    (fusedops.nn.LayerNorm, torch.nn.LayerNorm, {}),
    (fusedops.nn.LayerNorm, torch.nn.LayerNorm, {"bias": False}),
    (fusedops.nn.LayerNorm, torch.nn.LayerNorm, {"elementwise_affine": False, "eps": 1e-3}),
]


def randomised(module):
    for index, parameter in enumerate(module.parameters()):
        parameter.data.copy_(make_tensor(parameter.shape, parameter.dtype, seed=index))
    return module


@pytest.mark.parametrize("ours, torchs, options", PAIRS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(24,), (4, 6)])
def test_modules_equal_torchs(ours, torchs, options, dtype, shape):
    """Same values, gradients, state dict in both directions, and our operator is what ran."""
    theirs = randomised(torchs(shape, dtype=dtype, **options))
    mine = ours(shape, dtype=dtype, **options)
    mine.load_state_dict(theirs.state_dict())
    assert list(mine.state_dict()) == list(theirs.state_dict())
    theirs.load_state_dict(copy.deepcopy(mine).state_dict())
    x, grad = (make_tensor((3, 2, *shape), dtype, seed=seed) for seed in (9, 10))
    results = []
    for module, wide in ((mine, x), (theirs.double(), x.double())):
        leaf = wide.clone().requires_grad_()
        out = module(leaf)
        out.backward(grad.to(out.dtype))
        results.append((out.detach(), leaf.grad, *(p.grad for p in module.parameters())))
    for result, truth in zip(*results, strict=True):
        assert_accurate(result, truth)
    assert sum(counters().values()) == 2, counters()


@pytest.mark.parametrize("ours, torchs, options", PAIRS)
def test_from_module_shares_parameters(ours, torchs, options):
    theirs = randomised(torchs(24, **options)).eval()
    mine = ours.from_module(theirs)
    assert [p.data_ptr() for p in mine.parameters()] == [p.data_ptr() for p in theirs.parameters()]
    assert mine.training is False and mine.eps == theirs.eps
    x = make_tensor((3, 24), torch.float32, seed=1)
    torch.testing.assert_close(mine(x), theirs(x))
    with pytest.raises(TypeError, match=f"{ours.__name__}: module must be a torch.nn.{ours.__name__}, got Linear"):
        ours.from_module(torch.nn.Linear(2, 2))


def test_gemma_weights():
    module = fusedops.nn.RMSNorm(16, eps=1e-6, weight_offset=1.0, rounding="llama")
    assert torch.equal(module.weight, torch.zeros(16)) and "weight_offset=1.0, rounding='llama'" in repr(module)
    x = make_tensor((2, 16), torch.float32, seed=0)
    torch.testing.assert_close(module(x), torch.nn.functional.rms_norm(x, (16,), eps=1e-6))
    with pytest.raises(NotImplementedError, match="weight_offset and rounding must be left at their defaults here"):
        module(x.double())


@pytest.mark.parametrize("name", ["rms_norm", "layer_norm"])
def test_signatures_are_torchs(name):
    ours, theirs = (inspect.signature(getattr(module, name)) for module in (F, torch.nn.functional))
    described = [[(p.name, p.default) for p in signature.parameters.values()] for signature in (ours, theirs)]
    assert described[0] == described[1]


def test_every_other_name_is_torchs():
    assert F.silu is torch.nn.functional.silu and F.scaled_dot_product_attention
    assert set(dir(torch.nn.functional)) <= set(dir(F))
    with pytest.raises(AttributeError, match="no_such_function"):
        F.no_such_function  # noqa: B018


@pytest.mark.parametrize("eps", [None, 1e-3])
@pytest.mark.parametrize(
    "x, shape",
    [
        (torch.randn(3, 8, dtype=torch.float64), (8,)),
        (torch.randn(8, 3).t(), (8,)),
        (torch.randn(3, 4, 2).transpose(1, 2), (2, 4)),
        (torch.randn(2, 70000), (70000,)),
        (torch.randn(3, 8, dtype=torch.bfloat16), (8,)),
    ],
)
def test_functional_takes_what_torch_takes(x, shape, eps):
    """float64, strided last dimensions, rows that are too long for us: right, by whichever way."""
    torch.testing.assert_close(F.rms_norm(x, shape, eps=eps), torch.nn.functional.rms_norm(x, shape, eps=eps))
    weight, bias = torch.randn(shape, dtype=x.dtype), torch.randn(shape, dtype=x.dtype)
    expected = torch.nn.functional.layer_norm(x, shape, weight, bias)
    torch.testing.assert_close(F.layer_norm(x, shape, weight, bias), expected)


def test_a_wrong_call_gets_torchs_own_error():
    with pytest.raises(RuntimeError, match="normalized_shape"):
        F.layer_norm(torch.randn(3, 8), (9,))
