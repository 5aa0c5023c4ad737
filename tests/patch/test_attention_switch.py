"""Which attentions are replaced, and that nothing is left of it: in the registries, in the configs, in other models."""

import contextlib
import copy
import functools
import gc
import pickle
import subprocess
import sys
import types

import pytest
import torch
from torch import nn

import fusedops
from fusedops.patch import patch, patched, unpatch
from fusedops.patch.attention import NAME
from tests.patch.test_undo import assert_same, snapshot
from tests.patch.tiny_models import FAMILIES, logits, tiny, tokens, tower

transformers = pytest.importorskip("transformers")
from transformers import AttentionInterface  # noqa: E402  after the skip
from transformers.masking_utils import AttentionMaskInterface  # noqa: E402

only_attention = functools.partial(patch, norm=False, mlp=False, rotary=False)


def registries():
    """What both registries hold."""
    return dict(AttentionInterface._global_mapping), dict(AttentionMaskInterface._global_mapping)


@pytest.fixture(autouse=True)
def _no_model_left():
    """Other tests' models may still be alive, and keep our functions registered."""
    gc.collect()
    assert NAME not in registries()[0] and NAME not in registries()[1]


@pytest.mark.parametrize(
    ("family", "before"), [("llama", "eager"), ("llama", "sdpa"), ("gemma3", "sdpa"), ("gpt_oss", "eager")]
)
def test_undo(family, before):
    model, ids = tiny(family), tokens()
    model.set_attn_implementation(before)
    found, names, expected = snapshot(model), registries(), logits(model, ids)
    handle = patch(model)
    assert model.config._attn_implementation == NAME and NAME in registries()[0] and NAME in registries()[1]
    logits(model, ids)
    handle.undo()
    assert model.config._attn_implementation == before and registries() == names
    assert_same(found, snapshot(model))
    assert torch.equal(logits(model, ids), expected)
    handle.undo()
    assert model.config._attn_implementation == before


def test_context_manager_and_dry_run():
    model, names = tiny("llama"), registries()
    with patched(model) as report:
        assert report.counts["attention"] == 2 and model.config._attn_implementation == NAME
    assert model.config._attn_implementation == "eager" and registries() == names
    with pytest.raises(ZeroDivisionError), only_attention(model):
        raise ZeroDivisionError
    assert model.config._attn_implementation == "eager" and registries() == names
    assert patch(model, dry_run=True).report.counts["attention"] == 2
    assert patch(model, attention=False, dry_run=True).report.counts["attention"] == 0
    assert model.config._attn_implementation == "eager" and registries() == names


def test_two_models():
    """B45 (linkedin/Liger-Kernel#242): undoing one leaves the other as it is; the last one cleans up."""
    models, ids, names = [tiny("llama"), tiny("gemma2")], tokens(), registries()
    expected = [logits(model, ids) for model in models]
    handles = [only_attention(model) for model in models]
    handles[0].undo()
    assert torch.equal(logits(models[0], ids), expected[0])
    fusedops.reset_counters()
    torch.testing.assert_close(logits(models[1], ids), expected[1])
    assert sum(fusedops.counters().values()) == 2 and registries() != names
    handles[1].undo()
    assert torch.equal(logits(models[1], ids), expected[1]) and registries() == names


@pytest.mark.parametrize("first", [0, 1])
def test_two_models_with_one_config(first):
    """A model that shares the patched one's config keeps its own code and its bits."""
    models, ids, names = [tiny("gpt_oss"), tiny("gpt_oss")], tokens(), registries()
    for module in models[1].modules():
        if "config" in vars(module):
            module.config = models[0].config
    expected = logits(models[1], ids)
    handles = [only_attention(models[0])]
    fusedops.reset_counters()
    assert torch.equal(logits(models[1], ids), expected) and fusedops.counters() == {}
    handles.append(only_attention(models[1]))
    handles.pop(first).undo()
    assert torch.equal(logits(models[first], ids), expected)
    torch.testing.assert_close(logits(models[1 - first], ids), expected)
    handles.pop().undo()
    assert models[0].config._attn_implementation == "eager" and registries() == names


