"""Measure what each way to quantise or prune a language model costs in perplexity, over a text that every machine has.

The float32 model, the bfloat16 model and one converted model after the other, of the same weights. Activation ranges
for SmoothQuant come from another part of the text than that which is predicted; what Wanda and fine-tuning see shares
no longer run of tokens with it.
"""

import argparse
import contextlib
import hashlib
import math
import time
from pathlib import Path

from fusedops.cli import corpus, models, setting
from fusedops.cli.console import CommandError, Console, check_output, first_line, write_json
from fusedops.cli.ways import CALIBRATION_WINDOWS, STEPS, TUNED, WAYS, Data, chosen, held

MIB = 2**20
TOKENS, WINDOW = 4096, 512
SHARED_RUN = 16  # tokens: so long a run is no phrase that all texts have, but the same text


def add_arguments(parser):
    """Declare the command's arguments."""
    setting.add_arguments(parser)
    parser.add_argument("--schemes", type=_ways, metavar="NAME,...", help=f"some of {', '.join(WAYS)}")
    parser.add_argument(
        "--finetune", type=setting.positive, metavar="STEPS",
        help=f"measure {TUNED[0]} too, with so many steps of one window each (where it is named alone: {STEPS})",
    )  # fmt: skip
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
    names = given.split(",")
    unknown = [name for name in names if name not in WAYS]
    if unknown:
        raise argparse.ArgumentTypeError(f"must be some of {', '.join(WAYS)}, got {unknown[0]!r}")
    return names


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
    data = _parts(corpus.tokens(loaded.tokenizer, text), args, loaded.model)
    environment = setting.environment(device, dtype, load)
    setting.describe(environment, console)
    about = {
        "model": loaded.name, "text": about_text, "tokens": args.tokens, "window": args.window,
        "calibration_tokens": sum(map(len, data.calibration)), "apart_tokens": sum(map(len, data.apart)),
        "environment": environment,
    }  # fmt: skip
    console.line(in_words(about))
    loads = {torch.float32: loaded.model}
    rows = []
    for name in chosen(args.schemes, args.finetune is not None):
        wanted = _dtype(name, dtype)
        if wanted not in loads:
            loads[wanted] = models.load(args.model, device, wanted, console).model
        rows.append(_row(name, loads[wanted], data, args.finetune or STEPS, console))
    usual = args.model is None and args.text is None and (args.tokens, args.window) == (TOKENS, WINDOW)
    _judge(rows, usual)
    _print_table(rows, console)
    if args.json:
        write_json(args.json, {**about, "rows": rows})
    return int(any(row["error"] or row["goal_met"] is False for row in rows))


def _dtype(name, dtype):
    """What the model of a way computes in; a rate of 0.001 is below what 16-bit weights resolve."""
    import torch

    way = WAYS[name]
    return getattr(torch, name) if way.is_plain else torch.float32 if way.recovers else dtype


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
    """Windows to predict, from the beginning of the text; inputs from its end; inputs that repeat none of the first."""
    from fusedops.cli import perplexity

    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and args.window > limit:
        raise CommandError(f"--window must be at most the model's {limit} positions, got {args.window}")
    left = (len(tokens) - args.tokens - 1) // args.window
    if left < 1:
        needed = args.tokens + 1 + args.window
        raise CommandError(f"the text must have {needed} tokens, the last window for calibration, got {len(tokens)}")
    calibration = tokens[-min(left, CALIBRATION_WINDOWS) * args.window :]
    held_out, rest = tokens[: args.tokens + 1], tokens[args.tokens + 1 :]
    rest = rest[len(rest) % args.window :]
    apart = corpus.apart(_inputs(rest, args.window), held_out, SHARED_RUN)
    return Data(perplexity.windows(held_out, args.window), _inputs(calibration, args.window), apart)


def _inputs(tokens, length):
    """Windows that are not predicted."""
    from fusedops.cli import perplexity

    return [inputs for inputs, _ in perplexity.windows([*tokens, 0], length)]


def in_words(about):
    """What was measured, as text."""
    return (
        "{model}: {tokens} tokens in windows of {window}, each predicted once, from {text[source]} "
        "({text[characters]} characters, SHA-256 {digest}...); calibration on the last {calibration_tokens} tokens; "
        "quantised models compute in {environment[dtype]}"
    ).format(**about, digest=about["text"]["sha256"][:12])


def _row(name, model, data, steps, console):
    """What one way gives; its error where it does not take the model."""
    way = WAYS[name]
    row = {"scheme": name, "label": way.label, "perplexity": None, "seconds": None, "error": None}
    row |= {"layers": None, "weights": None, "weight_bytes": None}  # of the converted layers, scales included
    row |= {"finetune": None}
    try:
        row |= _measured(way, model, data, steps, console)
    except (ValueError, TypeError, NotImplementedError, RuntimeError) as error:  # of the conversion; the others go on
        row["error"] = first_line(error)
        console.line(f"{way.label} cannot run: {row['error']}")
    return row


def _measured(way, model, data, steps, console):
    """Perplexity of one way, its seconds, and what its converted layers hold; the model stays as it was."""
    from fusedops.cli import perplexity

    with console.step(way.label) as show, contextlib.ExitStack() as stack:
        model, told = held(way, model, data, steps, stack, console, show)
        windows, start = data.evaluated, time.perf_counter()
        found = perplexity.perplexity(model, windows, lambda done: show(f"window {done} of {len(windows)}"))
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
        if way.is_plain and converted:
            row |= {name: converted[name] for name in ("layers", "weights")}
            row["weight_bytes"] = row["weights"] * getattr(torch, row["scheme"]).itemsize
        row["change"] = value / found["float32"] - 1 if value and found["float32"] else None
        row["recovered"] = _recovered(value, found.get(way.recovers_of), found["float32"])
        row["goal"] = way.goal if usual else None
        row["asked"] = way.asks if usual else None
        row["goal_met"] = _is_met(way, row, found) if row["asked"] else None


def _recovered(value, untuned, exact):
    """The share of the gap between two perplexities that is won back; None where one is not known."""
    return (untuned - value) / (untuned - exact) if value and untuned and exact else None


def _is_met(way, row, found):
    """Whether a row reaches all that is asked of it."""
    value, other = row["perplexity"], found.get(way.below)
    if value is None or (way.goal is not None and not (row["change"] is not None and row["change"] <= way.goal)):
        return False
    if way.recovers and not (row["recovered"] is not None and row["recovered"] >= way.recovers):
        return False
    return not other or value < other


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
    value = row["perplexity"]
    goal = row["asked"] and f"{row['asked']}: {'met' if row['goal_met'] else 'missed'}"
    if row["recovered"] is not None:
        goal = f"{row['recovered']:.0%} of the gap won back" + (f"; {goal}" if goal else "")
    return value and f"{value:.3f}", row["change"] and f"{row['change']:+.2%}", goal
