"""Tell which implementation an operator would use for a shape, why not another, and what it costs at least."""

import argparse
import json
import re

from fusedops.cli.console import CommandError, first_line

DTYPES = ("bfloat16", "float16", "float32")


def add_arguments(parser):
    """Declare the command's arguments."""
    parser.add_argument("op", help="public operator, such as rms_norm")
    parser.add_argument("--shape", required=True, type=shape, metavar="8192x4096", help="shape of the first argument")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="default: bfloat16")
    parser.add_argument(
        "--device", choices=("cpu", "cuda", "meta"), help="default: cuda where there is one; meta with --target"
    )
    parser.add_argument("--target", metavar="sm_90a", help="judge for this GPU instead of the one at hand")
    parser.add_argument("--json", action="store_true", help="print JSON")


def shape(text):
    """Sizes from text, for argparse."""
    if not re.fullmatch(r"\d+(x\d+)*", text):
        raise argparse.ArgumentTypeError(f"must be sizes joined by x, as in 8192x4096, got {text!r}")
    return tuple(int(size) for size in text.split("x"))


def run(args):
    """Run the command."""
    import torch

    import fusedops

    device = args.device or ("meta" if args.target else "cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise CommandError(
            "--device cuda needs a CUDA device, and torch finds none (--target asks for one that is not here)"
        )
    try:
        positional, named = example_call(args.op, args.shape, getattr(torch, args.dtype), device)
        explanation = fusedops.explain(args.op, *positional, target=args.target, **named)
    except (ValueError, TypeError, NotImplementedError, RuntimeError) as error:
        raise CommandError(first_line(error)) from error
    print(json.dumps(explanation.as_dict(), indent=2) if args.json else explanation)
    return 0


def example_call(name, shape, dtype, device):
    """Arguments of a public operator for a shape: (args, kwargs)."""
    import fusedops
    from fusedops._core.register import operators

    if name not in fusedops.OPERATORS:
        raise ValueError(f"op must be one of {', '.join(fusedops.OPERATORS)}, got {name!r}")
    try:
        return operators()[name].example(shape, dtype, device)
    except IndexError as error:
        raise ValueError(f"{name}: --shape must have more dimensions, got {len(shape)}") from error
