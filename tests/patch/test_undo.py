"""Undo restores every object's identity; nothing outside the instance ever changes; other patchers are seen."""

import copy
import gc
import pickle
import sys
import types
import weakref

import pytest
import torch
from torch import nn

import fusedops.patch
import fusedops.patch.report
from fusedops.patch import patch, patched, unpatch
from fusedops.patch.instance import ATTRIBUTE
from tests.patch.tiny_models import FAMILIES, logits, tiny, tokens, tower

pytest.importorskip("transformers")


def snapshot(model):
    """Every attribute of every module, and every global and class attribute of the modelling code, by identity."""
    seen = {}
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            seen["instance", path, name] = value
            if name in ("_parameters", "_buffers", "_modules", "_forward_hooks", "_forward_pre_hooks"):
                seen.update({("entry", path, name, key): entry for key, entry in value.items()})
        for name, value in vars(type(module)).items():
            seen["class", type(module).__qualname__, name] = value
    for name in {type(module).__module__ for module in model.modules()}:
        seen.update({("global", name, key): value for key, value in vars(sys.modules[name]).items()})
    return seen


def assert_same(before, after):
    assert before.keys() == after.keys()
    changed = [key for key in before if before[key] is not after[key] and key[2:3] != ("__annotations__",)]
    assert not changed, changed


@pytest.mark.parametrize("family", FAMILIES)
def test_undo_restores_every_identity(family):
    """B45 (linkedin/Liger-Kernel#242, #772): incomplete reverts. Classes and globals never change at all."""
    model, ids = tiny(family), tokens()
    before, expected = snapshot(model), logits(model, ids)
    handle = patch(model, verify=True)
    during = {key: value for key, value in snapshot(model).items() if key[0] != "instance"}
    assert_same({key: value for key, value in before.items() if key[0] != "instance"}, during)
    logits(model, ids)
    handle.undo()
    assert_same(before, snapshot(model))
    assert torch.equal(logits(model, ids), expected)
    handle.undo()
    assert_same(before, snapshot(model))


def test_context_managers():
    model, ids = tower(), tokens()
    before = snapshot(model)
    with patched(model) as report:
        assert report.counts["norm"] == 7 and hasattr(model.roof, ATTRIBUTE)
    assert_same(before, snapshot(model))
    with pytest.raises(ZeroDivisionError), patch(model) as handle:
        logits(model, ids)
        assert handle.report.counts["residual"] == 3
        raise ZeroDivisionError
    assert_same(before, snapshot(model))


@pytest.mark.parametrize("failing", [0, 1, 7, 15])
def test_failure_midway_leaves_the_model_untouched(failing, monkeypatch):
    """B45 (linkedin/Liger-Kernel#772): a patch that fails half way must not stay half way."""
    model = tower()
    before = snapshot(model)
    install, calls = fusedops.patch.instance.install, iter(range(100))

    def fail_once(module, state):
        if next(calls) == failing:
            module.__dict__[ATTRIBUTE] = state  # as far as an interrupt may let it come
            raise KeyboardInterrupt
        install(module, state)

    monkeypatch.setattr(fusedops.patch.instance, "install", fail_once)
    with pytest.raises(KeyboardInterrupt):
        patch(model)
    assert_same(before, snapshot(model))


def test_two_models_in_one_process():
    """B45 (linkedin/Liger-Kernel#242; huggingface/transformers#33502): a patch must not leak to other models."""
    one, other, ids = tiny("llama"), tiny("llama"), tokens()
    before, expected = snapshot(other), logits(other, ids)
    handle = patch(one)
    assert_same(before, snapshot(other))
    second = patch(other)
    handle.undo()
    assert len(fusedops.patch.patched_modules(other)) == 11 and not fusedops.patch.patched_modules(one)
    assert torch.equal(logits(one, ids), expected)
    torch.testing.assert_close(logits(other, ids), expected)
    second.undo()
    assert_same(before, snapshot(other))


def test_patching_twice():
    model = tower()
    handle = patch(model)
    with pytest.raises(RuntimeError, match=r"must not be patched already, got 16 replaced modules .*floors\.0"):
        patch(model)
    with pytest.raises(RuntimeError, match="already"):
        patch(model.floors, strict=False)
    handle.undo()
    patch(model).undo()


def _foreign(self, *args):
    return type(self).forward(self, *args) * 1.0


def test_second_patcher():
    """B45: where something else has set a forward, we refuse, or leave that module alone and say so."""
    model, ids = tower(), tokens()
    model.floors[1].mixing.forward = types.MethodType(_foreign, model.floors[1].mixing)
    before, expected = snapshot(model), logits(model, ids)
    with pytest.raises(RuntimeError, match=r"floors\.1\.mixing must not be patched by something else .*_foreign"):
        patch(model)
    assert_same(before, snapshot(model))
    handle = patch(model, strict=False)
    assert handle.report.counts == {"attention": 0, "norm": 7, "mlp": 2, "rotary": 3, "residual": 3, "linear": 0}
    (row,) = handle.report.skipped
    assert row.path == "floors.1.mixing" and "already replaced by" in row.reason and "_foreign" in row.reason
    torch.testing.assert_close(logits(model, ids), expected)
    handle.undo()
    assert_same(before, snapshot(model))


