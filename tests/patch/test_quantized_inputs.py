"""When linears share a product and when they must not; who is left alone, and what the report says."""

import pytest
import torch
from torch import nn

import fusedops
from fusedops.nn import Fp8Linear, Int8Linear
from fusedops.patch import joined, patch, patched_modules
from fusedops.patch.instance import state_of
from tests.patch.quantized_models import Crosses, EditsBetween, Folds, Looker, Parallel, counted, looker, quantized
from tests.patch.test_undo import assert_same, snapshot
from tests.patch.tiny_models import fill, logits, tiny, tokens

MODES = pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])


def _twins(**options):
    """(unpatched, patched, its handle), with equal weights."""
    plain, model = looker(**options), looker(**options)
    return plain, model, patch(model)


def _names(handle):
    return [row.path for row in handle.report.replaced if row.kind == "linear"]


def test_one_product_of_three():
    """k and v narrower or wider than q; a bias for each; empty and one-dimensional inputs."""
    plain, model, handle = _twins()
    assert _names(handle) == ["ask", "find", "tell"]
    with torch.no_grad():
        for shape in ((2, 3, 64), (1, 1, 64), (5, 64), (0, 3, 64)):
            x = torch.randn(shape)
            expected = plain.project(x)
            fusedops.reset_counters()
            found = model.project(x)
            assert fusedops.counters() == {("quantize_int8", "torch"): 1, ("int8_matmul", "torch"): 1}
            assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
        assert torch.equal(model.ask(torch.ones(64)), plain.ask(torch.ones(64)))


@pytest.mark.parametrize("order", [(2, 1, 0), (1, 1, 0, 2), (0, 0, 0), (2, 0), (1, 0, 1, 2)])
def test_any_order(order):
    """Whoever is called first computes; a result is given once."""
    plain, model, handle = _twins()
    x = torch.randn(2, 3, 64)
    with torch.no_grad():
        for _ in range(2):
            for index in order:
                name = ("ask", "find", "tell")[index]
                assert torch.equal(getattr(model, name)(x), getattr(plain, name)(x))
    assert handle.fallbacks() == {}


def _change_input(model, x):
    x.add_(1.0)


def _change_input_below(model, x):
    x.view(-1)[3] = 9.0


def _change_weight(model, x):
    model.find.weight[0, 3] += 5


def _change_scale(model, x):
    model.find.weight_scale.mul_(2)


def _change_bias(model, x):
    model.find.bias[2] = 7.0


def _replace_weight(model, x):
    model.find.weight = nn.Parameter(model.find.weight.flip(1), requires_grad=False)


def _move_weight(model, x):
    model.find.weight.data = model.find.weight.data.flip(1)


CHANGES = (
    _change_input, _change_input_below, _change_weight, _change_scale, _change_bias, _replace_weight, _move_weight
)  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__.strip("_"))
def test_changes_in_between(change):
    """What was laid aside is of the input and the weights at that time: nobody may get it afterwards."""
    plain, model, _ = _twins()
    found, expected = [], []
    for one, outs in ((plain, expected), (model, found)):
        torch.manual_seed(1)
        x = torch.randn(2, 3, 64)
        with torch.no_grad():
            outs.append(one.ask(x))
            change(one, x)
            outs += [one.find(x), one.tell(x), one.ask(x)]
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_equal_is_not_identical():
    """Another tensor, also with the same values or in the same memory, is computed."""
    plain, model, _ = _twins()
    x = torch.randn(2, 3, 64)
    with torch.no_grad():
        model.ask(x)
        y = x.clone()
        y[0] = 0
        for other in (y, x.view(2, 3, 64)):
            expected = plain.find(other)
            fusedops.reset_counters()
            assert torch.equal(model.find(other), expected)
            assert fusedops.counters()["int8_matmul", "torch"] == 1


@MODES
@pytest.mark.parametrize("place", ["pre-hook edits", "pre-hook replaces", "hook edits output"])
def test_hooks_added_later(place, mode):
    """A hook on one of the linears may change the input in place, which inference tensors do not tell."""
    results = []
    for model in _twins()[:2]:

        def before(module, args):
            return args[0].mul_(2) if place == "pre-hook edits" else args[0] * 2

        if place == "hook edits output":
            model.find.register_forward_hook(lambda module, args, out: out.mul_(3))
        else:
            model.find.register_forward_pre_hook(before)
        torch.manual_seed(2)
        with mode():
            results.append(model(torch.randn(2, 3, 64)).clone())
    assert torch.equal(*results)


