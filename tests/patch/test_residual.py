"""Which additions are found in a layer's source, and what makes a layer be left alone."""

import functools

import pytest
import torch
from torch import nn

import fusedops
from fusedops.patch import patch, rebuild
from fusedops.patch.norms import add_then_norm
from fusedops.patch.residual import entry_norm, loop_is_clear, rewritten_forward
from tests.patch.tiny_models import Floor, Tower, fill, logits, tokens, tower

NORMS = ("n1", "n2", "n3", "n4")


class PreNorm:
    def forward(self, h, *args, **kwargs):
        residual = h
        h = self.n1(h)
        h, _ = self.attention(h, *args, **kwargs)
        h = residual + h
        residual = h
        h = self.n2(h)
        h = self.mlp(h)
        h = residual + self.drop(h)
        outputs = (h,)
        return outputs


class Sandwich:
    def forward(self, h):
        residual = h
        h = self.n2(self.attention(self.n1(h)))
        h = residual + h
        residual = h
        h = self.n4(self.mlp(self.n3(h)))
        return residual + h


class Scaled:
    def forward(self, h):
        h = h + self.attention(self.n1(h)) * self.scale
        h = h + self.mlp(self.n2(h)) * self.scale
        return h


class PostNorm:
    def forward(self, h):
        h = self.n1(h + self.attention(h))
        h = h + self.mlp(h)
        h = self.n2(h)
        return h


class InPlace:
    def forward(self, h):
        h += self.attention(self.n1(h))
        h += self.mlp(self.n2(h))
        return h


class UsedBetween:
    def forward(self, h):
        h = h + self.attention(self.n1(h))
        h = h * 2
        h = self.n2(h)
        return h


class ChangedBeforeReturn:
    def forward(self, h):
        h = h + self.attention(self.n1(h))
        h = h.clamp(-1, 1)
        return h


class OtherNorm:
    def forward(self, h):
        h = h + self.attention(self.n1(h))
        return self.unknown(h)


# class -> number of additions with a next norm, and without
FOUND = {PreNorm: (2, 1), Sandwich: (2, 1), Scaled: (2, 1), PostNorm: (1, 1)}


@pytest.mark.parametrize("layer", FOUND, ids=lambda layer: layer.__name__)
def test_found(layer):
    assert (rewritten_forward(layer, NORMS, True)[1], rewritten_forward(layer, NORMS, False)[1]) == FOUND[layer]


@pytest.mark.parametrize(
    "layer", [InPlace, UsedBetween, ChangedBeforeReturn, OtherNorm], ids=lambda layer: layer.__name__
)
def test_not_found(layer):
    with pytest.raises(rebuild.CannotRebuildError, match="no addition that is followed by a replaced norm"):
        rewritten_forward(layer, NORMS, True)


def test_rewritten_code_keeps_everything_else():
    """Defaults, keywords, closures, line numbers and the module's live globals stay."""
    factor = 3.0

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.n2 = nn.RMSNorm(8, eps=1e-5)

        def forward(self, h: "torch.Tensor", twice: float = 2.0, *, shift=1.0, **kwargs):
            extra = super().extra_repr()
            s = h * twice + shift * factor
            return self.n2(s), extra, kwargs, torch.__name__

    forward, count = rewritten_forward(Layer, ("n2",), False)
    assert count == 1
    assert forward.__globals__ is globals() and forward.__defaults__ == (2.0,)
    assert forward.__code__.co_firstlineno == Layer.forward.__code__.co_firstlineno
    layer, h = Layer(), torch.randn(2, 8)
    for arguments in ({}, {"twice": 5.0, "shift": 0.5, "more": 1}):
        for mine, stock in zip(forward(layer, h, **arguments), layer(h, **arguments), strict=True):
            assert torch.equal(mine, stock) if isinstance(mine, torch.Tensor) else mine == stock


def test_decorators_are_kept():
    """A wrapper made with functools.wraps runs around the rewritten code; one that hides the function is a reason."""
    calls = []

    def counted(function):
        @functools.wraps(function)
        def wrapper(*args, **kwargs):
            calls.append(function)
            return function(*args, **kwargs)

        return wrapper

    class Wrapped:
        @counted
        @counted
        def forward(self, h):
            h = h + self.part(h)
            return self.n1(h)

    forward, count = rewritten_forward(Wrapped, NORMS, False)
    assert count == 1

    class Norm(nn.Identity):
        pass

    layer = Wrapped()
    layer.part, layer.n1 = (lambda h: h), Norm()
    layer._modules = {"n1": layer.n1}
    assert torch.equal(forward(layer, torch.ones(2)), torch.full((2,), 2.0)) and len(calls) == 2

    class Hidden:
        @functools.wraps(PreNorm.forward)
        def forward(self, h):
            return type(self).somewhere_else(self, h)

    with pytest.raises(rebuild.CannotRebuildError, match="wrapped in a way that cannot be repeated"):
        rewritten_forward(Hidden, NORMS, True)


