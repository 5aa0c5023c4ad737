"""Modules are recognised by what they compute, and only those."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fusedops.patch import patch
from fusedops.patch.gates import find_gate
from fusedops.patch.norms import find_norm
from fusedops.patch.rotary import RotaryForm, RotaryFunction, rotary_form
from tests.patch.tiny_models import fill


class Norm(nn.Module):
    """A norm whose formula is given; two floats that could be its epsilon."""

    def __init__(self, formula, weighted=True, eps=1e-5):
        super().__init__()
        self.dropout = 1e-2
        self.some_name = eps
        self.formula = formula
        if weighted:
            self.scale = nn.Parameter(torch.randn(24))

    def forward(self, x):
        wide = x.float()
        y = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.some_name)
        return self.formula(y, getattr(self, "scale", None), x.dtype)


FORMULAS = {
    "rms_norm(rounding='llama')": lambda y, w, dtype: w * y.to(dtype),
    "rms_norm()": lambda y, w, dtype: (w * y).to(dtype),
    "rms_norm(weight_offset=1.0)": lambda y, w, dtype: (y * (1.0 + w.float())).to(dtype),
    "rms_norm(rounding='llama', weight_offset=1.0)": lambda y, w, dtype: ((1.0 + w.float()) * y.to(dtype)).to(dtype),
}


@pytest.mark.parametrize("text", FORMULAS)
@pytest.mark.parametrize("eps", [1e-6, 1e-5, 3e-3])
def test_norm_kinds(text, eps):
    state, found = find_norm(Norm(FORMULAS[text], eps=eps))
    assert (found, state.eps, state.weight) == (text, eps, "scale")


def test_norm_without_weight():
    state, found = find_norm(Norm(lambda y, w, dtype: y.to(dtype), weighted=False))
    assert (found, state.weight) == ("rms_norm(weight=None)", None)


def test_torch_norms():
    assert find_norm(nn.RMSNorm(32, eps=1e-5))[1] == "rms_norm()"
    assert find_norm(nn.LayerNorm(32))[1] == "layer_norm()"
    assert "several" in find_norm(nn.LayerNorm((4, 8)))


@pytest.mark.parametrize(
    "formula",
    [
        lambda y, w, dtype: (w * y * 1.01).to(dtype),
        lambda y, w, dtype: (w * y - y.mean(-1, keepdim=True)).to(dtype),
        lambda y, w, dtype: (w * y).abs().to(dtype),
        lambda y, w, dtype: (w * y.clamp(-2, 2)).to(dtype),
        lambda y, w, dtype: (w.flip(0) * y).to(dtype),
        lambda y, w, dtype: (w * y.roll(1, 0)).to(dtype),
    ],
)
def test_near_norms_are_left_alone(formula):
    assert find_norm(Norm(formula)) == "computes none of the RMS norms that we know"


@pytest.mark.parametrize(
    "module", [nn.Dropout(0.1), nn.Embedding(8, 4), nn.LeakyReLU(0.01), nn.BatchNorm1d(8), nn.GELU()]
)
def test_other_modules_are_not_norms(module):
    assert find_norm(module) is None


def test_norm_called_with_more_than_x():
    """A gated norm equals an RMS norm while no gate is given; with a gate, its own code must run."""

    class GatedNorm(Norm):
        def forward(self, x, gate=None):
            y = super().forward(x)
            return y if gate is None else y * F.silu(gate)

    model = nn.Sequential(GatedNorm(FORMULAS["rms_norm()"]))
    x, gate = torch.randn(3, 24), torch.randn(3, 24)
    expected = [model[0](x), model[0](x, gate), model[0](x, gate=gate), model[0](x=x)]
    patch(model)
    for mine, stock in zip(
        (model[0](x), model[0](x, gate), model[0](x, gate=gate), model[0](x=x)), expected, strict=True
    ):
        torch.testing.assert_close(mine, stock)


class Gated(nn.Module):
    """A gated MLP whose middle is given."""

    def __init__(self, middle, packed=False, drop=0.0):
        super().__init__()
        self.one = nn.Linear(8, 24, bias=False)
        if not packed:
            self.two = nn.Linear(8, 24, bias=False)
        self.three = nn.Linear(12 if packed else 24, 8)
        self.middle = middle
        self.drop = nn.Dropout(drop)

    def forward(self, x):
        halves = (self.one(x), self.two(x)) if hasattr(self, "two") else self.one(x).chunk(2, dim=-1)
        return self.three(self.drop(self.middle(*halves)))


GATES = {
    "silu_mul of one, two": lambda a, b: F.silu(a) * b,
    "silu_mul of two, one": lambda a, b: a * F.silu(b),
    "gelu_mul of one, two": lambda a, b: F.gelu(a) * b,
    "gelu_mul(approximate='tanh') of two, one": lambda a, b: F.gelu(b, approximate="tanh") * a,
}


@pytest.mark.parametrize("text", GATES)
def test_gate_kinds(text):
    assert find_gate(Gated(GATES[text]))[1] == text


@pytest.mark.parametrize("first", [True, False])
def test_packed_gate(first):
    module = Gated((lambda a, b: F.silu(a) * b) if first else (lambda a, b: a * F.silu(b)), packed=True)
    state, text = find_gate(module)
    assert (text, state.gate_first) == ("silu_mul of one halves", first)
    x = torch.randn(2, 3, 8)
    expected = module(x)
    patch(module)
    assert torch.equal(module(x), expected)


def test_activation_spelled_by_hand():
    """The old formula of GELU and SiLU written out are the same functions within rounding."""
    by_hand = Gated(lambda a, b: a * torch.sigmoid(a) * b)
    assert find_gate(by_hand)[1] == "silu_mul of one, two"
    tanh = Gated(lambda a, b: 0.5 * a * (1 + torch.tanh(0.7978845608 * (a + 0.044715 * a**3))) * b)
    assert find_gate(tanh)[1] == "gelu_mul(approximate='tanh') of one, two"


@pytest.mark.parametrize(
    "middle",
    [
        lambda a, b: F.relu(a) * b,
        lambda a, b: a * torch.sigmoid(1.702 * a) * b,
        lambda a, b: F.silu(a.clamp(max=7)) * b,
        lambda a, b: F.silu(a) * (b + 1),
        lambda a, b: F.silu(a) + b,
        lambda a, b: F.silu(a) * b * 1.01,
    ],
)
def test_near_gates_are_left_alone(middle):
    assert find_gate(Gated(middle)) == "does not compute down(silu(gate) * up) or down(gelu(gate) * up)"


def test_dropout_inside_an_mlp():
    silu = GATES["silu_mul of one, two"]
    assert find_gate(Gated(silu, drop=0.0))[1] == "silu_mul of one, two"
    assert find_gate(Gated(silu, drop=0.5)) == "its forward does something else in training"


def test_output_changed_after_the_last_projection():
    class Scaled(Gated):
        def forward(self, x):
            return super().forward(x) * 2

    assert find_gate(Scaled(GATES["silu_mul of one, two"])) is None


@pytest.mark.parametrize(
    "module", [nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), nn.Bilinear(4, 4, 4), nn.GRU(4, 4)]
)
def test_other_modules_are_not_mlps(module):
    assert not isinstance(find_gate(module), tuple)


def _turn(x, interleaved):
    if interleaved:
        return torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
    return torch.cat((-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]), -1)


def _neox(q, k, cos, sin, unsqueeze_dim=1):
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return tuple(x * cos + _turn(x, False) * sin for x in (q, k))


def _wide(q, k, cos, sin):
    return tuple(
        (x.float() * cos[:, None].float() + _turn(x.float(), False) * sin[:, None].float()).to(x.dtype) for x in (q, k)
    )


def _neighbours(q, k, cos, sin):
    return tuple(x * cos[:, None] + _turn(x, True) * sin[:, None] for x in (q, k))


def _glm(q, k, cos, sin):
    cos, sin = (x[:, None, :, : x.shape[-1] // 2].repeat_interleave(2, -1) for x in (cos, sin))
    width = cos.shape[-1]
    return tuple(
        torch.cat((x[..., :width] * cos + _turn(x[..., :width], True) * sin, x[..., width:]), -1) for x in (q, k)
    )


def _pairs(q, k, cos, sin):
    return _neox(q, k, torch.cat((cos, cos), -1), torch.cat((sin, sin), -1))


ROTARY = {
    _neox: RotaryForm(False, "each", heads_last=True),
    _wide: RotaryForm(False, "each", wide_angles=True),
    _neighbours: RotaryForm(True, "each"),
    _glm: RotaryForm(True, "first half", partial=True),
    _pairs: RotaryForm(False, "pair"),
}


@pytest.mark.parametrize("stock", ROTARY, ids=lambda function: function.__name__)
def test_rotary_forms(stock):
    assert rotary_form(stock) == ROTARY[stock]


@pytest.mark.parametrize(
    "stock",
    [
        lambda q, k, cos, sin: _neox(q, k, cos, -sin),
        lambda q, k, cos, sin: _neox(q, k, sin, cos),
        lambda q, k, cos, sin: (q, k),
        lambda q, k, cos, sin: _neox(q, k, cos, sin)[::-1],
        lambda q, k, cos, sin: (_neox(q, k, cos, sin)[0], k),
        lambda q, k, cos, sin: tuple(x * 1.01 for x in _neox(q, k, cos, sin)),
        lambda q, k, cos, sin, sections: _neox(q, k, cos, sin),
        lambda q, cos, sin: _neox(q, q, cos, sin)[0],
    ],
)
def test_other_rotary_functions_are_left_alone(stock):
    assert rotary_form(stock) is None


def _heads(dtype=torch.float32):
    angles = torch.randn(2, 3, 16)
    heads = [torch.randn(2, number, 3, 16).to(dtype) for number in (4, 2)]
    return *heads, angles.cos().to(dtype), angles.sin().to(dtype)


def test_rotary_calls_that_the_operator_takes():
    rotate = RotaryFunction(_neox, rotary_form(_neox))
    q, k, cos, sin = _heads()
    for mine, stock in zip(rotate(q, k, cos, sin), _neox(q, k, cos, sin), strict=True):
        torch.testing.assert_close(mine, stock)
    q, k = q.transpose(1, 2), k.transpose(1, 2)
    for mine, stock in zip(rotate(q, k, cos, sin, unsqueeze_dim=2), _neox(q, k, cos, sin, 2), strict=True):
        torch.testing.assert_close(mine, stock)
    assert rotate.fallbacks == {}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda q, k, cos, sin: (q.bfloat16(), k.bfloat16(), cos, sin), "result type"),
        (lambda q, k, cos, sin: (q.double(), k.double(), cos.double(), sin.double()), "float64"),
        (lambda q, k, cos, sin: (q, k, cos, sin, 1), "further arguments"),
        (lambda q, k, cos, sin: (q, k, cos[..., :1], sin[..., :1]), "as wide as the heads"),
        (lambda q, k, cos, sin: (q.mT.contiguous().mT, k, cos, sin), "contiguous"),
    ],
)
def test_rotary_calls_that_the_model_answers(change, reason):
    """Other dtypes, strides and arguments: the model's own function, with its own result dtype, and it is counted."""
    rotate = RotaryFunction(_neox, rotary_form(_neox))
    arguments = change(*_heads())
    for mine, stock in zip(rotate(*arguments), _neox(*arguments), strict=True):
        assert mine.dtype == stock.dtype and torch.equal(mine, stock)
    (counted,) = rotate.fallbacks.items()
    assert reason in counted[0] and counted[1] == 1


