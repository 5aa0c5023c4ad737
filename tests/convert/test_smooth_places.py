"""Places where smoothing would change the model are recognised as such, one by one, with the reason."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fusedops
from fusedops.convert.norms import find_norms
from tests.convert.test_quantize import distance
from tests.patch.tiny_models import Scaler, logits, tokens, tower

WIDTH = 48


class Block(nn.Module):
    """A norm, a linear that reads it, and what a test puts between or beside them."""

    def __init__(self, between=lambda x: x, beside=lambda self, x, normed: 0, after=lambda x: x):
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.other = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.a, self.b, self.c = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        for parameter in self.parameters():
            parameter.data.add_(torch.randn(parameter.shape) * 0.1)
        self.between, self.beside, self.after = between, beside, after

    def forward(self, x):
        normed = self.norm(x)
        return self.c(self.after(self.b(x))) + self.a(self.between(normed)) + self.beside(self, x, normed)


def smoothing(model, **options):
    """({source: consumers} that were folded, {source or consumer: reason} of those that were not)."""
    x = torch.randn(3, 5, WIDTH)
    expected = model(x)
    handle = fusedops.quantize_(model, "int8", calibration=[x, torch.randn(2, 5, WIDTH)], **options)
    assert distance(model(x).detach(), expected.detach()) < 0.05
    report = handle.report
    folded = {place.source: place.consumers for place in report.folded}
    return folded, {p.source or p.consumers[0]: p.reason for p in report.smoothing if p.status == "skipped"}


@pytest.mark.parametrize("after", [lambda x: x, F.relu, lambda x: F.leaky_relu(x, 0.1), lambda x: x.abs()])
def test_what_lets_factors_through(after):
    """Whatever is proportional in each channel, for positive factors; and the factors that arrive are those meant."""
    folded, left = smoothing(Block(after=after))
    assert folded == {"norm": ("a",), "b": ("c",)} and list(left) == ["b"]
    assert "not a norm's output" in left["b"]


@pytest.mark.parametrize(
    "after",
    [F.silu, F.gelu, torch.tanh, F.softplus, lambda x: x + 1, lambda x: x.cumsum(-1), lambda x: F.normalize(x, dim=-1)],
)
def test_what_does_not(after):
    """Curves, sums with something else, and what mixes channels."""
    folded, left = smoothing(Block(after=after))
    assert folded == {"norm": ("a",)} and left.keys() == {"b", "c"}


def test_channels_in_another_order():
    """A linear that gets another's channels turned round, some of them twice, and some from elsewhere."""

    def after(x):
        return torch.cat((x.flip(-1)[..., :20], x[..., :20], torch.ones_like(x[..., :8])), -1)

    model = Block(after=after)
    folded, _ = smoothing(model)
    assert folded == {"norm": ("a",), "b": ("c",)}


@pytest.mark.parametrize(
    ("beside", "options"),
    [
        (lambda self, x, normed: normed, {}),
        (lambda self, x, normed: 0.01 * normed[..., :1], {}),
        (lambda self, x, normed: F.linear(normed, self.other.weight[None]), {}),
        (lambda self, x, normed: self.b(normed.clone()), {}),
        (lambda self, x, normed: self.b(normed) * 0.1, {"skip": "b"}),
    ],
)
def test_something_else_reads_the_norm(beside, options):
    """A residual, a router, a linear that is not quantised: the norm stays as it is."""
    model = Block(beside=beside)
    weight = model.norm.weight.detach().clone()
    folded, left = smoothing(model, **options)
    assert "norm" not in folded and left["norm"] == "not only these linears read it"
    assert torch.equal(model.norm.weight, weight)


def test_a_small_part_in_bfloat16():
    """What else reads the norm is seen where it is small, too."""
    model = Block(beside=lambda self, x, normed: 0.01 * normed).to(torch.bfloat16)
    report = fusedops.quantize_(model, "int8", calibration=[torch.randn(3, 5, WIDTH).to(torch.bfloat16)]).report
    assert [place.source for place in report.folded] == ["b"]


def test_a_norm_for_several_linears():
    folded, _ = smoothing(Block(beside=lambda self, x, normed: F.silu(self.b(normed)), after=lambda x: x.detach()))
    assert "norm" not in folded  # b gets x too
    model = Block(beside=lambda self, x, normed: self.extra(normed))
    model.extra = nn.Linear(WIDTH, WIDTH)
    assert smoothing(model)[0] == {"norm": ("a", "extra"), "b": ("c",)}


def test_a_linear_with_several_inputs():
    """Two norms, or a norm and something else, before one linear: neither is folded."""
    folded, left = smoothing(Block(beside=lambda self, x, normed: self.a(self.other(x))))
    assert folded == {"b": ("c",)}
    assert left["norm"] == left["other"] == "a is given other tensors too"


def test_the_norm_was_changed_on_the_way():
    """In place, on the very tensor: an addition breaks the proportion, a factor does not."""
    assert "norm" not in smoothing(Block(between=lambda x: x.add_(1)))[0]
    assert "norm" in smoothing(Block(between=lambda x: x.mul_(2)))[0]
    assert "norm" not in smoothing(Block(between=lambda x: x + 1))[0]


