"""Who can load a quantised checkpoint: processes that import fusedops, in either order; no others; several at once."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fusedops.patch import FusedOpsConfig
from tests.patch.quantized_checkpoints import SCHEMES, load, same_tensors, save_tiny
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


SPLIT = """
import sys, torch, transformers
import torch.distributed as dist
from transformers.distributed import DistributedConfig
import fusedops.patch
from tests.patch.tiny_models import tokens


def logits(model):
    with torch.no_grad():
        return model(tokens()).logits


def load(folder, **options):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **options)


def refused(folder, **options):
    try:
        load(folder, **options)
    except NotImplementedError as error:
        return str(error)


split = DistributedConfig(tp_plan="auto")
told = [refused("floats", quantization_config=fusedops.patch.FusedOpsConfig("int8"), distributed_config=split)]
narrow = DistributedConfig(tp_plan={"model.layers.*.mlp.gate_proj": "packed_colwise"})
told.append(refused("int8", distributed_config=narrow))
told.append(refused("groups of 128", distributed_config=DistributedConfig(tp_plan="auto")))
found = {}
for scheme in ("int8-weight-only", "fp8-weight-only", "int4-weight-only", "int8", "fp8"):
    model = load(scheme, distributed_config=DistributedConfig(tp_plan="auto"))
    found[scheme] = logits(model)
    weight = model.model.layers[0].mlp.down_proj.weight
    assert weight.to_local().shape[-1] * 2 == weight.shape[-1]
    model.save_pretrained(scheme + "-split")
if dist.get_rank() == 0:
    torch.save((told, found), "found.pt")
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.deep
def test_two_processes_share_every_layer(saved):
    """Tensor parallelism: the values of one process but for rounding; each rank has its own scales of activations."""
    floats = logits(load(saved / "floats"), tokens())
    for scheme in SCHEMES:
        load(saved / "floats", scheme).save_pretrained(saved / scheme)
    load(saved / "floats", FusedOpsConfig("int4-weight-only", 128)).save_pretrained(saved / "groups of 128")
    python(SPLIT, saved, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    (on_the_fly, packed, groups), found = torch.load(saved / "found.pt")
    assert "must come from a checkpoint that is quantised already" in on_the_fly
    assert "must be colwise or rowwise, got packed_colwise for model.layers.0.mlp.gate_proj" in packed
    assert "a multiple of the group size times the ranks, 128 * 2, got 64 for model.layers.0.self_attn.o_proj" in groups
    for scheme, out in found.items():
        one = load(saved / scheme)
        expected = logits(one, tokens())
        if scheme.endswith("weight-only"):
            torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
        else:
            assert (out - floats).norm() < 1.2 * (expected - floats).norm()
        assert same_tensors(load(saved / f"{scheme}-split"), one)
