"""`quantize_` on whole models: results, report, undo, failures, and what it refuses."""

import gc
import json
import weakref

import pytest
import torch
from torch import nn

import fusedops
from fusedops.convert import SCHEMES
from fusedops.nn import Int8Linear, QuantizedLinear
from tests.patch.test_undo import assert_same, snapshot
from tests.patch.tiny_models import logits, tiny, tokens, tower

# Largest relative error of the logits of the tower, about twice what was measured.
BUDGETS = {
    "int8": 0.08,
    "fp8": 0.25,
    "int8-weight-only": 0.05,
    "fp8-weight-only": 0.2,
    "int4-weight-only": 0.6,
}


def distance(out, truth):
    return float((out - truth).norm() / truth.norm())


def state(model):
    """Copies of every tensor of a model."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_equal_tensors(model, before):
    after = model.state_dict()
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype and torch.equal(after[name], tensor), name


@pytest.mark.parametrize("keep", [True, "cpu"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_whole_model(scheme, keep):
    """Every linear is replaced in its place, the model computes nearly the same, and undo restores all of it."""
    model, ids = tower(), tokens()
    before, tensors, expected = snapshot(model), state(model), logits(model, ids)
    handle = fusedops.quantize_(model, scheme, keep=keep)
    linears = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    assert len(linears) == 16 and not any(type(module) is nn.Linear for module in model.modules())
    assert 0 < distance(logits(model, ids), expected) < BUDGETS[scheme]
    assert handle.report.totals["quantized"] == 16 and not handle.report.skipped
    handle.undo()
    assert_same(before, snapshot(model))
    assert_equal_tensors(model, tensors)
    assert torch.equal(logits(model, ids), expected)
    handle.undo()
    assert_same(before, snapshot(model))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dtypes(dtype):
    model, ids = tower(dtype), tokens()
    expected = logits(model, ids).float()
    handle = fusedops.quantize_(model, "int8")
    assert handle.report.totals["quantized"] == 16 and logits(model, ids).dtype == dtype
    assert distance(logits(model, ids).float(), expected) < BUDGETS["int8"]
    bits = 8 * handle.report.totals["bytes_after"] / (handle.report.totals["bytes_before"] / 2)
    assert 8 < bits < 8.7  # a float32 scale for each row of 64 or 96


def test_modes_and_biases_stay():
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64, bias=False)).eval()
    model[0].train()
    bias = model[0].bias
    fusedops.quantize_(model, "int8-weight-only")
    assert model[0].training and not model[2].training
    assert model[0].bias is bias and model[2].bias is None and list(model._modules) == ["0", "1", "2"]


def test_undo_without_keep():
    """The float weights are gone, and undo says what to do."""
    model = tower()
    gone = [weakref.ref(module.weight) for module in model.modules() if type(module) is nn.Linear]
    handle = fusedops.quantize_(model, "int8")
    gc.collect()
    assert len(gone) == 16 and not any(ref() is not None for ref in gone)
    with pytest.raises(RuntimeError, match="undo: the float weights were dropped; pass keep=True"):
        handle.undo()
    with pytest.raises(RuntimeError, match="needs keep=True"), handle:
        pass
    assert isinstance(model.head, Int8Linear)


def test_context_manager():
    model = tower()
    before = snapshot(model)
    with pytest.raises(ZeroDivisionError), fusedops.quantize_(model, "fp8", keep=True) as handle:
        assert isinstance(model.head, QuantizedLinear) and "fp8" in repr(handle)
        raise ZeroDivisionError
    assert_same(before, snapshot(model))


def test_undo_under_another_change():
    """Something else stands in a place: nothing is undone."""
    model = tower()
    handle = fusedops.quantize_(model, "int8", keep=True)
    ours, model.floors[1].mixing.w2 = model.floors[1].mixing.w2, nn.Linear(96, 64)
    for undo in (handle.undo, handle.dequantize):
        with pytest.raises(RuntimeError, match=r"floors\.1\.mixing\.w2 was replaced after it was quantised"):
            undo()
    assert isinstance(model.head, Int8Linear)
    model.floors[1].mixing.w2 = ours
    handle.undo()
    assert type(model.head) is nn.Linear


@pytest.mark.parametrize("scheme", ["int8", "int4-weight-only"])
def test_dequantize(scheme):
    """Plain linears with the codes' weights; what was kept can still be restored."""
    model, ids = tower(), tokens()
    before, expected = snapshot(model), logits(model, ids)
    handle = fusedops.quantize_(model, scheme, keep=True)
    weight = model.head.dequantize()
    out = logits(model, ids)
    handle.dequantize()
    assert type(model.head) is nn.Linear and torch.equal(model.head.weight, weight)
    assert distance(logits(model, ids), expected) < BUDGETS[scheme]
    if scheme == "int4-weight-only":
        torch.testing.assert_close(logits(model, ids), out)
    handle.dequantize()
    handle.undo()
    assert_same(before, snapshot(model))


