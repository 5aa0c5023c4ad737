"""Training as if quantised: the converted model computes the same bits; parameters, ties and the way back."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fusedops
from fusedops.convert import SCHEMES
from fusedops.nn import FakeQuantizedLinear, Int8Linear, QuantizedLinear
from tests.patch.test_undo import assert_same, snapshot
from tests.patch.tiny_models import logits, tokens, tower


def train(model, steps=3):
    """A few steps on one batch; the losses."""
    ids, optimizer, losses = tokens(), torch.optim.SGD(model.parameters(), lr=0.02), []
    for _ in range(steps):
        loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("scheme", SCHEMES)
def test_train_and_convert(scheme):
    """A tiny transformer learns, and its conversion gives the same bits, on inputs that it has not seen."""
    model = tower()
    parameters = dict(model.named_parameters())
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    handle = fusedops.fake_quantize_(model, scheme)
    assert sum(isinstance(m, FakeQuantizedLinear) for m in model.modules()) == 16
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    losses = train(model)
    assert losses[-1] < losses[0]
    assert not any(torch.equal(before[name], parameter) for name, parameter in parameters.items())
    ids = tokens(3, 20, seed=5)
    expected = logits(model, ids)
    converted = handle.convert()
    assert not any(isinstance(m, nn.Linear) for m in model.modules())
    assert torch.equal(logits(model, ids), expected)
    assert converted.report.totals["quantized"] == 16 and converted.report.scheme == scheme
    for use in (handle.convert, handle.undo):
        with pytest.raises(RuntimeError, match="converted"):
            use()


def test_group_size():
    model = nn.Sequential(nn.Linear(128, 8))
    handle = fusedops.fake_quantize_(model, "int4-weight-only", group_size=128)
    x = torch.randn(4, 128)
    expected = model(x)
    handle.convert()
    assert model[0].weight_scale.shape == (8, 1) and torch.equal(model(x), expected)


def test_undo():
    """The original modules come back with the trained parameters, which are the same objects; nothing else changed."""
    model, ids = tower(), tokens()
    before = snapshot(model)
    with fusedops.fake_quantize_(model, "int8") as handle:
        train(model, 1)
        weight = model.head.weight.detach().clone()
        assert "16 linears" in repr(handle)
    assert_same(before, snapshot(model))
    assert torch.equal(model.head.weight, weight)
    handle.undo()
    with pytest.raises(RuntimeError, match="convert: the model must be fake-quantised"):
        handle.convert()
    logits(model, ids)


def test_undo_of_the_conversion():
    """Plain linears with the trained weights, also where a parameter was replaced while it was trained."""
    model = tower()
    head = model.head
    handle = fusedops.fake_quantize_(model, "int8")
    train(model, 1)
    model.head.weight = nn.Parameter(model.head.weight.detach() * 2)
    trained = model.head.weight
    converted = handle.convert(keep=True)
    assert isinstance(model.head, Int8Linear)
    converted.undo()
    assert model.head is head and head.weight is trained
    assert all(type(m) is not FakeQuantizedLinear and not isinstance(m, QuantizedLinear) for m in model.modules())


def test_tied_weights():
    """One weight stays one parameter, and becomes one set of codes; untied ones become two."""
    for is_tied in (True, False):
        model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
        model[2].weight = model[0].weight
        handle = fusedops.fake_quantize_(model, "int8")
        assert model[0].weight is model[2].weight
        if not is_tied:
            model[2].weight = nn.Parameter(-model[2].weight.detach())
        x = torch.randn(3, 64)
        expected = model(x)
        handle.convert()
        assert (model[0].weight is model[2].weight) == is_tied
        assert torch.equal(model(x), expected)


def test_report():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64).double())
    report = fusedops.fake_quantize_(model, "int8").report
    first, second = report.rows
    assert first.status == "trained" and first.bytes_before == first.bytes_after == 16384 and first.error is None
    assert second.status == "skipped" and "float64" in second.reason
    assert report.totals["trained"] == 1 and report.totals["quantized"] == 0
    text = "trained as if quantized\n      1 x 0  Linear [64, 64] -> int8\nskipped\n      1 x Linear  - its weight is"
    assert str(report).startswith(text)


@pytest.mark.parametrize("failing", [0, 7, 15])
@pytest.mark.parametrize("stage", ["fake", "convert"])
def test_failure_midway(stage, failing, monkeypatch):
    """Nothing half-done, on the way in and in the conversion; a failed conversion can be tried again."""
    model, calls = tower(), iter(range(100))

    def fail(function):
        def failing_call(*args, **kwargs):
            if next(calls) == failing:
                raise KeyboardInterrupt
            return function(*args, **kwargs)

        return failing_call

    if stage == "fake":
        before = snapshot(model)
        monkeypatch.setattr(FakeQuantizedLinear, "from_linear", fail(FakeQuantizedLinear.from_linear))
        with pytest.raises(KeyboardInterrupt):
            fusedops.fake_quantize_(model, "int8")
    else:
        handle = fusedops.fake_quantize_(model, "int8")
        before, ids = snapshot(model), tokens()
        expected = logits(model, ids)
        with monkeypatch.context() as patch:
            patch.setattr(Int8Linear, "dequantize", fail(Int8Linear.dequantize))
            with pytest.raises(KeyboardInterrupt):
                handle.convert()
        assert_same(before, snapshot(model))
        handle.convert()
        assert torch.equal(logits(model, ids), expected)
        return
    assert_same(before, snapshot(model))


def test_refused():
    model = tower()
    with pytest.raises(ValueError, match="fake_quantize_: scheme must be one of"):
        fusedops.fake_quantize_(model, "int5")
    with pytest.raises(ValueError, match="fake_quantize_: model must contain"):
        fusedops.fake_quantize_(model, "int8", skip="*")
    handle = fusedops.fake_quantize_(model, "int8")
    with pytest.raises(ValueError, match="quantize_: model must contain .* a subclass of torch.nn.Linear"):
        fusedops.quantize_(model, "int8")
    model.roof, roof = nn.Identity(), model.roof
    model.head.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="convert: weights must be finite, got NaN or infinity in head"):
        handle.convert()
    model.roof, model.head = roof, nn.Linear(64, 128)
    for use in (handle.convert, handle.undo):
        with pytest.raises(RuntimeError, match="head was replaced after it was quantised"):
            use()
