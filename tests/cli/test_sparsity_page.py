"""docs/sparsity.md: its examples run, one after the other, on a tiny random model."""

import re
from pathlib import Path

import pytest
import torch

import fusedops
from fusedops.convert.pruning import METHODS

pytest.importorskip("transformers", reason="transformers is not installed")
PAGE = (Path(__file__).resolve().parents[2] / "docs/sparsity.md").read_text()
MODEL = '"HuggingFaceTB/SmolLM2-135M-Instruct"'


def test_the_examples_run(tiny_model_directory, capsys):
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.M)
    assert len(blocks) == 5 and sum(MODEL in block for block in blocks) == 1
    names, seen = {}, []
    for block in blocks:
        exec(block.replace(MODEL, repr(str(tiny_model_directory))), names)
        model = names["model"]
        assert model(input_ids=torch.arange(3, 9)[None]).logits.isfinite().all()
        seen.append(sum(isinstance(module, fusedops.nn.Sparse24Linear) for module in model.modules()))
    assert seen == [0, 0, 0, 6, 6] and len(names["losses"]) == 2  # pruned and undone, then trained and compressed
    assert "2:4 sparse" in capsys.readouterr().out


def test_every_method_stands_in_the_table():
    assert re.findall(r'^\| `"([a-z]+)"` \|', PAGE, re.M) == list(METHODS)
