"""Compile the kernels that a call launches, for any GPU without having one, and tell what they are made of."""

import json

from fusedops.cli.console import CommandError, first_line
from fusedops.cli.explain import DTYPES, example_call, shape


def add_arguments(parser):
    """Declare the command's arguments."""
    parser.add_argument("op", help="public operator, such as rms_norm")
    parser.add_argument("--shape", required=True, type=shape, metavar="8192x4096", help="shape of the first argument")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="default: bfloat16")
    parser.add_argument("--target", metavar="sm_90a", help="default: the GPU at hand, without one sm_90a")
    parser.add_argument("--backward", action="store_true", help="the kernels of the derivative instead")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args):
    """Run the command."""
    import torch

    import fusedops

    try:
        positional, named = example_call(args.op, args.shape, getattr(torch, args.dtype), "meta")
        found = fusedops.inspect(args.op, *positional, target=args.target, backward=args.backward, **named)
    except (ValueError, TypeError, NotImplementedError, RuntimeError) as error:
        raise CommandError(first_line(error).removeprefix("inspect: ")) from error
    print(json.dumps(found.as_dict(), indent=2) if args.json else found)
    return 0
