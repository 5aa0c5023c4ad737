"""SmoothQuant: where factors are moved, that moving them changes nothing by itself, and that it helps."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import Parameter
from torch.nn import functional as F

import fusedops
from fusedops.convert import SCHEMES, Scheme
from fusedops.convert.norms import find_norms
from fusedops.nn import Int8Linear, QuantizedLinear
from tests.convert.test_quantize import assert_equal_tensors, distance, state
from tests.patch.test_undo import assert_same, snapshot
from tests.patch.tiny_models import logits, tiny, tokens, tower

QKV, GATE_UP = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")
ATTENTION, MLP = {"input_layernorm": QKV, "v_proj": ("o_proj",)}, {"up_proj": ("down_proj",)}
PLACES = {
    "llama": {**ATTENTION, **MLP, "post_attention_layernorm": GATE_UP},
    "qwen2": {**ATTENTION, **MLP, "post_attention_layernorm": GATE_UP},
    "gemma": {**ATTENTION, **MLP, "post_attention_layernorm": GATE_UP},
    "gemma3": {**ATTENTION, **MLP, "pre_feedforward_layernorm": GATE_UP},
    "phi3": {
        "input_layernorm": ("qkv_proj",),
        "qkv_proj": ("o_proj",),
        "post_attention_layernorm": ("gate_up_proj",),
        "gate_up_proj": ("down_proj",),
    },
    "olmo2": {"v_proj": ("o_proj",), **MLP},
    "mixtral": ATTENTION,
    "gpt_oss": ATTENTION,
    "own": {
        "before_looking": ("all_in",),
        "all_in": ("all_out",),
        "before_mixing": ("w1", "w3"),
        "w3": ("w2",),
        "roof": ("head",),
    },
}


class Exact(QuantizedLinear):
    """A format without rounding: what is left is what smoothing does to the model."""

    @classmethod
    def _layout(cls, in_features, out_features, dtype):
        return {"weight": ((1, out_features, in_features), torch.float32)}

    @classmethod
    def _quantized(cls, weight, options):
        return {"weight": weight.float()[None]}

    @classmethod
    def compute(cls, x, parameters):
        bias = parameters["bias"]
        return F.linear(x.float(), parameters["weight"][0], bias if bias is None else bias.float()).to(x.dtype), x, None

    def dequantize(self, dtype=None):
        return self.weight[0].to(dtype, copy=True)


@pytest.fixture
def exact(monkeypatch):
    """Its name as a scheme."""
    monkeypatch.setitem(SCHEMES, "exact", Scheme("exact", Exact, quantizes_activations=True))
    monkeypatch.setattr(Scheme, "stored_bytes", lambda *args: 0)
    return "exact"


def model_of(family, **options):
    if family == "own":
        return tower(**options)
    pytest.importorskip("transformers")
    return tiny(family, **options)


def last(path):
    return path.split(".")[-1]


def places(report):
    return {last(place.source): tuple(map(last, place.consumers)) for place in report.folded}


@pytest.mark.parametrize("family", PLACES)
def test_moving_factors_changes_nothing(family, exact):
    """Every place is found, factors are moved there, and the model computes what it did; undo restores every bit."""
    model, ids = model_of(family), tokens()
    before, tensors, expected = snapshot(model), state(model), logits(model, ids)
    handle = fusedops.quantize_(model, exact, calibration=[ids, tokens(seed=1)], keep=True)
    assert places(handle.report) == PLACES[family]
    assert all(place.smallest < 0.9 and place.largest > 1.1 for place in handle.report.folded)
    assert distance(logits(model, tokens(seed=7)), logits(fresh(family), tokens(seed=7))) < 2e-5
    handle.undo()
    assert_same(before, snapshot(model))
    assert_equal_tensors(model, tensors)
    assert torch.equal(logits(model, ids), expected)


def fresh(family):
    return model_of(family)


@pytest.mark.parametrize("family", ["llama", "gemma", "own"])
def test_rounded_norms_are_made_up_for(family, exact):
    """A norm's weight in bfloat16 is rounded; the linear takes up the factor that the rounded one stands for."""
    model, ids = model_of(family).to(torch.bfloat16), tokens()
    twin = copy.deepcopy(model).float()
    fusedops.quantize_(model, exact, calibration=[ids])
    model.float()  # the codes are float32 already, the norms as they were rounded
    assert distance(logits(model, ids), logits(twin, ids)) < 2e-5


