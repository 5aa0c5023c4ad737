"""Measure for how many rows a sparse product is faster than the dense one, and keep the answer."""

import datetime
import platform
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from fusedops._core.tuning import EXACT, forget
from fusedops._core.tuning.entry import Entry, checksum, from_dict
from fusedops._core.tuning.store import current_store
from fusedops.ops.compress_24 import compress_24, decompress_24, prune_24
from fusedops.ops.scaled_matmul import fp8_matmul, int8_matmul
from fusedops.ops.sparse_matmul import CODES, sparse_matmul
from fusedops.ops.sparse_matmul._crossover import CROSSOVER, END, MEASURED_ROWS, Crossover, question
from fusedops.testing import assert_accurate
from fusedops.testing.timing import rotating
from fusedops.tuning import Options, not_now, ranks
from fusedops.tuning.measure import MARGIN

CHECKED_ROWS = 16  # of the first numbers of rows, whose results are compared with each other
_DENSE = {torch.int8: int8_matmul, torch.float8_e4m3fn: fp8_matmul}


@dataclass(frozen=True)
class Measured:
    """What was found; `print` it.

    Attributes:
        crossover: For which numbers of rows the sparse product is used from now on.
        timings: Seconds by kind and rows, such as ``"sparse 16"``.
        state: "measured", "partly measured" (out of time), "known", or why nothing was measured.
    """

    crossover: Crossover
    timings: dict
    state: str

    def __str__(self):
        found = self.crossover
        span = "no number of rows" if found.first == END else f"{found.first} to {found.last} rows"
        if (found.first, found.last) == (1, END):
            span = "any number of rows"
        lines = [f"sparse_matmul: sparse for {span} ({self.state})"]
        for rows in (rows for rows in MEASURED_ROWS if f"sparse {rows}" in self.timings):
            sparse, dense = (self.timings[f"{kind} {rows}"] * 1e6 for kind in ("sparse", "dense"))
            lines.append(f"  {rows:5} rows: sparse {sparse:10.1f} us, dense {dense:10.1f} us, {dense / sparse:.2f}x")
        return "\n".join(lines)


def tune_crossover(out_features, in_features, dtype, device="cpu", *, max_rows=MEASURED_ROWS[-1], tuning=None):
    """Measure sparse and dense products of one weight's shape, and use the faster for each number of rows from now on.

    Layers that keep a dense copy beside their compressed weight follow the answer. Sparse is used between the first and
    the last number of rows, of powers of two, where it is faster by more than 2 %, and than the noise, without a gap.

    Args:
        out_features, in_features: The weight's shape [N, K].
        dtype: Of the weight: float16, bfloat16, float32, int8 or float8_e4m3fn.
        device: Where.
        max_rows: The largest number of rows that is measured; calls of more are as the last.
        tuning: `fusedops.tuning.Options`.

    Returns:
        Measured. Nothing is measured in the cases that `fusedops.tune` names.

    Raises:
        ValueError: a size is below 1, or the device is not there.
        AssertionError: the two products do not agree.
    """
    for name, size in (("out_features", out_features), ("in_features", in_features), ("max_rows", max_rows)):
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"tune_crossover: {name} must be at least 1, got {size!r}")
    options, device = tuning or Options(), torch.device(device)
    asked = question(out_features, in_features, dtype, device)
    choice = CROSSOVER.look_up(*asked)
    reason = not_now()
    if reason is not None:
        return Measured(choice.config, {}, reason)
    if ranks.is_follower():
        return _followed(ranks.shared(None), asked)
    known = current_store().get(*choice.place)[0] if choice.source in EXACT else None
    if known is None or not known.complete or options.force:
        try:
            found = _measured(choice, out_features, in_features, dtype, device, max_rows, options)
        except Exception as error:
            ranks.shared({"error": f"{type(error).__name__}: {error}"})
            raise
        current_store().put(found, keep=options.keep)
        forget()
        state = "measured" if found.complete else "partly measured"
    else:
        found, state = known, "known"
    data = found.as_dict()
    ranks.shared({"entry": {**data, "checksum": checksum(data)}})
    return Measured(Crossover(**found.config), found.timings, state)


