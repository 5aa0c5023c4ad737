"""Int8Linear, Fp8Linear and WeightOnlyLinear: construction, state dicts, dtypes, copies, memory."""

import copy
import io
import pickle

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fusedops import counters, reset_counters
from fusedops.nn import Fp8Linear, Int8Linear, WeightOnlyLinear
from fusedops.testing import assert_accurate, make_tensor
from tests.nn.quantized_problems import (
    EVERY_FORMAT,
    FORMATS,
    FP8,
    ONE_OF_EACH,
    assert_same,
    budget_of,
    linear,
    quantized,
    truth_of,
)
from tests.ops.common import DTYPES, assert_rejected

NAN = float("nan")


@EVERY_FORMAT
def test_layout_is_what_a_weight_becomes(name):
    cls, options = FORMATS[name]
    for dtype in DTYPES:
        layer = quantized(name, 130, 131, dtype)
        layout = cls.layout(131, 130, dtype, **layer.options)
        stored = dict(layer.named_parameters())
        bias = stored.pop("bias")
        assert layout == {key: (tuple(p.shape), p.dtype) for key, p in stored.items()}
        assert bias.requires_grad and not any(p.requires_grad for p in stored.values())
        assert layer.weight.shape[0] == 1 and layer.weight.is_contiguous()
        made = cls.quantize_weight(linear(130, 131, dtype).weight, **layer.options)
        assert_same(made, {key: layer.state_dict()[key] for key in made})
        empty = cls(131, 130, dtype=dtype, **layer.options)
        assert {key: (p.shape, p.dtype) for key, p in empty.state_dict().items()} == {
            key: (p.shape, p.dtype) for key, p in layer.state_dict().items()
        }
        with torch.no_grad():
            assert not empty(make_tensor((2, 131), dtype, seed=1)).any(), "a weight of zeros before it is loaded"
    assert f"in_features=131, out_features=130, bias=True, {next(iter(layer.options))}=" in repr(layer)


@EVERY_FORMAT
@pytest.mark.parametrize("way", ["copied", "assigned", "to_empty"])
def test_state_dict_round_trip(name, way):
    layer = quantized(name, 30, 71, torch.bfloat16)
    state = layer.state_dict()
    device = "cpu" if way == "copied" else "meta"
    other = type(layer)(71, 30, device=device, dtype=torch.bfloat16, **layer.options)
    if way == "to_empty":
        other.to_empty(device="cpu")
    other.load_state_dict(state, assign=way == "assigned")
    assert_same(other.state_dict(), state)
    x = make_tensor((2, 71), torch.bfloat16, seed=2)
    with torch.no_grad():
        assert torch.equal(other(x), layer(x))
    stored = {key: p.requires_grad for key, p in other.named_parameters()}
    assert stored == {key: key == "bias" for key in state}


@EVERY_FORMAT
def test_meta_device(name):
    cls, options = FORMATS[name]
    layer = cls.from_linear(torch.nn.Linear(70, 30, device="meta", dtype=torch.bfloat16), **options)
    made = quantized(name, 30, 70, torch.bfloat16)
    for key, parameter in layer.named_parameters():
        assert parameter.is_meta and (parameter.shape, parameter.dtype) == (made.get_parameter(key).shape,
                                                                            made.get_parameter(key).dtype)  # fmt: skip
    out = layer(torch.empty(2, 3, 70, device="meta", dtype=torch.bfloat16))
    assert out.shape == (2, 3, 30) and out.dtype == torch.bfloat16


def test_codes_of_a_file_are_moved_to_where_they_are_fast():
    """safetensors gives tensors at any address; torch's product with int8 weights wants cache lines."""
    state = quantized("weight int8", 24, 64, torch.bfloat16).state_dict()
    aligned = torch.nn.Parameter(state["weight"], requires_grad=False)
    buffer = torch.empty(24 * 64 + 1, dtype=torch.int8)
    buffer[1:].view(1, 24, 64).copy_(state["weight"])
    layer = WeightOnlyLinear(64, 24, device="meta", dtype=torch.bfloat16)
    layer.load_state_dict({**state, "weight": buffer[1:].view(1, 24, 64)}, assign=True)
    assert layer.weight.data_ptr() % 64 == 0 and not layer.weight.requires_grad
    assert_same(layer.state_dict(), state)
    layer.weight = aligned
    assert layer.weight is aligned
    with FakeTensorMode():
        assert WeightOnlyLinear(64, 24)(torch.ones(2, 64)).shape == (2, 24)


REFUSED = {
    "a plain layer's weight": ("weight", lambda t: torch.zeros(24, 40), "of shape [24, 40]"),
    "other codes": ("weight", lambda t: t.to(torch.int16), "got int16"),
    "a column less": ("weight", lambda t: t[..., :-1], "of shape [1, 24, "),
    "a scale less": ("weight_scale", lambda t: t[:-1], "got"),
    "whole scales": ("weight_scale", lambda t: t.int(), "got int32"),
    "another bias": ("bias", lambda t: t[:5], "of shape [5]"),
}


