"""What every benchmark shares: cases, peers, rounds, rows with provenance. See docs/performance.md."""

import argparse
import importlib
import inspect
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from _rows import EAGER, ON_DEVICE, environment, share, table, version_of_module, write

import fusedops
from fusedops import explain
from fusedops._core.explain import operator_call
from fusedops.testing.timing import compare, copy_bandwidth, rotating

HOST_HIDDEN = 1e-3  # seconds on the device, behind which no call's cost on the host shows
MATMUL_DTYPE = {"cpu": torch.float32, "cuda": torch.bfloat16}  # of the product behind TC*
LEAST_CACHE_BYTES = 2**27  # that rotating buffers fill, where the device does not name its cache or has a smaller one
CPU_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
UNIMPORTABLE = {}  # peers that `peer` did not find, with the reason
VERSIONS = {}  # of the packages of those that it found


def as_tuple(value):
    return value if isinstance(value, tuple | list) else (value,)


def difference(found, wanted):
    """The largest difference between tensors, by norm, relative to those that are wanted."""
    worst = 0.0
    for a, b in zip(as_tuple(found), as_tuple(wanted), strict=True):
        if a.shape != b.shape:
            raise ValueError(f"its result has shape {tuple(a.shape)}, not {tuple(b.shape)}")
        away = float(torch.linalg.vector_norm(a.double() - b.double()) / torch.linalg.vector_norm(b.double()))
        if away != away:
            return away
        worst = max(worst, away)
    return worst


def error_of(case, arguments, out):
    """How far our result is from the reference in float64 on the same stored values."""
    operator, args = operator_call(getattr(fusedops, case.op), *arguments, **case.options)
    reference = getattr(operator._selector.module("reference"), operator.name)
    wide = [a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args]
    rounding = {"round_to": case.dtype} if "round_to" in inspect.signature(reference).parameters else {}
    truth = as_tuple(reference(*wide, **rounding))
    return difference(out, truth[: len(as_tuple(out))])  # a public function may return less than the operator


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
        tolerance: A peer whose results differ from ours by more, relative to their norm, is left out as wrong.
        cost: (bytes, operations) of the call where they are not those that ``explain`` gives.
        goal: (ratio to the best peer, part of the ceiling), the least there should be; None asks nothing.
        against: Peers that the goal's ratio is to, the best of them that ran; empty: all.
        check: Function (case, arguments, our result) that gives our error against float64; None where there is none.
    """

    op: str
    shape: str
    dtype: torch.dtype
    make: Callable
    candidates: dict
    options: dict
    tolerance: float = 0.03
    cost: tuple | None = None
    goal: tuple = (None, None)
    against: tuple = ()
    check: Callable | None = error_of


@dataclass(frozen=True)
class Effort:
    """How much a run measures.

    Attributes:
        rounds: Alternating rounds of everybody.
        round_seconds: The aim for the length of a round.
        rotating_bytes: What the buffers of a case fill together, where a call of it is not too small for that.
        copy_bytes: Of the copy behind BW*, each way.
        matmul_size: Of the product behind TC*.
    """

    rounds: int = 11
    round_seconds: float = 0.02
    rotating_bytes: int = LEAST_CACHE_BYTES
    copy_bytes: int = 2**29  # far beyond any cache
    matmul_size: int = 8192


@dataclass(frozen=True)
class Ceilings:
    """What this machine reaches now: bytes a second of a large copy (BW*), operations of a large product (TC*)."""

    bandwidth: float
    matmul_rate: float


def peer(module, attribute):
    """A function of an optional package by dotted names, or None where it cannot be imported."""
    try:
        value = importlib.import_module(module)
        for name in attribute.split("."):
            value = getattr(value, name)
    except Exception as error:  # a compiled package for another torch fails in its own ways
        UNIMPORTABLE[module] = brief(error)
        return None
    VERSIONS[module.partition(".")[0]] = version_of_module(module)
    return value


def brief(error):
    """An exception in one line."""
    first = str(error).strip().split("\n")[0]
    return f"{type(error).__name__}: {first[:160]}"


def compiled(function):
    """torch.compile of a plain function; in a quick run on a CPU one that says that it is left out there."""
    return torch.compile(function, dynamic=False) if compiled.allowed else refused


compiled.allowed = True  # `effort_of` decides


def refused(*args):
    raise RuntimeError("torch.compile takes longer than all else of a quick run on a CPU")


def forget_compiled():
    """Else a function that is compiled for many shapes would stop being compiled."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


