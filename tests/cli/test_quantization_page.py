"""docs/quantization.md: its examples run, one after the other, on a tiny random model."""

import re
from pathlib import Path

import pytest
import torch

from fusedops.convert import SCHEMES

PAGE = (Path(__file__).resolve().parents[2] / "docs/quantization.md").read_text()
MODEL = '"HuggingFaceTB/SmolLM2-135M-Instruct"'


def test_the_examples_run(tiny_model_directory, tmp_path, monkeypatch, capsys):
    pytest.importorskip("accelerate", reason="reading a checkpoint of ours needs accelerate")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.M)
    assert len(blocks) == 6 and sum(MODEL in block for block in blocks) == 1
    names = {}
    for block in blocks:
        exec(block.replace(MODEL, repr(str(tiny_model_directory))), names)
        model = names["model"]
        assert model(input_ids=torch.arange(3, 9)[None]).logits.isfinite().all()
    assert "smoothed" in capsys.readouterr().out
    assert model.config.quantization_config.scheme == "int8" and (tmp_path / "quantised").is_dir()


def test_every_scheme_stands_in_the_table():
    table = re.findall(r"^\| `([a-z0-9-]+)` \|", PAGE, re.M)
    assert sorted(table) == sorted(SCHEMES)
