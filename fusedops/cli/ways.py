"""Ways to hold the weights of a model, which `fusedops bench accuracy` compares, and bringing a model into each."""

import copy
import math
import random
import time
from dataclasses import dataclass, field

import fusedops

STEPS = 100  # of fine-tuning: below 10 minutes on two idle cores
LEARNING_RATE = 1e-3
CALIBRATION_WINDOWS = 8
MLP = {"layers": ("mlp",)}


@dataclass(frozen=True)
class Way:
    """One way to hold the model.

    Attributes:
        label: What the table calls it.
        scheme: Of `fusedops.quantize_`; None quantises nothing.
        options: Further arguments of `fusedops.quantize_`.
        calibrated: SmoothQuant, on the calibration part of the text.
        goal: The most that it may add to the perplexity of the demo model over Python's text; None asks nothing.
        below: The way whose perplexity it must stay below, where that is measured too.
        sparse: Arguments of `fusedops.sparsify_`, which comes before quantising; None prunes nothing.
        recovers: The share of what `recovers_of` adds to the perplexity that fine-tuning must win back; None tunes
            nothing.
        recovers_of: The way that is fine-tuned.
    """

    label: str
    scheme: str | None = None
    options: dict = field(default_factory=dict)
    calibrated: bool = False
    goal: float | None = None
    below: str | None = None
    sparse: dict | None = None
    recovers: float | None = None
    recovers_of: str | None = None

    @property
    def is_plain(self):
        """Whether the model stays as it is."""
        return self.scheme is None and self.sparse is None

    @property
    def asks(self):
        """What it must reach, as text; None where that is nothing."""
        parts = [] if self.goal is None else [f"{self.goal:.1%}"]
        parts += [f"below {WAYS[self.below].label}"] if self.below else []
        parts += [f"at least {self.recovers:.0%}"] if self.recovers else []
        return ", ".join(parts) or None


_WANDA = {"method": "wanda"}
WAYS = {
    "float32": Way("float32"),
    "bfloat16": Way("bfloat16"),
    "int8-weight-only": Way("int8 weight-only", "int8-weight-only", goal=0.005),
    "int8-weight-only-head": Way(
        "int8 weight-only, output head too", "int8-weight-only", {"output_head": True}, goal=0.005
    ),
    "int8": Way("int8 W8A8", "int8"),
    "int8-smoothquant": Way("int8 W8A8, SmoothQuant", "int8", calibrated=True, goal=0.025, below="int8"),
    "fp8-weight-only": Way("fp8 weight-only", "fp8-weight-only", goal=0.025),
    "fp8": Way("fp8 W8A8", "fp8", goal=0.035),
    "int4-weight-only": Way("int4 weight-only, groups of 32", "int4-weight-only", goal=0.02),
    "int4-weight-only-64": Way("int4 weight-only, groups of 64", "int4-weight-only", {"group_size": 64}),
    "sparse-magnitude-mlp": Way("2:4 on MLPs, magnitude", sparse={"method": "magnitude", **MLP}),
    "sparse-wanda-mlp": Way("2:4 on MLPs, Wanda", sparse={**_WANDA, **MLP}, below="sparse-magnitude-mlp"),
    "sparse-wanda-mlp-int8": Way("2:4 on MLPs, Wanda, all int8 W8A8", "int8", sparse={**_WANDA, **MLP}),
    "sparse-wanda-mlp-tuned": Way(
        "2:4 on MLPs, Wanda, fine-tuned", sparse={**_WANDA, **MLP}, recovers=1 / 3, recovers_of="sparse-wanda-mlp"
    ),
    "sparse-magnitude": Way("2:4 everywhere, magnitude", sparse={"method": "magnitude"}),
    "sparse-wanda": Way("2:4 everywhere, Wanda", sparse=_WANDA, below="sparse-magnitude"),
}
TUNED = [name for name, way in WAYS.items() if way.recovers]


