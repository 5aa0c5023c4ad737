"""Draw shapes within the limits of a warm-up and print the kernels that a model needs there and that it left out.

Usage: python -m tests.data.warm_draws CONFIG TARGET MAX_BATCH MAX_SEQLEN DRAWS    without Triton's interpreter
"""

import json
import random
import sys

import torch

from fusedops._core.device import TARGETS
from fusedops.patch.skeleton import skeleton
from fusedops.warm import calls, kernels


def drawn(model, draws, max_batch, max_seqlen):
    """(operator, arguments) of prompts and steps at shapes that nobody chose."""
    draw, found = random.Random(0), {}
    with torch.no_grad(), calls._recorded(found):
        for _ in range(draws):
            batch, length = draw.randint(1, max_batch), draw.randint(1, max_seqlen - 1)
            calls._generate(model, batch, length)
            calls._padded(model, batch, length)
            calls._paged(model, batch, length, max_seqlen, 16)
            if batch > 1 and length > 1:
                total = draw.randint(length + batch - 1, batch * length - 1)
                calls._padded_paged(model, batch, length, total, max_seqlen, 16)
    return list(found.values())


if __name__ == "__main__":
    path, target, *numbers = sys.argv[1:]
    max_batch, max_seqlen, draws = map(int, numbers)
    model = skeleton(path, torch.bfloat16)
    listed, _ = kernels.of_calls(calls.of_model(model, max_batch, max_seqlen), TARGETS[target])
    needed, _ = kernels.of_calls(drawn(model, draws, max_batch, max_seqlen), TARGETS[target])
    left_out = [f"{job.name} {job.signature} {job.constants} {job.attributes}" for job in needed if job not in listed]
    print(json.dumps({"listed": len(listed), "needed": len(needed), "left_out": left_out}))