def _followed(found, asked):
    """What this rank uses of what rank 0 found."""
    if "error" in found:
        raise RuntimeError(f"tune_crossover: rank 0 failed: {found['error']}")
    entry = from_dict(found["entry"])
    current_store().put(entry, keep=False)
    forget()
    return Measured(CROSSOVER.choose(*asked), entry.timings, "known")


def _measured(choice, N, K, dtype, device, max_rows, options):
    """Time both for each number of rows, from few to many."""
    deadline = time.monotonic() + options.seconds
    numbers = [rows for rows in MEASURED_ROWS if rows <= max_rows]
    weights = [_weights(N, K, dtype, device, 0)]
    if device.type == "cuda":  # so many that no call finds its own in the cache, where a model's step would not
        weights = rotating(lambda seed: _weights(N, K, dtype, device, seed), N * K * dtype.itemsize * 9 // 16)
    timings, wins, noise = {}, {}, 0.0
    for rows in numbers:
        if time.monotonic() > deadline:
            break
        if options.progress is not None:
            options.progress(f"{CROSSOVER.name} {rows} rows", len(wins), len(numbers))
        arguments = [(_operand(rows, K, dtype, device, seed), *three) for seed, three in enumerate(weights)]
        if rows <= CHECKED_ROWS:
            _check(arguments[0])
        with torch.no_grad():
            measured = options.timer({"sparse": _sparse, "dense": _dense}, arguments, device)
        sparse, dense = measured["sparse"], measured["dense"]
        timings |= {f"sparse {rows}": float(sparse.median), f"dense {rows}": float(dense.median)}
        scatter = max((one.median - one.low) / one.median for one in (sparse, dense))
        noise = max(noise, scatter)
        wins[rows] = sparse.median * (1 + max(MARGIN, scatter)) < dense.median
    complete = len(wins) == len(numbers)
    return Entry(
        key=choice.key,
        config=CROSSOVER.values(longest_run(wins)),
        timings=timings,
        noise=float(noise),
        validation={"by": "sparse and dense against each other", "refused": 0},
        complete=complete,
        host=platform.node(),
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )


def longest_run(wins):
    """The Crossover of measured numbers of rows, in rising order, to whether sparse is faster there."""
    best, run = [], []
    for rows, is_faster in wins.items():
        run = [*run, rows] if is_faster else []
        best = run if len(run) > len(best) else best
    if not best:
        return Crossover(END, END)
    return Crossover(best[0], END if best[-1] == list(wins)[-1] else best[-1])


def _weights(N, K, dtype, device, seed):
    """(values, metadata, dense) of one weight; of codes the numbers that a quantised layer has."""
    weight = _operand(N, K, dtype, device, 1000 + seed)
    values, metadata = compress_24(prune_24(weight))
    return values, metadata, decompress_24(values, metadata, in_features=K)


def _operand(rows, K, dtype, device, seed):
    draw = torch.Generator(device).manual_seed(seed)
    x = torch.randn(rows, K, device=device, generator=draw)
    return (x * 32).round().clamp(-127, 127).to(dtype) if dtype == torch.int8 else x.to(dtype)


def _scales(a, values):
    return a.new_ones(a.shape[0], dtype=torch.float32), a.new_ones(values.shape[0], dtype=torch.float32)


def _sparse(a, values, metadata, dense):
    if a.dtype in CODES:
        scale_a, scale_b = _scales(a, values)
        return sparse_matmul(a, values, metadata, scale_a=scale_a, scale_b=scale_b)
    return sparse_matmul(a, values, metadata)


def _dense(a, values, metadata, dense):
    if a.dtype in CODES:
        return _DENSE[a.dtype](a, dense, *_scales(a, values))
    return F.linear(a, dense)


def _check(arguments):
    """Both results against one product in float64."""
    a, _, _, dense = arguments
    truth = a.double() @ dense.double().T
    for product in (_sparse, _dense):
        assert_accurate(product(*arguments), truth, zeros=False)
