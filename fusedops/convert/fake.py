"""Quantisation-aware training: linears that compute what they will compute once they are quantised."""

from dataclasses import replace

from fusedops.convert.conversion import convert_all, model_bytes
from fusedops.convert.handle import Changed, Swap, check_in_place, replace_all
from fusedops.convert.report import Report, Row
from fusedops.convert.schemes import find_scheme, num_bytes
from fusedops.convert.select import DEFAULT_SKIP, Selection, check_finite, select
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


class FakeQuantizedModel:
    """What `fusedops.fake_quantize_` returns; as a context manager it undoes it at the end, unless it was converted.

    Attributes:
        model: The model.
        report: The `Report`; sizes are those of now, there are no errors yet.
    """

    def __init__(self, model, scheme, selection, swaps, report):
        self.model = model
        self.report = report
        self._scheme = scheme
        self._selection = selection
        self._swaps = swaps
        self._is_converted = False

    def convert(self, *, keep=False):
        """Put quantised modules in, which compute what the model computes now, with ``==``.

        Args:
            keep: As in `quantize_`; `undo` of the new handle puts plain linears back, with the trained weights.

        Returns:
            `QuantizedModel`, whose handle takes this one's place.

        Raises:
            ValueError: a weight holds NaN or infinity.
            RuntimeError: it was converted or undone before, or something else has replaced a module since. Nothing is
                changed then.
        """
        self._check("convert")
        fakes = {}
        for target, swap in zip(self._selection.targets, self._swaps, strict=True):
            twin = fakes.get(target.twin)
            is_shared = twin is not None and twin.linear.weight is swap.new.weight
            fakes[target] = replace(target, linear=swap.new, twin=twin if is_shared else None)
        check_finite("convert", fakes.values())
        selection = Selection(list(fakes.values()), self._selection.rows, self._selection.unmatched)
        plain = {swap.new: swap.old for swap in self._swaps}
        for fake, linear in plain.items():
            linear.weight, linear.bias = fake.weight, fake.bias
        handle = convert_all(self.model, self._scheme, selection, None, False, lambda: None, keep, plain)
        self._swaps, self._is_converted = [], True
        return handle

    def undo(self):
        """Put the original modules back, with the weights as they are now; once undone, a no-op.

        Raises:
            RuntimeError: the model was converted, or something else has replaced a module since. Nothing is undone
                then.
        """
        if self._is_converted:
            raise RuntimeError("undo: the model was converted; undo that, with the handle that convert() returned")
        check_in_place("undo", self._swaps)
        for swap in self._swaps:
            swap.old.weight, swap.old.bias = swap.new.weight, swap.new.bias
            swap.old.train(swap.new.training)
            swap.revert()
        self._swaps = []

    def _check(self, op):
        if not self._swaps:
            raise RuntimeError(f"{op}: the model must be fake-quantised, but it was converted or undone before")
        check_in_place(op, self._swaps)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        if not self._is_converted:
            self.undo()

    def __repr__(self):
        return f"<FakeQuantizedModel of {type(self.model).__name__}: {len(self._swaps)} linears, {self._scheme.name}>"


def _fake(target, scheme):
    new = FakeQuantizedLinear.from_linear(target.linear, scheme.module, **scheme.options)
    return Swap(target.path, target.places, target.linear, new)


def _row(target, scheme):
    linear = target.linear
    size = num_bytes([linear.weight]) if target.twin is None else 0
    shape = tuple(linear.weight.shape)
    return Row(target.path, type(linear).__name__, shape, "trained", scheme.name, bytes_before=size, bytes_after=size)
