"""A patched model gives what the unpatched one gives, whatever reaches it."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fusedops
from fusedops import FallbackWarning
from fusedops._core import env
from fusedops.patch import patch
from fusedops.testing.accuracy import Budget, errors
from tests.patch.tiny_models import Mixer, Scaler, fill, logits, tiny, tokens, tower


def test_float64_model():
    """The operators refuse float64; every module answers with its own code, and the handle says how often."""
    model, ids = tower(), tokens()
    handle = patch(model)
    model.double()
    patched_logits = logits(model, ids)
    counts = handle.fallbacks()
    handle.undo()
    assert torch.equal(patched_logits, logits(model, ids)) and patched_logits.dtype == torch.float64
    paths = {path for path, _ in counts}
    assert paths == {row.path for row in handle.report.replaced if row.kind != "residual"}
    assert all("float64" in reason for _, reason in counts)


@pytest.mark.parametrize("policy", ["raise", "warn", "silent"])
def test_fallback_policy_on_a_gpu(policy, monkeypatch):
    """Leaving the fused path with CUDA tensors is never silent unless that was asked for."""

    class OnGpu(torch.Tensor):
        is_cuda = True

    monkeypatch.setenv("FUSEDOPS_FALLBACK", policy)
    env.refresh()
    model = nn.Sequential(nn.RMSNorm(8, eps=1e-5)).double()
    x = torch.randn(2, 8, dtype=torch.float64).as_subclass(OnGpu)
    handle = patch(model)
    if policy == "raise":
        with pytest.raises(RuntimeError, match="RMSNorm runs its own code instead of a fused operator .*float64"):
            model(x)
    elif policy == "warn":
        with pytest.warns(FallbackWarning, match="RMSNorm runs its own code") as warned:
            model(x)
            model(x)
        assert len(warned) == 1
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model(x)
    assert sum(handle.fallbacks().values()) == (2 if policy == "warn" else 1)


def test_last_dimension_not_contiguous():
    model = fill(nn.Sequential(Scaler(64), nn.LayerNorm(64), nn.RMSNorm(64, eps=1e-5)))
    x = torch.randn(64, 6).t()
    expected = [module(x) for module in model]
    handle = patch(model)
    for module, stock in zip(model, expected, strict=True):
        torch.testing.assert_close(module(x), stock)
    assert {path for path, _ in handle.fallbacks()} == {"0", "1", "2"}


def test_projection_that_returns_strided_columns():
    class Strided(nn.Linear):
        def forward(self, x):
            return super().forward(x).mT.contiguous().mT

    model = nn.Sequential(Mixer(64, 96))
    model[0].w1 = Strided(64, 96)
    x = torch.randn(2, 5, 64)
    expected = model(x)
    handle = patch(model)
    torch.testing.assert_close(model(x), expected)
    assert [path for path, _ in handle.fallbacks()] == ["0"]


@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
def test_norms_kept_in_float32(family):
    """Weights wider than the activations: llama's formula then returns float32, gpt-oss's the activations' dtype."""
    norm = tiny(family).model.norm
    x = torch.randn(2, 3, 64).bfloat16()
    expected = norm(x)
    patch(nn.Sequential(norm))
    assert norm(x).dtype == expected.dtype == (torch.float32 if family == "llama" else torch.bfloat16)
    torch.testing.assert_close(norm(x), expected)


@pytest.mark.parametrize(
    "make", [tower, lambda: tiny("llama"), lambda: tiny("gpt_oss")], ids=["own", "llama", "gpt_oss"]
)
def test_autocast(make):
    model, ids = make(), tokens()
    model = nn.Sequential(model)
    model.append(nn.LayerNorm(8))
    truth = logits(model[0], ids).double(), model[1](torch.ones(2, 8)).double()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = logits(model[0], ids), model[1](torch.ones(2, 8).bfloat16())
        patch(model)
        found = logits(model[0], ids), model[1](torch.ones(2, 8).bfloat16())
    for mine, stock, exact in zip(found, expected, truth, strict=True):
        assert mine.dtype == stock.dtype
        measured, allowed = errors(mine, exact), errors(stock, exact)
        assert measured.rms <= 2 * allowed.rms and measured.peak <= 2 * allowed.peak + 1, (measured, allowed)


