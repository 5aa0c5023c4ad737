"""The command line: ``fusedops <command>``, also ``python -m fusedops <command>``."""

import argparse
import os
import sys

from fusedops.cli import bench, bench_accuracy, bench_model, cache, demo, doctor, explain, inspect, tune, warmup
from fusedops.cli.console import CommandError

COMMANDS = {
    "demo": demo,
    "bench": bench,
    "bench model": bench_model,
    "bench accuracy": bench_accuracy,
    "explain": explain,
    "inspect": inspect,
    "doctor": doctor,
    "tune": tune,
    "warmup": warmup,
    "cache": cache,
}
BAD_INPUT = 2
INTERRUPTED = 130


class _Parser(argparse.ArgumentParser):
    """Reports bad input in one line."""

    def error(self, message):
        self.exit(BAD_INPUT, f"{self.prog}: {message} (see {self.prog} --help)\n")


def build_parser():
    """The parser of every command; each command's module adds its own arguments."""
    parser = _Parser(prog="fusedops", description="Fused operators for language models.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, module in COMMANDS.items():
        about = module.__doc__.splitlines()[0]
        module.add_arguments(commands.add_parser(name, help=about, description=about))
    return parser


def main(argv=None):
    """Run one command and return its exit status: 0 is well, 1 is a failed check, 2 is bad input."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if " ".join(argv[:2]) in COMMANDS:  # a command of two words
        argv[:2] = [" ".join(argv[:2])]
    args = build_parser().parse_args(argv)
    try:
        return COMMANDS[args.command].run(args)
    except CommandError as error:
        print(f"fusedops {args.command}: {error}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of a pipe left: point stdout elsewhere, so that the interpreter's last flush does not raise again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
