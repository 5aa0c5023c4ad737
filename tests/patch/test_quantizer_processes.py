"""Who can load a quantised checkpoint: processes that import fusedops, in either order; no others; several at once."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.patch.quantized_checkpoints import load, save_tiny
from tests.patch.tiny_models import logits, tokens

pytest.importorskip("transformers")
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with a quantised checkpoint in each of two folders, and the logits of the first."""
    folder = tmp_path_factory.mktemp("checkpoints")
    save_tiny(folder / "floats", intermediate_size=128)
    for scheme in ("int8", "int4-weight-only"):
        model = load(folder / "floats", scheme)
        model.save_pretrained(folder / scheme)
        torch.save(logits(model, tokens()), folder / scheme / "logits.pt")
    return folder


def python(code, folder, *launcher):
    """What a fresh process prints."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    script = folder / "script.py"
    script.write_text(code)
    ended = subprocess.run(
        [sys.executable, *launcher, str(script)], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr[-4000:]
    return ended.stdout


LOADS = """
def loads(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        return torch.equal(model(tokens()).logits, torch.load(f"{folder}/logits.pt"))
"""


def test_without_fusedops_it_is_an_error_and_with_it_afterwards_it_works(saved):
    """transformers warns that it does not know the method and goes on; the shape of the codes stops it."""
    code = f"""
import torch
from transformers import AutoModelForCausalLM
for folder in ("int8", "int4-weight-only"):
    try:
        AutoModelForCausalLM.from_pretrained(folder)
    except RuntimeError as error:
        print("refused:", error)
import fusedops
from tests.patch.tiny_models import tokens
{LOADS}
print(loads("int8"), loads("int4-weight-only"))
"""
    lines = python(code, saved).splitlines()
    assert [line[:8] for line in lines] == ["refused:", "refused:", "True Tru"]
    assert all("ignore_mismatched_sizes" in line for line in lines[:2])


def test_fusedops_first(saved):
    """Importing it does not import transformers, and yet it is known there afterwards."""
    code = f"""
import sys, torch
import fusedops.patch
fusedops.patch.FusedOpsConfig
print("transformers" in sys.modules)
from transformers import AutoModelForCausalLM
from tests.patch.tiny_models import tokens
{LOADS}
print(loads("int8"), loads("int4-weight-only"))
"""
    assert python(code, saved).split() == ["False", "True", "True"]
