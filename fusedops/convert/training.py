"""Models whose linears are trained as what they will be converted to: what `fake_quantize_` and `sparsify_` share."""

from dataclasses import replace

from fusedops.convert.conversion import convert_all
from fusedops.convert.handle import check_in_place
from fusedops.convert.select import Selection, check_finite


class ModelInTraining:
    """A model that is trained; as a context manager it is undone at the end, unless it was converted.

    Attributes:
        model: The model.
        report: The `Report`; sizes are those of now, there are no errors yet.
    """

    BEING = ""  # what the model is, for messages
    DONE = ""  # what was done to its linears

    def __init__(self, model, scheme, selection, swaps, report):
        self.model = model
        self.report = report
        self._scheme = scheme
        self._selection = selection
        self._swaps = swaps
        self._is_converted = False

    def convert(self, *, keep=False):
        """Put the modules in that the linears were trained for, with the weights as they are now.

        Args:
            keep: As in `quantize_`; `undo` of the new handle puts plain linears back, with the trained weights.

        Returns:
            The handle that takes this one's place.

        Raises:
            ValueError: a weight holds NaN or infinity.
            RuntimeError: it was converted or undone before, or something else has replaced a module since. Nothing is
                changed then.
        """
        if not self._swaps:
            raise RuntimeError(f"convert: the model must be {self.BEING}, but it was converted or undone before")
        check_in_place("convert", self._swaps, self.DONE)
        self._before_reading()
        trained = {}
        for target, swap in zip(self._selection.targets, self._swaps, strict=True):
            twin = trained.get(target.twin)
            is_shared = twin is not None and twin.linear.weight is swap.new.weight
            trained[target] = replace(target, linear=swap.new, twin=twin if is_shared else None)
        check_finite("convert", trained.values())
        selection = Selection(list(trained.values()), self._selection.rows, self._selection.unmatched)
        plain = {swap.new: swap.old for swap in self._swaps}
        for module, linear in plain.items():
            linear.weight, linear.bias = module.weight, module.bias
        handle = convert_all(self.model, self._scheme, selection, keep=keep, plain=plain)
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
        check_in_place("undo", self._swaps, self.DONE)
        self._before_reading()
        for swap in self._swaps:
            swap.old.weight, swap.old.bias = swap.new.weight, swap.new.bias
            swap.old.train(swap.new.training)
            swap.revert()
        self._swaps = []

    def _before_reading(self):
        """Bring the weights into the state in which others may read them."""

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        if not self._is_converted:
            self.undo()

    def __repr__(self):
        number = f"{len(self._swaps)} linears, {self._scheme.name}"
        return f"<{type(self).__name__} of {type(self.model).__name__}: {number}>"