@ONE_OF_EACH
@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("case", REFUSED)
def test_state_dict_that_does_not_fit(name, assign, case):
    """B59: a checkpoint whose shapes or dtypes disagree with the layer changes nothing, and nothing is launched."""
    key, change, got = REFUSED[case]
    model = torch.nn.Sequential(quantized(name, 24, 40))
    before = copy.deepcopy(model.state_dict())
    state = {f"0.{k}": v for k, v in quantized(name, 24, 40, seed=9).state_dict().items()}
    state[f"0.{key}"] = change(state[f"0.{key}"])
    reset_counters()
    with pytest.raises(RuntimeError, match=f"{type(model[0]).__name__}: 0.{key} must be ") as raised:
        model.load_state_dict(state, assign=assign)
    assert got in str(raised.value) and not counters()
    assert_same(model.state_dict(), before)


def test_state_dict_of_other_dtypes():
    """Scales and codes that belong to the format are taken as they are; what has the layer's dtype converts."""
    state = quantized("int8", 24, 40).state_dict()
    with pytest.raises(RuntimeError, match="Int8Linear: weight_scale must be float32 of shape .24., got bfloat16"):
        Int8Linear(40, 24).load_state_dict({**state, "weight_scale": state["weight_scale"].bfloat16()})
    layer = WeightOnlyLinear(40, 24, dtype=torch.bfloat16)
    layer.load_state_dict(quantized("weight int8", 24, 40).state_dict())
    assert layer.weight_scale.dtype == layer.bias.dtype == torch.bfloat16
    with pytest.raises(RuntimeError, match='Missing key.* "weight_zero"'):
        WeightOnlyLinear(40, 24, format="int4").load_state_dict(
            {k: v for k, v in quantized("weight int4", 24, 40).state_dict().items() if k != "weight_zero"}
        )
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        torch.nn.Linear(40, 24).load_state_dict({"weight": state["weight"], "bias": state["bias"]})


CONVERSIONS = {
    "half": lambda m: m.half(),
    "bfloat16": lambda m: m.bfloat16(),
    "float": lambda m: m.float(),
    "to": lambda m: m.to(torch.bfloat16),
    "to device and dtype": lambda m: m.to("cpu", torch.float16),
    "type": lambda m: m.type(torch.bfloat16),
    "to meta": lambda m: m.to("meta", torch.bfloat16),
}


@EVERY_FORMAT
@pytest.mark.parametrize("way", CONVERSIONS)
def test_dtypes_of_a_converted_layer(name, way):
    """Codes, zeros and the scales of quantised inputs stay what they are; bias and the other scales follow."""
    layer = quantized(name, 24, 70, torch.bfloat16)
    before = copy.deepcopy(layer.state_dict())
    changed = CONVERSIONS[way](torch.nn.Sequential(layer))[0]
    assert changed is layer
    wanted = CONVERSIONS[way](torch.nn.Linear(1, 1, dtype=torch.bfloat16)).weight
    follows = ("bias", "weight_scale") if isinstance(layer, WeightOnlyLinear) else ("bias",)
    for key, tensor in layer.state_dict().items():
        expected = before[key].to(wanted.device, wanted.dtype) if key in follows else before[key].to(wanted.device)
        assert (tensor.dtype, tensor.device) == (expected.dtype, expected.device), key
        assert tensor.is_meta or torch.equal(tensor.view(-1).view(torch.uint8), expected.view(-1).view(torch.uint8))
    assert layer.dtype == layer.dequantize().dtype == wanted.dtype
    x = make_tensor((2, 70), torch.float32, seed=1).to(wanted)
    with torch.no_grad():
        assert layer(x).dtype == wanted.dtype


@EVERY_FORMAT
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_input_of_another_dtype_than_the_layers(name, dtype):
    for stored in DTYPES:
        layer, x = quantized(name, 40, 70, stored), make_tensor((3, 70), dtype, seed=1)
        with torch.no_grad():
            out = layer(x)
        assert torch.equal(layer.requires_grad_(False)(x), out), "the way that checks takes it too"
        truth = truth_of(layer, x)
        assert out.dtype == dtype
        assert_accurate(out, truth, budget=budget_of(layer, x, truth), zeros=False)


@ONE_OF_EACH
def test_autocast(name):
    """As a plain layer: in autocast's dtype."""
    layer, x = quantized(name, 24, 40), make_tensor((3, 40), torch.float32, seed=1)
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            out = layer(x)
        assert torch.equal(out, layer(x.bfloat16()))


