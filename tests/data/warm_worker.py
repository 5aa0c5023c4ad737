"""Run a patched random model on a GPU that runs nothing, with FUSEDOPS_JIT=forbid, and tell what was compiled.

Usage: python -m tests.data.warm_worker CONFIG TARGET MAX_BATCH MAX_SEQLEN RUNS [sparse|gradients|page=N ...]
Runs without Triton's interpreter. Tokens are garbage; which kernels are launched does not depend on them.
"""

import json
import random
import sys
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

import fusedops
from fusedops._core import env
from fusedops.patch import PagedCache
from tests.data.stand_in_driver import standing_in


def build(path, kinds):
    data = json.loads(Path(path).read_text())
    config = AutoConfig.for_model(data.pop("model_type"), **data)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    if "sparse" in kinds:
        fusedops.sparsify_(model)
    fusedops.patch(model)
    return model


def train(model, draw, max_batch, max_seqlen):
    """A step of training of a drawn shape; what it was."""
    batch, length = draw.randint(1, max_batch), draw.randint(2, max_seqlen)
    with torch.enable_grad():
        ids = torch.randint(3, 60, (batch, length))
        model(ids, labels=ids, use_cache=False).loss.backward()
    return f"{batch} x {length} trained"


def run(model, draw, max_batch, max_seqlen, page_size):
    """One `generate` of a drawn shape; what it was."""
    batch, total = draw.randint(1, max_batch), draw.randint(2, max_seqlen)
    prompt = draw.randint(1, total - 1)
    ids = torch.randint(3, 60, (batch, prompt))
    mask = torch.ones_like(ids)
    paged = draw.random() < 0.4
    padded = draw.random() < 0.6
    if padded:
        mask[0, : draw.randint(0, prompt - 1)] = 0
    options = {"num_pages": -(-max_seqlen // page_size) * batch, "page_size": page_size, "max_length": max_seqlen}
    cache = {"past_key_values": PagedCache(model, **options)} if paged else {}
    model.generate(
        ids, attention_mask=mask, do_sample=False, min_new_tokens=total - prompt, max_new_tokens=total - prompt,
        pad_token_id=0, **cache,
    )  # fmt: skip
    return f"{batch} x {prompt} to {total}" + " padded" * padded + " paged" * paged


if __name__ == "__main__":
    path, target, max_batch, max_seqlen, runs, *kinds = sys.argv[1:]
    model, draw, errors, done = build(path, kinds), random.Random(0), [], []
    page_size = next((int(kind.removeprefix("page=")) for kind in kinds if kind.startswith("page=")), 16)
    limits = int(max_batch), int(max_seqlen)
    with (
        env.override("FUSEDOPS_BACKEND", "triton"), env.override("FUSEDOPS_JIT", "forbid"),
        standing_in(target) as (launches, compiled, found),
    ):  # fmt: skip
        for _ in range(int(runs)):
            try:
                done.append(run(model, draw, *limits, page_size))
                if "gradients" in kinds:
                    done.append(train(model, draw, *limits))
            except RuntimeError as error:
                if "FUSEDOPS_JIT=forbid" not in str(error):
                    raise
                errors.append(str(error))
    kernels = {name: launches.count(name) for name in sorted(set(launches))}
    print(json.dumps({"launches": kernels, "compiled": compiled, "found": len(found), "errors": errors, "done": done}))