def test_rotary_function_may_be_a_module():
    """transformers may put a module of the kernels hub where the function was."""

    class Rotate(nn.Module):
        def forward(self, q, k, cos, sin):
            return _neox(q, k, cos, sin)

    assert rotary_form(Rotate()) == RotaryForm(False, "each")


def test_recognition_leaves_no_trace():
    """Neither parameters nor the random state nor a module's own counters change."""

    class Counting(Gated):
        calls = 0

        def forward(self, x):
            self.calls += 1
            return super().forward(x)

    model = fill(
        nn.Sequential(Counting(GATES["silu_mul of one, two"], drop=0.5), nn.RMSNorm(8, eps=1e-5), nn.Dropout(0.5))
    )
    versions = [parameter._version for parameter in model.parameters()]
    random_state = torch.get_rng_state()
    patch(model, dry_run=True)
    assert [parameter._version for parameter in model.parameters()] == versions
    assert torch.equal(torch.get_rng_state(), random_state)
    assert "calls" not in vars(model[0])


def test_patching_inside_autocast_and_on_meta():
    """Recognition runs on the CPU in its own dtypes, whatever the model's weights are."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert find_norm(Norm(FORMULAS["rms_norm()"]))[1] == "rms_norm()"
    with torch.device("meta"):
        on_meta = nn.Sequential(Norm(FORMULAS["rms_norm(rounding='llama')"]), Gated(GATES["silu_mul of one, two"]))
        counts = patch(on_meta, dry_run=True).report.counts
    assert counts == {"attention": 0, "norm": 1, "mlp": 1, "rotary": 0, "residual": 0, "linear": 0}
