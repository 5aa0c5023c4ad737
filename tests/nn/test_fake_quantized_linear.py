"""FakeQuantizedLinear: the forward of the converted layer, straight-through gradients, training."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fusedops import reset_counters
from fusedops.nn import FakeQuantizedLinear, Fp8Linear, Int8Linear, WeightOnlyLinear
from fusedops.testing import assert_accurate, make_tensor, strategies
from tests.nn.quantized_problems import EVERY_FORMAT, FORMATS, ONE_OF_EACH, linear, plain_input, truth_of
from tests.ops.common import DTYPES, assert_compiles, assert_rejected, using


def fake(name, N, K, dtype=torch.float32, bias=True, seed=0):
    """A layer that trains for a format, from `linear`."""
    cls, options = FORMATS[name]
    return FakeQuantizedLinear.from_linear(linear(N, K, dtype, bias, seed), cls, **options)


# ---- accuracy


@given(
    name=st.sampled_from(sorted(FORMATS)), shape=strategies.row_shapes(max_n=300), N=st.integers(1, 150),
    dtypes=st.tuples(strategies.dtypes(), strategies.dtypes()), bias=st.booleans(), data=st.data(),
)  # fmt: skip
def test_forward_is_that_of_the_converted_layer(name, shape, N, dtypes, bias, data):
    """Bit for bit, with a graph and without, for an input of the weight's dtype or another."""
    seed, layout = data.draw(strategies.seeds()), data.draw(strategies.layouts(len(shape)))
    layer = fake(name, N, shape[-1], dtypes[0], bias, seed)
    x = make_tensor(shape, dtypes[1], seed=seed + 2, magnitude=data.draw(strategies.magnitudes()), layout=layout)
    out = layer(x)
    assert out.requires_grad and out.dtype == dtypes[1]
    converted = layer.convert()
    assert type(converted) is layer.target and converted.bias is layer.bias
    with torch.no_grad():
        assert torch.equal(out, converted(x)) and torch.equal(out, layer(x))
    x.requires_grad_()
    assert torch.equal(out, layer(x)) and torch.equal(out, converted(x))


@ONE_OF_EACH
def test_kernels(name):
    layer, x = fake(name, 20, 70), make_tensor((3, 70), torch.float32, seed=1)
    with using("triton"):
        out = layer(x)
        converted = layer.convert()
        with torch.no_grad():
            assert torch.equal(out, converted(x))
    assert_accurate(out, truth_of(converted, x), zeros=False)


@EVERY_FORMAT
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients(name, dtype):
    """The plain formula, in float64, of what was multiplied: dequantised weight and dequantised input."""
    layer, x = fake(name, 24, 150, dtype), make_tensor((2, 3, 150), dtype, seed=1).requires_grad_()
    grad = make_tensor((2, 3, 24), dtype, seed=2)
    layer(x).backward(grad)
    converted = layer.convert()
    wide = grad.double().view(-1, 24)
    multiplied = plain_input(converted, x.detach()).view(-1, 150)
    assert_accurate(x.grad.view(-1, 150), wide @ converted.dequantize().double(), name="grad_x")
    assert_accurate(layer.weight.grad, wide.T @ multiplied.to(dtype).double(), name="grad_weight")
    assert_accurate(layer.bias.grad, wide.sum(0), name="grad_bias")
    assert layer.weight.grad.dtype == layer.bias.grad.dtype == x.grad.dtype == dtype


@EVERY_FORMAT
def test_only_what_is_wanted_is_differentiated(name):
    layer, x = fake(name, 24, 40, bias=False), make_tensor((3, 40), torch.float32, seed=1)
    leaf = x.clone().requires_grad_()
    (of_weight,) = torch.autograd.grad(layer(x).sum(), layer.weight)
    assert of_weight.shape == (24, 40)
    layer.weight.requires_grad_(False)
    assert not layer(x).requires_grad
    (of_x,) = torch.autograd.grad(layer(leaf).sum(), leaf)
    torch.testing.assert_close(of_x, layer.convert().dequantize().sum(0).expand(3, 40))
    with torch.no_grad():
        assert not layer(leaf).requires_grad
    assert torch.autograd.grad(layer(leaf[:0]).sum(), leaf)[0].eq(0).all(), "no rows at all"


# ---- training


class Tiny(nn.Module):
    """Three layers, of which the first and the last share their weight."""

    def __init__(self, name, dtype):
        super().__init__()
        self.first, self.last = fake(name, 32, 32, dtype, seed=1), fake(name, 32, 32, dtype, bias=False, seed=1)
        self.middle = fake(name, 32, 32, dtype, seed=2)
        self.last.weight = self.first.weight

    def forward(self, x):
        return self.last(nn.functional.silu(self.middle(nn.functional.silu(self.first(x)))))


@EVERY_FORMAT
@pytest.mark.parametrize("dtype", DTYPES[::2], ids=str)
def test_training_and_conversion(name, dtype):
    """A tied weight is trained until the loss is a third of what it was; then the converted model gives the same."""
    torch.manual_seed(0)
    model = Tiny(name, dtype)
    weights = {id(p) for p in model.parameters()}
    assert len(weights) == 4
    x = make_tensor((64, 32), dtype, seed=3)
    wanted = (x.float() @ make_tensor((32, 32), torch.float32, seed=4) * 0.1).to(dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    before = [layer.weight.detach().clone() for layer in (model.first, model.middle)]
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = (model(x).float() - wanted.float()).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] / 3, losses
    assert not any(torch.equal(a, b.weight) for a, b in zip(before, (model.first, model.middle)))
    assert model.last.weight is model.first.weight
    with torch.no_grad():
        out = model(x)
        for child in ("first", "middle", "last"):
            setattr(model, child, getattr(model, child).convert())
        assert torch.equal(model(x), out)
        assert torch.equal(model.first.weight, model.last.weight)


