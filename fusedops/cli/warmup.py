"""Compile the kernels that a model needs, from its config alone, so that nothing is compiled while it runs."""

import contextlib
import sys

from fusedops.cli import setting
from fusedops.cli.console import CommandError, Console, check_output, first_line, write_json
from fusedops.cli.explain import DTYPES
from fusedops.cli.quantized import SCHEMES


def add_arguments(parser):
    """Declare the command's arguments."""
    parser.add_argument("--model", required=True, metavar="DIR|config.json", help="of the model; no weights are needed")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="default: bfloat16")
    parser.add_argument("--max-batch", type=setting.positive, default=8, help="rows of a batch; default: 8")
    parser.add_argument("--max-seqlen", type=setting.positive, default=4096, help="tokens of a row; default: 4096")
    parser.add_argument("--target", metavar="sm_90a", help="default: the GPU at hand, without one sm_90a")
    parser.add_argument("--quantize", choices=SCHEMES, metavar="SCHEME", help=f"its linears: {', '.join(SCHEMES)}")
    parser.add_argument("--sparsity", choices=("2:4",), help="its linears are pruned; with --quantize int8 or fp8 too")
    parser.add_argument(
        "--page-size", type=setting.positive, default=16, help="tokens of a page of PagedCache; default: 16"
    )
    parser.add_argument("--gradients", action="store_true", help="also what training launches")
    parser.add_argument("--jobs", type=setting.positive, help="processes; default: one for each processor")
    parser.add_argument("--json", metavar="FILE", help="write what was done")


def run(args):
    """Run the command; exit status 1 where a kernel cannot be compiled."""
    import torch

    import fusedops

    check_output(args.json)
    try:
        with _progress() as progress:
            done = fusedops.warmup(
                args.model, dtype=getattr(torch, args.dtype), max_batch=args.max_batch, max_seqlen=args.max_seqlen,
                target=args.target, scheme=args.quantize, sparsity=args.sparsity, page_size=args.page_size,
                gradients=args.gradients, jobs=args.jobs, progress=progress,
            )  # fmt: skip
    except (ValueError, TypeError, NotImplementedError, RuntimeError, ImportError) as error:
        raise CommandError(first_line(error).removeprefix("warmup: ").removeprefix("inspect: ")) from error
    Console().line(str(done))
    if args.json:
        write_json(args.json, done.as_dict())
    return int(bool(done.failed))


@contextlib.contextmanager
def _progress():
    """A bar on a terminal with rich, else a line at every tenth of the work."""
    if sys.stdout.isatty():
        with contextlib.suppress(ImportError):
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

            columns = BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}")
            with Progress(*columns) as bar:
                task = bar.add_task("looking at the model", total=None)
                yield lambda done, total, name: bar.update(task, completed=done, total=total, description=name)
            return
    yield _line


def _line(done, total, name):
    if done == total or done * 10 // total > (done - 1) * 10 // total:
        print(f"{done} of {total} kernels, {name}", flush=True)
