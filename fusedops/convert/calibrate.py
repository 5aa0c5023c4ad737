"""Running a model on calibration batches: what reaches each linear, how large, and whose output it is."""

import contextlib
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from fusedops._core.modules import without_cache


@dataclass
class Observed:
    """What calibration saw of one linear.

    Attributes:
        largest: float32 ``[K]``: the largest absolute value of each input channel; None until it is called.
        sources: The watched modules whose very output it was given; None stands for anything else.
        order: When it was first called, counted over all linears.
    """

    largest: torch.Tensor | None = None
    sources: set = field(default_factory=set)
    order: int = -1


def checked_batches(op, batches, name="calibration"):
    """Model inputs as a list; `name` is what messages call them.

    Raises:
        TypeError: it is not an iterable of tensors, mappings, lists or tuples.
        ValueError: it is empty.
    """
    if isinstance(batches, torch.Tensor | Mapping | str):
        batches = [batches]
    try:
        batches = list(batches)
    except TypeError:
        raise TypeError(f"{op}: {name} must hold model inputs, got {type(batches).__name__}") from None
    if not batches:
        raise ValueError(f"{op}: {name} must hold at least one batch, got none")
    for batch in batches:
        if not isinstance(batch, torch.Tensor | Mapping | list | tuple):
            raise TypeError(f"{op}: {name} must hold tensors, mappings, lists or tuples, got {type(batch).__name__}")
    return batches


@contextlib.contextmanager
def hooked(pairs):
    """Hooks for a while.

    Args:
        pairs: (register, hook): a module's bound method such as ``register_forward_hook``, and what it is given.
    """
    with contextlib.ExitStack() as stack:
        for register, hook in pairs:
            stack.callback(register(hook).remove)
        yield


def run(model, batch):
    """Call a model with one batch, on the model's device, without a cache."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    extra = without_cache(model)
    if isinstance(batch, Mapping):
        return model(**{**extra, **{name: _moved(value, device) for name, value in batch.items()}})
    args = [batch] if isinstance(batch, torch.Tensor) else batch
    return model(*(_moved(value, device) for value in args), **extra)


def observe(model, targets, watched, batches, step):
    """Collect what reaches the linears.

    Args:
        model: The model, in evaluation mode.
        targets: Target of every linear.
        watched: Modules whose outputs are recognised when they reach a linear.
        batches: Model inputs.
        step: Is called after each batch.

    Returns:
        {target: Observed}
    """
    found = {target: Observed() for target in targets}
    outputs = {}
    pairs = [(module.register_forward_hook, _remember(outputs)) for module in watched]
    pairs += [(t.linear.register_forward_pre_hook, _record(found, t, outputs)) for t in targets]
    with hooked(pairs):
        for batch in batches:
            run(model, batch)
            step()
    return found


def _moved(value, device):
    return value.to(device) if isinstance(value, torch.Tensor) else value


def _remember(outputs):
    """A forward hook that keeps who made a tensor, not the tensor."""

    def hook(module, args, out):
        if isinstance(out, torch.Tensor):
            outputs[id(out)] = weakref.ref(out), module

    return hook


def _record(found, target, outputs):
    """A forward pre-hook that keeps the range and the source of a linear's input."""

    def hook(module, args):
        seen = found[target]
        if seen.order < 0:
            seen.order = sum(other.order >= 0 for other in found.values())
        x = args[0] if args else None
        if not isinstance(x, torch.Tensor):  # given by name: its range is unknown
            seen.sources.add(None)
            return
        made, source = outputs.get(id(x), (None, None))
        seen.sources.add(source if made is not None and made() is x else None)
        largest = x.detach().flatten(0, -2).abs().amax(0).float() if x.numel() else x.new_zeros(x.shape[-1]).float()
        seen.largest = largest if seen.largest is None else torch.maximum(seen.largest, largest)

    return hook
