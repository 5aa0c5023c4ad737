"""Masked24Linear: dropped weights stay 0 whatever an optimizer does, and the kept ones train as always."""

import copy

import pytest
import torch
from torch.nn import functional as F

from fusedops import is_24, prune_24
from fusedops.nn import Masked24Linear, Sparse24Linear
from fusedops.testing import make_tensor
from tests.nn.quantized_problems import assert_same, linear

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.5, foreach=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1, weight_decay=0.1),
}


def masked(N=24, K=40, dtype=torch.float32, seed=0):
    return Masked24Linear.from_linear(linear(N, K, dtype, seed=seed))


def train(model, optimizer, steps):
    x, wanted = make_tensor((64, 40), torch.float32, seed=3), make_tensor((64, 24), torch.float32, seed=4)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (model(x) - wanted).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_forward_and_gradients():
    """Those of a plain layer with the pruned weight; the dropped weights have the gradient 0."""
    plain = linear(24, 43)
    before = plain.weight.detach().clone()
    layer = Masked24Linear.from_linear(plain)
    assert layer.weight is plain.weight and layer.bias is plain.bias
    assert torch.equal(plain.weight, prune_24(before)), "dropped in place"
    x = make_tensor((5, 43), torch.float32, seed=1).requires_grad_()
    out = layer(x)
    assert torch.equal(out, F.linear(x, prune_24(before), plain.bias))
    grad = make_tensor((5, 24), torch.float32, seed=2)
    out.backward(grad)
    dense = grad.T @ x.detach()
    assert torch.equal(layer.weight.grad, torch.where(layer.mask, dense, 0)) and dense[~layer.mask].all()
    assert torch.equal(x.grad, grad @ prune_24(before)) and torch.equal(layer.bias.grad, grad.sum(0))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_zeros_stay_zeros(name):
    """With momentum and weight decay, bit for bit; and the layer learns."""
    layer = masked()
    dropped, optimizer = ~layer.mask, OPTIMIZERS[name](layer.parameters())
    losses = train(layer, optimizer, 20)
    assert losses[-1] < losses[0]
    assert torch.equal(layer.weight[dropped], torch.zeros(int(dropped.sum())))
    assert not torch.equal(layer.weight[layer.mask], masked().weight[layer.mask]) and is_24(layer.weight.detach())


def test_momentum_from_before():
    """What it adds to dropped weights is not computed with, and never gets into a state dict or a conversion."""
    plain, x = linear(24, 40), make_tensor((3, 40), torch.float32, seed=1)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
    train(plain, optimizer, 3)
    layer = Masked24Linear.from_linear(plain)
    train(layer, optimizer, 2)
    dropped = ~layer.mask
    assert layer.weight[dropped].any(), "else this test shows nothing"
    expected = layer(x)
    assert torch.equal(expected, F.linear(x, layer.weight * layer.mask, layer.bias))
    for read in (lambda m: m.state_dict()["weight"], lambda m: m.convert().decompress()):
        other = copy.deepcopy(layer)
        assert not read(other)[dropped].any() and torch.equal(other(x), expected)


def test_a_kept_weight_of_0_may_grow():
    """Groups with fewer than two numbers keep two places all the same."""
    plain = linear(24, 40)
    plain.weight.data.zero_()
    layer = Masked24Linear.from_linear(plain)
    assert torch.equal(layer.mask.view(24, 10, 4).sum(-1), torch.full((24, 10), 2))
    train(layer, torch.optim.SGD(layer.parameters(), lr=0.1), 3)
    assert bool((layer.weight[layer.mask] != 0).all()) and not layer.weight[~layer.mask].any()


def test_scores_decide():
    plain = linear(8, 32)
    before, scores = plain.weight.detach().clone(), torch.rand(8, 32, generator=torch.Generator().manual_seed(0))
    layer = Masked24Linear.from_linear(plain, scores=scores)
    assert torch.equal(layer.weight, prune_24(before, scores=scores))
    again = Masked24Linear.from_linear(linear(8, 32), mask=layer.mask)
    assert torch.equal(again.weight, layer.weight)
    with pytest.raises(ValueError, match="scores must have shape"):
        Masked24Linear.from_linear(plain, scores=scores[:, 1:])


@pytest.mark.parametrize("format", [None, "int8", "fp8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_convert(format, dtype):
    layer = masked(dtype=dtype).eval()
    made = layer.convert(format=format, dense_below=2)
    assert type(made) is Sparse24Linear and made.options == {"format": format, "dense_below": 2}
    assert made.bias is layer.bias and not made.training
    if format is None:
        assert torch.equal(made.decompress(), layer.weight)
    else:
        assert not made.decompress()[~layer.mask].any()


def test_state_dict():
    """Names, shapes and dtypes of a plain layer; what is loaded is masked."""
    layer, plain = masked(), linear(24, 40, seed=7)
    assert {key: value.shape for key, value in layer.state_dict().items()} == {
        key: value.shape for key, value in plain.state_dict().items()
    }
    layer.load_state_dict(plain.state_dict())
    assert torch.equal(layer.weight, torch.where(layer.mask, plain.weight, 0))
    other = Masked24Linear(40, 24, device="meta")
    other.load_state_dict(layer.state_dict(), assign=True)
    assert_same(other.state_dict(), layer.state_dict())
    assert bool(other.mask[layer.weight != 0].all())


def test_copies_and_dtypes():
    layer, x = masked(), make_tensor((3, 40), torch.float32, seed=1)
    other = copy.deepcopy(layer)
    assert torch.equal(other(x), layer(x)) and other.mask.data_ptr() != layer.mask.data_ptr()
    for change in (lambda m: m.bfloat16(), lambda m: m.type(torch.float16)):
        changed = change(other)
        assert changed.mask.dtype == torch.bool and changed(x.to(changed.weight.dtype)).dtype == changed.weight.dtype
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    compiled(x).sum().backward()
    assert not layer.weight.grad[~layer.mask].any()


def test_wrong_input():
    with pytest.raises(TypeError, match="Masked24Linear: linear must be a torch.nn.Linear, got ReLU"):
        Masked24Linear.from_linear(torch.nn.ReLU())
