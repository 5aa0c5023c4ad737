"""Verification measures on real activations, and refuses a replacement that computes something else."""

import pytest
import torch
from torch import nn

import fusedops
from fusedops._core.register import Operator
from fusedops.patch import attention, norms, patch, rotary, verify
from tests.patch.test_undo import assert_same, snapshot
from tests.patch.tiny_models import FAMILIES, logits, tiny, tokens, tower

pytest.importorskip("transformers")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_right_replacements_pass(family, dtype):
    report = patch(tiny(family, dtype), verify=True).report
    measured = {entry.kind: entry for entry in report.measured}
    assert set(measured) == {kind for kind, count in report.counts.items() if count} | {"whole model"}
    for entry in report.measured:
        assert 0 <= entry.rms <= entry.rms_limit and 0 <= entry.peak <= entry.peak_limit
        assert entry.count >= report.counts.get(entry.kind, 1)


def _plant(monkeypatch, fault):
    """Make one operator wrong where the patched modules call it."""
    # the faults stand in the public functions
    monkeypatch.setattr(Operator, "direct", lambda self, tensor, like=None: None)
    rms_norm, add_rms_norm, turn, attend = norms.rms_norm, norms.add_rms_norm, rotary.rotary, attention.attention
    if fault == "norm 1 % too large":
        monkeypatch.setattr(norms, "rms_norm", lambda *args, **options: rms_norm(*args, **options) * 1.01)
    elif fault == "norm without eps":
        monkeypatch.setattr(norms, "rms_norm", lambda x, w, eps, **options: rms_norm(x, w, eps * 1e3, **options))
    elif fault == "norm with one NaN":
        monkeypatch.setattr(norms, "rms_norm", lambda *args, **options: _with_nan(rms_norm(*args, **options)))
    elif fault == "addition leaves x out":
        monkeypatch.setattr(norms, "add_rms_norm", lambda x, r, *a, **o: add_rms_norm(torch.zeros_like(x), r, *a, **o))
    elif fault == "norm of the sum is stale":
        monkeypatch.setattr(norms, "add_rms_norm", lambda x, r, *a, **o: (r, add_rms_norm(x, r, *a, **o)[1]))
    elif fault == "k not rotated":
        monkeypatch.setattr(rotary, "rotary", lambda q, k, *a, **o: (turn(q, k, *a, **o)[0], k))
    elif fault == "sin negated":
        monkeypatch.setattr(rotary, "rotary", lambda q, k, cos, sin, **o: turn(q, k, cos, -sin, **o))
    elif fault == "gate and up swapped":
        stock = fusedops.patch.gates.silu_mul
        monkeypatch.setattr(fusedops.patch.gates, "silu_mul", lambda gate, up: stock(up, gate))
    elif fault == "up left out":
        monkeypatch.setattr(fusedops.patch.gates, "silu_mul", lambda gate, up: torch.nn.functional.silu(gate))
    elif fault == "scores 5 % too large":
        monkeypatch.setattr(attention, "attention", lambda q, k, v, **o: attend(q * 1.05, k, v, **o))
    elif fault == "the next key is seen":
        ahead = {"causal": False, "window_size": (-1, 1)}
        monkeypatch.setattr(attention, "attention", lambda *args, **options: attend(*args, **{**options, **ahead}))
    elif fault == "key heads swapped":
        monkeypatch.setattr(attention, "attention", lambda q, k, v, **options: attend(q, k.flip(2), v, **options))


def _with_nan(x):
    x = x.clone()
    x.view(-1)[3] = float("nan")
    return x