def test_module_that_edits_its_input_between():
    """Seen when the module's own code was tried: only what gets the same values is joined."""
    plain, model, handle = _twins(kind=EditsBetween)
    assert _names(handle) == ["find", "tell"]
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            x = torch.randn(2, 3, 64)
            assert torch.equal(model(x), plain(x))


def test_results_that_must_be_contiguous():
    plain, model, handle = _twins(kind=Folds)
    x = torch.randn(2, 3, 64)
    with torch.no_grad():
        assert torch.equal(model(x), plain(x)) and _names(handle) == ["ask", "find", "tell"]


def test_neighbours_that_get_other_inputs():
    """Cross attention: the trial saw one input, the model gives two. After a while each computes for itself."""
    plain, model, handle = _twins(kind=Crosses)
    with torch.no_grad():
        x, other = torch.randn(2, 2, 3, 64)
        fusedops.reset_counters()
        for _ in range(joined.MAX_WASTED + 3):
            assert torch.equal(model(x, other), plain(x, other))
        fusedops.reset_counters()
        model(x, other)
    assert fusedops.counters()["quantize_int8", "torch"] == 4
    assert ("ask", "its neighbours get other inputs") in handle.fallbacks()
    handle.undo()


def test_seldom_waste_is_forgiven():
    plain, model, handle = _twins()
    x = torch.randn(1, 64)
    with torch.no_grad():
        for _ in range(3 * joined.MAX_WASTED):
            model.ask(x.clone())
            model.project(x)
    assert handle.fallbacks() == {}


