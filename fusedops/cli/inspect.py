"""Compile the kernels that a call launches, for any GPU without having one, and tell what they are made of."""

import argparse
import json
import re

from fusedops._core.inspection_table import lines
from fusedops.cli.console import CommandError, first_line
from fusedops.cli.explain import DTYPES, example_call, shape


def add_arguments(parser):
    """Declare the command's arguments."""
    parser.add_argument("op", help="public operator, such as rms_norm")
    parser.add_argument("--shape", required=True, type=shape, metavar="8192x4096", help="shape of the first argument")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="default: bfloat16")
    parser.add_argument("--target", metavar="sm_90a", help="default: the GPU at hand, without one sm_90a")
    parser.add_argument("--backward", action="store_true", help="the kernels of the derivative instead")
    parser.add_argument(
        "--compare", nargs=2, type=_config, metavar=("A", "B"),
        help="two configurations side by side, such as block_m=64,num_warps=4; default: what the call would take",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print JSON")


def _config(text):
    """(text, parameters): of "default" none."""
    found = {}
    for part in [] if text == "default" else text.split(","):
        name, _, value = part.partition("=")
        if not re.fullmatch(r"[a-z]\w*", name.strip()) or not re.fullmatch(r"\d+", value.strip()):
            raise argparse.ArgumentTypeError(f"must be name=number,... or default, got {text!r}")
        found[name.strip()] = int(value)
    return text, found


def run(args):
    """Run the command."""
    import torch

    import fusedops

    try:
        positional, named = example_call(args.op, args.shape, getattr(torch, args.dtype), "meta")
        found = {
            text: fusedops.inspect(
                args.op, *positional, target=args.target, backward=args.backward, config=config, **named
            )
            for text, config in args.compare or [("default", {})]
        }
    except (ValueError, TypeError, NotImplementedError, RuntimeError) as error:
        raise CommandError(first_line(error).removeprefix("inspect: ")) from error
    if args.json:
        plain = {text: one.as_dict() for text, one in found.items()}
        print(json.dumps(plain if args.compare else plain["default"], indent=2))
    else:
        print("\n".join(lines(list(found.values()), list(found) if args.compare else None)))
    return 0
