"""`sparsify_`: of the linears of a model 2 in every 4 weights are kept."""

from dataclasses import replace

from fusedops._core import checks
from fusedops.convert.calibrate import checked_batches
from fusedops.convert.conversion import convert_all, model_bytes
from fusedops.convert.handle import Changed, Swap, replace_all
from fusedops.convert.pruning import METHODS, Pruning
from fusedops.convert.quantize import Progress, check_conversion_options
from fusedops.convert.report import Report, Row
from fusedops.convert.schemes import num_bytes, sparse_scheme
from fusedops.convert.select import DEFAULT_SKIP, select
from fusedops.convert.training import ModelInTraining
from fusedops.nn import Masked24Linear
from fusedops.nn.sparse_24_linear import check_dense_below

OP = "sparsify_"


def sparsify_(
    model, *, method="magnitude", calibration=None, layers=None, skip=DEFAULT_SKIP, dense_below=None, keep=False,
    train=False, progress=None,
):  # fmt: skip
    """Keep 2 in every 4 consecutive weights of the linears of a model, and store and multiply those alone, in place.

    Every `torch.nn.Linear` itself is replaced by a `fusedops.nn.Sparse24Linear`, with the exceptions of `quantize_`.
    Linears that share a weight share what is stored. `quantize_` with ``"int8"`` or ``"fp8"`` afterwards gives the kept
    weights 8 bits; layers that are quantised already stay as they are, so the sparse ones come first.

    Pruning a model costs accuracy, a small one's much of it. With `train` the linears stay what they are, with the same
    parameters, but for the dropped weights: they are 0, and stay 0 while the model is trained. `.convert()` compresses
    then what training has made of the others.

    Args:
        model: A torch.nn.Module, built and loaded.
        method: ``"magnitude"`` keeps the weights that are largest, ``"wanda"`` those whose product with the norm of
            their input, over the calibration, is.
        calibration: An iterable of model inputs, each a tensor, a mapping of arguments or a list of them: what Wanda
            needs, and by what the report tells the error of each linear's outputs. The model runs on each as it was, in
            evaluation mode without gradients.
        layers: Linears to take, or modules around them: full names, last parts of names, or patterns of fnmatch; None
            takes all.
        skip: Linears to leave alone, in the same terms.
        dense_below: Of `Sparse24Linear`: calls with fewer rows than this, or for which dense was measured to be faster
            (``"measured"``), multiply by a dense copy of the weight.
        keep: Keep the float weights, so that `undo` can restore them: True where they are, ``"cpu"`` on the CPU.
        train: Only mask the weights, for training. With ``keep=True`` `undo` writes the values from before back.
        progress: Is called with (done, total) after each run of the model on a batch, of which Wanda needs two, and
            after each linear.

    Returns:
        `SparsifiedModel` with `.report` and `.undo()`; with `keep` also a context manager. With `train`
        `MaskedModel` with `.report`, `.convert()` and `.undo()`, also a context manager.

    Raises:
        TypeError: an argument is not of its type.
        ValueError: no such method, Wanda without a calibration of every linear, an option that does not fit, a name in
            `layers` without a linear, nothing to replace, or a weight that holds NaN or infinity or is not loaded. The
            model is then as it was; so it is after any other failure or interrupt.

    Numerics: see `fusedops.nn.Sparse24Linear`. Kept weights keep every bit.
    Memory: as of `quantize_`.
    From: Mishra et al., "Accelerating Sparse Deep Neural Networks", 2021, https://arxiv.org/abs/2104.08378; Sun et al.,
        "A Simple and Effective Pruning Approach for Large Language Models", 2023, https://arxiv.org/abs/2306.11695
    """
    checks.check_choice(OP, "method", method, METHODS)
    if method == "wanda" and calibration is None:
        raise ValueError(f"{OP}: calibration must hold model inputs for method 'wanda', got None")
    check_dense_below(OP, dense_below)
    check_conversion_options(OP, keep, progress)
    if not isinstance(train, bool):
        raise TypeError(f"{OP}: train must be a bool, got {type(train).__name__}")
    if train and keep == "cpu":
        raise ValueError(f"{OP}: keep must be False or True with train, got 'cpu'")
    scheme = sparse_scheme(dense_below)
    selection = select(OP, model, scheme, skip, layers)
    targets = selection.targets
    batches = [] if calibration is None else checked_batches(OP, calibration)
    step = Progress(progress, Pruning.passes(batches, method) + len(targets))
    pruning = Pruning(model, targets, batches, method, step)
    if train:
        return _mask_all(model, scheme, selection, pruning, step, keep)
    return convert_all(model, scheme, selection, pruning=pruning, step=step, keep=keep)


class MaskedModel(ModelInTraining):
    """What `fusedops.sparsify_` returns with ``train=True``: a `ModelInTraining`.

    Its linears are `fusedops.nn.Masked24Linear`; its conversion holds their weights, bit for bit.
    """

    BEING = "sparsified for training"
    DONE = "sparsified"

    def __init__(self, model, scheme, selection, swaps, report, changed):
        super().__init__(model, scheme, selection, swaps, report)
        self._changed = changed

    def undo(self):
        """Put the original modules back; with ``keep=True`` and the weights as they were before, else as they are now.

        Once undone, a no-op.

        Raises:
            RuntimeError: the model was converted, or something else has replaced a module since. Nothing is undone
                then.
        """
        super().undo()
        self._changed.restore()

    def _before_reading(self):
        for swap in self._swaps:
            swap.new.apply_mask()


def _mask_all(model, scheme, selection, pruning, step, keep):
    size, changed, rows = model_bytes(model), Changed(), list(selection.rows)
    order = {path: index for index, (path, _) in enumerate(model.named_modules())}
    swaps = replace_all(_masked(selection.targets, scheme, pruning, changed, rows, step), changed)
    rows.sort(key=lambda row: order[row.path])
    report = Report(scheme.name, rows, [], selection.unmatched, size, size)
    return MaskedModel(model, scheme, selection, swaps, report, changed if keep else Changed())


def _masked(targets, scheme, pruning, changed, rows, step):
    """Mask one linear after the other; yields the Swap of each."""
    made, figures = {}, {}
    for target in targets:
        linear, twin = target.linear, target.twin
        if twin is None:
            changed.keep(linear.weight)
            figures[target] = pruning.figures(target, linear.weight.detach(), pruning.pruned(target))
            made[target] = Masked24Linear.from_linear(linear, scores=pruning.scores(target))
        else:
            figures[target] = {**figures[twin], "output_error": pruning.errors.get(target)}
            made[target] = Masked24Linear.from_linear(linear, mask=made[twin].mask)
        size = num_bytes([linear.weight]) if twin is None else 0
        kind, shape = type(linear).__name__, tuple(linear.weight.shape)
        row = Row(target.path, kind, shape, "masked", scheme.name, bytes_before=size, bytes_after=size)
        rows.append(replace(row, **figures[target]))
        yield Swap(target.path, target.places, linear, made[target])
        step()
