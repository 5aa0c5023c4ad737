"""Putting modules in the place of others, all or none, and taking them out again."""

from dataclasses import dataclass

import torch
from torch import nn

from fusedops._core.modules import foreign_attribute
from fusedops.convert.schemes import stored_tensors
from fusedops.nn import QuantizedEmbedding, QuantizedLinear


@dataclass(eq=False)
class Swap:
    """One module in the place of another.

    Attributes:
        path: Name of the first place.
        places: (parent, name) of every place.
        old: The module that stood there; None once it was dropped.
        new: The module that stands there.
    """

    path: str
    places: list
    old: nn.Module | None
    new: nn.Module

    def apply(self):
        """Put the new module into its places."""
        for parent, name in self.places:
            parent._modules[name] = self.new

    def revert(self):
        """Put the old module back; harmless where `apply` did not come so far."""
        for parent, name in self.places:
            parent._modules[name] = self.old

    def is_in_place(self):
        """Whether the new module still stands in all its places."""
        return all(parent._modules.get(name) is self.new for parent, name in self.places)


class Changed:
    """Parameters that are changed in place, with their values from before."""

    def __init__(self):
        self._before = []

    def keep(self, parameter):
        """Remember a parameter's value."""
        self._before.append((parameter, parameter.detach().clone()))

    def restore(self):
        """Write the values back, bit for bit."""
        with torch.no_grad():
            for parameter, value in reversed(self._before):
                parameter.copy_(value)
        self._before = []


class ConvertedModel:
    """A model with other linears; where the float weights were kept also a context manager, which undoes it at the end.

    A copy of the model is converted like the model; this handle stays with the original.

    Attributes:
        model: The model.
        report: The `Report`.
    """

    OP = ""  # the function that gives it
    DONE = ""  # what was done to the linears, for messages

    def __init__(self, model, swaps, changed, report, keep):
        self.model = model
        self.report = report
        self._swaps = swaps
        self._changed = changed
        self._is_kept = bool(keep)
        if not keep:
            self._changed = None
            for swap in swaps:
                swap.old = None
        elif keep == "cpu":
            for swap in swaps:
                _move(swap.old, torch.device("cpu"))

    def undo(self):
        """Put the original modules back, and the norms as they were, bit for bit; once undone, a no-op.

        A weight that was kept on the CPU, or whose model has moved since, goes to where the quantised one is.

        Raises:
            RuntimeError: the float weights were not kept, or something else has replaced or patched a module since.
                Nothing is undone then.
        """
        if not self._is_kept:
            raise RuntimeError(f"undo: the float weights were dropped; pass keep=True to {self.OP} to keep them")
        check_in_place("undo", self._swaps, self.DONE)
        for swap in self._swaps:
            _move(swap.old, swap.new.weight.device)
            swap.old.train(swap.new.training)
            swap.revert()
        if self._changed is not None:
            self._changed.restore()
        self._swaps = []

    def dequantize(self, dtype=None):
        """Put plain modules of torch in place of the converted ones, with the weights those stand for.

        Args:
            dtype: Of the weights; None is that of the module.

        Raises:
            RuntimeError: something else has replaced or patched a module since. Nothing is changed then.
        """
        check_in_place("dequantize", self._swaps, self.DONE)
        plain = {}
        for swap in self._swaps:
            if not isinstance(swap.new, QuantizedLinear | QuantizedEmbedding):
                continue
            codes = id(swap.new.weight)
            is_linear = isinstance(swap.new, QuantizedLinear)
            made = swap.new.to_linear(dtype) if is_linear else swap.new.to_embedding(dtype)
            if codes in plain:
                made.weight = plain[codes].weight
            else:
                plain[codes] = made
                plain[id(made)] = swap.new  # the codes live until all are done, so that no id is used twice
            swap.new = made
            swap.apply()

    def __enter__(self):
        if not self._is_kept:
            raise RuntimeError(f"{self.OP}: as a context manager it needs keep=True, so that it can be undone")
        return self

    def __exit__(self, *exception):
        self.undo()

    def __repr__(self):
        number = f"{len(self.report.converted)} layers, {self.report.scheme}"
        return f"<{type(self).__name__} of {type(self.model).__name__}: {number}>"


class QuantizedModel(ConvertedModel):
    """What `fusedops.quantize_` returns: a `ConvertedModel`."""

    OP = "quantize_"
    DONE = "quantised"


class SparsifiedModel(ConvertedModel):
    """What `fusedops.sparsify_` returns: a `ConvertedModel`; `dequantize` leaves the dropped weights at 0."""

    OP = "sparsify_"
    DONE = "sparsified"


def check_in_place(op, swaps, done):
    """Raise RuntimeError where something else has replaced a module since, or its forward, as `fusedops.patch` does.

    Args:
        op: Who asks, for the message.
        swaps: Swaps that were applied.
        done: What they did, for the message.
    """
    for swap in swaps:
        if not swap.is_in_place():
            raise RuntimeError(f"{op}: {swap.path} was replaced after it was {done}; undo that first")
        if foreign_attribute(swap.new) is not None:
            raise RuntimeError(f"{op}: {swap.path} was patched after it was {done}; undo that first")


def _move(linear, device):
    """Move what holds a linear's weight; its bias may be that of the module in its place."""
    for tensor in stored_tensors(linear):
        if tensor.device != device:
            tensor.data = tensor.data.to(device)


def replace_all(conversions, changed):
    """Make all new modules, then put them in: all or none.

    Args:
        conversions: Iterable of Swap, which does the work when it is iterated.
        changed: Changed; what the work changes in place is restored where it fails.

    Returns:
        List of the swaps.
    """
    swaps = []
    try:
        swaps.extend(conversions)
        for swap in swaps:
            swap.apply()
    except BaseException:
        for swap in swaps:
            swap.revert()
        changed.restore()
        raise
    return swaps
