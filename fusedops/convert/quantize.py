"""`quantize_`: the linears of a model become quantised ones."""

from fusedops.convert.calibrate import checked_batches
from fusedops.convert.conversion import convert_all
from fusedops.convert.schemes import find_scheme
from fusedops.convert.select import DEFAULT_SKIP, select
from fusedops.convert.smooth import SEARCHES, Calibration
from fusedops.nn import Sparse24Linear

OP = "quantize_"


def quantize_(
    model, scheme, *, skip=DEFAULT_SKIP, output_head=False, group_size=None, calibration=None, smoothing=0.5,
    static=False, keep=False, progress=None,
):  # fmt: skip
    """Replace the linears of a model by quantised ones, in place.

    Every `torch.nn.Linear` itself is replaced. Those of a class derived from it, with hooks, with a weight that an
    embedding uses too, of other dtypes, or too small to gain, stay and stand in the report with the reason; so do those
    of whose weight the model's code reads the dtype. Linears that share a weight share its codes. Of linears that
    `sparsify_` has made ``"int8"`` and ``"fp8"`` quantise what was kept; the other schemes leave them as they are.

    With `calibration`, factors of single channels move from activations with outliers into the weights (SmoothQuant):
    out of the weight of the norm before a linear, out of the rows of up_proj for down_proj, and out of those of v_proj
    for o_proj. Which module stands before which is told by running the model: by whose output a linear is given, and by
    which powers of two come through. A place counts only if the model's outputs stay the same when powers of two are
    moved there. A linear takes up the factor that the norm's rounded weight stands for, in float32, before it is
    quantised; the bias of a LayerNorm is rounded to its dtype.

    Args:
        model: A torch.nn.Module, built and loaded.
        scheme: ``"int8"`` and ``"fp8"`` quantise weights and activations, those with a scale for each row (token) at
            each call; ``"int8-weight-only"``, ``"fp8-weight-only"`` and ``"int4-weight-only"`` the weights alone.
        skip: Linears to leave alone, or modules around them: full names, last parts of names, or patterns of fnmatch.
        output_head: Take output embeddings too: ``"lm_head"`` is no default of `skip` then, and a weight that a linear
            and an embedding share is quantised once for both by the weight-only schemes: the linear multiplies the
            codes that `fusedops.nn.QuantizedEmbedding` looks up.
        group_size: Of the weight-only schemes: 32, 64 or 128 columns share a scale. None is 32 for int4, and one scale
            for each row otherwise.
        calibration: Of ``"int8"`` and ``"fp8"``: an iterable of model inputs, each a tensor, a mapping of arguments or
            a list of them. The model runs on each, in evaluation mode without gradients.
        smoothing: How much of the outliers goes into the weights, from 0 to 1; None leaves the model's weights alone.
        static: Give every linear one fixed scale for its inputs, from the calibration, in place of each row's own:
            cheaper, and much coarser where a few tokens are far larger than the others.
        keep: Keep the float weights, so that `undo` can restore them: True where they are, ``"cpu"`` on the CPU.
        progress: Is called with (done, total) after each batch, each search for places of smoothing, and each linear.

    Returns:
        `QuantizedModel` with `.report` and `.undo()`; with `keep` also a context manager.

    Raises:
        TypeError: an argument is not of its type.
        ValueError: no such scheme, an option that it does not take, nothing to replace, or a weight that holds NaN or
            infinity or is not loaded. The model is then as it was; so it is after any other failure or interrupt.

    Numerics: see `fusedops.nn.Int8Linear`, `Fp8Linear` and `WeightOnlyLinear`.
    Memory: until the last linear is done, all float weights stay, so that a failure can be taken back: the most is the
        model, the codes, and float32 copies of one weight. Without `keep` they are dropped then.
    From: Xiao et al., "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models", 2022,
        https://arxiv.org/abs/2211.10438
    """
    scheme = find_scheme(OP, scheme, group_size)
    _check_options(scheme, calibration, smoothing, static, keep, progress)
    if not isinstance(output_head, bool):
        raise TypeError(f"{OP}: output_head must be True or False, got {output_head!r}")
    if output_head and skip is DEFAULT_SKIP:
        skip = ()
    takes_tied = output_head and not scheme.quantizes_activations
    selection = select(OP, model, scheme, skip, takes_sparse=True, takes_tied=takes_tied)
    targets = selection.targets
    if static:
        _check_not_sparse(targets)
    batches = [] if calibration is None else checked_batches(OP, calibration)
    searches = SEARCHES if batches and smoothing is not None else 0
    step = Progress(progress, len(batches) + searches + len(targets))
    found = Calibration(model, targets, batches, step, smoothing) if batches else None
    if static:
        _check_reached(found)
    return convert_all(model, scheme, selection, found=found, static=static, step=step, keep=keep)


class Progress:
    """Counts steps, and tells a callback of each how many of how many are done."""

    def __init__(self, callback, total):
        self.callback, self.done, self.total = callback, 0, total

    def __call__(self):
        self.done += 1
        if self.callback is not None:
            self.callback(self.done, self.total)


def _check_options(scheme, calibration, smoothing, static, keep, progress):
    if calibration is not None and not scheme.quantizes_activations:
        raise ValueError(f"{OP}: calibration must be None for {scheme.name!r}, whose activations are not quantised")
    is_number = isinstance(smoothing, int | float) and not isinstance(smoothing, bool)
    if smoothing is not None and not (is_number and 0 <= smoothing <= 1):
        raise ValueError(f"{OP}: smoothing must be None or from 0 to 1, got {smoothing!r}")
    if static and calibration is None:
        raise ValueError(f"{OP}: static must come with calibration, got none")
    check_conversion_options(OP, keep, progress)


def check_conversion_options(op, keep, progress):
    """Raise where options that all conversions have are not of their kind."""
    if keep not in (False, True, "cpu"):
        raise ValueError(f"{op}: keep must be False, True or 'cpu', got {keep!r}")
    if progress is not None and not callable(progress):
        raise TypeError(f"{op}: progress must be callable, got {type(progress).__name__}")


def _check_not_sparse(targets):
    for target in targets:
        if isinstance(target.linear, Sparse24Linear):
            what = "since of a 2:4 sparse linear each row has its own scale"
            raise ValueError(f"{OP}: static must be False, {what}, got True with {target.path}")


def _check_reached(found):
    for target, seen in found.observed.items():
        if seen.largest is None or not bool(seen.largest.isfinite().all()):
            what = "did not reach" if seen.largest is None else "gave NaN or infinity to"
            raise ValueError(f"{OP}: static must have a calibration for every linear; it {what} {target.path}")