def chosen(names, tunes):
    """The ways of these names (None: all; fine-tuned ones where `tunes`), and those that they are compared with."""
    if names is None:
        names = [name for name in WAYS if tunes or name not in TUNED]
    wanted = {"float32", *names, *(TUNED if tunes else ())}
    wanted |= {WAYS[name].recovers_of for name in wanted if WAYS[name].recovers_of}
    return [name for name in WAYS if name in wanted]


@dataclass
class Data:
    """Parts of a text.

    Attributes:
        evaluated: (inputs, targets) of the windows that are predicted.
        calibration: Inputs from the end of the text.
        apart: Inputs that share no longer run of tokens with what is predicted, in the text's order.
    """

    evaluated: list
    calibration: list
    apart: list

    def pruning(self):
        """Inputs for Wanda, from the end of the text.

        Raises:
            ValueError: there are none, or none would be left for training.
        """
        number = min(CALIBRATION_WINDOWS, len(self.apart) // 2)
        if not number:
            raise ValueError("the text must have two more windows that share nothing with what is predicted")
        return self.apart[-number:]

    def training(self, steps):
        """Inputs for as many steps, drawn from those before `pruning`, all of them before one comes again."""
        windows = self.apart[: -len(self.pruning())]
        drawn, order = random.Random(0), []
        while len(order) < steps:
            order += drawn.sample(range(len(windows)), len(windows))
        return [windows[index] for index in order[:steps]]


def held(way, model, data, steps, stack, console, show):
    """Bring a model into a way.

    Args:
        way, model: The Way and the model.
        data: The Data.
        steps: Of fine-tuning.
        stack: An ExitStack, which gets what takes it back.
        console: Is told how far fine-tuning is.
        show: Shows how far everything else is.

    Returns:
        (the model, or another one, in this way; what a row says about it)
    """
    told, reports = {}, []
    progress = {"progress": lambda done, total: show(f"converting, {done} of {total}")}
    if way.sparse is not None:
        options = dict(way.sparse, **progress)
        if way.sparse["method"] == "wanda":
            options["calibration"] = [one[None] for one in data.pruning()]
        if way.recovers:
            model, report, told["finetune"] = _tuned(model, options, data.training(steps), console, show)
        else:
            handle = fusedops.sparsify_(model, keep=True, **options)
            stack.callback(handle.undo)
            report = handle.report
        reports.append(report)
    if way.scheme is not None:
        options = dict(way.options, **progress)
        if way.calibrated:
            options["calibration"] = [one[None].to(model.device) for one in data.calibration]
        handle = fusedops.quantize_(model, way.scheme, keep=True, **options)
        stack.callback(handle.undo)
        reports.append(handle.report)
    if reports:
        rows = [row for row in reports[-1].converted if row.bytes_before]  # a weight that two layers share counts once
        told["layers"] = len(reports[-1].converted)
        told["weights"] = sum(math.prod(row.shape) for row in rows)
        told["weight_bytes"] = sum(row.bytes_after for row in rows)
    return model, told


def _tuned(teacher, options, windows, console, show):
    """A pruned copy of a model, trained to predict what that predicts, then compressed; its report; what was done."""
    student = copy.deepcopy(teacher)
    masked = fusedops.sparsify_(student, train=True, **options)
    start = time.perf_counter()

    def progress(done, total):
        show(f"fine-tuning, step {done} of {total}")
        if done % max(1, total // 10) == 0:
            console.line(f"  step {done} of {total}, {time.perf_counter() - start:.0f} s")

    losses = fusedops.distill_(
        student, teacher, [one[None] for one in windows], learning_rate=LEARNING_RATE, progress=progress
    )
    seconds = time.perf_counter() - start
    tokens = sum(map(len, windows))
    told = {"steps": len(losses), "tokens": tokens, "learning_rate": LEARNING_RATE, "seconds": seconds}
    return student, masked.convert().report, {**told, "losses": losses}