class LowRank(nn.Module):
    """A linear layer with a low-rank addition, as adapters wrap it."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.in_features, self.out_features = base.in_features, base.out_features
        self.down = nn.Linear(base.in_features, 4, bias=False)
        self.up = nn.Linear(4, base.out_features, bias=False)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return self.base(x) + self.up(self.down(x))


@pytest.mark.parametrize("when", ["before", "after"])
def test_adapters_keep_working(when):
    """Children are called as modules, so what wraps them before or after patching takes part."""
    plain, model, ids = tower(), tower(), tokens()
    handle = patch(model) if when == "after" else None
    for one in (plain, model):
        torch.manual_seed(0)
        for floor in one.floors:
            for name in ("w1", "w2", "w3"):
                setattr(floor.mixing, name, LowRank(getattr(floor.mixing, name)))
    handle = handle or patch(model)
    assert handle.report.counts["mlp"] == 3
    torch.testing.assert_close(logits(model, ids), logits(plain, ids))
    assert [getattr(model.floors[0].mixing, name).calls for name in ("w1", "w2", "w3")] == [1, 1, 1]


def test_weight_that_is_a_subclass():
    """Where the weight is no plain parameter (DTensor, quantised), the module itself is used."""

    class Sharded(nn.Parameter):
        pass

    model, ids = tower(), tokens()
    expected = logits(model, ids)
    handle = patch(model)
    model.floors[1].before_mixing._parameters["gain"] = Sharded(model.floors[1].before_mixing.gain.detach())
    torch.testing.assert_close(logits(model, ids), expected)
    assert ("floors.1.before_mixing", "the weight is a Sharded") in handle.fallbacks()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
@pytest.mark.parametrize(
    "place",
    ["norm edits", "norm replaces", "norm output", "layer edits", "layer replaces", "next layer edits", "MLP output"],
)
def test_hooks(place, mode):
    """Hooks fire as often as before and what they change takes effect, also where it is changed in place."""
    results, calls = [], []
    for patched in (False, True):
        model, seen = tower(), []
        calls.append(seen)
        _add_hook(model, place, seen)
        if patched:
            patch(model)
        with mode():
            results.append([model(tokens()).clone() for _ in range(2)])
    assert len(calls[0]) == len(calls[1]) == 2
    for mine, stock in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(mine, stock)


def _add_hook(model, place, seen):
    def before(change):
        def hook(module, args):
            seen.append(place)
            return change(args[0])

        return hook

    def after(change):
        def hook(module, args, out):
            seen.append(place)
            return change(out)

        return hook

    def in_place(x):
        x[..., ::2].add_(1.0)  # not a factor, which a norm would take out again

    floor = model.floors[1]
    if place == "norm edits":
        floor.before_mixing.register_forward_pre_hook(before(in_place))
    elif place == "norm replaces":
        floor.before_looking.register_forward_pre_hook(before(lambda x: (x.roll(1, -1),)))
    elif place == "norm output":
        model.roof.register_forward_hook(after(lambda x: x * 1.5))
    elif place == "layer edits":
        floor.register_forward_hook(after(in_place))
    elif place == "layer replaces":
        floor.register_forward_hook(after(lambda x: x + 1.0))
    elif place == "next layer edits":
        floor.register_forward_pre_hook(before(in_place))
    else:
        floor.mixing.register_forward_hook(after(lambda x: x * 2))


@pytest.mark.parametrize("family", ["llama", "gemma3", "phi3", "gpt_oss", "mixtral", "glm"])
def test_training_gradients(family):
    """Loss and every gradient, with dropout drawing the same numbers, with and without gradient checkpointing."""
    model, ids = tiny(family).train(), tokens()
    found = {}
    for name in ("stock", "patched", "checkpointed"):
        handle = patch(model) if name != "stock" else None
        if name == "checkpointed":
            model.gradient_checkpointing_enable()
        torch.manual_seed(0)
        model.zero_grad()
        loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        found[name] = loss.item(), {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
        if handle:
            handle.undo()
    for name in ("patched", "checkpointed"):
        assert found[name][0] == pytest.approx(found["stock"][0], rel=1e-6)
        assert found[name][1].keys() == found["stock"][1].keys()
        for key, gradient in found[name][1].items():
            stock = found["stock"][1][key]
            assert (gradient - stock).norm() <= 2e-5 * stock.norm() + 1e-9, key


def test_layers_frozen_and_last_norm_trained():
    """What a layer without gradients prepared must not be taken by a norm that records them."""
    model, ids = tower(), tokens()
    patch(model)
    stream = model.words(ids).detach()
    places = torch.zeros(1, 12, model.rotated)
    with torch.no_grad():
        for floor in model.floors:
            stream = floor(stream, (places.cos(), places.sin()))
    assert model.roof._fusedops.stash is not None
    model.head(model.roof(stream)).sum().backward()
    assert model.roof.gain.grad is not None


@pytest.mark.parametrize("family", ["llama", "mixtral", "own"])
def test_compile(family):
    """The compiler sees the stock code and our attention: no graph break more, no recompilation from call to call."""
    model = tower() if family == "own" else tiny(family)
    counts, results = [], []
    for patched in (False, True):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        if patched:
            patch(model)
        compiled = torch.compile(model, backend="eager")
        results.append([logits(compiled, tokens(length=length, seed=length)) for length in (5, 5, 9, 7)])
        counters = torch._dynamo.utils.counters
        counts.append((counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())))
    torch._dynamo.reset()
    assert counts[0] == counts[1] and counts[0][0] > 0
    budget = Budget.for_dtype(torch.float32)
    for mine, stock in zip(results[1], results[0], strict=True):
        measured = errors(mine, stock.double())
        assert measured.rms <= budget.rms * 2**0.5 and measured.peak <= budget.peak * 2**0.5  # two attentions
        assert family != "own" or torch.equal(mine, stock)


def test_inference_mode_uses_the_fused_path():
    """Every addition that a norm follows is one call, also across layers, under no_grad and inference_mode."""
    model, ids = tiny("llama"), tokens()
    expected = logits(model, ids)
    patch(model)
    for mode in (torch.no_grad, torch.inference_mode):
        fusedops.reset_counters()
        with mode():
            torch.testing.assert_close(model(ids).logits, expected)
        calls = {name: count for (name, _), count in fusedops.counters().items()}
        assert calls == {"attention": 2, "add_rms_norm": 4, "rms_norm": 1, "silu_mul": 2, "rotary": 2}


def test_layer_norm_residual():
    """A decoder with torch.nn.LayerNorm: replaced and fused as well."""

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.LayerNorm(32), nn.LayerNorm(32, bias=False)
            self.inner, self.outer = nn.Linear(32, 32), nn.Linear(32, 32)

        def forward(self, x):
            x = x + self.inner(self.first(x))
            x = x + self.outer(F.relu(self.second(x)))
            return x

    class Stack(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([Layer() for _ in range(3)])
            self.last = nn.LayerNorm(32)

        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
            return self.last(x)

    model, x = fill(Stack()), torch.randn(2, 5, 32)
    expected = logits(model, x)
    assert patch(model).report.counts == {"attention": 0, "norm": 7, "mlp": 0, "rotary": 0, "residual": 3, "linear": 0}
    fusedops.reset_counters()
    torch.testing.assert_close(logits(model, x), expected)
    assert {name: count for (name, _), count in fusedops.counters().items()} == {"add_layer_norm": 6, "layer_norm": 1}
