"""What was replaced by what, what was not and why."""

from collections import Counter
from dataclasses import asdict, dataclass, field

KINDS = ("attention", "norm", "mlp", "rotary", "residual", "linear")


@dataclass(frozen=True)
class Row:
    """One module.

    Attributes:
        path: Name of the module in the model.
        module: Name of its class.
        kind: attention, norm, mlp, rotary, residual or linear.
        status: replaced or skipped.
        replacement: The operator that computes it now; empty where it was skipped.
        reason: Why it was skipped; empty where it was replaced.
    """

    path: str
    module: str
    kind: str
    status: str
    replacement: str = ""
    reason: str = ""


@dataclass(frozen=True)
class Measured:
    """Measured difference between the model's own code and the replacement, in epsilons of the output's dtype.

    Attributes:
        kind: attention, norm, mlp, rotary, residual, linear; or "whole model".
        path: The module that differed most of its kind.
        count: Number of comparisons.
        rms, peak: The largest relative differences: Euclidean over the tensor, and of the largest element.
        rms_limit, peak_limit: The budget.
    """

    kind: str
    path: str
    count: int
    rms: float
    peak: float
    rms_limit: float
    peak_limit: float


@dataclass
class Report:
    """Table of a patched model; `str()` gives it as text.

    Attributes:
        rows: One Row per module that was replaced, or recognised and skipped.
        dry_run: Whether the model was left as it is.
        measured: Results of ``verify=True``, one per kind and one for the whole model.
        engine: What transformers' continuous batching runs on; empty where the model has none.
    """

    rows: list = field(default_factory=list)
    dry_run: bool = False
    measured: list = field(default_factory=list)
    engine: str = ""

    @property
    def replaced(self):
        """Rows of replaced modules."""
        return [row for row in self.rows if row.status == "replaced"]

    @property
    def skipped(self):
        """Rows of modules that were recognised and left alone."""
        return [row for row in self.rows if row.status == "skipped"]

    @property
    def counts(self):
        """Number of replaced modules of each kind."""
        found = Counter(row.kind for row in self.replaced)
        return {kind: found[kind] for kind in KINDS}

    def as_dict(self):
        """Everything, in types that JSON knows."""
        return {
            "counts": self.counts,
            "dry_run": self.dry_run,
            "rows": [asdict(row) for row in self.rows],
            "measured": [asdict(entry) for entry in self.measured],
            "engine": self.engine,
        }

    def __str__(self):
        lines = ["would be replaced" if self.dry_run else "replaced"]
        lines += _table(self.replaced, lambda row: row.replacement) or ["  nothing"]
        if self.skipped:
            lines += ["skipped", *_table(self.skipped, lambda row: row.reason)]
        if self.engine:
            lines.append(f"continuous batching\n  {self.engine}")
        if self.measured:
            lines += ["verified (rms and peak difference in epsilons, with the budget)"]
            lines += [
                f"  {entry.count:5d} x {entry.kind:<12} rms {entry.rms:.3g} of {entry.rms_limit:.3g}, "
                f"peak {entry.peak:.3g} of {entry.peak_limit:.3g}{f' ({entry.path})' if entry.path else ''}"
                for entry in self.measured
            ]
        return "\n".join(lines)


def _table(rows, text):
    groups = Counter((KINDS.index(row.kind), row.kind, row.module, text(row)) for row in rows)
    width = max((len(module) for _, _, module, _ in groups), default=0)
    return [
        f"  {count:5d} x {kind:<9}  {module:<{width}}  {'->' if rows[0].status == 'replaced' else '-'} {last}"
        for (_, kind, module, last), count in sorted(groups.items())
    ]