def test_tied_parameters():
    model = Block()
    model.other.weight = model.norm.weight
    folded, left = smoothing(model)
    assert "norm" not in folded and left["norm"] == "the norm's parameter is also norm.weight"
    model = Block(beside=lambda self, x, normed: self.c(F.silu(normed)))
    model.a.weight = model.c.weight
    folded, left = smoothing(model)
    assert not folded and left["norm"] == "a shares its weight or bias with another module"
    assert left["c"] == "it shares its weight or bias with another module"
    model = Block()
    model.b.bias = model.c.bias
    folded, left = smoothing(model)
    assert folded == {"norm": ("a",)}


def test_not_reached():
    model = Block()
    model.idle = nn.Linear(WIDTH, WIDTH)
    assert smoothing(model)[1]["idle"] == "calibration did not reach it"


class Cleaned(Block):
    def forward(self, x):
        return self.c(self.b(x)) + self.a(self.norm(x)).nan_to_num(0, 0, 0)


def test_values_that_are_not_finite():
    """A place with infinite values stays; a model without finite results cannot be checked."""
    model = Cleaned()
    model.norm.weight.data[3] = float("inf")
    folded, left = smoothing(model)
    assert folded == {"b": ("c",)} and left["norm"] == "its values are not all finite"
    model = tower()
    model.floors[1].before_mixing.gain.data[3] = float("inf")
    with pytest.raises(ValueError, match="model must return finite tensors, .* got NaN or infinity only"):
        fusedops.quantize_(model, "int8", calibration=[tokens()])
    assert type(model.head) is nn.Linear


class Masked(Block):
    def forward(self, x):
        return super().forward(x).index_fill(-1, torch.tensor([0, 5]), -torch.inf)


def test_results_with_masks():
    """Infinite elements at the same places are no difference, and hide none."""
    model = Masked(beside=lambda self, x, normed: normed)
    x = torch.randn(3, 5, WIDTH)
    report = fusedops.quantize_(model, "int8", calibration=[x]).report
    assert [(p.source, p.consumers) for p in report.folded] == [("b", ("c",))]


class Odd(nn.Module):
    """Has one parameter, as a norm, and uses it in another way."""

    def __init__(self, use):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))
        self.use = use

    def forward(self, x):
        return self.use(x, self.weight)


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (nn.RMSNorm(WIDTH), ("weight", None, 0.0)),
        (nn.LayerNorm(WIDTH), ("weight", "bias", 0.0)),
        (nn.LayerNorm(WIDTH, bias=False), ("weight", None, 0.0)),
        (fusedops.nn.RMSNorm(WIDTH, weight_offset=1.0), ("weight", None, 1.0)),
        (fusedops.nn.RMSNorm(WIDTH, rounding="llama"), ("weight", None, 0.0)),
        (Scaler(WIDTH), ("gain", None, 0.0)),
        (Odd(lambda x, w: x * w), ("weight", None, 0.0)),
        (Odd(lambda x, w: x * (1 + w)), ("weight", None, 1.0)),
        (Odd(lambda x, w: x * (2 + w)), None),
        (Odd(lambda x, w: x + w), None),
        (Odd(lambda x, w: x * w.abs().sqrt()), None),
        (Odd(lambda x, w: x * w.flip(0)), None),
        (Odd(lambda x, w: (x * w).sum(-1)), None),
        (Odd(lambda x, w: x * 0 * w), None),
        (nn.LayerNorm((2, WIDTH)), None),
        (nn.LayerNorm(WIDTH, elementwise_affine=False), None),
        (nn.PReLU(WIDTH), None),
        (nn.BatchNorm1d(3).eval(), None),
    ],
)
def test_norms_by_what_they_compute(module, expected):
    found = [(norm.weight, norm.bias, norm.offset) for norm in find_norms(nn.Sequential(module))]
    assert found == ([] if expected is None else [expected])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_divided_by_what_was_really_done(dtype, offset):
    """The factor that comes back is that of the rounded weight; where the weight is 0 nothing happens."""
    norm_module = fusedops.nn.RMSNorm(WIDTH, weight_offset=offset).to(dtype)
    torch.manual_seed(0)
    before = torch.randn(WIDTH).to(dtype)
    before[7] = -offset
    norm_module.weight.data.copy_(before)
    (norm,) = find_norms(nn.Sequential(norm_module))
    factors = torch.rand(WIDTH) * 8 + 0.1
    real = norm.divide(factors)
    after = norm_module.weight.detach()
    torch.testing.assert_close((after.float() + offset) * real, before.float() + offset)
    assert real[7] == 1 and after[7] == before[7]
    assert ((real / factors - 1).abs() < 0.05).sum() >= WIDTH - 8


def test_patched_model():
    """Smoothing finds the same places in a model whose norms and gates are replaced, and the patch stays in force."""
    model, ids = tower(), tokens()
    expected = logits(model, ids)
    patched = fusedops.patch(model)
    handle = fusedops.quantize_(model, "int8", calibration=[ids], keep=True)
    assert handle.report.totals["folded"] == 13 and patched.fallbacks() == {}
    assert distance(logits(model, ids), expected) < 0.1
    patched.undo()
    assert distance(logits(model, ids), expected) < 0.1
    handle.undo()
    assert torch.equal(logits(model, ids), expected)
