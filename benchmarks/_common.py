"""What every benchmark shares: cases, peers, rounds, rows with provenance, the table. See performance.md, section 4."""

import argparse
import datetime
import importlib
import json
import platform
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from fusedops import explain
from fusedops._core.device import cpu_name
from fusedops.testing.timing import compare, rotating

ROOT = Path(__file__).resolve().parent.parent
COPY_BYTES = 2**29  # each way: far beyond any cache


@dataclass(frozen=True)
class Case:
    """One line of a benchmark.

    Attributes:
        op: Public operator that is explained and measured.
        shape: What the line is called, such as "8192x4096".
        dtype: Of the data.
        make: Function of a number that gives the operator's positional arguments in fresh memory.
        candidates: Name to function of those arguments; the first is ours.
        options: Keyword arguments of our call.
    """

    op: str
    shape: str
    dtype: torch.dtype
    make: Callable
    candidates: dict
    options: dict


def peer(module, attribute):
    """A function of an optional package by dotted names, or None where the package is not installed."""
    try:
        value = importlib.import_module(module)
    except ImportError:
        return None
    for name in attribute.split("."):
        value = getattr(value, name)
    return value


def compiled(function):
    """torch.compile of a plain function, under a name of its own."""
    return torch.compile(function, dynamic=False)


def environment(device):
    """What the numbers depend on."""
    triton = sys.modules.get("triton")
    commit = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else cpu_name(),
        "threads": torch.get_num_threads() if device == "cpu" else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__ if triton else None,
        "commit": commit.stdout.strip() or None,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def copy_bandwidth(device, rounds):
    """BW*: bytes read and written per second by a large copy on this machine, now."""
    count = COPY_BYTES // 4
    source, target = torch.randn(count, device=device), torch.empty(count, device=device)
    timing = compare({"copy": target.copy_}, arguments=[(source,)], rounds=rounds, device=device)["copy"]
    return 2 * COPY_BYTES / timing.median


def measure(case, device, rounds, bandwidth, graph):
    """One row: our time and each peer's, in alternating rounds over buffers that no cache holds."""
    explanation = explain(case.op, *case.make(0), **case.options)
    timings = compare(
        case.candidates,
        arguments=rotating(case.make, explanation.bytes),
        rounds=rounds,
        device=device,
        graph=graph,
    )
    ours, *others = timings
    best = min(others, key=lambda name: timings[name].median, default=None)
    return {
        "op": case.op,
        "shape": case.shape,
        "dtype": str(case.dtype).removeprefix("torch."),
        "timed": "device time under a CUDA graph" if graph else "wall time of eager calls",
        "backend": explanation.backend,
        "config": explanation.config,
        "config_source": explanation.config_source,
        "bytes": explanation.bytes,
        "operations": explanation.operations,
        "seconds": timings[ours].median,
        "low": timings[ours].low,
        "high": timings[ours].high,
        "peers": {name: timings[name].median for name in others},
        "best_peer": best,
        "speedup": timings[best].median / timings[ours].median if best else None,
        "share_of_copy_bandwidth": explanation.bytes / timings[ours].median / bandwidth,
    }


def table(rows):
    """The rows as text, ours first, each peer with the ratio of its time to ours."""
    lines = [f"{'operator':<16}{'shape':<18}{'dtype':<10}{'ours':>11}{'of BW*':>8}   peers (times ours)"]
    for row in rows:
        peers = ", ".join(f"{name} {seconds / row['seconds']:.2f}" for name, seconds in row["peers"].items())
        lines.append(
            f"{row['op']:<16}{row['shape']:<18}{row['dtype']:<10}{row['seconds'] * 1e6:>9.1f}us"
            f"{row['share_of_copy_bandwidth']:>8.0%}   {peers}"
        )
    return "\n".join(lines)


def main(cases, absent=()):
    """Run a benchmark's cases from its command line and print the table.

    Args:
        cases: Function (device, quick) that yields the cases.
        absent: Names of peers that are not installed; they are reported as absent.
    """
    parser = argparse.ArgumentParser(description=sys.modules["__main__"].__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="few shapes and rounds, to see that it runs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows to a file")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs an NVIDIA GPU, and torch finds none")
    rounds = 5 if args.quick else 11
    provenance = environment(args.device)
    bandwidth = copy_bandwidth(args.device, rounds)
    rows = []
    with torch.no_grad():
        for case in cases(args.device, args.quick):
            for graph in (False, True) if args.device == "cuda" else (False,):
                rows.append(measure(case, args.device, rounds, bandwidth, graph) | {"environment": provenance})
    print(f"{provenance['device']}, torch {provenance['torch']}, {provenance['date']}, BW* {bandwidth / 1e9:.1f} GB/s")
    print(table(rows))
    for name in absent:
        print(f"absent peer: {name} is not installed")
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