class LowRank(nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base = base
        self.in_features, self.out_features = base.in_features, base.out_features
        self.delta = nn.Linear(base.in_features, base.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + self.delta(x)


@pytest.mark.parametrize("when", ["before", "after"])
def test_adapters(when):
    """Wrapped before: the two others are joined. Wrapped afterwards: what they wrap still takes part."""
    plain, model = (quantized(tiny("llama")) for _ in "12")
    handle = patch(model) if when == "after" else None
    for one in (plain, model):
        torch.manual_seed(0)
        for layer in one.model.layers:
            layer.self_attn.q_proj = LowRank(layer.self_attn.q_proj)
            layer.mlp.down_proj = LowRank(layer.mlp.down_proj)
    handle = handle or patch(model)
    paths = _names(handle)
    assert ("model.layers.0.self_attn.q_proj" in paths) == (when == "after") and not any("base" in p for p in paths)
    assert "model.layers.0.self_attn.k_proj" in paths
    reference = patch(plain, linear=False)
    for _ in range(3):
        assert torch.equal(logits(model, tokens()), logits(plain, tokens()))
    reference.undo()
    for layer in model.model.layers:
        for module, name in ((layer.self_attn, "q_proj"), (layer.mlp, "down_proj")):
            setattr(module, name, getattr(module, name).base)
    handle.undo()


def test_hooked_linears_are_left_alone():
    hooks = pytest.importorskip("accelerate.hooks")
    model = looker()
    model.ask.register_forward_hook(lambda *_: None)
    hooks.add_hook_to_module(model.find, hooks.ModelHook())
    handle = patch(model, strict=False)
    assert _names(handle) == [] and {row.path: row.reason for row in handle.report.skipped} == {
        "ask": "it has hooks",
        "find": "accelerate's ModelHook may move its parameters",
    }
    handle.undo()


def test_second_patcher():
    model = looker()
    model.find.forward = model.find.to_linear().forward
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="find must not be patched by something else"):
        patch(model)
    assert_same(before, snapshot(model))
    handle = patch(model, strict=False)
    assert _names(handle) == ["ask", "tell"] and state_of(model.ask).group.members == [model.ask, model.tell]
    handle.undo()
    assert_same(before, snapshot(model))


def test_tied_linears_are_left_alone():
    """A parameter that two modules hold can lie in one place only."""
    model = nn.Sequential(looker(), looker())
    model[0].find.weight = model[1].ask.weight
    x = torch.randn(2, 3, 64)
    with torch.no_grad():
        expected = model(x)
        handle = patch(model)
        assert torch.equal(model(x), expected)
        model[1].ask.weight[0, 0] += 9
        assert model[0].find.weight is model[1].ask.weight
    assert {row.path for row in handle.report.skipped} == {"0.find", "1.ask"}
    assert all(row.reason == "it shares a parameter with another module" for row in handle.report.skipped)
    assert _names(handle) == ["0.ask", "0.tell", "1.find", "1.tell"]


def test_one_layer_used_twice():
    block = looker()
    model, x = nn.Sequential(block, block), torch.randn(2, 3, 64)
    with torch.no_grad():
        expected = model(x)
        handle = patch(model)
        assert torch.equal(model(x), expected) and _names(handle) == ["0.ask", "0.find", "0.tell"]


def test_quantised_differently():
    """A linear without a bias, of another scheme, or not quantised keeps its own product."""
    model = looker()
    model.find = Fp8Linear.from_linear(model.find.to_linear())
    assert _names(patch(model)) == ["ask", "tell"]
    model = looker()
    model.ask = model.ask.to_linear()
    assert _names(patch(model)) == ["find", "tell"]
    model = looker()
    model.tell.bias = None
    handle, x = patch(model), torch.randn(2, 64)
    assert _names(handle) == ["ask", "find"]
    with torch.no_grad():
        plain = looker()
        assert torch.equal(model.tell(x) + plain.tell.bias, plain.tell(x))


@pytest.mark.parametrize("scales", [(0.02, 0.02, 0.02), (0.02, 0.03, 0.02)], ids=["equal", "different"])
def test_static_input_scales(scales):
    models = []
    for _ in range(2):
        model = looker("int8-weight-only")
        for name, scale in zip(("ask", "find", "tell"), scales, strict=True):
            linear = Int8Linear.from_linear(getattr(model, name).to_linear(), input_scale=scale)
            setattr(model, name, linear)
        models.append(model)
    handle, x = patch(models[1], strict=False), torch.randn(2, 3, 64)
    with torch.no_grad():
        assert torch.equal(models[0](x), models[1](x))
    if scales[1] == 0.02:
        assert _names(handle) == ["ask", "find", "tell"]
        with torch.no_grad():
            for one in models:
                one.tell.input_scale.mul_(3)
            assert torch.equal(models[0](x), models[1](x))
    else:
        reason = "it and its neighbours have different values of input_scale"
        assert [row.reason for row in handle.report.skipped] == [reason] * 3


@pytest.mark.parametrize("narrow", [128, 96])
def test_blocks_of_float8(narrow):
    """Scales of 128 rows stay with their rows only where each linear but the last has whole blocks."""
    models = [quantized(fill(looker_of(narrow)), "fp8", granularity="block") for _ in range(2)]
    handle, x = patch(models[1], strict=False), torch.randn(2, 3, 64)
    with torch.no_grad():
        torch.testing.assert_close(models[0](x), models[1](x), rtol=1e-5, atol=1e-5)
    assert _names(handle) == (["ask", "find", "tell"] if narrow == 128 else [])
    assert [row.reason for row in handle.report.skipped][:1] == (
        [] if narrow == 128 else ["blocks of 128 rows that share a scale would not stay together"]
    )


def looker_of(narrow):
    torch.manual_seed(0)
    return Looker(narrow=narrow).eval()


def test_meta_parameters_are_left_alone():
    """A model that is not loaded yet, or whose weights accelerate keeps elsewhere."""
    handle = patch(looker().to("meta"), strict=False)
    assert _names(handle) == [] and "no ordinary parameter" in handle.report.skipped[0].reason


@pytest.mark.parametrize("fault", ["wrong columns", "stale result", "scale left out"])
def test_verification_finds_faults(fault, monkeypatch):
    model = quantized(tiny("llama"))
    take = joined.Group._take
    if fault == "wrong columns":
        monkeypatch.setattr(joined.Group, "_take", lambda *args: take(*args).roll(1, -1))
    elif fault == "stale result":
        kept = {}
        monkeypatch.setattr(joined.Group, "_take", lambda g, p, i: kept.setdefault((id(g), i), take(g, p, i)) * 0.5)
    else:
        stock = Int8Linear.forward_quantized
        monkeypatch.setattr(Int8Linear, "forward_quantized", lambda s, v, scale, d: stock(s, v, scale * 1.01, d))
    with pytest.raises(RuntimeError, match=r"verification failed: .*\(linear\) differs by rms"):
        patch(model, verify=True)
    assert not patched_modules(model)
    handle = patch(model, verify=True, strict=False)
    assert any(row.kind == "linear" and "differs" in row.reason for row in handle.report.skipped)


def test_parallel_branches():
    """One norm's result for attention and MLP: both take it quantised."""
    torch.manual_seed(0)
    model = quantized(fill(Parallel().eval()))
    x = torch.randn(2, 3, 64)
    with torch.no_grad():
        expected = model(x)
        handle = patch(model)
        found, calls = counted(nn.Sequential(model), x)
    torch.testing.assert_close(found, expected)
    assert calls["rms_norm_quantized"] == 1 and calls["quantize_int8"] == 2 and calls["int8_matmul"] == 4
    assert state_of(model.before).rows is torch.int8 and handle.fallbacks() == {}
