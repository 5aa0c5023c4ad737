"""Making the quantised or sparse modules of a model, one after the other, and the report on them."""

import torch
from torch import nn
from torch.nn import Parameter

from fusedops._core.codes import scale_of
from fusedops.convert.handle import Changed, QuantizedModel, SparsifiedModel, Swap, replace_all
from fusedops.convert.norms import Norm
from fusedops.convert.report import Report, Row
from fusedops.convert.schemes import num_bytes, plain_weight, stored_tensors
from fusedops.convert.select import module_places
from fusedops.nn import QuantizedEmbedding

# parameters that linears with one weight have in common
SHARED = {"weight", "weight_scale", "weight_zero", "metadata"}
HANDLES = {"quantized": QuantizedModel, "sparsified": SparsifiedModel}


def convert_all(model, scheme, selection, *, found=None, static=False, pruning=None, step=None, keep=False, plain=None):
    """Replace the selected linears, all or none.

    Args:
        model, scheme: A module and a Scheme.
        selection: What `select.select` gave.
        found: Calibration, or None.
        static: Give every module the one scale of its inputs that `found` has.
        pruning: Pruning, or None where the weights are what the scheme wants.
        step: Is called after each linear.
        keep: As in `quantize_`.
        plain: {linear: the module that `undo` puts back in its place}; None for the linears themselves.

    Returns:
        `QuantizedModel` or `SparsifiedModel`
    """
    before = model_bytes(model)
    order = {path: index for index, (path, _) in enumerate(model.named_modules())}
    work = _Conversion(scheme, found, static, pruning, step, module_places(model))
    swaps = replace_all(work.conversions(selection.targets), work.changed)
    rows = sorted(selection.rows + work.rows, key=lambda row: order[row.path])
    smoothing = [] if found is None else [fold.row("folded") for fold in found.folds] + found.rows
    for swap in swaps:
        swap.old = swap.old if plain is None else plain[swap.old]
    report = Report(scheme.name, rows, smoothing, selection.unmatched, before, model_bytes(model))
    return HANDLES[scheme.status](model, swaps, work.changed, report, keep)


class _Conversion:
    """The conversion of a model's linears.

    Attributes:
        changed: What was changed in place.
        rows: A Row for each linear that is done.
    """

    def __init__(self, scheme, found, static, pruning, step, places):
        self.changed = Changed()
        self.rows = []
        self._scheme, self._found, self._static, self._pruning, self._step = scheme, found, static, pruning, step
        self._columns, self._divisors = {}, {}
        self._places = places
        self._made = {}

    def conversions(self, targets):
        """Move the factors of smoothing, then yield the Swap of one linear after the other."""
        for fold in self._found.folds if self._found is not None else ():
            self._move_factors(fold)
        for target in targets:
            new = self._convert(target)
            self._made[target] = new
            yield Swap(target.path, target.places, target.linear, new)
            for path, embedding in target.embeddings.items():
                yield self._shared(path, embedding, new)
            if self._step is not None:
                self._step()

    def _shared(self, path, embedding, linear):
        """The Swap of an embedding that looks up the codes of a linear, whose row has the weight's bytes."""
        error = self.rows[-1].error
        shape = tuple(embedding.weight.shape)
        self.rows.append(
            Row(path, type(embedding).__name__, shape, self._scheme.status, self._scheme.name, error=error)
        )
        new = QuantizedEmbedding.sharing(linear, embedding)
        return Swap(path, self._places[id(embedding)], embedding, new)

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
        linear = target.linear
        weight = plain_weight(linear)
        N, K = weight.shape
        columns, divisors = self._columns.get(target), self._divisors.get(target)
        if columns is not None:
            weight = weight.float() * columns
        if divisors is not None:
            weight = weight.float() / divisors[:, None]
        module, options = self._scheme.module_for(linear)
        options = {**options, **({"static_input": True} if self._static else {})}
        new = module(K, N, linear.bias is not None, "meta", linear.weight.dtype, **options)
        if target.twin is None:
            new.take(module.quantize_weight(self._pruned(target, weight), **options))
        else:
            twin = self._made[target.twin]
            new.take({name: p for name, p in twin._parameters.items() if name in SHARED})
            new._buffers.update(twin._buffers)
        if linear.bias is not None:
            new.bias = linear.bias if divisors is None else _divided(linear.bias, divisors)
        if self._static:
            largest = self._found.observed[target].largest
            largest = (largest if columns is None else largest / columns.to(largest.device)).max()
            new.input_scale = Parameter(scale_of(largest, new.weight.dtype).to(weight.device), requires_grad=False)
        self.rows.append(self._row(target, weight, new))
        return new.train(linear.training)

    def _pruned(self, target, weight):
        return weight if self._pruning is None else self._pruning.pruned(target)

    def _row(self, target, weight, new):
        is_counted = target.twin is None
        stored = new.dequantize(torch.float32)
        pruned = {} if self._pruning is None else self._pruning.figures(target, weight, stored)
        norm = float(torch.linalg.vector_norm(weight, dtype=torch.float32))
        error = float(torch.linalg.vector_norm(stored.sub_(weight)))
        return Row(
            target.path,
            "Linear" if isinstance(target.linear, nn.Linear) else type(target.linear).__name__,
            tuple(weight.shape),
            self._scheme.status,
            self._scheme.name,
            bytes_before=num_bytes(stored_tensors(target.linear)) if is_counted else 0,
            bytes_after=num_bytes(stored_tensors(new)) if is_counted else 0,
            error=error / norm if norm else 0.0,
            **pruned,
        )


def _divided(bias, divisors):
    divided = (bias.detach().float() / divisors).to(bias.dtype)
    return Parameter(divided, requires_grad=bias.requires_grad)


def model_bytes(model):
    """Bytes of all parameters and buffers, each counted once."""
    return num_bytes({id(t): t for t in (*model.parameters(), *model.buffers())}.values())
