"""Running the model's own code and the replacements on the same real activations, and judging the difference."""

import contextlib
import functools
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from fusedops._core.modules import evaluating, float_tensors, without_cache
from fusedops.patch.attention import watched
from fusedops.patch.gates import GATE_METHOD
from fusedops.patch.instance import state_of
from fusedops.patch.report import KINDS, Measured
from fusedops.patch.rotary import RotaryState, with_rotary
from fusedops.patch.rows import peek
from fusedops.testing.accuracy import Budget, errors

# How many default budgets a kind may differ from the stock code, which rounds on its own. One: the same roundings, or
# stock code that runs in float32 (attention).
# Two: an activation spelled out rounds its factors; rotary rounds two products and a sum where the operator rounds
# once; a layer hands rounded norms on.
ALLOWANCE = {"attention": 1, "norm": 1, "mlp": 2, "rotary": 2, "residual": 2, "linear": 1}

NOISE_RUNS = 6  # enough for an expert that is chosen by a hair to change at least once

PROBE_SHAPE = (2, 12)  # batch and tokens: more than one of each, and no multiple of a tile


@dataclass
class Difference:
    """One comparison on real activations."""

    path: str
    kind: str
    rms: float
    peak: float
    limit: Budget

    @property
    def acceptable(self):
        """Whether both numbers are within the budget; NaN is not."""
        return self.rms <= self.limit.rms and self.peak <= self.limit.peak


def probe_inputs(model, given):
    """The arguments of the probe forward: what the caller gave, or token ids drawn with a fixed seed.

    Raises:
        ValueError: the model has no token embedding, and no inputs were given.
    """
    if isinstance(given, Mapping):
        return dict(given)
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    if getattr(embedding, "weight", None) is None:
        raise ValueError(
            "patch: verify must be a mapping of arguments for a model without get_input_embeddings(), got True"
        )
    seeded = torch.Generator("cpu").manual_seed(0)
    ids = torch.randint(0, embedding.weight.shape[0], PROBE_SHAPE, generator=seeded)
    return {"input_ids": ids.to(embedding.weight.device)}


def run(model, inputs):
    """Output tensors of a model in evaluation mode, without gradients or a cache; nothing of the model is changed."""
    arguments = {**without_cache(model), **inputs}
    with evaluating(model):
        return [_visible(tensor, inputs.get("attention_mask")) for tensor in float_tensors(model(**arguments))]


def _visible(tensor, mask):
    """The tensor with 0 for padding tokens, whose values are arbitrary."""
    if not isinstance(mask, torch.Tensor) or mask.dim() != 2 or tensor.shape[:2] != mask.shape:
        return tensor
    return tensor.masked_fill(mask.to(tensor.device)[(...,) + (None,) * (tensor.dim() - 2)] == 0, 0)


def differences(handle, inputs):
    """Compare every replaced module with its own code, each on the activations that it gets in the patched model."""
    found = []
    attentions = {id(r.module): r.row.path for r in handle.replacements if r.row.kind == "attention"}
    with contextlib.ExitStack() as stack:
        for replacement in handle.replacements:
            if replacement.row.kind != "attention":
                hook = _hook(replacement.row.path, replacement.row.kind, found)
                stack.callback(replacement.module.register_forward_hook(hook, with_kwargs=True).remove)
        if attentions:
            stack.enter_context(watched(functools.partial(_compare_attention, attentions, found)))
        run(handle.model, inputs)
    return found


def tolerated(model, replacements, inputs, expected):
    """The budget of the whole model: how far its outputs go when each part differs by its own budget, at most twice.

    The model runs unpatched, with seeded noise on the output of every module that is to be replaced. So a model that
    amplifies rounding (hot attention, an expert chosen by a hair) is not blamed on the replacements.

    Args:
        expected: The outputs of the model itself.

    Returns:
        One Budget for each output tensor.
    """
    limits = [Budget.for_dtype(tensor.dtype) for tensor in expected]
    for seed in range(NOISE_RUNS):
        seeded = torch.Generator("cpu").manual_seed(seed)
        with contextlib.ExitStack() as stack:
            for replacement in replacements:
                hook = _noise_hook(replacement, seeded)
                stack.callback(replacement.module.register_forward_hook(hook, with_kwargs=True).remove)
            outs = run(model, inputs)
        for index, (out, truth) in enumerate(zip(outs, expected, strict=True)):
            base, moved = Budget.for_dtype(truth.dtype), errors(out, truth.double())
            rms, peak = 2 * moved.rms + base.rms, 2 * moved.peak + base.peak
            limits[index] = Budget(max(limits[index].rms, rms), max(limits[index].peak, peak))
    return limits


