"""Measure the configurations of an operator, or of all that a model needs, and keep the fastest right ones."""

import contextlib
import dataclasses
import json
import time

from fusedops.cli import model_calls, setting
from fusedops.cli.console import CommandError, Console, first_line
from fusedops.cli.explain import DTYPES, example_call, shape


def add_arguments(parser):
    """Declare the command's arguments."""
    parser.add_argument("op", nargs="?", help="public operator, such as rms_norm")
    parser.add_argument("--shape", type=shape, metavar="8192x4096", help="shape of the first argument")
    parser.add_argument("--model", metavar="DIR|config.json", help="tune what this model needs instead of one operator")
    parser.add_argument(
        "--crossover", type=shape, metavar="4096x14336",
        help="find for how many rows sparse_matmul is faster than the dense product by a weight of this shape",
    )  # fmt: skip
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="default: bfloat16")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument(
        "--scheme", choices=model_calls.SCHEMES, default="none", help="with --model: how its linears are quantised"
    )
    parser.add_argument(
        "--batches", type=_sizes, default=(1, 16, 64), metavar="1,16,64", help="with --model: of decoding"
    )
    parser.add_argument(
        "--prompt", type=setting.positive, default=2048, help="with --model: tokens of a prompt; default: 2048"
    )
    parser.add_argument("--backward", action="store_true", help="the kernels of the gradients instead")
    parser.add_argument(
        "--seconds", type=setting.positive_number, default=600.0, help="for everything together; default: 600"
    )
    parser.add_argument("--force", action="store_true", help="measure again what is known")
    parser.add_argument("--json", action="store_true", help="print JSON")


def _sizes(text):
    return tuple(setting.positive(part) for part in text.split(","))


def run(args):
    """Run the command; exit status 1 where a default was wrong, or nothing could be measured."""
    import torch

    import fusedops
    from fusedops.tuning import Options

    if args.crossover is None:
        if (args.model is None) == (args.op is None) or (args.op is not None and args.shape is None):
            raise CommandError("give an operator with --shape, or --model, or --crossover")
    elif len(args.crossover) != 2 or args.op not in (None, "sparse_matmul") or args.model is not None:
        raise CommandError("--crossover is of sparse_matmul alone, and takes the two sizes of a weight")
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise CommandError("--device cuda needs a CUDA device, and torch finds none")
    if args.crossover is not None:
        return _crossover(args, device)
    console, reports = _Quiet() if args.json else Console(), []
    deadline = time.monotonic() + args.seconds
    try:
        for what, op, positional, named in _calls(args, device):
            with console.step(f"{op} {what}") as show:
                left = max(deadline - time.monotonic(), 0.0)
                options = Options(seconds=left, force=args.force, progress=_shown_by(show))
                report = fusedops.tune(op, *positional, tuning=options, backward=args.backward, **named)
                reports.append((what, report))
            console.line(f"  {reports[-1][1]}".replace("\n", "\n  "))
    except (ValueError, TypeError, NotImplementedError) as error:
        raise CommandError(first_line(error)) from error
    if args.json:
        print(json.dumps([_as_dict(what, report) for what, report in reports], indent=2))
    failed = any(one.state == "failed" for _, report in reports for one in report.tuned)
    return int(failed or all(report.reason is not None for _, report in reports))


def _crossover(args, device):
    import torch

    from fusedops.crossover import tune_crossover
    from fusedops.tuning import Options

    console = _Quiet() if args.json else Console()
    try:
        with console.step(f"sparse_matmul {'x'.join(map(str, args.crossover))}") as show:
            options = Options(seconds=args.seconds, force=args.force, progress=_shown_by(show))
            found = tune_crossover(*args.crossover, getattr(torch, args.dtype), device, tuning=options)
    except ValueError as error:
        raise CommandError(first_line(error)) from error
    console.line(f"  {found}".replace("\n", "\n  "))
    if args.json:
        print(json.dumps(dataclasses.asdict(found), indent=2))
    return int(not found.timings)


def _shown_by(show):
    def progress(text, done, total):
        show(f"{done} of {total}, {text}")

    return progress


class _Quiet:
    """A console that leaves stdout to the JSON."""

    def line(self, text):
        pass

    @contextlib.contextmanager
    def step(self, text):
        yield lambda progress: None


def _calls(args, device):
    import torch

    dtype = getattr(torch, args.dtype)
    if args.model is None:
        positional, named = example_call(args.op, args.shape, dtype, device)
        return [("x".join(map(str, args.shape)), args.op, positional, named)]
    shapes = model_calls.read_shapes(args.model)
    if args.backward:
        return model_calls.differentiated(shapes, dtype, device, prompt=args.prompt)
    return model_calls.calls(
        shapes, dtype, device, batches=args.batches, prompt=args.prompt, scheme=args.scheme
    )  # fmt: skip


def _as_dict(what, report):
    return {
        "op": report.op,
        "call": what,
        "reason": report.reason,
        "tuned": [
            {
                "kernel": one.before.tunable.name,
                "state": one.state,
                "config": one.before.tunable.values(one.config),
                "timings": one.timings,
                "refused": one.refused,
            }
            for one in report.tuned
        ],
    }