def test_patcher_on_top_of_ours():
    """Undoing below another patch would silently remove that one too."""
    model, ids = tower(), tokens()
    before = snapshot(model)
    handle = patch(model)
    model.roof.forward = types.MethodType(_foreign, model.roof)
    with pytest.raises(RuntimeError, match="undo: the forward of a Scaler was replaced after patching"):
        handle.undo()
    assert len(fusedops.patch.patched_modules(model)) == 16
    logits(model, ids)
    del model.roof.forward
    handle.undo()
    assert_same(before, snapshot(model))


def test_deepcopy():
    """The copy is patched on its own; the handle stays with the original."""
    model, ids = tiny("llama"), tokens()
    expected = logits(model, ids)
    handle = patch(model)
    logits(model, ids)
    twin = copy.deepcopy(model)
    for module in twin.modules():
        state = vars(module).get(ATTRIBUTE)
        if state is not None:
            assert vars(module)[state.slot].args[0] is module
            following = getattr(state, "next_norm", None)
            assert following is None or any(following is other for other in twin.modules())
    handle.undo()
    assert torch.equal(logits(model, ids), expected)
    torch.testing.assert_close(logits(twin, ids), expected)
    assert unpatch(twin) == 11 and unpatch(twin) == 0
    assert torch.equal(logits(twin, ids), expected)
    assert not any(ATTRIBUTE in vars(module) or "forward" in vars(module) for module in twin.modules())


@pytest.mark.parametrize("family", ["llama", "phi3", "gemma3", "mixtral", "own"])
def test_pickle(family):
    """A pickled model comes back patched, without activations, and can be unpatched."""
    model, ids = (tower() if family == "own" else tiny(family)), tokens()
    expected = logits(model, ids)
    patch(model)
    count = len(fusedops.patch.patched_modules(model))
    patched_logits = logits(model, ids)
    again = pickle.loads(pickle.dumps(model))
    assert len(fusedops.patch.patched_modules(again)) == count
    assert torch.equal(logits(again, ids), patched_logits)
    assert unpatch(again) == count
    assert torch.equal(logits(again, ids), expected)


def test_no_activation_is_copied():
    """Between two layers a norm's result waits with the norm; a copy made then must not carry it."""
    model, ids = tower(), tokens()
    patch(model)
    copies = []
    model.floors[1].register_forward_pre_hook(lambda *_: copies.append(copy.deepcopy(model.floors[1].before_looking)))
    logits(model, ids)
    assert copies[0]._fusedops.stash is None
    assert all(getattr(vars(m).get(ATTRIBUTE), "stash", None) is None for m in model.modules())


def test_accelerate_hook():
    """Below accelerate's hook, which stays; and the other way round, whichever is removed first."""
    hooks = pytest.importorskip("accelerate.hooks")
    model, ids = tower(), tokens()
    expected, calls = logits(model, ids), []

    class Counting(hooks.ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            calls.append(module)
            return args, kwargs

    for module in (model.roof, model.floors[0], model.floors[1].mixing):
        hooks.add_hook_to_module(module, Counting())
    before = snapshot(model)
    handle = patch(model)
    assert len(handle.replacements) == 16
    torch.testing.assert_close(logits(model, ids), expected)
    assert len(calls) == 3 and handle.fallbacks() == {}
    handle.undo()
    assert_same(before, snapshot(model))
    hooks.remove_hook_from_module(model, recurse=True)

    handle = patch(model)
    hooks.add_hook_to_module(model.roof, Counting())
    handle.undo()
    assert torch.equal(logits(model, ids), expected) and calls[-1] is model.roof
    handle = patch(model)
    hooks.remove_hook_from_module(model, recurse=True)
    torch.testing.assert_close(logits(model, ids), expected)
    handle.undo()
    assert torch.equal(logits(model, ids), expected)


def test_no_cycle_keeps_the_model():
    """A patched model that is dropped is freed."""
    model = tower()
    patch(model)
    gone = weakref.ref(model.roof)
    del model
    gc.collect()
    assert gone() is None


def test_the_package_can_be_called():
    model = nn.Sequential(nn.RMSNorm(8, eps=1e-5))
    assert isinstance(fusedops.patch, types.ModuleType)
    handle = fusedops.patch(model)
    assert isinstance(handle, fusedops.patch.PatchedModel) and handle.report.counts["norm"] == 1
    handle.undo()
    assert fusedops.patch.report.Row is fusedops.patch.Row
