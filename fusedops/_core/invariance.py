"""Batch-invariant mode: what may depend on the rows around a row, and a way to compute rows one at a time."""

import threading
from contextlib import contextmanager

import torch

from fusedops._core import env
from fusedops._core.tuning import defaults_only

_lock = threading.Lock()
_depth = 0


def enabled():
    """Whether a block of `batch_invariant` is running in any thread."""
    return _depth > 0


@contextmanager
def batch_invariant(enabled=True):
    """In this block, give each row of a forward pass the same bits whatever else is in its batch.

    Every tile and every split of a sum follows from the row's own shape, its dtype and the device: never from the
    number of rows or sequences, nor from another sequence's length. A row is a token; in attention, a sequence with its
    queries. Tuned configurations are not used. Blocks nest, and decorate functions. While one runs, the calls of every
    thread are invariant; a captured CUDA graph keeps the mode it was captured in.

    Args:
        enabled: False does nothing, for ``with batch_invariant(option):``.

    Raises:
        NotImplementedError: inside the block, by a call that cannot keep the promise: a scale computed from the whole
            tensor or from several rows, and the reference implementation.
    """
    if not enabled:
        yield
        return
    with _counted(), defaults_only():
        yield


@contextmanager
def _counted():
    _step(1)
    try:
        yield
    finally:
        _step(-1)


def _step(change):
    """Plans of one mode are not used in the other: those that are kept are forgotten after the mode has changed."""
    global _depth
    with _lock:
        _depth += change
        if _depth == max(change, 0):
            env.changed()


def refuse(op, why):
    """Raise where the mode is on. NotImplementedError: it is."""
    if enabled():
        raise NotImplementedError(f"{op}: {why}, which fusedops.batch_invariant() does not allow")


def row_by_row(function, row_arguments, args):
    """Outputs of a function for each row alone, joined; each row is computed from fresh memory of the same layout.

    Args:
        function: Function of args.
        row_arguments: Places in args of the tensors that have a row for each row of the first; one without has less
            leading dimensions, or None stands there.
        args: The first of row_arguments is ``[..., N]``.

    Returns:
        (outputs, changed): a list of tensors [rows, ...], and by place the rows of each argument after the call.
    """
    first = args[row_arguments[0]]
    leading = first.shape[:-1]
    number = leading.numel()
    tables = {
        place: args[place].reshape(number, *args[place].shape[len(leading) :])
        for place in row_arguments
        if args[place] is not None and args[place].shape[: len(leading)] == leading
    }
    outputs, changed = [], {place: [] for place in tables}
    for row in range(number):
        own = list(args)
        for place, table in tables.items():
            own[place] = table[row : row + 1].clone(memory_format=torch.contiguous_format)
            changed[place].append(own[place])
        found = function(*own)
        outputs.append(found if isinstance(found, tuple) else (found,))
    joined = [] if outputs[0] == (None,) else [torch.cat(parts) for parts in zip(*outputs)]
    return joined, {place: torch.cat(rows) for place, rows in changed.items()}
