"""Measure configurations, when asked to and never else, and look after what was found."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from fusedops._core import env
from fusedops._core.device import limits as limits_of
from fusedops._core.explain import derivative_call, operator_call
from fusedops._core.register import operators
from fusedops._core.tuning import EXACT, forget, observed, uses_defaults_only
from fusedops._core.tuning.entry import checksum, from_dict
from fusedops._core.tuning.store import TuningWarning, counts, current_store
from fusedops.tuning import ranks
from fusedops.tuning.measure import Search, Tuned, measure_side_by_side
from fusedops.tuning.oracle import Oracle

__all__ = ["Options", "Report", "Tuned", "TuningWarning", "counters", "reset_counters", "tune"]


@dataclass(frozen=True)
class Options:
    """How to tune.

    Attributes:
        seconds: No further configuration is begun after so many; the next call goes on where this one stopped.
        force: Measure again what is known.
        keep: Store what was found for other processes; else it holds for this one.
        progress: Function (text, done, total) that is called before each configuration.
        timer: Function (calls by name, argument tuples, device) that gives an object with `median` and `low`, in
            seconds, for each name.
    """

    seconds: float = 60.0
    force: bool = False
    keep: bool = True
    progress: Callable | None = None
    timer: Callable = measure_side_by_side


@dataclass
class Report:
    """What `tune` did; `print` it for a table.

    Attributes:
        op: The operator.
        tuned: One `Tuned` for each kernel of the call that has a configuration to measure.
        reason: Why nothing was measured, or None.
    """

    op: str
    tuned: list = field(default_factory=list)
    reason: str | None = None

    def __str__(self):
        lines = [f"{self.op}: not measured, {self.reason}"] if self.reason else []
        return "\n".join([*lines, *map(str, self.tuned)])


def tune(op, /, *args, tuning=None, backward=False, **kwargs):
    """Measure the configurations of the kernels that a call launches, and use the fastest right one from now on.

    Every configuration that the device can hold runs on clones of the arguments and must compute what the reference
    computes in float64, before it is timed; of those that are equally fast within 2 %, or within the noise, the
    first wins, which is the default. Nothing but this function measures. In a job of several ranks all must call
    it, rank 0 measures, and all use what it found.

    Args:
        op: Name of an operator, such as ``"rms_norm"``.
        *args, **kwargs: The arguments of the call. None is written to.
        tuning: `fusedops.tuning.Options`.
        backward: Tune the kernels that differentiating the call launches instead.

    Returns:
        `fusedops.tuning.Report`. Nothing is measured, and it says why, where a CUDA graph is being captured, torch's
        deterministic algorithms are on, only defaults are used, or the call runs on no kernel.

    Raises:
        ValueError: `op` is no operator, or the operator refuses the arguments.
        NotImplementedError: `backward`, and the operator has no derivative.
        RuntimeError: rank 0 failed.
    """
    options = tuning or Options()
    operator, call_args = _call_of(op, args, kwargs, backward)
    op = operator.name if backward else op
    backend, _ = operator.select(call_args)
    configure = getattr(operator.module(backend, call_args), "config", None)
    choices = []
    if configure is not None:
        with observed() as choices:
            configure(operator.name, limits_of(call_args[0].device), *call_args)
    reason = not_now() or (None if choices else f"{backend} has nothing to configure")
    if reason is not None:
        return Report(op, [Tuned(choice, choice.config, choice.source) for choice in choices], reason)
    if ranks.is_follower():
        found = ranks.shared(None)
        if "error" in found:
            raise RuntimeError(f"tune: rank 0 failed: {found['error']}")
        return _followed(op, choices, found["entries"])
    try:
        tuned = _tuned(_once_each(choices), operator, call_args, options)
    except Exception as error:
        ranks.shared({"error": f"{type(error).__name__}: {error}"})
        raise
    entries = [one.entry.as_dict() for one in tuned if one.entry is not None]
    ranks.shared({"entries": [{**data, "checksum": checksum(data)} for data in entries]})
    return Report(op, tuned)


def _call_of(op, args, kwargs, backward):
    """The registered operator, and its arguments, of a public operator's call or of a registered one's own."""
    import fusedops

    if op in fusedops.OPERATORS:
        return (derivative_call if backward else operator_call)(getattr(fusedops, op), *args, **kwargs)
    if op in operators() and not kwargs and not backward:
        return operators()[op], args
    raise ValueError(f"tune: op must be one of {', '.join(fusedops.OPERATORS)}, got {op!r}")


def not_now():
    """Why nothing may be measured now, or None."""
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        return "a CUDA graph is being captured"
    if torch.are_deterministic_algorithms_enabled():
        return "torch.use_deterministic_algorithms is on"
    if uses_defaults_only():
        return "only defaults are used"
    if env.jit() == "forbid":
        return "FUSEDOPS_JIT=forbid"
    return None


def _once_each(choices):
    return list({(choice.tunable.name, choice.fields, choice.also): choice for choice in choices}.values())


def _tuned(choices, operator, args, options):
    """One kernel after the other; those before run with what was found for them."""
    deadline = time.monotonic() + options.seconds
    oracle = Oracle(operator, args)
    tuned = []
    for choice in choices:
        known = None
        if choice.source in EXACT:
            known, _ = current_store().get(*choice.place)
        if known is not None and known.complete and not options.force:
            tuned.append(Tuned(choice, choice.config, "known", entry=known))
            continue
        search = Search(
            choice, operator, args, oracle=oracle, timer=options.timer, deadline=deadline, progress=options.progress,
            known=None if options.force else known,
        )  # fmt: skip
        found = search.run()
        if found.entry is not None:
            current_store().put(found.entry, keep=options.keep)
            forget()
        tuned.append(found)
    return tuned


def _followed(op, choices, shared):
    """What this rank uses of what rank 0 found."""
    for data in shared:
        current_store().put(from_dict(data), keep=False)
    forget()
    looked_up = [choice.tunable.look_up(choice.limits, choice.fields, choice.also) for choice in _once_each(choices)]
    return Report(op, [Tuned(choice, choice.config, choice.source) for choice in looked_up])


def counters():
    """Since the last reset: new questions answered by a stored entry (hit) or not (miss), the latter by a neighbour's
    entry (fallback) or by arithmetic (default), and files that were refused (invalid)."""
    return {name: counts[name] for name in ("hit", "miss", "invalid", "default", "fallback")}


def reset_counters():
    """Set the counters to zero."""
    counts.clear()
