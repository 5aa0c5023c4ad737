"""Perplexity of a language model over a text: windows that stand alone, each token of the text predicted once."""

import math

import torch
import torch.nn.functional as F


def windows(tokens, length):
    """(inputs, targets) of consecutive windows of at most `length` tokens: a target is the token behind its input.

    All tokens but the first are targets, each once; a window knows nothing of those before it.
    """
    ids = torch.as_tensor(tokens)
    return list(zip(ids[:-1].split(length), ids[1:].split(length), strict=True))


@torch.inference_mode()
def perplexity(model, cut, progress=None):
    """``exp`` of the mean negative log likelihood of all targets; infinity beyond float64, NaN where a logit is NaN.

    Args:
        model: A causal language model; its logits are taken to float32, sums are in float64.
        cut: What `windows` gave.
        progress: Called with the number of windows done, after each.
    """
    total, count = 0.0, 0
    for done, (inputs, targets) in enumerate(cut, 1):
        logits = model(inputs[None].to(model.device), use_cache=False).logits[0].float()
        total += F.cross_entropy(logits, targets.to(model.device), reduction="none").double().sum().item()
        count += len(targets)
        if progress is not None:
            progress(done)
    mean = total / count
    return math.inf if mean > math.log(1e300) else math.exp(mean)