def effort_of(device, quick):
    """How much a run measures: a quick one on a CPU so little that its figures mean nothing but that it runs."""
    compiled.allowed = device == "cuda" or not quick
    if device == "cuda":
        return Effort(rounds=5 if quick else 11, rotating_bytes=beyond_caches(device))
    if not quick:
        return Effort(rotating_bytes=beyond_caches(device), matmul_size=1024)
    return Effort(5, round_seconds=2e-3, rotating_bytes=2**22, copy_bytes=2**25, matmul_size=512)


def beyond_caches(device):
    """Bytes of which no cache of the device holds the half."""
    if device == "cuda":
        return max(LEAST_CACHE_BYTES, 2 * torch.cuda.get_device_properties(0).L2_cache_size)
    sizes = [path.read_text().strip() for path in CPU_CACHES.glob("index*/size")]
    largest = max((int(size[:-1]) * 2**10 for size in sizes if size.endswith("K")), default=0)
    return max(LEAST_CACHE_BYTES, 2 * largest)


def measure_ceilings(device, effort):
    """BW* and TC* of this machine, now, on random data."""
    timed = {"rounds": effort.rounds, "round_seconds": effort.round_seconds, "device": device}
    bandwidth = copy_bandwidth(effort.copy_bytes, **timed)
    size, dtype = effort.matmul_size, MATMUL_DTYPE[device]
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    product = compare({"matmul": torch.matmul}, arguments=[(a, b)], **timed)["matmul"]
    return Ceilings(bandwidth, 2 * size**3 / product.median)


def copies(arguments):
    """Arguments in fresh memory: some peers work in place."""
    return tuple(a.clone() if isinstance(a, torch.Tensor) else a for a in arguments)


def why_left_out(case, name, arguments, wanted, graph=False):
    """Why a candidate cannot stand beside ours, whose result is `wanted`: it fails, cannot be captured where asked, or
    gives something else. None where it can."""
    try:
        away = difference(case.candidates[name](*copies(arguments)), wanted)
        if not away <= case.tolerance:
            return f"its results differ from ours by {away:.3g}"
        if graph:
            capture(case.candidates[name], copies(arguments))
    except Exception as reason:
        if arguments[0].is_cuda:
            torch.cuda.synchronize()  # an error that stays in the context ends the benchmark here
        return brief(reason)
    return None


def tried(case, graph):
    """(names of the candidates to be timed, the others with the reason, our error)."""
    arguments = case.make(0)
    ours, *others = case.candidates
    wanted = case.candidates[ours](*copies(arguments))
    error = case.check(case, arguments, wanted) if case.check else None
    reasons = {name: why_left_out(case, name, arguments, wanted, graph) for name in others}
    left_out = {name: reason for name, reason in reasons.items() if reason}
    return [name for name in case.candidates if name not in left_out], left_out, error


def capture(function, arguments):
    """Capture one call in a CUDA graph; raises where that is not possible."""
    torch.cuda.synchronize()
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        function(*arguments)
    torch.cuda.synchronize()


def measure(case, device, effort, ceilings, graph):
    """One row: our time and each peer's, in alternating rounds over buffers that no cache holds."""
    explanation = explain(case.op, *case.make(0), **case.options)
    num_bytes, operations = case.cost or (explanation.bytes, explanation.operations)
    used, left_out, error = tried(case, graph)
    arguments = rotating(case.make, num_bytes, cache_bytes=effort.rotating_bytes)
    timings = compare(
        {name: case.candidates[name] for name in used},
        arguments=arguments,
        rounds=effort.rounds,
        round_seconds=effort.round_seconds,
        device=device,
        graph=graph,
    )
    ours, *others = timings
    best = min(others, key=lambda name: timings[name].median, default=None)
    seconds = timings[ours].median
    by_operations = operations / ceilings.matmul_rate > num_bytes / ceilings.bandwidth
    row = {
        "op": case.op,
        "shape": case.shape,
        "dtype": str(case.dtype).removeprefix("torch."),
        "timed": ON_DEVICE if graph else EAGER,
        "backend": explanation.backend,
        "config": explanation.config,
        "config_source": explanation.config_source,
        "bytes": num_bytes,
        "operations": operations,
        "error": error,
        "seconds": seconds,
        "low": timings[ours].low,
        "high": timings[ours].high,
        "rounds": effort.rounds,
        "rotating_bytes": len(arguments) * num_bytes,
        "peers": {name: timings[name].median for name in others},
        "peers_left_out": left_out,
        "best_peer": best,
        "speedup": timings[best].median / seconds if best else None,
        "copy_bandwidth": ceilings.bandwidth,
        "matmul_rate": ceilings.matmul_rate,
        "share_of_copy_bandwidth": num_bytes / seconds / ceilings.bandwidth,
        "share_of_matmul_rate": operations / seconds / ceilings.matmul_rate if by_operations else None,
        "goal": case.goal,
    }
    return row | {"goal_met": judged(case, row) if graph or device == "cpu" else None}