@pytest.mark.parametrize("failing", [0, 1, 9, 15])
@pytest.mark.parametrize("stage", ["quantize", "apply", "progress"])
def test_failure_midway(stage, failing, monkeypatch):
    """Nothing half-done: an interrupt leaves every module, tensor and norm as it was."""
    model, ids = tower(), tokens()
    before, tensors = snapshot(model), state(model)
    calls = iter(range(100))

    def fail(*args):
        if next(calls) == failing:
            raise KeyboardInterrupt

    options = {"progress": fail} if stage == "progress" else {}
    if stage == "quantize":
        quantize = Int8Linear.quantize_weight.__func__
        monkeypatch.setattr(
            Int8Linear, "quantize_weight", classmethod(lambda cls, *a, **k: fail() or quantize(cls, *a, **k))
        )
    if stage == "apply":
        apply = fusedops.convert.handle.Swap.apply
        monkeypatch.setattr(fusedops.convert.handle.Swap, "apply", lambda swap: apply(swap) or fail())
    with pytest.raises(KeyboardInterrupt):
        fusedops.quantize_(model, "int8", calibration=[ids], **options)
    assert_same(before, snapshot(model))
    assert_equal_tensors(model, tensors)


def test_progress():
    """Batches, the two searches of smoothing, and linears."""
    seen = []
    fusedops.quantize_(
        tower(), "int8", calibration=[tokens(seed=i) for i in range(3)], progress=lambda *a: seen.append(a)
    )
    assert seen == [(i, 21) for i in range(1, 22)]
    seen.clear()
    fusedops.quantize_(tower(), "int8", progress=lambda *a: seen.append(a))
    assert seen == [(i, 16) for i in range(1, 17)]


def test_report():
    model = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 8, dtype=torch.float64), nn.Linear(32, 128))
    handle = fusedops.quantize_(model, "int8-weight-only", skip=("head", "x*"))
    first, second, third = handle.report.rows
    assert (first.path, first.shape, first.status, first.scheme) == ("0", (32, 64), "quantized", "int8-weight-only")
    assert first.bytes_before == 8192 and first.bytes_after == 2048 + 128 and 1e-3 < first.error < 1e-2
    assert second.status == "skipped" and "float64" in second.reason and second.error is None
    assert third.bytes_after == 4096 + 512
    assert handle.report.unmatched == ("head", "x*")
    totals = handle.report.totals
    assert totals["bytes_before"] == 8192 + 16384 and totals["bytes_after"] == 2176 + 4608
    held = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    assert totals["model_bytes_after"] == held
    assert totals["model_bytes_before"] == held + 8192 + 16384 - 2176 - 4608
    assert json.loads(json.dumps(handle.report.as_dict()))["totals"] == totals
    text = str(handle.report)
    assert "1 x Linear  - its weight is float64" in text and "'head', 'x*'" in text and "24 KiB -> 6.625 KiB" in text