class Encoder(nn.Module):
    """A layer with LayerNorms, biases, and a ReLU between two linears, which lets positive factors through."""

    def __init__(self, width=48, inner=80):
        super().__init__()
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mix, self.wide, self.narrow = nn.Linear(width, width), nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x):
        x = x + self.mix(self.first(x))
        return x + self.narrow(F.relu(self.wide(self.second(x))))


def encoder():
    torch.manual_seed(0)
    model = Encoder()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.3)
    return model


def test_layer_norm_and_relu(exact):
    model, x = encoder().requires_grad_(False), torch.randn(4, 9, 48)
    expected = model(x)
    handle = fusedops.quantize_(model, exact, calibration=[[x]])
    assert places(handle.report) == {"first": ("mix",), "second": ("wide",), "wide": ("narrow",)}
    assert distance(model(x), expected) < 2e-6


@pytest.mark.parametrize("family", ["llama", "own"])
def test_outliers(family):
    """The same function with outliers in two channels, as large models have: int8 loses, and smoothing wins it back."""
    model, ids = model_of(family), tokens()
    expected = logits(model, ids)
    with fusedops.quantize_(model, "int8", keep=True):
        easy = distance(logits(model, ids), expected)
    with torch.no_grad():
        for norm in find_norms(model):
            names = PLACES[family].get(last(norm.path), ())
            parent = model.get_submodule(norm.path.rpartition(".")[0])
            norm.module._parameters[norm.weight][3::29] *= 60 if names else 1
            for path, linear in parent.named_modules():
                if last(path) in names:
                    linear.weight[:, 3::29] /= 60
    assert distance(logits(model, ids), expected) < 2e-5
    with fusedops.quantize_(model, "int8", keep=True):
        plain = distance(logits(model, ids), expected)
    seen = [tokens(seed=i) for i in range(1, 4)]
    with fusedops.quantize_(model, "int8", calibration=seen, keep=True) as handle:
        smooth = distance(logits(model, ids), expected)
        assert places(handle.report) == PLACES[family]
    assert plain > 5 * easy and smooth < 1.5 * easy, (plain, easy, smooth)


def test_factors():
    """``largest x**alpha / largest w**(1 - alpha)`` over all linears that share the input, around 1."""
    model, x = encoder(), torch.randn(4, 9, 48)  # some channels are largest in the first batch, some in the second
    with torch.no_grad():
        model.first.weight[5] = 30.0
        model.first.weight[6] = 0.0
        model.first.bias[6] = 0.0  # never anything but 0: there is nothing to move
        largest = model.first(x).abs().amax((0, 1))
    weight, before = model.mix.weight.detach().abs().amax(0), model.first.weight.detach().clone()
    fusedops.quantize_(model, "int8", calibration=[x[:2], x[2:]], smoothing=0.7)
    expected = largest**0.7 / weight**0.3
    used = torch.arange(48) != 6
    expected /= expected[used].log().mean().exp()
    torch.testing.assert_close((before / model.first.weight)[used], expected[used])
    assert model.first.weight[6] == 0


def test_factors_of_heads_that_share_a_value(exact):
    """A channel of v has the largest range of all heads that read it, and the largest weight."""
    model, ids, given = model_of("llama"), tokens(), []
    output = model.model.layers[0].self_attn.o_proj
    with output.register_forward_pre_hook(lambda module, args: given.append(args[0])):
        logits(model, ids)
    x, w = (tensor.detach().flatten(0, -2).abs().amax(0).view(2, 2, 16) for tensor in (given[0], output.weight))
    expected = (x.amax(1) / w.amax(1)).sqrt()  # of 2 values, each for 2 heads
    expected /= expected.log().mean().exp()
    report = fusedops.quantize_(model, exact, calibration=[ids]).report
    (place,) = [p for p in report.folded if p.consumers == ("model.layers.0.self_attn.o_proj",)]
    assert (place.largest, place.smallest) == pytest.approx((float(expected.max()), float(expected.min())), rel=1e-4)