FAULTS = {
    "norm 1 % too large": "norm",
    "norm without eps": "norm",
    "norm with one NaN": "norm",
    "addition leaves x out": "residual",
    "norm of the sum is stale": "norm",
    "k not rotated": "rotary",
    "sin negated": "rotary",
    "gate and up swapped": "mlp",
    "up left out": "mlp",
    "scores 5 % too large": "attention",
    "the next key is seen": "attention",
    "key heads swapped": "attention",
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("fault", FAULTS)
def test_wrong_replacements_are_refused(fault, dtype, monkeypatch):
    """Each planted fault is found by its kind, in both dtypes; the model is left as it was."""
    model = tiny("llama", dtype)
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(0.02)  # small enough for eps to matter
    before = snapshot(model)
    _plant(monkeypatch, fault)
    with pytest.raises(RuntimeError, match=rf"verification failed: .*\({FAULTS[fault]}\) differs by rms"):
        patch(model, verify=True)
    assert_same(before, snapshot(model))


def test_not_strict_leaves_out_what_is_wrong(monkeypatch):
    """The faulty kind is undone and reported; the rest stays, and the logits are right."""
    model, ids = tiny("llama"), tokens()
    expected = logits(model, ids)
    _plant(monkeypatch, "sin negated")
    handle = patch(model, verify=True, strict=False)
    assert handle.report.counts == {"attention": 2, "norm": 5, "mlp": 2, "rotary": 0, "residual": 2, "linear": 0}
    assert all("differs by rms" in row.reason for row in handle.report.skipped)
    torch.testing.assert_close(logits(model, ids), expected)
    handle.undo()
    assert not any("_fusedops" in vars(module) for module in model.modules())


def test_fault_that_only_the_whole_model_shows(monkeypatch):
    """Where every module agrees alone and the model does not, it is undone and raised, strict or not."""
    model = tower()
    before = snapshot(model)

    def agree_and_break(handle, inputs):
        monkeypatch.setattr(norms.RMSNormState, "compute", lambda state, module, x: -x)
        return []

    monkeypatch.setattr(verify, "differences", agree_and_break)
    with pytest.raises(RuntimeError, match=r"the whole model \(whole model\) differs"):
        patch(model, verify={"ids": tokens()}, strict=False)
    assert_same(before, snapshot(model))


def test_own_inputs():
    """A model without get_input_embeddings needs a mapping of arguments."""
    model = tower()
    with pytest.raises(ValueError, match="verify must be a mapping"):
        patch(model, verify=True)
    assert not any("_fusedops" in vars(module) for module in model.modules())
    report = patch(model, verify={"ids": tokens()}).report
    assert {entry.kind for entry in report.measured} == {"norm", "mlp", "rotary", "residual", "whole model"}


def test_verification_leaves_no_trace():
    """Training flags, hooks and the random state are what they were."""
    model = tiny("phi3").train()
    model.model.layers[0].mlp.eval()
    modes = [module.training for module in model.modules()]
    random_state = torch.get_rng_state()
    handle = patch(model, verify=True)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random_state)
    assert not any(module._forward_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    handle.undo()


def test_verification_in_dry_run_does_nothing():
    model = nn.Sequential(nn.RMSNorm(8, eps=1e-5))
    assert patch(model, dry_run=True, verify=True).report.measured == []


def test_attention_alone_can_be_left_out(monkeypatch):
    """The rotary function of the same module stays replaced, and the config names the model's own attention again."""
    model, ids = tiny("gpt_oss"), tokens()
    expected = logits(model, ids)
    _plant(monkeypatch, "key heads swapped")
    handle = patch(model, verify=True, strict=False)
    assert handle.report.counts == {"attention": 0, "norm": 5, "mlp": 0, "rotary": 2, "residual": 2, "linear": 0}
    assert model.config._attn_implementation == "eager"
    torch.testing.assert_close(logits(model, ids), expected)
    handle.undo()
    assert torch.equal(logits(model, ids), expected)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_not_compared(side):
    """Eager attention gives a padding token the mean of all values, and we give it nothing."""
    ids, mask = tokens(), torch.ones(2, 12, dtype=torch.long)
    mask[0, slice(5) if side == "left" else slice(7, None)] = 0
    report = patch(tiny("gemma2"), verify={"input_ids": ids, "attention_mask": mask}).report
    assert report.counts["attention"] == 2 and [entry.kind for entry in report.measured].count("attention") == 1
