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
        status: quantized or skipped; trained, where its float weight is trained as if it were quantised.
        scheme: The scheme; empty where it was skipped.
        reason: Why it was skipped; empty where it was quantised.
        bytes_before, bytes_after: Of the weight, with its scales. A weight that two modules share counts once.
        error: ``|W - W'| / |W|``, Euclidean, of the weight and what the codes stand for; None without codes.
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
    """Table of a quantised model; `str()` gives it as text.

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
    def trained(self):
        """Rows of linears that compute as quantised ones while they are trained."""
        return [row for row in self.rows if row.status == "trained"]

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
        """Number of linears by status, bytes of the quantised ones before and after, and the largest error."""
        return {
            "quantized": len(self.quantized),
            "trained": len(self.trained),
            "skipped": len(self.skipped),
            "folded": len(self.folded),
            "bytes_before": sum(row.bytes_before for row in self.quantized),
            "bytes_after": sum(row.bytes_after for row in self.quantized),
            "largest_error": max((row.error for row in self.quantized), default=0.0),
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
        for title, rows in (("quantized", self.quantized), ("trained as if quantized", self.trained)):
            lines += [title, *_quantized_lines(rows)] if rows else []
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
        if self.quantized:
            lines.append(
                f"weights {_size(totals['bytes_before'])} -> {_size(totals['bytes_after'])}, "
                f"model {_size(self.model_bytes_before)} -> {_size(self.model_bytes_after)}"
            )
        return "\n".join(lines)


def _quantized_lines(rows):
    """One line for all linears of the same name, shape and scheme, with their largest error."""
    groups = {}
    for row in rows:
        groups.setdefault((_kind(row.path), row.module, row.shape, row.scheme), []).append(row.error)
    width = max(len(name) for name, *_ in groups)
    return [
        f"  {len(errors):5d} x {name:<{width}}  {module} {list(shape)} -> {scheme}{_largest(errors)}"
        for (name, module, shape, scheme), errors in groups.items()
    ]


def _largest(errors):
    return "" if None in errors else f", error at most {max(errors):.2%}"


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
