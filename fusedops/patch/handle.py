"""The handle of a patched model: apply, report, undo."""

from dataclasses import replace

from fusedops.patch import instance
from fusedops.patch.rotary import RotaryState


class PatchedModel:
    """What `fusedops.patch` returns; as a context manager it undoes the replacement at the end.

    A copy or a pickle of the model is patched like the model, on its own: this handle stays with the original, and
    `fusedops.patch.unpatch` takes the replacements out of a copy.

    Attributes:
        model: The model.
        report: The `Report`.
    """

    def __init__(self, model, replacements, report):
        self.model = model
        self.report = report
        self.replacements = replacements
        self._modules = []

    def apply(self):
        """Set the instance attributes of every module in the plan; all or none."""
        try:
            for replacement in self.replacements:
                self._modules.append(replacement.module)
                instance.install(replacement.module, replacement.state)
        except BaseException:
            self.undo()
            raise

    def undo(self):
        """Restore every module exactly; once undone, a no-op.

        Raises:
            RuntimeError: something else has replaced a forward since. Nothing is undone then.
        """
        restore_all(self._modules)
        self._modules = []

    def drop(self, reasons):
        """Restore single modules, {path: reason}, and report them as skipped."""
        leaving = [r for r in self.replacements if r.row.path in reasons]
        gone = {id(r.module) for r in leaving}
        restore_all([r.module for r in leaving])
        self._modules = [module for module in self._modules if id(module) not in gone]
        self.replacements = [r for r in self.replacements if r.row.path not in reasons]
        self.report.rows = [
            replace(row, status="skipped", replacement="", reason=reasons[row.path])
            if row.status == "replaced" and row.path in reasons
            else row
            for row in self.report.rows
        ]

    def fallbacks(self):
        """Calls that a module's own code answered because the operator refused: {(path, reason): number}."""
        counts = {}
        for replacement in self.replacements:
            state = replacement.state
            refused = state.rotate.fallbacks if isinstance(state, RotaryState) else state.fallbacks
            for reason, number in refused.items():
                counts[replacement.row.path, reason] = number
        return counts

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.undo()

    def __repr__(self):
        return f"<PatchedModel of {type(self.model).__name__}: {self.report.counts}>"


def restore_all(modules):
    """Restore replaced modules, after making sure that nothing was put on top of any."""
    modules = [module for module in modules if instance.state_of(module) is not None]
    for module in modules:
        if instance.place_of(module) is None and _covered(module):
            raise RuntimeError(
                f"undo: the forward of a {type(module).__name__} was replaced after patching; undo that first"
            )
    for module in modules:
        instance.restore(module)


def _covered(module):
    """Whether something else stands where our function was; a slot that is simply gone needs no restoring."""
    return instance.state_of(module).slot in module.__dict__


def patched_modules(model):
    """(path, module) of every replaced module of a model."""
    return [(path, module) for path, module in model.named_modules() if instance.state_of(module) is not None]