def test_a_model_that_is_dropped():
    """Nobody has to undo what is gone."""
    names = registries()
    handle = only_attention(tiny("llama"))
    assert registries() != names
    del handle
    gc.collect()
    assert registries() == names


def test_patching_twice():
    model = tiny("llama")
    handle = only_attention(model)
    with pytest.raises(RuntimeError, match=r"patched already, got 2 replaced modules .*layers\.0\.self_attn"):
        patch(model)
    handle.undo()
    patch(model).undo()


def test_implementation_chosen_after_patching():
    """The user's later choice is not undone."""
    model, ids, names = tiny("llama"), tokens(), registries()
    handle = only_attention(model)
    model.set_attn_implementation("sdpa")
    fusedops.reset_counters()
    logits(model, ids)
    assert fusedops.counters() == {}
    handle.undo()
    assert model.config._attn_implementation == "sdpa" and registries() == names


@pytest.mark.parametrize("family", ["mistral", "gpt_oss"])
def test_copies(family):
    """A copy is patched on its own, holds our functions in the registries, and can be unpatched."""
    model, ids, names = tiny(family), tokens(), registries()
    expected = logits(model, ids)
    handle = only_attention(model)
    twin, again = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    handle.undo()
    for other in (twin, again):
        fusedops.reset_counters()
        torch.testing.assert_close(logits(other, ids), expected)
        assert sum(fusedops.counters().values()) == 2
        assert unpatch(other) == 2 and unpatch(other) == 0
        assert torch.equal(logits(other, ids), expected) and other.config._attn_implementation == "eager"
    assert registries() == names


LOAD = """
import pickle, sys, torch
model, ids, expected = pickle.load(open(sys.argv[1], "rb"))
import fusedops
from transformers import AttentionInterface
with torch.no_grad():
    torch.testing.assert_close(model(ids).logits, expected)
    assert sum(fusedops.counters().values()) == 2
    fusedops.unpatch(model)
    torch.testing.assert_close(model(ids).logits, expected)
assert sum(fusedops.counters().values()) == 2 and "fusedops" not in AttentionInterface._global_mapping
"""


