"""``python -m fusedops.testing.ptx golden --record FILE | --check FILE``."""

from __future__ import annotations

import argparse
import sys
import zlib
from collections import defaultdict
from pathlib import Path

from fusedops.testing.ptx import golden
from fusedops.testing.ptx.device import Device


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fusedops.testing.ptx", description="Compiled kernels on the CPU.")
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("golden", help="compare the emulator with a real GPU, bit by bit")
    what = one.add_mutually_exclusive_group(required=True)
    what.add_argument("--record", type=Path, metavar="FILE", help="run every launch of the suite on the device too")
    what.add_argument("--check", type=Path, metavar="FILE", help="run the suite in the emulator and compare")
    one.add_argument("--device", choices=["gpu", "emulator"], default="gpu", help="what records (default: gpu)")
    one.add_argument("--suite", type=Path, default=golden.SUITE, help="tests whose launches count")
    options = parser.parse_args(arguments)
    try:
        return record(options) if options.record else check(options)
    except (RuntimeError, zlib.error) as problem:
        print(problem, file=sys.stderr)
        return 2


def record(options) -> int:
    device = Device() if options.device == "gpu" else None
    recorder = golden.record(options.record, options.suite, device)
    print(f"{len(recorder.results)} launches recorded on {'the emulator' if device is None else device.description}")
    for text in recorder.failed.values():
        print(f"not recorded: {text}")
    return 0


def check(options) -> int:
    device, report = golden.check(options.check, options.suite)
    print(f"{report.same} launches give what {device} gave, bit by bit; {len(report.differences)} do not")
    by_instruction = defaultdict(list)
    for instructions, test, text in report.differences:
        by_instruction[", ".join(instructions)].append(f"  {test}: {text}")
    for instructions, lines in sorted(by_instruction.items()):
        print("\n".join([instructions, *lines]))
    if report.unknown:
        print(f"not in the file: {len(report.unknown)} launches, the first of {report.unknown[0]}")
    if report.missing:
        print(f"only in the file: {len(report.missing)} launches, the first of {report.missing[0]}")
    return 1 if report.differences or not report.same else 0


if __name__ == "__main__":
    sys.exit(main())
