"""Which linears are replaced: skip rules, tied weights, hooks, classes and dtypes; each with its reason."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize

import fusedops
from fusedops.nn import Int8Linear, QuantizedLinear
from tests.patch.tiny_models import logits, tokens, tower


def skipped(model, skip=("lm_head",), scheme="int8"):
    """{path: reason}, of a model that is quantised."""
    return {row.path: row.reason for row in fusedops.quantize_(model, scheme, skip=skip).report.skipped}


@pytest.mark.parametrize(
    ("skip", "expected"),
    [
        ("head", {"head"}),
        (["w2"], {f"floors.{i}.mixing.w2" for i in range(3)}),
        (["mixing.w2", "head"], {"head", *(f"floors.{i}.mixing.w2" for i in range(3))}),
        (["floors.1.mixing"], {f"floors.1.mixing.w{i}" for i in (1, 2, 3)}),
        (["floors.[01].*"], {f"floors.{i}.{n}" for i in (0, 1) for n in ("looking.all_in", "looking.all_out")}
         | {f"floors.{i}.mixing.w{n}" for i in (0, 1) for n in (1, 2, 3)}),
        (["ead", "loors", "mixing.w"], set()),
        ((), set()),
    ],
)  # fmt: skip
def test_skip(skip, expected):
    """Full names, last parts, and patterns; of a linear or of what is around it."""
    model = tower()
    found = skipped(model, skip)
    assert found.keys() == expected and all("named in skip ('" in reason for reason in found.values())
    for path, module in model.named_modules():
        assert (type(module) is nn.Linear) == (path in expected)


def test_unmatched_names():
    """An entry that names nothing is told; one that another entry covers is not, nor the default."""
    report = fusedops.quantize_(tower(), "int8", skip=("lm_head", "head", "he*", "w9")).report
    assert report.unmatched == ("w9",) and "skip names nothing in the model: 'w9'" in str(report)
    assert fusedops.quantize_(tower(), "int8").report.unmatched == ()


def test_weight_of_an_embedding():
    """A tied head stays, under any name, whichever comes first."""
    model, ids = tower(), tokens()
    model.head.weight = model.words.weight
    assert skipped(model) == {"head": "its weight is also words.weight"}
    assert model.head.weight is model.words.weight and isinstance(model.floors[0].mixing.w1, Int8Linear)
    logits(model, ids)
    model = nn.ModuleDict({"head": nn.Linear(64, 128), "other": nn.Linear(64, 64), "words": nn.Embedding(128, 64)})
    model["words"].weight = model["head"].weight
    assert skipped(model) == {"head": "its weight is also words.weight"}


def test_two_linears_with_one_weight():
    """They share the codes too, each with its own bias; the weight counts once; undo restores the tie."""
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    model[2].weight = model[0].weight
    originals, x = list(model), torch.randn(3, 64)
    expected = model(x)
    handle = fusedops.quantize_(model, "int4-weight-only", keep=True)
    first, second = model[0], model[2]
    assert isinstance(first, QuantizedLinear) and first is not second
    for name in ("weight", "weight_scale", "weight_zero"):
        assert getattr(first, name) is getattr(second, name)
    assert first.bias is originals[0].bias and second.bias is originals[2].bias
    before, after = zip(*((row.bytes_before, row.bytes_after) for row in handle.report.rows))
    assert before == (16384, 0) and after[0] > 0 == after[1]
    handle.dequantize()
    assert type(model[2]) is nn.Linear and model[2].weight is model[0].weight
    handle.undo()
    assert list(model) == originals and model[0].weight is model[2].weight and torch.equal(model(x), expected)


def test_one_of_two_is_skipped():
    model = nn.ModuleDict({"a": nn.Linear(64, 64), "b": nn.Linear(64, 64), "c": nn.Linear(64, 64)})
    model["b"].weight = model["a"].weight
    assert skipped(model, skip="b") == {"a": "its weight is also b.weight", "b": "named in skip ('b')"}


def test_one_module_in_two_places():
    """It becomes one module in both places, which any of its names can skip."""
    shared = nn.Linear(64, 64)
    model = nn.ModuleDict({"a": shared, "b": nn.ModuleDict({"inner": shared}), "c": nn.Linear(64, 64)})
    handle = fusedops.quantize_(model, "int8", keep=True)
    assert isinstance(model["a"], Int8Linear) and model["b"]["inner"] is model["a"]
    assert [row.path for row in handle.report.rows] == ["a", "c"]
    handle.undo()
    assert model["a"] is shared and model["b"]["inner"] is shared
    assert skipped(model, skip="b.inner") == {"a": "named in skip ('b.inner')"}


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def _with(change):
    linear = nn.Linear(64, 64)
    return change(linear) or linear


def _weight_as_view(linear):
    weight = linear.weight.detach().clone()
    del linear.weight
    linear.weight = weight


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        (lambda: Doubled(64, 64), "a subclass of torch.nn.Linear"),
        (lambda: Int8Linear(64, 64), "quantised already"),
        (lambda: parametrizations.weight_norm(nn.Linear(64, 64)), "a subclass of torch.nn.Linear"),
        (lambda: _with(lambda m: parametrize.register_parametrization(m, "weight", nn.Identity())), "a subclass"),
        (lambda: _with(lambda m: torch.nn.utils.spectral_norm(m)), "1 hook is on it"),
        (lambda: _with(lambda m: m.register_forward_hook(print) and None), "1 hook is on it"),
        (lambda: _with(lambda m: m.register_forward_pre_hook(print) and None), "1 hook is on it"),
        (lambda: _with(lambda m: m.register_full_backward_hook(print) and None), "1 hook is on it"),
        (lambda: _with(lambda m: setattr(m, "forward", lambda x: x)), "its forward was replaced"),
        (lambda: _with(lambda m: setattr(m, "_hf_hook", object())), "accelerate's hook is on it"),
        (lambda: _with(_weight_as_view), "its weight is a Tensor, not a plain parameter"),
        (lambda: nn.Linear(64, 64).double(), "its weight is float64"),
        (lambda: nn.Linear(0, 64), "its weight is empty"),
        (lambda: nn.Linear(1, 64), "too small"),
    ],
)
def test_reasons(made, reason):
    """Whatever has more to it than its weight stays as it is, and says why."""
    module = made()
    model = nn.ModuleDict({"odd": module, "plain": nn.Linear(64, 64)})
    found = skipped(model)
    assert found.keys() == {"odd"} and reason in found["odd"]
    assert model["odd"] is module and isinstance(model["plain"], Int8Linear)


def test_weight_is_given_to_another_function():
    """A model that reads the weight itself must fail, not compute with the codes."""

    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.proj = nn.Linear(64, 64)

        def forward(self, x):
            return F.linear(x, self.proj.weight.to(x.dtype))

    model = Reader()
    fusedops.quantize_(model, "int8-weight-only")
    with pytest.raises(RuntimeError):
        model(torch.randn(2, 64))


class Asks(nn.Module):
    """Casts to the dtype of the weight of one linear, in a method of its own, and of a nested one."""

    def __init__(self):
        super().__init__()
        self.first, self.last, self.block = nn.Linear(64, 64), nn.Linear(64, 64), nn.ModuleDict()
        self.block.down, self.other = nn.Linear(64, 64), nn.Linear(64, 64)

    @torch.no_grad()
    def forward(self, x):
        width = self.other.weight.shape[0] + len(str(self.first.weight.device))
        down = self.block.down(x.to(self.block.down.weight.dtype))
        return down + self._ended(x) + width * self.other.bias.dtype.itemsize

    def _ended(self, x):
        return self.last(self.first(x).to(self.last.weight.dtype))


@pytest.mark.parametrize("scheme", ["int8", "int4-weight-only"])
def test_weights_whose_dtype_the_model_asks(scheme):
    """Codes would give a dtype to which activations must not be cast; what stores float values is taken."""
    model = nn.ModuleDict({"asks": Asks(), "plain": nn.Linear(64, 64)})
    found = dict.fromkeys(("asks.last", "asks.block.down"), "asks reads its weight's dtype")
    assert skipped(model, scheme=scheme) == found
    assert isinstance(model["asks"].first, QuantizedLinear) and isinstance(model["asks"].other, QuantizedLinear)
    assert skipped(Asks(), scheme=scheme) == {path[5:]: "Asks reads its weight's dtype" for path in found}
    assert not fusedops.sparsify_(Asks()).report.skipped
    assert len(fusedops.fake_quantize_(Asks(), scheme).report.skipped) == 2


@pytest.mark.parametrize("scheme", ["fp8-weight-only", "int8"])
def test_t5(scheme):
    """wo of T5, to whose dtype it casts what comes out of the activation, stays; its output is close to the model's."""
    import transformers

    config = transformers.T5Config(vocab_size=128, d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4)
    model, ids = transformers.T5ForConditionalGeneration(config).eval(), tokens()
    with torch.no_grad():
        before = model(input_ids=ids, decoder_input_ids=ids).logits
        report = fusedops.quantize_(model, scheme).report
        after = model(input_ids=ids, decoder_input_ids=ids).logits
    assert [row.path.rpartition(".")[2] for row in report.skipped if "dtype" in row.reason] == ["wo"] * 4
    assert (after - before).norm() < 0.1 * before.norm()
