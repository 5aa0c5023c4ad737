"""SmoothQuant: factors of single channels move from the activations, where they are outliers, into the weights."""

from dataclasses import dataclass

import torch

from fusedops._core.modules import evaluating, float_tensors
from fusedops.convert.calibrate import hooked, observe, run
from fusedops.convert.channels import find_products
from fusedops.convert.norms import Norm, find_norms
from fusedops.convert.report import Smoothing
from fusedops.convert.schemes import plain_weight
from fusedops.convert.select import Target, parameter_owners

MAX_FACTOR = 2.0**10  # beyond its mean: a float16 activation keeps half its range
SEARCHES = 2  # runs of the model on the first batch beyond those for the ranges: to find places, and to check them
TOLERANCE = 1e-4  # of outputs, relative, when exact powers of two were moved; only denormal numbers change then
MAX_NOISE = 1e-2  # between two runs of one model, on devices where sums have no order; beyond it nothing is seen


@dataclass(eq=False)
class Fold:
    """One place where factors move: the output of `source` is divided, the weights of `consumers` are multiplied.

    Attributes:
        source: A Norm, or the Target of a linear, whose rows are divided.
        consumers: Targets whose columns are multiplied.
        channels: The source's channel for each column; -1 where there is none. None is one to one.
        factors: float32, one for each channel of the source.
    """

    source: Norm | Target
    consumers: list
    channels: torch.Tensor | None = None
    factors: torch.Tensor | None = None

    @property
    def size(self):
        """Number of channels of the source."""
        return self.source.size if isinstance(self.source, Norm) else self.source.linear.out_features

    @property
    def module(self):
        """The source's module."""
        return self.source.module if isinstance(self.source, Norm) else self.source.linear

    def columns(self, factors):
        """Factors of the source's channels as those of a consumer's columns."""
        if self.channels is None:
            return factors
        return torch.where(self.channels < 0, 1.0, factors[self.channels.clamp(min=0)])

    def row(self, status, reason=""):
        """The report's row."""
        paths = tuple(target.path for target in self.consumers)
        extremes = (float(self.factors.max()), float(self.factors.min())) if self.factors is not None else ()
        return Smoothing(self.source.path, paths, status, reason, *extremes)


class Calibration:
    """What a model's calibration gave: ranges of the linears' inputs, and where to fold.

    Args:
        model: The model.
        targets: Targets of the linears that are quantised.
        batches: Model inputs; the first one is used to find and to check the places.
        step: Is called after each batch and each search.
        alpha: How much of the outliers goes into the weights; None looks for no places.

    Attributes:
        observed: {target: Observed}
        folds: Folds, with their factors, whose effect on the model was seen to be none.
        rows: Smoothing of every place where nothing can be folded.
    """

    def __init__(self, model, targets, batches, step, alpha):
        self.folds, self.rows = [], []
        with evaluating(model):
            norms = find_norms(model) if alpha is not None else []
            self.observed = observe(model, targets, [norm.module for norm in norms], batches, step)
            if alpha is None:
                return
            proposed = self._of_norms(norms, targets, parameter_owners(model))
            explained = {target for fold in proposed for target in fold.consumers}
            proposed += self._of_products(model, targets, explained, batches[0])
            step()
            usable = [fold for fold in proposed if self._is_finite(fold)]
            self.folds = _without_effect(model, usable, batches[0])
            step()
        for fold in usable:
            if fold not in self.folds:
                self.rows.append(fold.row("skipped", "not only these linears read it"))
        self._choose_factors(alpha)

    def _choose_factors(self, alpha):
        """Give every fold its factors: ``largest x**alpha / largest w**(1 - alpha)``, around 1."""
        for fold in self.folds:
            size = fold.size
            device = fold.consumers[0].linear.weight.device
            x, w = torch.zeros(size, device=device), torch.zeros(size, device=device)
            for consumer in fold.consumers:
                weights = plain_weight(consumer.linear).abs().amax(0).float()
                x = torch.maximum(x, _by_channel(self.observed[consumer].largest.to(device), fold.channels, size))
                w = torch.maximum(w, _by_channel(weights.to(device), fold.channels, size))
            usable = (x > 0) & (w > 0)
            logs = torch.where(usable, alpha * x.log() - (1 - alpha) * w.log(), 0.0)
            logs = torch.where(usable, logs - logs.sum() / usable.sum().clamp(min=1), 0.0)
            fold.factors = logs.exp().clamp(1 / MAX_FACTOR, MAX_FACTOR)

    def _of_norms(self, norms, targets, owners):
        """Folds of norms into all linears that get their outputs."""
        found = []
        for norm in norms:
            consumers = [target for target in targets if norm.module in self.observed[target].sources]
            if not consumers:
                continue
            fold = Fold(norm, consumers)
            mixed = [target.path for target in consumers if self.observed[target].sources != {norm.module}]
            tied = [target.path for target in consumers if target.is_tied]
            others = [owners[id(p)][0][0] for p in norm.parameters() if len(owners[id(p)]) > 1]
            if mixed:
                self.rows.append(fold.row("skipped", f"{mixed[0]} is given other tensors too"))
            elif tied:
                self.rows.append(fold.row("skipped", f"{tied[0]} shares its weight or bias with another module"))
            elif others:
                self.rows.append(fold.row("skipped", f"the norm's parameter is also {others[0]}"))
            else:
                found.append(fold)
        return found

    def _of_products(self, model, targets, explained, batch):
        """Folds of linears into others whose input is linear in their output."""
        refused = {path for row in self.rows for path in row.consumers}
        open_ones = [target for target in targets if target not in explained and target.path not in refused]
        called = [target for target in open_ones if self.observed[target].order >= 0 and not target.is_tied]
        products = find_products(model, targets, called, self.observed, batch)
        found, taken = [], set()
        for target in open_ones:
            producer, channels = products.get(target, (None, None))
            if producer is not None and producer not in taken:
                taken.add(producer)
                found.append(Fold(producer, [target], channels))
                continue
            reason = "its input is not a norm's output, nor linear in a neighbour's"
            if target.is_tied:
                reason = "it shares its weight or bias with another module"
            if self.observed[target].order < 0:
                reason = "calibration did not reach it"
            self.rows.append(Smoothing("", (target.path,), "skipped", reason))
        return found

    def _is_finite(self, fold):
        if all(bool(self.observed[target].largest.isfinite().all()) for target in fold.consumers):
            return True
        self.rows.append(fold.row("skipped", "its values are not all finite"))
        return False