def test_gradients_are_no_plain_layers():
    """They are those of the quantised forward, and differ by as much as it does."""
    layer, x = fake("weight int4", 24, 64), make_tensor((3, 64), torch.float32, seed=1).requires_grad_()
    layer(x).square().sum().backward()
    ours, x.grad = x.grad, None
    nn.functional.linear(x, layer.weight, layer.bias).square().sum().backward()
    assert float((ours - x.grad).norm() / x.grad.norm()) > 0.01


# ---- construction, state dicts, dtypes


@ONE_OF_EACH
def test_state_dict_is_a_plain_layers(name):
    layer, plain = fake(name, 24, 40, seed=5), linear(24, 40)
    plain.load_state_dict(layer.state_dict())
    made = FakeQuantizedLinear(40, 24, target=layer.target, **layer.options)
    made.load_state_dict(plain.state_dict())
    x = make_tensor((2, 40), torch.float32, seed=1)
    assert torch.equal(made(x), layer(x))
    other = copy.deepcopy(layer)
    assert torch.equal(other(x), layer(x)) and other.weight is not layer.weight
    assert f"target={layer.target.__name__}, {next(iter(layer.options))}=" in repr(layer)


def test_a_static_scale_is_kept():
    """In the state dict, in any dtype, and in the converted layer."""
    layer = fake("int8 static", 24, 40).train(False)
    scale = layer.input_scale.clone()
    made = FakeQuantizedLinear(40, 24, target=Int8Linear, static_input=True)
    made.load_state_dict(layer.state_dict())
    for changed in (made, layer.bfloat16(), layer.half(), layer.convert()):
        assert changed.input_scale.dtype == torch.float32 and torch.equal(changed.input_scale, scale)
    assert not layer.convert().training and layer.weight.dtype == torch.float16
    assert fake("int8", 24, 40).input_scale is None


@ONE_OF_EACH
def test_shared_with_the_layer_it_was_made_from(name):
    plain = linear(24, 40).eval()
    layer = FakeQuantizedLinear.from_linear(plain, FORMATS[name][0], **FORMATS[name][1])
    assert layer.weight is plain.weight and layer.bias is plain.bias and not layer.training
    assert isinstance(layer, nn.Linear)


@ONE_OF_EACH
def test_autocast(name):
    """The converted layer's dtype and bits under autocast, too; gradients have the parameters' dtype."""
    layer, x = fake(name, 24, 40), make_tensor((3, 40), torch.float32, seed=1)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
        converted = layer.convert()(x)
    assert out.dtype == torch.bfloat16 and torch.equal(out, converted) and torch.equal(out, layer(x.bfloat16()))
    out.sum().backward()
    assert layer.weight.grad.dtype == torch.float32 and layer.bias.grad.dtype == torch.float32


@pytest.mark.parametrize("name", ["int8", "weight int8 groups"])
def test_compile(name):
    layer, x = fake(name, 24, 40), make_tensor((3, 40), torch.float32, seed=1)
    assert_compiles(layer, (x,))
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    found, expected = (torch.autograd.grad(f(x).square().sum(), layer.weight)[0] for f in (compiled, layer))
    torch.testing.assert_close(found, expected)


# ---- rejects

PLAIN = nn.Linear(40, 24)
REJECTED = [
    (lambda: FakeQuantizedLinear(40, 24, target=nn.Linear), TypeError, "target must be a class of quantised layers"),
    (lambda: FakeQuantizedLinear(40, 24, target="int8"), TypeError, "target must be a class of quantised layers, got"),
    (lambda: FakeQuantizedLinear(40, 24, target=Int8Linear, group_size=32), TypeError, "Int8Linear: options must be"),
    (lambda: FakeQuantizedLinear(40, 24, target=Fp8Linear, granularity="x"), ValueError, "granularity must be one of"),
    (lambda: FakeQuantizedLinear.from_linear(nn.ReLU(), Int8Linear), TypeError, "linear must be a torch.nn.Linear, g"),
    (lambda: FakeQuantizedLinear.from_linear(PLAIN, WeightOnlyLinear, input_scale=1.0), TypeError, "options must be"),
    (lambda: FakeQuantizedLinear.from_linear(PLAIN, Int8Linear, input_scale=-1.0), ValueError, "input_scale must be f"),
    (lambda: FakeQuantizedLinear.from_linear(PLAIN, Int8Linear, static_input=True), ValueError, "input_scale must be "),
    (lambda: FakeQuantizedLinear(40, 24, target=Int8Linear)(torch.ones(2, 41)), ValueError, r"with K=40, got \[2, 41"),
    (lambda: FakeQuantizedLinear(40, 24, target=Int8Linear)(None), TypeError, "x must be a torch.Tensor, got NoneType"),
]


@pytest.mark.parametrize("call, error, message", REJECTED)
def test_wrong_arguments(call, error, message):
    reset_counters()
    assert_rejected(call, error, message)
