"""Quantisation-aware training: linears that compute what they will compute once they are quantised."""

from fusedops.convert.conversion import model_bytes
from fusedops.convert.handle import Changed, Swap, replace_all
from fusedops.convert.report import Report, Row
from fusedops.convert.schemes import find_scheme, num_bytes
from fusedops.convert.select import DEFAULT_SKIP, select
from fusedops.convert.training import ModelInTraining
from fusedops.nn import FakeQuantizedLinear

OP = "fake_quantize_"


def fake_quantize_(model, scheme, *, skip=DEFAULT_SKIP, group_size=None):
    """Let the linears of a model compute as quantised ones while their float weights are trained, in place.

    The forward of each is, bit for bit, that of the quantised module which `.convert()` puts in its place; in the
    backward pass quantising counts as the identity. Weights and biases stay the same parameters, so an optimizer that
    was made before keeps working.

    Args:
        model, scheme, skip, group_size: As in `quantize_`.

    Returns:
        `FakeQuantizedModel` with `.report`, `.convert()` and `.undo()`; also a context manager, which undoes it.

    Raises:
        TypeError: an argument is not of its type.
        ValueError: no such scheme, nothing to replace, or a weight that holds NaN or infinity or is not loaded. The
            model is then as it was; so it is after any other failure or interrupt.

    Numerics: see `fusedops.nn.FakeQuantizedLinear`.
    From: Bengio, Leonard and Courville, "Estimating or Propagating Gradients Through Stochastic Neurons for
        Conditional Computation", 2013, https://arxiv.org/abs/1308.3432
    """
    scheme = find_scheme(OP, scheme, group_size)
    selection = select(OP, model, scheme, skip)
    size = model_bytes(model)
    order = {path: index for index, (path, _) in enumerate(model.named_modules())}
    rows = [_row(target, scheme) for target in selection.targets]
    swaps = replace_all((_fake(target, scheme) for target in selection.targets), Changed())
    rows = sorted(selection.rows + rows, key=lambda row: order[row.path])
    report = Report(scheme.name, rows, [], selection.unmatched, size, size)
    return FakeQuantizedModel(model, scheme, selection, swaps, report)


class FakeQuantizedModel(ModelInTraining):
    """What `fusedops.fake_quantize_` returns: a `ModelInTraining`, whose conversion computes the same, with ``==``."""

    BEING = "fake-quantised"
    DONE = "quantised"


def _fake(target, scheme):
    new = FakeQuantizedLinear.from_linear(target.linear, scheme.module, **scheme.options)
    return Swap(target.path, target.places, target.linear, new)


def _row(target, scheme):
    linear = target.linear
    size = num_bytes([linear.weight]) if target.twin is None else 0
    shape = tuple(linear.weight.shape)
    return Row(target.path, type(linear).__name__, shape, "trained", scheme.name, bytes_before=size, bytes_after=size)
