"""Sparse models of transformers: pruned while they are read, saved, and read back, bit for bit."""

import json
from types import SimpleNamespace

import pytest
import torch

from fusedops import sparsify_
from fusedops.nn import Sparse24Linear
from fusedops.patch import FusedOpsConfig
from fusedops.patch.quantizer_parallel import add_scales_to_plan
from tests.patch.quantized_checkpoints import edit, linears, load, quantized, same_tensors, save_tiny
from tests.patch.tiny_models import logits, tokens

pytest.importorskip("accelerate")
OTHERS = ["lm_head", r".*\.self_attn\..*"]


@pytest.fixture(scope="module")
def floats(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("floats"), dtype=torch.bfloat16)


@pytest.mark.parametrize("scheme", [None, "int8", "fp8"])
def test_read_saved_and_read_back(floats, tmp_path, scheme):
    """What `sparsify_`, and `quantize_` after it, make of the loaded model."""
    model = load(floats, FusedOpsConfig(scheme, sparsity="2:4"), dtype="auto")
    expected = load(floats, dtype="auto")
    sparsify_(expected)
    if scheme is not None:
        quantized(expected, scheme)
    assert len(linears(model, Sparse24Linear)) == 14 and same_tensors(model, expected)
    assert not any(p.requires_grad for m in linears(model).values() for p in m.parameters())
    model.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert (stored["scheme"], stored["sparsity"]) == (scheme, "2:4")
    again = load(tmp_path)
    assert same_tensors(again, model) and torch.equal(logits(again, tokens()), logits(model, tokens()))


@pytest.fixture(scope="module")
def wanda(floats, tmp_path_factory):
    """(model, folder) of one that was pruned by a calibration, in parts, and saved."""
    model, folder = load(floats, dtype="auto"), tmp_path_factory.mktemp("wanda")
    sparsify_(model, method="wanda", calibration=[tokens()], layers="mlp")
    model.config.quantization_config = FusedOpsConfig(sparsity="2:4", modules_to_not_convert=OTHERS)
    model.save_pretrained(folder)
    return model, folder


def test_a_model_that_was_pruned_before(wanda):
    model, folder = wanda
    again = load(folder)
    assert same_tensors(again, model) and len(linears(again)) == 6


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("metadata", lambda t: t[:, :-1], r"metadata is uint8 \[96, 15\], not uint8 \[96, 16\]"),
        ("metadata", lambda t: t.to(torch.int8), "metadata is int8"),
        ("weight", lambda t: t[..., :-32], r"weight is bfloat16 \[1, 96, 0\], not bfloat16 \[1, 96, 32\]"),
        ("metadata", None, "metadata is missing"),
    ],
)
def test_checkpoints_that_do_not_fit(wanda, tmp_path, part, change, message):
    model, _ = wanda
    model.save_pretrained(tmp_path)
    name = f"model.layers.1.mlp.up_proj.{part}"

    def damage(tensors):
        tensor = tensors.pop(name)
        if change is not None:
            tensors[name] = change(tensor)

    edit(tmp_path, damage)
    with pytest.raises(ValueError, match=rf"what its metadata says \('2:4'\), got .*{message}"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"sparsity": "1:4"}, "sparsity must be None or '2:4', got '1:4'"),
        (
            {"sparsity": "2:4", "scheme": "int8-weight-only"},
            "scheme must be None or one of 'int8', 'fp8' with",
        ),
        ({"sparsity": "2:4", "group_size": 32}, "group_size must be None with sparsity, got 32"),
        ({}, "scheme must be one of"),
    ],
)
def test_bad_config(given, message):
    with pytest.raises(ValueError, match=f"FusedOpsConfig: {message}"):
        FusedOpsConfig(**given)


def test_sparse_layers_are_not_split(wanda, monkeypatch):
    """Their metadata belongs to whole rows; a layer that every rank has whole is no matter."""
    pytest.importorskip("transformers.distributed.parallel_utils")
    model, plan = wanda[0], {"model.layers.*.mlp.up_proj": "colwise", "model.layers.*.self_attn.q_proj": "colwise"}
    add_scales_to_plan(model, dict(plan))  # a plan that nobody carries out
    asked = SimpleNamespace(tp_plan=None, dp_size=1)
    monkeypatch.setattr(model.config, "distributed_config", asked, raising=False)
    with pytest.raises(NotImplementedError, match=r"must not be split, got colwise for model\.layers\.0\.mlp\.up_proj"):
        add_scales_to_plan(model, dict(plan))
    add_scales_to_plan(model, {"model.layers.*.self_attn.q_proj": "colwise"})