def test_report_groups():
    text = str(fusedops.quantize_(tower(), "fp8-weight-only").report)
    lines = [line for line in text.splitlines() if "-> fp8-weight-only, error at most" in line]
    assert len(lines) == 6 and sum("3 x" in line for line in lines) == 5


def test_weight_error():
    """The report's error is that of the weight."""
    linear = nn.Linear(64, 32)
    model = nn.Sequential(linear)
    report = fusedops.quantize_(model, "int4-weight-only", keep=True).report
    truth = linear.weight.detach().double()
    expected = float((model[0].dequantize().double() - truth).norm() / truth.norm())
    assert report.rows[0].error == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma3", "phi3", "gpt_oss", "qwen3_moe"])
def test_families(family):
    """Models of transformers run quantised; packed experts are no linears and stay."""
    pytest.importorskip("transformers")
    model, ids = tiny(family), tokens()
    expected = logits(model, ids)
    handle = fusedops.quantize_(model, "int8-weight-only", keep=True)
    assert distance(logits(model, ids), expected) < 0.1
    assert [row.path for row in handle.report.skipped] == ["lm_head"]
    handle.undo()
    assert torch.equal(logits(model, ids), expected)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (([1], "int8"), TypeError, "quantize_: model must be a torch.nn.Module, got list"),
        ((nn.Linear(4, 4), "int8"), ValueError, "model must hold its linears as children, got a Linear itself"),
        ((nn.Sequential(nn.ReLU()), "int8"), ValueError, r"must contain a torch.nn.Linear .*got Sequential \(it has n"),
        ((nn.Sequential(nn.Linear(1, 9)), "int8"), ValueError, r"got Sequential \(0: too small"),
        ((nn.Sequential(nn.Linear(64, 9)), "int2"), ValueError, "scheme must be one of"),
        ((nn.Sequential(nn.Linear(64, 9, device="meta")), "fp8"), ValueError, "must be loaded, got 0 on the meta"),
    ],
)
def test_bad_model(given, error, message):
    with pytest.raises(error, match=message):
        fusedops.quantize_(*given)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"skip": 3}, TypeError, "skip must hold names, got int"),
        ({"skip": ["head", 3]}, TypeError, "skip must hold names, got 3"),
        ({"skip": "*"}, ValueError, r"must contain a torch.nn.Linear .*named in skip \('\*'\)"),
        ({"group_size": 32}, ValueError, "group_size must be None for 'int8'"),
        ({"smoothing": 1.5}, ValueError, "smoothing must be None or from 0 to 1, got 1.5"),
        ({"smoothing": True}, ValueError, "smoothing must be None or from 0 to 1, got True"),
        ({"static": True}, ValueError, "static must come with calibration"),
        ({"keep": "disk"}, ValueError, "keep must be False, True or 'cpu', got 'disk'"),
        ({"progress": 3}, TypeError, "progress must be callable, got int"),
        ({"calibration": 3}, TypeError, "calibration must hold model inputs, got int"),
        ({"calibration": []}, ValueError, "calibration must hold at least one batch, got none"),
        ({"calibration": [3]}, TypeError, "calibration must hold tensors, mappings, lists or tuples, got int"),
    ],
)
def test_bad_options(options, error, message):
    """Nothing is changed before all is checked."""
    model = tower()
    before = snapshot(model)
    with pytest.raises(error, match=f"quantize_: .*{message}"):
        fusedops.quantize_(model, "int8", **options)
    assert_same(before, snapshot(model))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_must_be_finite(value):
    model = tower()
    model.floors[2].mixing.w2.weight.data[3, 5] = value
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"weights must be finite, got NaN or infinity in floors\.2\.mixing\.w2"):
        fusedops.quantize_(model, "int8")
    assert_same(before, snapshot(model))
    fusedops.quantize_(model, "int8", skip="w2")