def compare_outputs(outs, expected, limits):
    """Compare the outputs of the whole model before and after."""
    found = []
    for out, truth, limit in zip(outs, expected, limits, strict=True):
        _compare("", "whole model", [out], [truth], limit, found)
    return found


def summary(found):
    """One Measured per kind: the largest numbers and where they were."""
    rows = []
    for kind in (*KINDS, "whole model"):
        group = [difference for difference in found if difference.kind == kind]
        if group:
            worst = max(group, key=lambda difference: difference.rms / difference.limit.rms)
            rms, peak = max(d.rms for d in group), max(d.peak for d in group)
            rows.append(Measured(kind, worst.path, len(group), rms, peak, worst.limit.rms, worst.limit.peak))
    return rows


def _compare_attention(paths, found, module, out, expected):
    """Append one Difference; `expected` is wider than `out`, because eager attention rounds its scores to 16 bits."""
    limit = _limit("attention", out.dtype)
    measured = errors(out, expected.double())
    found.append(Difference(paths[id(module)], "attention", measured.rms, measured.peak, limit))


def _hook(path, kind, found):
    busy = False

    def hook(module, args, kwargs, out):
        nonlocal busy
        if busy:  # called again by the stock code of a layer around it
            return
        busy = True
        args, kwargs, out = peek((args, kwargs, out))
        try:
            state = state_of(module)
            if isinstance(state, RotaryState):
                recorder = _recording(path, state.rotate, found)
                with_rotary(state.owner, state.name, recorder)(module, *args, **kwargs)
                return
            with _without_gate(module, state):
                expected = type(module).forward(module, *args, **kwargs)
            _compare(path, kind, float_tensors(out), float_tensors(expected), None, found)
        finally:
            busy = False

    return hook


def _noise_hook(replacement, seeded):
    """A forward hook that returns the module's output with noise as large as the budget of its kind."""
    kind, state = replacement.row.kind, replacement.state

    def noisy(out):
        if isinstance(out, tuple | list):
            return type(out)(noisy(value) for value in out)
        if not isinstance(out, torch.Tensor) or not out.is_floating_point():
            return out
        size = _limit(kind, out.dtype).rms * torch.finfo(out.dtype).eps * 3**0.5  # the rms of uniform noise is 3**-0.5
        noise = torch.rand(out.shape, generator=seeded).to(out.device) * 2 - 1
        return (out * (1 + size * noise)).to(out.dtype)

    def hook(module, args, kwargs, out):
        if not isinstance(state, RotaryState):
            return noisy(out)
        stock = state.rotate.stock
        return with_rotary(state.owner, state.name, lambda *a, **k: noisy(stock(*a, **k)))(module, *args, **kwargs)

    return hook


def _recording(path, rotate, found):
    """A rotary function that compares both ways on the q and k that the attention has, and returns the stock result."""

    def compare(*args, **kwargs):
        expected = rotate.stock(*args, **kwargs)
        _compare(path, "rotary", float_tensors(rotate(*args, **kwargs)), float_tensors(expected), None, found)
        return expected

    return compare


@contextlib.contextmanager
def _without_gate(module, state):
    """The experts' own gate for a while; a replaced forward needs no such care, the class still has the stock one."""
    if state.slot != GATE_METHOD:
        yield
        return
    ours = module.__dict__.pop(GATE_METHOD)
    try:
        yield
    finally:
        module.__dict__[GATE_METHOD] = ours


def _compare(path, kind, outs, expected, limit, found):
    """Append one Difference for each tensor; without a limit, the kind's own."""
    if len(outs) != len(expected):
        found.append(Difference(path, kind, float("inf"), float("inf"), Budget(0.0, 0.0)))
        return
    for out, truth in zip(outs, expected, strict=True):
        limit = limit or _limit(kind, truth.dtype)
        if out.shape != truth.shape or out.dtype != truth.dtype or not _same_class(out, truth):
            found.append(Difference(path, kind, float("inf"), float("inf"), limit))
        elif torch.equal(out, truth):
            found.append(Difference(path, kind, 0.0, 0.0, limit))
        else:
            measured = errors(out, truth.double())
            found.append(Difference(path, kind, measured.rms, measured.peak, limit))


def _limit(kind, dtype):
    base = Budget.for_dtype(dtype)
    return Budget(base.rms * ALLOWANCE[kind], base.peak * ALLOWANCE[kind])


def _same_class(out, truth):
    """Whether NaN, +inf and -inf stand at the same places."""
    special = ~torch.isfinite(truth)
    return torch.equal(special, ~torch.isfinite(out)) and torch.equal(
        torch.nan_to_num(out[special], 0.5), torch.nan_to_num(truth[special], 0.5)
    )