def measured(case, device, effort, ceilings):
    """The rows of a case: on a GPU the device's time, and where the host's may show beside it, that of eager calls."""
    if device == "cuda":
        row = measure(case, device, effort, ceilings, graph=True)
        yield row
        if row["seconds"] > HOST_HIDDEN:
            return
    yield measure(case, device, effort, ceilings, graph=False)


def judged(case, row):
    """Whether a row reaches the case's goal; None where there is none, or nobody to beat."""
    ratio, part = case.goal
    rivals = [seconds for name, seconds in row["peers"].items() if not case.against or name in case.against]
    if case.goal == (None, None) or (ratio is not None and not rivals):
        return None
    reached = row["share_of_copy_bandwidth"] if row["share_of_matmul_rate"] is None else row["share_of_matmul_rate"]
    return (ratio is None or min(rivals) >= ratio * row["seconds"]) and (part is None or reached >= part)


def arguments_of(parser):
    """Declare the options of a benchmark and return what the command line says."""
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="few shapes and rounds, to see that it runs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows to a file, again after each case")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no case after so long")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs an NVIDIA GPU, and torch finds none")
    return args


def command(args):
    """What to type to measure the same again."""
    return f"python benchmarks/{Path(sys.argv[0]).name} --device {args.device}{' --quick' * args.quick}"


def progress(row):
    """One line of a row: every peer's time by ours, and why peers are missing."""
    peers = [f"{name} {seconds / row['seconds']:.2f}" for name, seconds in row["peers"].items()]
    peers += [f"{name} left out ({reason})" for name, reason in row["peers_left_out"].items()]
    timed = "graph" if row["timed"] == ON_DEVICE else "eager"
    figures = f"{row['seconds'] * 1e6:.1f}us {share(row)} {row['operations'] / row['seconds'] / 1e12:.1f} TFLOP/s"
    return f"{row['op']} {row['shape']} {row['dtype']} {timed} {figures} [{row['backend']}]: {', '.join(peers)}"


def main(cases):
    """Run a benchmark's cases from its command line and print the table.

    A case that fails is reported and the next one runs; the exit status is then 1.

    Args:
        cases: Function (device, quick) that yields the cases.
    """
    started = time.monotonic()
    args = arguments_of(argparse.ArgumentParser(description=sys.modules["__main__"].__doc__.split("\n")[0]))
    effort = effort_of(args.device, args.quick)
    provenance = environment(args.device) | {"command": command(args), "quick": args.quick, "peers": VERSIONS}
    ceilings = measure_ceilings(args.device, effort)
    rows, failed = [], 0
    with torch.no_grad():
        for case in cases(args.device, args.quick):
            if time.monotonic() - started > args.seconds:
                print(f"out of time before {case.op} {case.shape}")
                break
            forget_compiled()
            try:
                for row in measured(case, args.device, effort, ceilings):
                    rows.append(row | {"environment": provenance})
                    print(progress(row), flush=True)
            except Exception as error:
                failed += 1
                print(f"failed: {case.op} {case.shape}: {brief(error)}", flush=True)
            if args.json:
                write(args.json, rows)
    for name, reason in UNIMPORTABLE.items():
        print(f"absent peer: {name} ({reason})")
    print(
        f"{provenance['device']}, torch {provenance['torch']}, {provenance['date']}, "
        f"BW* {ceilings.bandwidth / 1e9:.1f} GB/s, TC* {ceilings.matmul_rate / 1e12:.2f} TFLOP/s"
    )
    print(table(rows))
    sys.exit(int(failed > 0))
