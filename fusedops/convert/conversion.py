"""Making the quantised modules of a model, one after the other, and the report on them."""

import torch
from torch.nn import Parameter

from fusedops._core.codes import scale_of
from fusedops.convert.handle import Changed, QuantizedModel, Swap, replace_all
from fusedops.convert.norms import Norm
from fusedops.convert.report import Report, Row
from fusedops.convert.schemes import num_bytes

SHARED = {"weight", "weight_scale", "weight_zero"}  # parameters that linears with one weight have in common


def convert_all(model, scheme, selection, found, static, step, keep, plain=None):
    """Replace the selected linears, all or none.

    Args:
        model, scheme: A module and a Scheme.
        selection: What `select.select` gave.
        found: Calibration, or None.
        static: Give every module the one scale of its inputs that `found` has.
        step: Is called after each linear.
        keep: As in `quantize_`.
        plain: {linear: the module that `undo` puts back in its place}; None for the linears themselves.

    Returns:
        `QuantizedModel`
    """
    before = model_bytes(model)
    order = {path: index for index, (path, _) in enumerate(model.named_modules())}
    work = _Conversion(scheme, found, static, step)
    swaps = replace_all(work.conversions(selection.targets), work.changed)
    rows = sorted(selection.rows + work.rows, key=lambda row: order[row.path])
    smoothing = [] if found is None else [fold.row("folded") for fold in found.folds] + found.rows
    for swap in swaps:
        swap.old = swap.old if plain is None else plain[swap.old]
    report = Report(scheme.name, rows, smoothing, selection.unmatched, before, model_bytes(model))
    return QuantizedModel(model, swaps, work.changed, report, keep)


class _Conversion:
    """The conversion of a model's linears.

    Attributes:
        changed: What was changed in place.
        rows: A Row for each linear that is done.
    """

    def __init__(self, scheme, found, static, step):
        self.changed = Changed()
        self.rows = []
        self._scheme, self._found, self._static, self._step = scheme, found, static, step
        self._columns, self._divisors = {}, {}
        self._made = {}

    def conversions(self, targets):
        """Move the factors of smoothing, then yield the Swap of one linear after the other."""
        for fold in self._found.folds if self._found is not None else ():
            self._move_factors(fold)
        for target in targets:
            new = self._convert(target)
            self._made[target] = new
            yield Swap(target.path, target.places, target.linear, new)
            self._step()

    def _move_factors(self, fold):
        """Divide a norm by its factors, or note them for the rows of a linear; and for the consumers' columns."""
        if isinstance(fold.source, Norm):
            for parameter in fold.source.parameters():
                self.changed.keep(parameter)
            fold.factors = fold.source.divide(fold.factors)
        else:
            self._divisors[fold.source] = fold.factors.to(fold.module.weight.device)
        for target in fold.consumers:
            self._columns[target] = fold.columns(fold.factors).to(target.linear.weight.device)

    def _convert(self, target):
        linear, module = target.linear, self._scheme.module
        weight = linear.weight.detach()
        N, K = weight.shape
        columns, divisors = self._columns.get(target), self._divisors.get(target)
        if columns is not None:
            weight = weight.float() * columns
        if divisors is not None:
            weight = weight.float() / divisors[:, None]
        options = {**self._scheme.options, **({"static_input": True} if self._static else {})}
        new = module(K, N, linear.bias is not None, "meta", linear.weight.dtype, **options)
        if target.twin is None:
            stored = module.quantize_weight(weight, **options)
            stored = {name: Parameter(tensor, requires_grad=False) for name, tensor in stored.items()}
        else:
            stored = {name: p for name, p in self._made[target.twin]._parameters.items() if name in SHARED}
        for name, parameter in stored.items():
            setattr(new, name, parameter)
        if linear.bias is not None:
            new.bias = linear.bias if divisors is None else _divided(linear.bias, divisors)
        if self._static:
            largest = self._found.observed[target].largest
            largest = (largest if columns is None else largest / columns.to(largest.device)).max()
            new.input_scale = Parameter(scale_of(largest, new.weight.dtype).to(weight.device), requires_grad=False)
        self.rows.append(self._row(target, weight, new, stored.values()))
        return new.train(linear.training)

    def _row(self, target, weight, new, stored):
        linear = target.linear
        is_counted = target.twin is None
        difference = new.dequantize(torch.float32).sub_(weight)
        norm = float(torch.linalg.vector_norm(weight, dtype=torch.float32))
        return Row(
            target.path,
            "Linear",
            tuple(linear.weight.shape),
            "quantized",
            self._scheme.name,
            bytes_before=num_bytes([linear.weight]) if is_counted else 0,
            bytes_after=num_bytes(stored) if is_counted else 0,
            error=float(torch.linalg.vector_norm(difference)) / norm if norm else 0.0,
        )


def _divided(bias, divisors):
    divided = (bias.detach().float() / divisors).to(bias.dtype)
    return Parameter(divided, requires_grad=bias.requires_grad)


def model_bytes(model):
    """Bytes of all parameters and buffers, each counted once."""
    return num_bytes({id(t): t for t in (*model.parameters(), *model.buffers())}.values())