@EVERY_FORMAT
def test_copies(name):
    layer, x = quantized(name, 24, 40), make_tensor((3, 40), torch.float32, seed=1)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    copies = [copy.deepcopy(layer), torch.load(buffer, weights_only=False)]
    if layer.weight.dtype != FP8:  # which pickle by itself cannot write, of any tensor
        copies.append(pickle.loads(pickle.dumps(layer)))
    with torch.no_grad():
        for other in copies:
            assert_same(other.state_dict(), layer.state_dict())
            assert other.weight.data_ptr() != layer.weight.data_ptr() and torch.equal(other(x), layer(x))


def test_tied_layers_stay_tied():
    first, second = quantized("int8", 24, 40), Int8Linear(40, 24, device="meta")
    second.weight, second.weight_scale, second.bias = first.weight, first.weight_scale, first.bias
    model = copy.deepcopy(torch.nn.Sequential(first, second)).bfloat16()
    assert model[0].weight is model[1].weight and model[0].weight_scale is model[1].weight_scale
    assert len(list(model.parameters())) == 3 and model[0].weight.dtype == torch.int8


@pytest.mark.parametrize("name, limit", [("int8", 0.55), ("fp8", 0.55), ("fp8 block", 0.55), ("weight int8", 0.55),
                                         ("weight fp8", 0.55), ("weight int4", 0.36)])  # fmt: skip
def test_memory(name, limit):
    """Scales included, of a layer of the smallest model that anybody converts (576 of SmolLM2-135M)."""
    plain = linear(576, 192, torch.bfloat16, bias=False)
    layer = FORMATS[name][0].from_linear(plain, **FORMATS[name][1])
    sizes = [sum(p.numel() * p.element_size() for p in module.parameters()) for module in (layer, plain)]
    storages = sum(p.untyped_storage().nbytes() for p in layer.parameters())
    assert sizes[0] <= limit * sizes[1] and storages == sizes[0], sizes


# ---- rejects

PLAIN = torch.nn.Linear(40, 24)
CONSTRUCTIONS = [
    (lambda: Int8Linear(0, 24), ValueError, "Int8Linear: in_features must be at least 1, got 0"),
    (lambda: Fp8Linear(40, 0), ValueError, "Fp8Linear: out_features must be at least 1, got 0"),
    (lambda: Int8Linear(2**17 + 1, 1, device="meta"), NotImplementedError, "in_features must be at most MAX_K_INT8"),
    (lambda: Fp8Linear(40, 24, granularity="column"), ValueError, "granularity must be one of 'row', 'block', got 'c"),
    (lambda: WeightOnlyLinear(40, 24, format="int5"), ValueError, "format must be one of 'int8', 'fp8', 'int4', got"),
    (lambda: WeightOnlyLinear(40, 24, group_size=16), ValueError, "group_size must be one of None, 32, 64, 128, got"),
    (lambda: WeightOnlyLinear(40, 24, group_size="all"), ValueError, "group_size must be one of None, 32, 64, 128, g"),
    (lambda: Int8Linear.from_linear(PLAIN, format="int4"), TypeError, "options must be among static_input, got format"),
    (lambda: WeightOnlyLinear.from_linear(PLAIN, input_scale=1.0), TypeError, "options must be among format, group_s"),
    (lambda: Int8Linear.from_linear(torch.nn.ReLU()), TypeError, "linear must be a torch.nn.Linear, got ReLU"),
    (lambda: Int8Linear.from_linear(PLAIN, input_scale=0.0), ValueError, "input_scale must be finite and above 0, got"),
    (lambda: Int8Linear.from_linear(PLAIN, input_scale=NAN), ValueError, "input_scale must be finite and above 0, got"),
    (lambda: Fp8Linear.from_linear(PLAIN, input_scale=[1.0, 2.0]), ValueError, "input_scale must be one number, got s"),
    (lambda: Fp8Linear.from_linear(PLAIN, static_input=True), ValueError, "input_scale must be a number with static"),
    (lambda: Int8Linear.from_linear(torch.nn.Linear(4, 2).double()), TypeError, "Int8Linear: weight must be float16"),
    (
        lambda: Int8Linear.quantize_weight(torch.ones(4)),
        ValueError,
        r"Int8Linear: weight must have shape \[N, K\], g",
    ),
    (lambda: Int8Linear.quantize_weight(None), TypeError, "Int8Linear: weight must be a torch.Tensor, got NoneType"),
    (lambda: Int8Linear.quantize_weight(PLAIN.weight, group_size=32), TypeError, "options must be among"),
]


@pytest.mark.parametrize("call, error, message", CONSTRUCTIONS)
def test_wrong_construction(call, error, message):
    assert_rejected(call, error, message)


def test_a_weight_with_any_strides():
    weight = make_tensor((40, 24), torch.float32, seed=1)
    for cls in (Int8Linear, Fp8Linear, WeightOnlyLinear):
        assert_same(cls.quantize_weight(weight.T), cls.quantize_weight(weight.T.contiguous()))
