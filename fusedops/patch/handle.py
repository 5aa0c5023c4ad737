"""The handle of a patched model: apply, report, undo."""

from dataclasses import replace

from fusedops.patch import attention, instance
from fusedops.patch.continuous import unsupported
from fusedops.patch.rotary import RotaryState

ENGINE = "generate_batch -> paged_attention; attention_varlen where a window slides"


class PatchedModel:
    """What `fusedops.patch` returns; as a context manager it undoes the replacement at the end.

    A copy or a pickle of the model is patched like the model, on its own: this handle stays with the original, and
    `fusedops.patch.unpatch` takes the replacements out of a copy.

    Attributes:
        model: The model.
        report: The `Report`.
    """

    def __init__(self, model, replacements, report, engines=()):
        self.model = model
        self.report = report
        self.replacements = replacements
        self._engines = engines
        self._installed = []
        if engines:
            reason = unsupported()
            report.engine = f"not available: {reason}" if reason else ENGINE

    def apply(self):
        """Set the instance attributes of every module in the plan; all or none."""
        try:
            for replacement in self.replacements:
                self._installed.append((replacement.module, replacement.state))
                instance.install(replacement.module, replacement.state)
            for module, state in self._engines:
                self._installed.append((module, state))
                instance.install(module, state)
        except BaseException:
            self.undo()
            raise

    def undo(self):
        """Restore every module exactly; once undone, a no-op.

        Raises:
            RuntimeError: something else has replaced a forward since. Nothing is undone then.
        """
        restore_all(self._installed)
        self._installed = []

    def drop(self, reasons):
        """Restore single replacements, {(path, kind): reason}, and report them as skipped."""
        gone = {id(r.state) for r in self.replacements if (r.row.path, r.row.kind) in reasons}
        staying = [(module, state) for module, state in self._installed if id(state) not in gone]
        restore_all([(module, state) for module, state in self._installed if id(state) in gone], staying)
        self._installed = staying
        if not any(isinstance(state, attention.AttentionState) for _, state in staying):
            self.report.engine = ""  # the engine finds the model's own attention again
        self.replacements = [r for r in self.replacements if id(r.state) not in gone]
        self.report.rows = [
            replace(row, status="skipped", replacement="", reason=reasons[row.path, row.kind])
            if row.status == "replaced" and (row.path, row.kind) in reasons
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
                place = replacement.row.path, reason
                counts[place] = counts.get(place, 0) + number
        return counts

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.undo()

    def __repr__(self):
        return f"<PatchedModel of {type(self.model).__name__}: {self.report.counts}>"


def restore_all(installed, staying=()):
    """Restore replaced modules, after making sure that nothing was put on top of any.

    Args:
        installed: (module, state); states that the modules do not carry any more need nothing.
        staying: Those of the same model that stay replaced.
    """
    installed = [(module, state) for module, state in installed if instance.carries(module, state)]
    for module, state in installed:
        obstacle = state.obstacle(module)
        if obstacle is not None:
            raise RuntimeError(f"undo: {obstacle}")
    for module, state in installed:
        state.restore(module)
    attention.switch_off([state for _, state in installed], [state for _, state in staying])


def patched_modules(model):
    """(path, module) of every replaced module of a model."""
    return [(path, module) for path, module in model.named_modules() if instance.states_of(module)]
