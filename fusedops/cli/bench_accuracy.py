"""Measure what each way to quantise a language model costs in perplexity, over a text that every machine has.

The float32 model, the bfloat16 model and one quantised model after the other, of the same weights. Activation ranges
for SmoothQuant come from another part of the text than that which is predicted.
"""

import argparse
import contextlib
import hashlib
import math
import time
from dataclasses import dataclass, field
from pathlib import Path

from fusedops.cli import corpus, models, setting
from fusedops.cli.console import CommandError, Console, check_output, first_line, write_json

MIB = 2**20
TOKENS, WINDOW, CALIBRATION_WINDOWS = 4096, 512, 8


@dataclass(frozen=True)
class Way:
    """One way to hold the model.

    Attributes:
        label: What the table calls it.
        scheme: Of `fusedops.quantize_`; None is the model as it is.
        options: Further arguments of `fusedops.quantize_`.
        calibrated: SmoothQuant, on the calibration part of the text.
        goal: The most that it may add to the perplexity of the demo model over Python's text; None asks nothing.
        below: The way whose perplexity it must stay below, where that is measured too.
    """

    label: str
    scheme: str | None
    options: dict = field(default_factory=dict)
    calibrated: bool = False
    goal: float | None = None
    below: str | None = None


WAYS = {
    "float32": Way("float32", None),
    "bfloat16": Way("bfloat16", None),
    "int8-weight-only": Way("int8 weight-only", "int8-weight-only", goal=0.005),
    "int8": Way("int8 W8A8", "int8"),
    "int8-smoothquant": Way("int8 W8A8, SmoothQuant", "int8", calibrated=True, goal=0.025, below="int8"),
    "fp8-weight-only": Way("fp8 weight-only", "fp8-weight-only", goal=0.025),
    "fp8": Way("fp8 W8A8", "fp8", goal=0.035),
    "int4-weight-only": Way("int4 weight-only, groups of 32", "int4-weight-only", goal=0.02),
    "int4-weight-only-64": Way("int4 weight-only, groups of 64", "int4-weight-only", {"group_size": 64}),
}


def add_arguments(parser):
    """Declare the command's arguments."""
    setting.add_arguments(parser)
    parser.add_argument("--schemes", type=_ways, metavar="NAME,...", help=f"default: {','.join(WAYS)}")
    parser.add_argument(
        "--tokens", type=setting.positive, default=TOKENS, metavar="N", help=f"to predict (default: {TOKENS})"
    )
    parser.add_argument(
        "--window", type=setting.positive, default=WINDOW, metavar="N",
        help=f"tokens that the model sees at once; windows do not overlap (default: {WINDOW})",
    )  # fmt: skip
    parser.add_argument("--text", metavar="FILE", help="text to predict (default: Python's own reference)")
    parser.add_argument("--json", metavar="FILE", help="write everything that was measured to a file")


def _ways(given):
    chosen = given.split(",")
    unknown = [name for name in chosen if name not in WAYS]
    if unknown:
        raise argparse.ArgumentTypeError(f"must be some of {', '.join(WAYS)}, got {unknown[0]!r}")
    return [name for name in WAYS if name in chosen or name == "float32"]


def run(args):
    """Run the command; 1 where a goal is missed, or a way cannot run."""
    import torch

    console = Console()
    load = setting.load()
    models.require_transformers()
    device, dtype = setting.place(args)
    check_output(args.json)
    text, about_text = _text(args.text)
    loaded = models.load(args.model, device, torch.float32, console)
    evaluated, calibration = _parts(corpus.tokens(loaded.tokenizer, text), args, loaded.model)
    environment = setting.environment(device, dtype, load)
    setting.describe(environment, console)
    about = {
        "model": loaded.name, "text": about_text, "tokens": args.tokens, "window": args.window,
        "calibration_tokens": sum(map(len, calibration)), "environment": environment,
    }  # fmt: skip
    console.line(in_words(about))
    held = {torch.float32: loaded.model}
    rows = []
    for name in args.schemes or WAYS:
        wanted = dtype if WAYS[name].scheme else getattr(torch, name)
        if wanted not in held:
            held[wanted] = models.load(args.model, device, wanted, console).model
        rows.append(_row(name, held[wanted], evaluated, calibration, console))
    usual = args.model is None and args.text is None and (args.tokens, args.window) == (TOKENS, WINDOW)
    _judge(rows, usual)
    _print_table(rows, console)
    if args.json:
        write_json(args.json, {**about, "rows": rows})
    return int(any(row["error"] or row["goal_met"] is False for row in rows))


def _text(path):
    """The text, and what it is: its source, length and hash."""
    if path is None:
        import platform

        text, source = corpus.of_python(), f"pydoc_data.topics of Python {platform.python_version()}"
    else:
        try:
            text, source = Path(path).read_text(encoding="utf-8"), Path(path).name
        except (OSError, ValueError) as error:
            raise CommandError(f"cannot read {path}: {first_line(error)}") from error
    digest = hashlib.sha256(text.encode()).hexdigest()
    return text, {"source": source, "characters": len(text), "sha256": digest}