def test_pickle_in_another_process(tmp_path):
    model, ids = tiny("llama"), tokens()
    with only_attention(model):
        (tmp_path / "model").write_bytes(pickle.dumps((model, ids, logits(model, ids))))
    done = subprocess.run([sys.executable, "-c", LOAD, tmp_path / "model"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_saved_model_knows_nothing_of_it(tmp_path):
    model, ids = tiny("llama"), tokens()
    expected = logits(model, ids)
    with only_attention(model):
        model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    assert torch.equal(logits(again, ids), expected)
    assert NAME not in (tmp_path / "config.json").read_text()


@pytest.mark.parametrize("family", FAMILIES)
def test_text_of_the_report(family):
    report = only_attention(tiny(family), dry_run=True).report
    options = {"gemma2": "softcap", "gpt_oss": "sinks"}.get(family, "")
    assert [(row.path, row.replacement) for row in report.rows] == [
        (f"model.layers.{index}.self_attn", f"attention({options})") for index in range(2)
    ]


def reason(model):
    """Why the attentions of a model are left alone; and that the model is then as it was."""
    ids = tokens()
    expected, before = logits(model, ids), snapshot(model)
    handle = only_attention(model, strict=False)
    (found,) = {row.reason for row in handle.report.skipped}
    assert handle.report.counts["attention"] == 0 and torch.equal(logits(model, ids), expected)
    assert_same(before, snapshot(model))
    return found


def test_head_dimension_without_kernels():
    assert reason(tiny("llama", head_dim=20, hidden_size=80)) == "heads of 20 elements"


def test_other_implementations():
    """What somebody else registered stays; what transformers has is replaced."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    with registered("mine", sdpa_attention_forward):
        model = tiny("llama")
        model.set_attn_implementation("mine")
        assert reason(model) == "its attention was already replaced by mine"
    model.set_attn_implementation("sdpa")
    assert only_attention(model, dry_run=True).report.counts["attention"] == 2


@contextlib.contextmanager
def registered(name, function):
    AttentionInterface.register(name, function)
    try:
        yield
    finally:
        del AttentionInterface._global_mapping[name]


def test_model_that_returns_its_weights():
    model = tiny("llama")
    model.config.output_attentions = True
    assert reason(model) == "the model returns attention weights"


def test_forward_that_somebody_replaced():
    """B45: then it may not ask for an attention function at all."""
    model = tiny("llama")
    module = model.model.layers[1].self_attn
    module.forward = types.MethodType(lambda self, *args, **kwargs: type(self).forward(self, *args, **kwargs), module)
    with pytest.raises(RuntimeError, match=r"layers\.1\.self_attn must not be patched by something else"):
        only_attention(model)
    handle, ids = only_attention(model, strict=False), tokens()
    assert handle.report.counts["attention"] == 1
    fusedops.reset_counters()
    found = logits(model, ids)
    assert sum(fusedops.counters().values()) == 1, "the module that was left alone runs its own code"
    torch.testing.assert_close(found, logits(tiny("llama"), ids))


INTERFACE = transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS
OWN_INTERFACE = AttentionInterface()
OWN_INTERFACE["sdpa"] = print


def eager(module, query, key, value, attention_mask, scaling=1.0, dropout=0.0, **kwargs):
    """The attention that everybody knows, without groups."""
    scores = query @ key.mT * scaling
    scores = scores if attention_mask is None else scores + attention_mask
    return (scores.softmax(-1) @ value).transpose(1, 2), None


def sigmoid_attention(module, query, key, value, attention_mask, scaling=1.0, dropout=0.0, **kwargs):
    """Near enough in shape, and another function."""
    scores = (query @ key.mT * scaling + attention_mask).sigmoid()
    return (scores / scores.sum(-1, keepdim=True) @ value).transpose(1, 2), None


class Attention(nn.Module):
    """An attention as transformers has them."""

    def __init__(self):
        super().__init__()
        self.config = types.SimpleNamespace(_attn_implementation_internal="eager", _attn_implementation="eager")
        self.head_dim = 8

    def forward(self, x):
        function = INTERFACE.get_interface(self.config._attn_implementation, eager)
        return function(self, x, x, x, None, scaling=0.5, dropout=0.0)[0]


class SigmoidAttention(Attention):
    def forward(self, x):
        function = INTERFACE.get_interface(self.config._attn_implementation, sigmoid_attention)
        return function(self, x, x, x, None, scaling=0.5, dropout=0.0)[0]


class BiasedAttention(Attention):
    def forward(self, x):
        function = INTERFACE.get_interface(self.config._attn_implementation, eager)
        return function(self, x, x, x, None, scaling=0.5, position_bias=x)[0]


class MaskingAttention(Attention):
    def forward(self, x, attention_mask=None):
        function = INTERFACE.get_interface(self.config._attn_implementation, eager)
        if attention_mask is not None:
            attention_mask = attention_mask & (x[..., :1] > 0)
        return function(self, x, x, x, attention_mask, scaling=0.5)[0]


class ComputedSinks(Attention):
    def forward(self, x):
        function = INTERFACE.get_interface(self.config._attn_implementation, eager)
        return function(self, x, x, x, None, scaling=0.5, s_aux=x[0, :, 0, 0])[0]


class OwnAttention(Attention):
    def forward(self, x):
        function = OWN_INTERFACE.get_interface(self.config._attn_implementation, eager)
        return function(self, x, x, x, None, scaling=0.5)[0]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (SigmoidAttention, "computes another attention than softmax(q @ k.T) @ v"),
        (BiasedAttention, "its attention depends on position_bias"),
        (MaskingAttention, "its forward computes with the mask"),
        (ComputedSinks, "its sinks are no parameter"),
        (OwnAttention, "its file has attention functions of its own"),
    ],
)
def test_near_misses_are_left_alone(kind, expected):
    handle = only_attention(nn.Sequential(kind()), strict=False)
    assert [row.reason for row in handle.report.skipped] == [expected]
    with pytest.raises(ValueError, match="attention that takes its function from transformers' AttentionInterface"):
        only_attention(nn.Sequential(kind()))


def test_what_they_are_near():
    handle = only_attention(nn.Sequential(Attention()))
    assert [row.replacement for row in handle.report.replaced] == ["attention()"]


def test_model_without_transformers_attention():
    assert patch(tower()).report.counts["attention"] == 0
