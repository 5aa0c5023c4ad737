"""Run a patched random model on a GPU that runs nothing, with FUSEDOPS_JIT=forbid, and tell what was compiled.

Usage: python -m tests.data.warm_worker CONFIG TARGET MAX_BATCH MAX_SEQLEN RUNS SCHEME|none
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


def build(path, scheme):
    data = json.loads(Path(path).read_text())
    config = AutoConfig.for_model(data.pop("model_type"), **data)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    if scheme != "none":
        fusedops.quantize_(model, scheme)
    fusedops.patch(model)
    return model


def run(model, draw, max_batch, max_seqlen):
    """One `generate` of a drawn shape; what it was."""
    batch, total = draw.randint(1, max_batch), draw.randint(2, max_seqlen)
    prompt = draw.randint(1, total - 1)
    ids = torch.randint(3, 60, (batch, prompt))
    mask = torch.ones_like(ids)
    paged = draw.random() < 0.4
    padded = not paged and draw.random() < 0.6  # padding takes no page: any number of tokens, which is not listed
    if padded:
        mask[0, : draw.randint(0, prompt - 1)] = 0
    pages = -(-max_seqlen // 16) * batch
    cache = {"past_key_values": PagedCache(model, num_pages=pages, max_length=max_seqlen)} if paged else {}
    model.generate(
        ids, attention_mask=mask, do_sample=False, min_new_tokens=total - prompt, max_new_tokens=total - prompt,
        pad_token_id=0, **cache,
    )  # fmt: skip
    return f"{batch} x {prompt} to {total}" + " padded" * padded + " paged" * paged


if __name__ == "__main__":
    path, target, max_batch, max_seqlen, runs, scheme = sys.argv[1:]
    model, draw, errors, done = build(path, scheme), random.Random(0), [], []
    with (
        env.override("FUSEDOPS_BACKEND", "triton"), env.override("FUSEDOPS_JIT", "forbid"),
        standing_in(target) as (launches, compiled, found),
    ):  # fmt: skip
        for _ in range(int(runs)):
            try:
                done.append(run(model, draw, int(max_batch), int(max_seqlen)))
            except RuntimeError as error:
                if "FUSEDOPS_JIT=forbid" not in str(error):
                    raise
                errors.append(str(error))
    kernels = {name: launches.count(name) for name in sorted(set(launches))}
    print(json.dumps({"launches": kernels, "compiled": compiled, "found": len(found), "errors": errors, "done": done}))
