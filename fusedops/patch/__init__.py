"""Replace the attention, norms, gated MLPs, rotary embeddings and residual additions of a model that is already built.

``fusedops.patch`` is this package and can itself be called: ``fusedops.patch(model)`` is `fusedops.patch.patch`.
So ``import fusedops.patch``, ``from fusedops.patch import patched`` and ``fusedops.patch(model)`` all work, whichever
comes first.

Modules are recognised by what they compute: a norm by its values on probes, a gated MLP by what reaches its last
projection, a rotary function by what it returns, a residual addition by the source of the layer's forward. Neither
class names nor transformers are needed. Attention goes through the registries that transformers has for it, after its
eager function was run on probes. Only instance attributes and the attention function's name in the model's config are
set, so other models, the classes and the modules of transformers stay as they are. Under `torch.compile`, attention is
our operator, and the other replaced modules run their own code, which the compiler fuses.
"""

import sys
from types import ModuleType

from torch import nn

from fusedops.patch.handle import PatchedModel, patched_modules, restore_all
from fusedops.patch.instance import all_states
from fusedops.patch.paged_cache import PagedCache
from fusedops.patch.plan import Plan
from fusedops.patch.quantizer import FusedOpsConfig
from fusedops.patch.quantizer_register import register_with_transformers
from fusedops.patch.report import KINDS, Report, Row
from fusedops.patch.server import serving

__all__ = ["FusedOpsConfig", "PagedCache", "PatchedModel", "Report", "Row", "patch", "patched", "serving", "unpatch"]


def patch(
    model, *, attention=True, norm=True, mlp=True, rotary=True, residual=True, linear=True, dry_run=False,
    strict=True, verify=False
):  # fmt: skip
    """Replace parts of a model by fused operators, in this instance only.

    Args:
        model: A torch.nn.Module, built and loaded; any family.
        attention: Replace the attention of models of transformers, masks included.
        norm: Replace RMS norms and torch.nn.LayerNorm.
        mlp: Replace the activation and multiplication of gated MLPs and packed experts.
        rotary: Replace the rotary embedding of q and k.
        residual: Compute a residual addition and the norm after it in one pass (without gradients); needs `norm`.
        linear: Multiply quantised linears that get the same input (q, k and v; gate and up) in one product, and let the
            norm or gate before them quantise it (without gradients).
        dry_run: Report what would be replaced, and leave the model alone.
        strict: Raise where nothing is recognised, where something else has already replaced a forward that we would
            replace, or where verification fails; False reports it and leaves such modules alone.
        verify: Run the model on random tokens, and each replacement and its original on the activations that arise;
            the numbers stand in the report. A mapping gives the arguments of the model for this run.

    Returns:
        `PatchedModel` with `.report` and `.undo()`; also a context manager.

    Raises:
        TypeError: model is not a module.
        ValueError: nothing was recognised (the message says what was looked for).
        RuntimeError: the model is patched already, by us or by something else, or verification failed. The model is
            then as it was before.
    """
    wanted = {"attention": attention, "norm": norm, "mlp": mlp, "rotary": rotary, "residual": norm and residual,
              "linear": linear}  # fmt: skip
    kinds = tuple(kind for kind in KINDS if wanted[kind])
    _check(model, kinds)
    plan = Plan(model, kinds, strict)
    if strict and not plan.replacements:
        raise ValueError(f"patch: model must contain something to replace, got {_nothing_found(model, kinds, plan)}")
    handle = PatchedModel(model, plan.replacements, Report(plan.rows, dry_run), plan.engines)
    if dry_run:
        handle.replacements = []
    elif verify and plan.replacements:
        _apply_verified(handle, strict, verify)
    else:
        handle.apply()
    return handle


class patched:
    """``with fusedops.patched(model) as report:``: the model is patched inside, exactly as before outside.

    Args:
        model: A torch.nn.Module.
        **options: As in `patch`.
    """

    def __init__(self, model, **options):
        self._model = model
        self._options = options
        self._handle = None

    def __enter__(self):
        self._handle = patch(self._model, **self._options)
        return self._handle.report

    def __exit__(self, *exception):
        self._handle.undo()


def unpatch(model):
    """Undo the replacements found in a model: for a copy or an unpickled model, which has no handle.

    Args:
        model: A torch.nn.Module, patched or not.

    Returns:
        Number of modules that were restored.

    Raises:
        RuntimeError: something else has replaced a forward since. Nothing is undone then.
    """
    number = len(patched_modules(model))
    restore_all(all_states(model))
    return number


def _check(model, kinds):
    if not isinstance(model, nn.Module):
        raise TypeError(f"patch: model must be a torch.nn.Module, got {type(model).__name__}")
    if not kinds:
        raise ValueError("patch: at least one of attention, norm, mlp, rotary, linear must be True, got none")
    already = patched_modules(model)
    if already:
        raise RuntimeError(
            f"patch: model must not be patched already, got {len(already)} replaced modules "
            f"(the first is {already[0][0] or 'the model itself'}); undo() that first"
        )


_LOOKED_FOR = {
    "attention": "attention that takes its function from transformers' AttentionInterface",
    "norm": "RMS norms (rounding once or before the weight, weight or 1 + weight) and torch.nn.LayerNorm",
    "mlp": "gated MLPs (down(silu(gate) * up), gelu too, separate or packed projections)",
    "rotary": "rotary functions of q and k that a forward calls as a global",
    "residual": "residual additions before a replaced norm",
    "linear": "quantised linears that get the same input",
}


def _nothing_found(model, kinds, plan):
    looked_for = "; ".join(_LOOKED_FOR[kind] for kind in kinds)
    skipped = "; ".join(f"{row.path} ({row.kind}): {row.reason}" for row in plan.rows[:8])
    message = f"{type(model).__name__} with none of: {looked_for}"
    return f"{message}. Left alone: {skipped}" if skipped else message


def _apply_verified(handle, strict, verify):
    """Apply and compare; whatever is beyond the budget is undone, and raises where `strict`."""
    from fusedops.patch import verify as verification  # needs the accuracy tools, which a plain patch does not

    model = handle.model
    inputs = verification.probe_inputs(model, verify)
    before = verification.run(model, inputs)
    limits = verification.tolerated(model, handle.replacements, inputs, before)
    handle.apply()
    try:
        found = verification.differences(handle, inputs)
        wrong = {(difference.path, difference.kind): difference for difference in found if not difference.acceptable}
        if wrong and not strict:
            handle.drop({place: _beyond(difference) for place, difference in wrong.items()})
        elif wrong:
            raise RuntimeError("patch: verification failed: " + "; ".join(map(_beyond, wrong.values())))
        whole = verification.compare_outputs(verification.run(model, inputs), before, limits)
        for difference in whole:
            if not difference.acceptable:
                raise RuntimeError(f"patch: verification failed: {_beyond(difference)}")
    except BaseException:
        handle.undo()
        raise
    handle.report.measured = verification.summary(found + whole)


def _beyond(difference):
    return (
        f"{difference.path or 'the whole model'} ({difference.kind}) differs by rms {difference.rms:.3g}, peak "
        f"{difference.peak:.3g} epsilons; at most {difference.limit.rms:.3g}, {difference.limit.peak:.3g}"
    )


class _CallablePackage(ModuleType):
    def __call__(self, model, **options):
        """`fusedops.patch.patch`."""
        return self.patch(model, **options)


sys.modules[__name__].__class__ = _CallablePackage
register_with_transformers()