def test_source_that_is_not_what_runs(tmp_path):
    """A file that was changed since it was imported, and code that has no file."""
    path = tmp_path / "edited.py"
    text = "class Layer:\n    def forward(self, h):\n        h = h + self.part(h)\n        return self.n1(h)\n"
    path.write_text(text)
    namespace = {}
    exec(compile(text, str(path), "exec"), namespace)
    assert rewritten_forward(namespace["Layer"], NORMS, False)[1] == 1
    path.write_text(text.replace("h + ", "h * 2 + "))
    with pytest.raises(rebuild.CannotRebuildError, match="not the code that runs"):
        rewritten_forward(namespace["Layer"], NORMS, False)
    exec(compile(text, "<string>", "exec"), namespace)
    with pytest.raises(rebuild.CannotRebuildError, match="cannot be read"):
        rewritten_forward(namespace["Layer"], NORMS, False)


def test_entry_norm_and_loop():
    assert entry_norm(Floor(8, 2, 8), ("before_looking", "before_mixing")) == "before_looking"
    assert entry_norm(PostNorm(), ()) is None
    assert loop_is_clear(Tower, "floors") and not loop_is_clear(Tower, "other")

    class Edits(Tower):
        def forward(self, ids):
            signal = self.words(ids)
            for floor in self.floors:
                signal = floor(signal, None)
                signal[:, 0] = 0
            return self.roof(signal)

    assert not loop_is_clear(Edits, "floors")


class EditingTower(Tower):
    """Changes the layers' outputs in place between two layers, as multimodal models do."""

    def forward(self, ids):
        signal = self.words(ids)
        zeros = torch.zeros(1, ids.shape[1], self.rotated)
        for floor in self.floors:
            signal = floor(signal, (zeros.cos(), zeros.sin()))
            signal[:, 0] += 1.0
        return self.head(self.roof(signal))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
def test_model_that_edits_between_layers(mode):
    """The prepared norm is of the tensor before it was edited: it must not be used."""
    model, ids = fill(EditingTower().eval()), tokens()
    with mode():
        expected = model(ids)
        handle = patch(model)
        torch.testing.assert_close(model(ids), expected)
    assert handle.report.counts["residual"] == 3


def test_one_layer_used_several_times():
    """Weights shared between depths: the next norm is then the layer's own."""
    model, ids = tower(), tokens()
    model.floors = nn.ModuleList([model.floors[0]] * 3)
    expected = logits(model, ids)
    patch(model)
    torch.testing.assert_close(logits(model, ids), expected)


def test_layers_in_another_order():
    """The norm that was prepared belongs to another layer: computed again by the one that runs."""
    model, ids = tower(), tokens()
    patch(model)
    model.floors = nn.ModuleList([model.floors[2], model.floors[0], model.floors[1]])
    found = logits(model, ids)
    plain = tower()
    plain.floors = nn.ModuleList([plain.floors[2], plain.floors[0], plain.floors[1]])
    torch.testing.assert_close(found, logits(plain, ids))


def test_gradients_take_the_stock_forward():
    """With gradients, a layer runs its own code: the compiler's and autograd's view of it stays simple."""
    model, ids = tower(), tokens()
    patch(model)
    fusedops.reset_counters()
    model(ids).sum().backward()
    assert all(name != "add_rms_norm" for name, _ in fusedops.counters())


def test_sums_of_different_dtypes():
    """A residual stream kept in float32 beside 16-bit branches is added by torch; so is a bias that is broadcast."""
    model = tower()
    patch(model)
    residual, x = torch.randn(2, 3, 64), torch.randn(2, 3, 64)
    with torch.no_grad():
        for one in (x.bfloat16(), x[:1, :1], 2.0):
            assert torch.equal(add_then_norm(residual, one, model.roof), residual + one)
            assert model.roof._fusedops.stash is None
        assert torch.equal(add_then_norm(residual, x, model.roof), residual + x)
        assert model.roof._fusedops.stash is not None
