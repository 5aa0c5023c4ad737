"""Where the time of a forward pass goes: of each kind of layer, and which of our operators ran in it."""

import re
import time
from collections import Counter
from dataclasses import dataclass, field

import torch

from fusedops._core import dispatch

OUTSIDE = "(outside of layers)"


@dataclass
class Layer:
    """All layers of one kind, without the layers in them.

    Attributes:
        name: Path of the module, numbers as ``*``.
        calls: How often one ran.
        seconds: Spent in them.
        operators: Calls of ours by (operator, implementation).
    """

    name: str
    calls: int = 0
    seconds: float = 0.0
    operators: Counter = field(default_factory=Counter)

    def as_dict(self):
        """The same as plain data."""
        ours = [[*key, count] for key, count in sorted(self.operators.items())]
        return {"layer": self.name, "calls": self.calls, "seconds": self.seconds, "operators": ours}


class Watch:
    """Watches every module of a model for the length of a block; what passes belongs to the innermost one.

    On a GPU each module is waited for, so that its time is its own; what that costs, and what watching costs on the
    host, is not counted.
    """

    def __init__(self, model):
        self._model = model
        self._cuda = model.device.type == "cuda"
        self.layers = {}
        self._stack = []
        self._handles = []

    def __enter__(self):
        for path, module in self._model.named_modules():
            name = re.sub(r"\b\d+\b", "*", path) or OUTSIDE
            self._handles.append(module.register_forward_pre_hook(lambda *_, name=name: self._enter(name)))
            self._handles.append(module.register_forward_hook(lambda *_: self._leave(), always_call=True))
        return self

    def __exit__(self, *_):
        for handle in self._handles:
            handle.remove()

    def _enter(self, name):
        self._settle()
        layer = self.layers.setdefault(name, Layer(name))
        layer.calls += 1
        self._stack.append(layer)
        self._begin()

    def _leave(self):
        self._settle()
        self._stack.pop()
        self._begin()

    def _begin(self):
        self._counted = Counter(dispatch.counters())
        self._start = time.perf_counter()

    def _settle(self):
        if not self._stack:
            return
        if self._cuda:
            torch.cuda.synchronize()
        self._stack[-1].seconds += time.perf_counter() - self._start
        self._stack[-1].operators += Counter(dispatch.counters()) - self._counted


def profile(model, prompt, steps):
    """The layers of one prompt's forward pass, and of a step of decoding after it.

    Args:
        model: In whatever way it is.
        prompt: Token ids.
        steps: Of decoding, whose mean is told.

    Returns:
        ``{"prefill": ..., "step": ...}``, each with ``layers`` (as `Layer.as_dict`, the slowest first), ``seconds``
        (their sum), ``unwatched_seconds`` (the same pass with nobody watching), ``share_not_ours`` (of the sum, that of
        layers in which no operator of ours ran).
    """
    _passes(model, prompt, steps, None)
    plain = _passes(model, prompt, steps, None)
    first, later = Watch(model), Watch(model)
    _passes(model, prompt, steps, (first, later))
    return {
        "prefill": _told(first.layers, plain[0], 1),
        "step": _told(later.layers, plain[1] / steps, steps),
    }


@torch.no_grad()
def _passes(model, prompt, steps, watches):
    """Seconds of the prompt's pass and of all steps."""
    taken = []
    ids = torch.tensor([prompt], device=model.device)
    cache = None
    for index, count in enumerate((1, steps)):
        watch = watches[index] if watches else None
        if watch:
            watch.__enter__()
        start = time.perf_counter()
        try:
            for _ in range(count):
                out = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
                cache, ids = out.past_key_values, out.logits[:, -1:].argmax(-1)
            ids.tolist()  # waits for a GPU
        finally:
            if watch:
                watch.__exit__()
        taken.append(time.perf_counter() - start)
    return taken


def _told(layers, plain, times):
    found = sorted(layers.values(), key=lambda layer: -layer.seconds)
    whole = sum(layer.seconds for layer in found)
    others = sum(layer.seconds for layer in found if not layer.operators)
    rows = [layer.as_dict() for layer in found]
    for row in rows:
        row["seconds"] /= times
        row["calls"] //= times
        row["operators"] = [[*key, count // times] for *key, count in row["operators"]]
    return {
        "layers": rows, "seconds": whole / times, "unwatched_seconds": plain, "share_not_ours": others / whole,
    }  # fmt: skip