def _by_channel(columns, channels, size):
    """The largest value of the columns that belong to each channel of the source."""
    if channels is None:
        return columns
    belongs = channels >= 0
    gathered = torch.zeros(size, device=columns.device)
    return gathered.scatter_reduce(0, channels[belongs].to(columns.device), columns[belongs], "amax")


def _without_effect(model, folds, batch):
    """The folds that leave the model's outputs as they are; each is tried by moving exact powers of two.

    All are tried at once, then those of one kind, then halves: places that fail mostly fail in every layer.
    """
    if not folds:
        return []
    out = run(model, batch)
    before, again = float_tensors(out), float_tensors(run(model, batch))
    if not any(bool(tensor.isfinite().any()) for tensor in before):
        found = "NaN or infinity only" if before else type(out).__name__
        raise ValueError(
            "quantize_: model must return finite tensors, by which smoothing is checked, or smoothing be None, "
            f"got {found}"
        )
    limits = [min(max(TOLERANCE, 2 * _distance(b, a)), MAX_NOISE) for a, b in zip(before, again)]

    def agrees(some):
        with hooked([pair for fold in some for pair in _moving(fold)]):
            after = float_tensors(run(model, batch))
        return len(after) == len(before) and all(
            out.shape == truth.shape and _distance(out, truth) <= limit
            for out, truth, limit in zip(after, before, limits)
        )

    def passing(some):
        if agrees(some):
            return some
        if len(some) == 1:
            return []
        middle = len(some) // 2
        return passing(some[:middle]) + passing(some[middle:])

    if agrees(folds):
        return folds
    kinds = {}
    for fold in folds:
        kinds.setdefault((fold.source.path.split(".")[-1], len(fold.consumers)), []).append(fold)
    return [fold for some in kinds.values() for fold in passing(some)]


def _moving(fold):
    """Hooks that divide the source's output by powers of two and multiply what the consumers get."""
    seeded = torch.Generator("cpu").manual_seed(0)
    device = fold.consumers[0].linear.weight.device
    factors = torch.exp2(torch.randint(-2, 3, (fold.size,), generator=seeded).float()).to(device)
    if fold.channels is not None:
        is_read = torch.zeros(fold.size, dtype=torch.bool, device=device)
        is_read[fold.channels[fold.channels >= 0]] = True
        factors = torch.where(is_read, factors, 1.0)
    columns = fold.columns(factors)

    def divide(module, args, out):
        return out * (1 / factors).to(out)

    def multiply(module, args):
        return (args[0] * columns.to(args[0]), *args[1:])

    pairs = [(target.linear.register_forward_pre_hook, multiply) for target in fold.consumers]
    return [(fold.module.register_forward_hook, divide), *pairs]


def _distance(out, truth):
    """Euclidean, relative, of the finite elements; infinite where the others do not stand at the same places."""
    is_finite = truth.isfinite()
    if not torch.equal(out.isfinite(), is_finite):
        return float("inf")
    out, truth = out[is_finite].double(), truth[is_finite].double()
    return float((out - truth).norm() / truth.norm()) if not torch.equal(out, truth) else 0.0
