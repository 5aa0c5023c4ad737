"""What became of every linear of a model, and of every norm or projection that smoothing touched."""

from collections import Counter
from dataclasses import asdict, dataclass, field


@dataclass(frozen=True)
class Row:
    """One linear.

    Attributes:
        path: Name of the module in the model; of one that stands at several places, the first.
        module: Name of its class.
        shape: [out_features, in_features].
        status: quantized, sparsified or skipped; trained or masked, where its float weight is trained as if it were
            quantised, or with the dropped weights at 0.
        scheme: The scheme; empty where it was skipped.
        reason: Why it was skipped; empty where it was not.
        bytes_before, bytes_after: Of the weight, with its scales. A weight that two modules share counts once.
        error: ``|W - W'| / |W|``, Euclidean, of the weight and what is stored; None while it is trained.
        kept: ``|W'| / |W|`` of a pruned weight; None of others.
        output_error: ``|(W - W') x| / |W x|`` of a pruned weight over the calibration's inputs; None without.
    """

    path: str
    module: str
    shape: tuple
    status: str
    scheme: str = ""
    reason: str = ""
    bytes_before: int = 0
    bytes_after: int = 0
    error: float | None = None
    kept: float | None = None
    output_error: float | None = None


@dataclass(frozen=True)
class Smoothing:
    """One place where smoothing moved a factor of each channel from the activations into the weights.

    Attributes:
        source: Path of the norm or linear whose output became smaller in the channels with outliers.
        consumers: Paths of the linears whose weights took the factors.
        status: folded or skipped.
        reason: Why nothing was folded there; empty where it was.
        largest, smallest: Of the factors.
    """

    source: str
    consumers: tuple
    status: str
    reason: str = ""
    largest: float = 1.0
    smallest: float = 1.0


@dataclass
class Report:
    """Table of a converted model; `str()` gives it as text.

    Attributes:
        scheme: Name of the scheme.
        rows: One Row per linear.
        smoothing: One Smoothing per place; empty without calibration.
        unmatched: Entries of `skip` that name nothing in the model; that of the default is not meant.
        model_bytes_before, model_bytes_after: Of all parameters and buffers of the model, each counted once.
    """

    scheme: str
    rows: list = field(default_factory=list)
    smoothing: list = field(default_factory=list)
    unmatched: tuple = ()
    model_bytes_before: int = 0
    model_bytes_after: int = 0

    @property
    def quantized(self):
        """Rows of quantised linears."""
        return [row for row in self.rows if row.status == "quantized"]

    @property
    def sparsified(self):
        """Rows of linears whose weights are stored compressed."""
        return [row for row in self.rows if row.status == "sparsified"]

    @property
    def converted(self):
        """Rows of linears that store something else than before."""
        return [row for row in self.rows if row.status in ("quantized", "sparsified")]

    @property
    def trained(self):
        """Rows of linears that compute as quantised ones while they are trained."""
        return [row for row in self.rows if row.status == "trained"]

    @property
    def masked(self):
        """Rows of linears whose dropped weights stay 0 while they are trained."""
        return [row for row in self.rows if row.status == "masked"]

    @property
    def skipped(self):
        """Rows of linears that were left alone."""
        return [row for row in self.rows if row.status == "skipped"]

    @property
    def folded(self):
        """Places where smoothing took effect."""
        return [place for place in self.smoothing if place.status == "folded"]

    @property
    def totals(self):
        """Number of linears by status, bytes of the converted ones before and after, and the largest error."""
        return {
            "quantized": len(self.quantized),
            "sparsified": len(self.sparsified),
            "trained": len(self.trained),
            "masked": len(self.masked),
            "skipped": len(self.skipped),
            "folded": len(self.folded),
            "bytes_before": sum(row.bytes_before for row in self.converted),
            "bytes_after": sum(row.bytes_after for row in self.converted),
            "largest_error": max((row.error for row in self.converted), default=0.0),
            "model_bytes_before": self.model_bytes_before,
            "model_bytes_after": self.model_bytes_after,
        }

    def as_dict(self):
        """Everything, in types that JSON knows."""
        return {
            "scheme": self.scheme,
            "totals": self.totals,
            "rows": [{**asdict(row), "shape": list(row.shape)} for row in self.rows],
            "smoothing": [{**asdict(place), "consumers": list(place.consumers)} for place in self.smoothing],
            "unmatched": list(self.unmatched),
        }

    def __str__(self):
        lines = []
        for title, rows in (
            ("quantized", self.quantized), ("2:4 sparse", self.sparsified), ("trained as if quantized", self.trained),
            ("trained with the dropped weights at 0", self.masked),
        ):  # fmt: skip
            lines += [title, *_converted_lines(rows)] if rows else []
        if self.skipped:
            lines += ["skipped", *_grouped(self.skipped, lambda row: (row.module, row.reason))]
        if self.folded:
            lines += ["smoothed", *_grouped(self.folded, lambda p: (_kind(p.source), _consumers(p)), "->")]
        unfolded = [place for place in self.smoothing if place.status == "skipped"]
        if unfolded:
            lines += ["not smoothed", *_grouped(unfolded, lambda p: (_consumers(p), p.reason))]
        if self.unmatched:
            lines.append(f"skip names nothing in the model: {', '.join(map(repr, self.unmatched))}")
        totals = self.totals
        if self.converted:
            lines.append(
                f"weights {_size(totals['bytes_before'])} -> {_size(totals['bytes_after'])}, "
                f"model {_size(self.model_bytes_before)} -> {_size(self.model_bytes_after)}"
            )
        return "\n".join(lines)


def _converted_lines(rows):
    """One line for all linears of the same name, shape and scheme, with the worst of their figures."""
    groups = {}
    for row in rows:
        groups.setdefault((_kind(row.path), row.module, row.shape, row.scheme), []).append(row)
    width = max(len(name) for name, *_ in groups)
    return [
        f"  {len(rows):5d} x {name:<{width}}  {module} {list(shape)} -> {scheme}{_worst(rows)}"
        for (name, module, shape, scheme), rows in groups.items()
    ]


def _worst(rows):
    """What was lost at most; of pruned weights, whose norm tells the error, what was kept at least."""
    kept, errors, of_outputs = ([getattr(row, name) for row in rows] for name in ("kept", "error", "output_error"))
    text = ""
    if None not in kept:
        text += f", kept at least {min(kept):.2%} of the norm"
    elif None not in errors:
        text += f", error at most {max(errors):.2%}"
    reached = [error for error in of_outputs if error is not None]
    return text + (f", error of outputs at most {max(reached):.2%}" if reached else "")


def _grouped(rows, texts, arrow="-"):
    groups = Counter(texts(row) for row in rows)
    width = max(len(first) for first, _ in groups)
    return [f"  {count:5d} x {first:<{width}}  {arrow} {last}" for (first, last), count in groups.items()]


def _kind(path):
    """The last part of a path that is not a number."""
    parts = [part for part in path.split(".") if not part.isdigit()]
    return parts[-1] if parts else path


def _consumers(place):
    return ", ".join(_kind(path) for path in place.consumers)


def _size(number):
    for unit in ("B", "KiB", "MiB"):
        if number < 1024:
            return f"{number:.4g} {unit}"
        number /= 1024
    return f"{number:.4g} GiB"
