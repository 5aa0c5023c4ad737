"""Which 2 of every 4 weights are kept, and what that costs on the inputs of a calibration."""

import torch
import torch.nn.functional as F

from fusedops._core.modules import evaluating
from fusedops.convert.calibrate import hooked, run
from fusedops.ops.compress_24 import prune_24

METHODS = ("magnitude", "wanda")


class Pruning:
    """How the weights of a model are pruned.

    Args:
        model, targets: The model, and Targets of the linears that are pruned.
        batches: Model inputs; may be empty without Wanda.
        method: One of METHODS.
        step: Is called after each batch.

    Attributes:
        errors: {target: ``|(W - W') x| / |W x|`` over all inputs x of the linear}; of those that were reached alone.
    """

    def __init__(self, model, targets, batches, method, step):
        self._norms = {}
        self.errors = {}
        if not batches:
            return
        with evaluating(model):
            if method == "wanda":
                self._norms = _norms(model, targets, batches, step)
            self.errors = self._errors(model, targets, batches, step)

    @staticmethod
    def passes(batches, method):
        """How often the step is called."""
        return len(batches) * (2 if method == "wanda" else 1)

    def scores(self, target):
        """What decides: the product of a weight's size and its input channel's; None is the size alone."""
        norms = self._norms.get(target.twin or target)
        return None if norms is None else target.linear.weight.detach().float().abs() * norms

    def pruned(self, target):
        """The weight of a linear with 2 of every 4 columns."""
        return prune_24(target.linear.weight.detach(), scores=self.scores(target))

    def figures(self, target, weight, pruned):
        """What a report's Row tells of a weight and what is kept of it, by name."""
        norms = [float(torch.linalg.vector_norm(part, dtype=torch.float32)) for part in (pruned, weight)]
        return {"kept": norms[0] / norms[1] if norms[1] else 1.0, "output_error": self.errors.get(target)}

    def _errors(self, model, targets, batches, step):
        lost, whole = (dict.fromkeys(targets, 0.0) for _ in range(2))

        def of(target):
            def hook(module, args, kwargs):
                x = _rows(args, kwargs)
                weight = module.weight.detach()
                dropped = weight - self.pruned(target)
                with torch.autocast(x.device.type, enabled=False):
                    for sums, part in ((lost, dropped), (whole, weight)):
                        sums[target] += float(F.linear(x, part.float()).square().sum(dtype=torch.float64))

            return hook

        _run_all(model, targets, batches, of, step)
        return {target: (lost[target] / whole[target]) ** 0.5 for target in targets if whole[target] > 0}


def _norms(model, targets, batches, step):
    """{target: float32 ``[K]``}: the Euclidean norm of each input channel; linears with one weight have one together.

    Raises:
        ValueError: a linear was not reached, or was given NaN or infinity.
    """
    squares = {}

    def of(target):
        def hook(module, args, kwargs):
            found = _rows(args, kwargs).square().sum(0, dtype=torch.float64)
            owner = target.twin or target
            squares[owner] = squares[owner] + found if owner in squares else found

        return hook

    _run_all(model, targets, batches, of, step)
    for target in targets:
        found = squares.get(target.twin or target)
        if found is None or not bool(found.isfinite().all()):
            what = "did not reach" if found is None else "gave NaN or infinity to"
            raise ValueError(f"sparsify_: method 'wanda' must have a calibration for every linear; it {what} "
                             f"{target.path}")  # fmt: skip
    return {target: found.sqrt().float() for target, found in squares.items()}


def _run_all(model, targets, batches, hook_of, step):
    with hooked([(_before(target.linear), hook_of(target)) for target in targets]):
        for batch in batches:
            run(model, batch)
            step()


def _before(linear):
    return lambda hook: linear.register_forward_pre_hook(hook, with_kwargs=True)


def _rows(args, kwargs):
    """The input of a linear as a float32 matrix."""
    x = args[0] if args else kwargs["input"]
    return x.detach().reshape(-1, x.shape[-1]).float()
