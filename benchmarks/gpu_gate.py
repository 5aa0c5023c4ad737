"""On a machine with an NVIDIA GPU: run the GPU tests and every benchmark, and keep what they say in one place.

    python benchmarks/gpu_gate.py [--minutes 25] [--only tests,rms_norm] [--quick] [--out benchmarks/results]
    python benchmarks/gpu_gate.py --dry-run --out DIR    # without a GPU: the same stages, interpreted, on tiny shapes

Works from a source checkout that is not installed; torch, triton, pytest and hypothesis are enough. Stages run one
after the other, each in its part of the time; one that fails or runs out of time does not stop the next. The folder
``<out>/<gpu>_<date>/`` receives ``rows.json`` (all rows of the benchmarks), ``summary.json`` (environment, and what
became of each stage) and ``gate.log`` (all output). The table of all rows is printed last.
Exit status: 0 all stages passed, 1 one did not, 2 there is no CUDA device, or nothing to run.
"""

import argparse
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

from _rows import environment, table, write

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
NO_DEVICE = NOTHING_TO_RUN = 2
PYTEST = [sys.executable, "-m", "pytest", "-v", "-ra", "--tb=short", "-m", "gpu"]  # -v: killed, it has named the tests
NO_TESTS_COLLECTED = 5  # pytest's exit status
TEST_PROCESSES = 12  # most of their time is compilation; more would fill the GPU's memory
TESTS_WEIGHT = 3  # parts of the time
WEIGHTS = {"attention": 2}  # 1 for every other benchmark
GRACE = 20  # seconds that a benchmark may need beyond its time to finish a case
ENVIRONMENT = {
    **os.environ,
    "TRITON_INTERPRET": "0",  # the tests would choose the interpreter
    "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
    "PYTHONUNBUFFERED": "1",
}
DRY_RUN = {"TRITON_INTERPRET": "1", "GPU_TESTS_DRY_RUN": "1"}


@dataclass(frozen=True)
class Stage:
    """A process to run: its name, its command, the part of the time it gets, the file of rows that it writes, and what
    it finds in the environment beside the usual."""

    name: str
    command: list
    weight: float = 1
    rows: Path | None = None
    variables: dict = field(default_factory=dict)


def stages(scratch, quick, dry_run):
    """Every stage in order: the GPU tests, then each benchmark."""
    parallel = ["-n", str(min(TEST_PROCESSES, os.cpu_count()))] if importlib.util.find_spec("xdist") else []
    variables = DRY_RUN if dry_run else {}
    yield Stage("tests", [*PYTEST, *parallel, str(ROOT / "tests/gpu")], TESTS_WEIGHT, variables=variables)
    options = ["--device", "cpu", "--quick"] if dry_run else ["--device", "cuda"] + ["--quick"] * quick
    for script in sorted(HERE.glob("bench_*.py")):
        name, rows = script.stem.removeprefix("bench_"), scratch / f"{script.stem}.json"
        command = [sys.executable, str(script), "--json", str(rows), *options]
        yield Stage(name, command, WEIGHTS.get(name, 1), rows)


def chosen(found, only):
    """The stages that `only` names; the tests among them are those of the operators named beside them, if any.

    Raises:
        ValueError: a name is not that of a stage.
    """
    if not only:
        return found
    wanted = only.split(",")
    if unknown := sorted(set(wanted) - {stage.name for stage in found}):
        known = ", ".join(stage.name for stage in found)
        raise ValueError(f"gpu_gate: --only must name stages out of {known}, got {', '.join(unknown)}")
    operators = [name for name in wanted if name != "tests"]
    chosen_tests = ["-k", " or ".join(operators)] if operators else []
    return [
        stage if stage.rows else replace(stage, command=stage.command + chosen_tests)
        for stage in found
        if stage.name in wanted
    ]


def run_stage(stage, log, seconds):
    """Run one stage with a time limit, show and keep its output, and return what became of it."""
    start = time.monotonic()
    if seconds <= 0:
        return {"stage": stage.name, "result": "not run, out of time", "seconds": 0.0}
    command = stage.command + (["--seconds", f"{max(1, seconds - GRACE):.0f}"] if stage.rows else [])
    heading = f"== {stage.name}, at most {seconds:.0f} s: {' '.join(command)}\n"
    print(heading, end="", flush=True)
    variables = {**ENVIRONMENT, **stage.variables}
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, cwd=ROOT, env=variables, start_new_session=True
        )
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # a test's own processes too
            process.wait()
            status = None
        output.seek(0)
        said = output.read()
    with open(log, "a") as kept:
        kept.write(heading + said)
    print(said[-4000:], flush=True)
    result = {None: "out of time", 0: "passed"}.get(status, f"failed with status {status}")
    if stage.rows is None and status == NO_TESTS_COLLECTED:
        result = "there is no GPU test"
    return {"stage": stage.name, "result": result, "seconds": round(time.monotonic() - start, 1)}


def run_stages(plan, folder, deadline):
    """Run the stages, each for at most one and a half of its share of what is left.

    Yields what became of the stages so far after each of them, when ``rows.json`` in `folder` has their rows.
    """
    results, rows = [], []
    write(folder / "rows.json", rows)
    for index, stage in enumerate(plan):
        left = deadline - time.monotonic()
        share = stage.weight / sum(other.weight for other in plan[index:])
        results.append(run_stage(stage, folder / "gate.log", min(left, left * share * 1.5)))
        if stage.rows and stage.rows.exists():
            rows += json.loads(stage.rows.read_text())
        write(folder / "rows.json", rows)
        yield results


def main(argv=None):
    """Run all stages within the time given, write the summary, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=25, help="for all stages together (default: 25)")
    parser.add_argument("--only", metavar="NAMES", help="stages, separated by commas: tests, a benchmark's operator")
    parser.add_argument("--quick", action="store_true", help="few shapes and rounds")
    parser.add_argument("--dry-run", action="store_true", help="without a GPU: interpreted, on tiny shapes")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="default: benchmarks/results")
    args = parser.parse_args(argv)
    deadline = time.monotonic() + 60 * args.minutes

    import torch

    if not args.dry_run and not torch.cuda.is_available():
        print("gpu_gate: needs an NVIDIA GPU (or --dry-run), and torch finds none", file=sys.stderr)
        return NO_DEVICE
    found = environment("cpu" if args.dry_run else "cuda")
    print(json.dumps(found, indent=2), flush=True)
    name = re.sub(r"[^a-z0-9]+", "_", found["device"].lower()).strip("_")
    folder = args.out / f"{name}_{found['date'][:19].replace(':', '')}"
    with tempfile.TemporaryDirectory() as scratch:
        try:
            plan = chosen(list(stages(Path(scratch), args.quick, args.dry_run)), args.only)
        except ValueError as error:
            print(error, file=sys.stderr)
            return NOTHING_TO_RUN
        folder.mkdir(parents=True, exist_ok=True)
        for results in run_stages(plan, folder, deadline):
            summary = {"environment": found, "stages": results}
            (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    for stage in results:
        print(f"{stage['stage']:<24}{stage['result']:<24}{stage['seconds']:>8.1f} s")
    print(f"written to {folder}")
    print(table(json.loads((folder / "rows.json").read_text())))
    return int(any(stage["result"] != "passed" for stage in results))


if __name__ == "__main__":
    sys.exit(main())
