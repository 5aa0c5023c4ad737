"""Quantising and patching in either order, and undoing in either order."""

import pytest
import torch
from torch import nn

import fusedops
from fusedops.nn import QuantizedLinear
from tests.convert.test_quantize import assert_equal_tensors, distance, state
from tests.patch.test_undo import assert_same, snapshot
from tests.patch.tiny_models import logits, tiny, tokens, tower

MODELS = ["own", "llama", "gemma3"]


def model_of(family):
    if family == "own":
        return tower()
    pytest.importorskip("transformers")
    return tiny(family)


def quantized(model):
    return [module for module in model.modules() if isinstance(module, QuantizedLinear)]


@pytest.mark.parametrize("first", ["patch", "quantize"])
@pytest.mark.parametrize("family", MODELS)
def test_patched_first(family, first):
    """A patched model is quantised like any other, with smoothing; either can be undone before the other."""
    model, ids = model_of(family), tokens()
    before, tensors, expected = snapshot(model), state(model), logits(model, ids)
    patched = fusedops.patch(model)
    handle = fusedops.quantize_(model, "int8", calibration=[ids], keep=True)
    assert handle.report.folded and patched.fallbacks() == {}
    both = logits(model, ids)
    assert 0 < distance(both, expected) < 0.1
    if first == "patch":
        patched.undo()
        assert quantized(model) and distance(logits(model, ids), both) < 0.05
        handle.undo()
    else:
        handle.undo()
        assert not quantized(model) and distance(logits(model, ids), expected) < 1e-4
        patched.undo()
    assert_same(before, snapshot(model))
    assert_equal_tensors(model, tensors)
    assert torch.equal(logits(model, ids), expected)


@pytest.mark.parametrize("scheme", ["int8", "int8-weight-only"])
@pytest.mark.parametrize("family", MODELS)
def test_quantized_first(family, scheme):
    """The patch fuses the quantised linears; below it nothing can be undone, after it everything."""
    model, ids = model_of(family), tokens()
    before, tensors, expected = snapshot(model), state(model), logits(model, ids)
    options = {"calibration": [ids]} if scheme == "int8" else {}
    handle = fusedops.quantize_(model, scheme, keep=True, **options)
    alone = logits(model, ids)
    during = snapshot(model)
    patched = fusedops.patch(model)
    assert patched.report.counts["linear"] and distance(logits(model, ids), alone) < 0.05
    with pytest.raises(RuntimeError, match=r"undo: .* was patched after it was quantised; undo that first"):
        handle.undo()
    with pytest.raises(RuntimeError, match=r"dequantize: .* was patched after it was quantised; undo that first"):
        handle.dequantize()
    assert len(quantized(model)) == handle.report.totals["quantized"]
    patched.undo()
    assert_same(during, snapshot(model))
    assert torch.equal(logits(model, ids), alone)
    handle.undo()
    assert_same(before, snapshot(model))
    assert_equal_tensors(model, tensors)
    assert torch.equal(logits(model, ids), expected)


def test_between_two_patches():
    """What a patch put on a linear that was quantised before is seen; new linears can be quantised."""
    model, ids = tower(), tokens()
    handle = fusedops.quantize_(model, "int8", skip=("looking",), keep=True)
    patched = fusedops.patch(model)
    rest = fusedops.quantize_(model, "int8-weight-only", keep=True)
    assert rest.report.totals["quantized"] == 6
    assert {row.reason for row in rest.report.skipped} == {"quantised already"}
    logits(model, ids)
    rest.undo()
    patched.undo()
    handle.undo()
    assert not quantized(model)


def test_training_a_patched_model():
    """Patched norms and gates train with linears that compute as quantised ones; the conversion gives the same bits."""
    model, ids = tower(), tokens()
    patched = fusedops.patch(model)
    handle = fusedops.fake_quantize_(model, "int8")
    nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten()).backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 0.05 * parameter.grad
    expected = logits(model, ids)
    handle.convert()
    assert torch.equal(logits(model, ids), expected) and patched.fallbacks() == {}


def test_accelerate_hook():
    """A linear below accelerate's hook stays as it is; so does one that got the hook after it was quantised."""
    hooks = pytest.importorskip("accelerate.hooks")
    model, ids = tower(), tokens()
    hooks.add_hook_to_module(model.head, hooks.ModelHook())
    handle = fusedops.quantize_(model, "int8", keep=True)
    assert [(row.path, row.reason) for row in handle.report.skipped] == [("head", "accelerate's hook is on it")]
    looking = model.floors[0].looking
    hooks.add_hook_to_module(looking.all_in, hooks.ModelHook())
    logits(model, ids)
    with pytest.raises(RuntimeError, match=r"floors\.0\.looking\.all_in was patched after it was quantised"):
        handle.undo()
    hooks.remove_hook_from_module(looking.all_in)
    handle.undo()
    assert type(looking.all_in) is nn.Linear