def _parts(tokens, args, model):
    """Windows to predict, from the beginning of the text, and inputs for calibration, from its end."""
    from fusedops.cli import perplexity

    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and args.window > limit:
        raise CommandError(f"--window must be at most the model's {limit} positions, got {args.window}")
    left = (len(tokens) - args.tokens - 1) // args.window
    if left < 1:
        needed = args.tokens + 1 + args.window
        raise CommandError(f"the text must have {needed} tokens, the last window for calibration, got {len(tokens)}")
    calibration = tokens[-min(left, CALIBRATION_WINDOWS) * args.window :]
    evaluated = perplexity.windows(tokens[: args.tokens + 1], args.window)
    return evaluated, [inputs for inputs, _ in perplexity.windows([*calibration, 0], args.window)]


def in_words(about):
    """What was measured, as text."""
    return (
        "{model}: {tokens} tokens in windows of {window}, each predicted once, from {text[source]} "
        "({text[characters]} characters, SHA-256 {digest}...); calibration on the last {calibration_tokens} tokens; "
        "quantised models compute in {environment[dtype]}"
    ).format(**about, digest=about["text"]["sha256"][:12])


def _row(name, model, evaluated, calibration, console):
    """What one way gives; its error where it does not take the model."""
    way = WAYS[name]
    row = {"scheme": name, "label": way.label, "perplexity": None, "seconds": None, "error": None}
    row |= {"layers": None, "weights": None, "weight_bytes": None}  # of the converted layers, scales included
    try:
        row |= _measured(way, model, evaluated, calibration, console)
    except (ValueError, TypeError, NotImplementedError) as error:  # what quantize_ raises; the other ways go on
        row["error"] = first_line(error)
        console.line(f"{way.label} cannot run: {row['error']}")
    return row


def _measured(way, model, evaluated, calibration, console):
    """Perplexity of one way, its seconds, and what its converted layers hold; the model stays as it was."""
    import fusedops
    from fusedops.cli import perplexity

    told = {}
    with console.step(way.label) as show, contextlib.ExitStack() as stack:
        if way.scheme is not None:
            options = {**way.options, "progress": lambda done, total: show(f"converting, {done} of {total}")}
            if way.calibrated:
                options["calibration"] = [one[None].to(model.device) for one in calibration]
            handle = fusedops.quantize_(model, way.scheme, keep=True, **options)
            stack.callback(handle.undo)
            totals = handle.report.totals
            told = {"layers": totals["quantized"], "weight_bytes": totals["bytes_after"]}
            told["weights"] = totals["bytes_before"] // model.dtype.itemsize
        start = time.perf_counter()
        found = perplexity.perplexity(model, evaluated, lambda done: show(f"window {done} of {len(evaluated)}"))
        told["seconds"] = time.perf_counter() - start
    return {**told, "perplexity": found if math.isfinite(found) else None}


def _judge(rows, usual):
    """Add to each row its change against float32, and where model and text are the usual ones, if its goal is met.

    Rows of the model as it is get the size of what the others convert.
    """
    import torch

    found = {row["scheme"]: row["perplexity"] for row in rows}
    converted = next((row for row in rows if row["layers"]), None)
    for row in rows:
        way, value = WAYS[row["scheme"]], row["perplexity"]
        if way.scheme is None and converted:
            row |= {name: converted[name] for name in ("layers", "weights")}
            row["weight_bytes"] = row["weights"] * getattr(torch, row["scheme"]).itemsize
        row["change"] = value / found["float32"] - 1 if value and found["float32"] else None
        row["goal"] = way.goal if usual else None
        row["goal_met"] = None
        if row["goal"] is not None:
            other = found.get(way.below)
            row["goal_met"] = row["change"] is not None and row["change"] <= way.goal and (not other or value < other)


def _print_table(rows, console):
    """Print a line each."""
    lines = []
    for row in rows:
        size = row["weight_bytes"] and f"{row['weight_bytes'] / MIB:.1f}"
        seconds = row["seconds"] and f"{row['seconds']:.1f}"
        lines.append([row["label"], *(cell or "-" for cell in (*in_cells(row), size, seconds))])
    console.line()
    header = ("", "perplexity", "change", "goal", "weights of the converted layers, MiB", "s")
    console.table("Perplexity against the float32 model", header, lines)


def in_cells(row):
    """Perplexity, its change and the goal as text; None where there is none."""
    value, goal = row["perplexity"], None
    if row["goal"] is not None:
        below = WAYS[row["scheme"]].below
        goal = f"{row['goal']:.1%}" + (f", below {WAYS[below].label}" if below else "")
        goal += ": met" if row["goal_met"] else ": missed"
    return value and f"{value:.3f}", row["change"] and f"{row['change']:+.2%}", goal