def test_smoothing_is_left_out():
    """None leaves the norms as they are, without calibration too."""
    for options in ({}, {"calibration": [tokens()], "smoothing": None}):
        model = tower()
        weights = {norm.path: norm.module.gain.detach().clone() for norm in find_norms(model)}
        report = fusedops.quantize_(model, "int8", **options).report
        assert len(weights) == 7 and not report.smoothing
        assert all(torch.equal(norm.module.gain, weights[norm.path]) for norm in find_norms(model))


@pytest.mark.parametrize("form", [lambda x: x, lambda x: {"ids": x}, lambda x: [x], lambda x: (x,)])
def test_forms_of_batches(form):
    """Tensors, mappings and lists give the same model, from any iterable."""
    models = [tower(), tower()]
    fusedops.quantize_(models[0], "int8", calibration=[tokens(), tokens(seed=1)])
    fusedops.quantize_(models[1], "int8", calibration=(form(tokens(seed=i)) for i in range(2)))
    assert_equal_tensors(models[1], state(models[0]))


def test_calibration_leaves_no_trace():
    """Modes, hooks, random numbers and gradients are as before, also where a batch fails."""
    model = tower().train()
    model.roof.eval()
    modes = {name: module.training for name, module in model.named_modules()}
    torch.manual_seed(3)
    numbers = torch.get_rng_state()
    before = snapshot(model)
    with pytest.raises(IndexError):
        fusedops.quantize_(model, "int8", calibration=[tokens(), torch.full((1, 4), 10**6)])
    assert_same(before, snapshot(model))
    fusedops.quantize_(model, "int8", calibration=[tokens()])
    assert torch.equal(torch.get_rng_state(), numbers) and torch.is_grad_enabled()
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_static_scales():
    """One scale for every input of a linear, of the range after smoothing; a linear out of reach is refused."""
    model, x = encoder(), torch.randn(4, 9, 48)
    expected = model(x)
    fusedops.quantize_(model, "int8", calibration=[x, x / 2], static=True)
    with torch.no_grad():
        largest = model.first(x).abs().max()
    torch.testing.assert_close(model.mix.input_scale, Parameter(largest / 127, requires_grad=False))
    assert distance(model(x).detach(), expected.detach()) < 0.05
    model = nn.ModuleDict({"used": nn.Linear(64, 64), "idle": nn.Linear(64, 64)})
    model.forward = lambda x: model["used"](x)
    with pytest.raises(ValueError, match="calibration for every linear; it did not reach idle"):
        fusedops.quantize_(model, "int8", calibration=[torch.randn(2, 64)], static=True)
    with pytest.raises(ValueError, match="it gave NaN or infinity to used"):
        fusedops.quantize_(model, "int8", calibration=[torch.full((2, 64), torch.inf)], static=True, skip="idle")
    assert type(model["used"]) is nn.Linear


def test_calibration_is_refused():
    """Where activations are not quantised there is nothing to calibrate; and nothing to check without an output."""
    with pytest.raises(ValueError, match="calibration must be None for 'int8-weight-only', whose activations"):
        fusedops.quantize_(tower(), "int8-weight-only", calibration=[tokens()])
    model = encoder()
    model.forward = lambda x: Encoder.forward(model, x) is None
    with pytest.raises(ValueError, match="quantize_: model must return finite tensors, .* got bool"):
        fusedops.quantize_(model, "int8", calibration=[torch.randn(2, 3, 48)])
    assert type(model.mix) is nn.Linear and not model.mix._forward_pre_hooks


def test_fp8():
    model, ids = tower(), tokens()
    expected = logits(model, ids)
    assert fusedops.quantize_(model, "fp8", calibration=[ids]).report.totals["folded"] == 13
    assert distance(logits(model, ids), expected) < 0.25


def test_modules_are_the_schemes():
    """Smoothed modules are those of any other way: same class, dtype, options, names."""
    model, plain = tower(torch.bfloat16), tower(torch.bfloat16)
    fusedops.quantize_(model, "int8", calibration=[tokens()])
    fusedops.quantize_(plain, "int8")
    for made, other in zip(model.modules(), plain.modules(), strict=True):
        assert type(made) is type(other)
        if isinstance(made, Int8Linear):
            assert made.dtype == other.dtype == torch.bfloat16 and made.options == other.options
            assert {n: (p.shape, p.dtype) for n, p in made.named_parameters()} == {
                n: (p.shape, p.dtype) for n, p in other.named_parameters()
            }
