"""On a machine with an NVIDIA GPU: run the GPU tests and every benchmark, and keep what they say in one place.

    python benchmarks/gpu_gate.py [--minutes 25] [--only tests,rms_norm] [--quick] [--resume] [--out benchmarks/results]
    python benchmarks/gpu_gate.py --dry-run [--out build/dry_run]    # without a GPU: interpreted, on tiny shapes

Works from a source checkout that is not installed; torch, triton, pytest and hypothesis are enough. Stages (ceilings,
build of csrc/cuda, tests by file, benchmarks, host cost, whole models, compute-sanitizer, tuning) run one after the
other, each in a process of its own and in its part of the time; one that fails, crashes or runs out of time does not
stop the next. The folder ``<out>/<device>_<date>/`` receives ``rows.json`` (all rows of the benchmarks),
``host_cost.json``, ``model.json`` and ``model_batch.json`` (other figures), ``summary.json`` (environment, what became
of each stage, goals 1 to 12) and ``gate.log`` (all output); ``--resume`` goes on in the newest such folder with the
stages that it has not ended. The goals and the table of all rows are printed last.
Exit status: 0 no stage failed, 1 one did or had no time, 2 there is no CUDA device, or nothing to run.
"""

import argparse
import json
import os
import re
import shutil
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import _goals
import _processes
from _rows import NOT_RUN, environment, key, table, write
from _stages import MODELS, chosen, stages

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
NO_DEVICE = NOTHING_TO_RUN = 2
NO_TESTS_COLLECTED = 5  # pytest's exit status
OUT_OF_TIME = "out of time"
ENVIRONMENT = {
    "TRITON_INTERPRET": "0",  # the tests would choose the interpreter
    "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
    "PYTHONUNBUFFERED": "1",
}


def run_stage(stage, log, seconds):
    """Run one stage with a time limit, show and keep its output, and return what became of it."""
    start = time.monotonic()
    if stage.absent is not None or seconds <= 0:
        return {"stage": stage.name, "result": f"not run, {stage.absent or OUT_OF_TIME}", "seconds": 0.0}
    told = [] if stage.grace is None else ["--seconds", f"{max(1, seconds - stage.grace):.0f}"]
    command = stage.command + told
    heading = f"== {stage.name}, at most {seconds:.0f} s: {' '.join(command)}\n"
    print(heading, end="", flush=True)
    variables = {**os.environ, **ENVIRONMENT, **stage.variables}
    with tempfile.TemporaryFile("w+") as output:
        status = _processes.status_of(command, variables, output, seconds, stage.forked)
        output.seek(0)
        said = output.read()
    with open(log, "a") as kept:
        kept.write(heading + said)
    print(said[-4000:], flush=True)
    result = in_words(stage, status, said)
    return {"stage": stage.name, "result": result, "seconds": round(time.monotonic() - start, 1)}


def in_words(stage, status, said):
    """What became of a stage that ended with that status (None: it was ended) after it had said so much."""
    if status is None:
        return OUT_OF_TIME
    if status < 0:
        return f"crashed with signal {-status}"
    if status == NOT_RUN:
        return f"not run, {(said.strip().splitlines() or ['it did not say why'])[-1]}"
    if stage.is_test and status == NO_TESTS_COLLECTED:
        return "not run, no test is chosen"
    return "passed" if status == 0 else f"failed with status {status}"


def has_ended(result):
    """Whether a stage need not run again; one that failed would fail again."""
    return OUT_OF_TIME not in result["result"]


def is_bad(result):
    """Whether a stage failed, or should have run."""
    return not has_ended(result) or not result["result"].startswith(("passed", "not run"))


def run_stages(plan, folder, deadline, earlier=()):
    """Run the stages, each for at most one and a half of its share of what is left.

    Yields what became of the stages so far after each of them, when ``rows.json`` in `folder` has their rows.

    Args:
        earlier: What became of stages that ran before, whose rows are there; the plan leaves them out.
    """
    results, kept = list(earlier), folder / "rows.json"
    rows = json.loads(kept.read_text()) if results and kept.exists() else []
    write(kept, rows)
    for index, stage in enumerate(plan):
        left = deadline - time.monotonic()
        share = stage.weight / sum(other.weight for other in plan[index:])
        results.append(run_stage(stage, folder / "gate.log", min(left, left * share * 1.5)))
        if stage.rows and stage.rows.exists():
            rows = merged(rows, json.loads(stage.rows.read_text()))
        if stage.figures and stage.figures.exists():
            shutil.copy(stage.figures, folder)
        write(kept, rows)
        yield results


def merged(rows, new):
    """The rows, with those in the place of older ones that are about the same."""
    about = {(*key(row), row["timed"]) for row in new}
    return [row for row in rows if (*key(row), row["timed"]) not in about] + new


def resumed(out, name):
    """The newest folder of a machine of that name, and what became of the stages that ended there.

    Raises:
        ValueError: there is none.
    """
    folders = sorted(path.parent for path in out.glob(f"{name}_*/summary.json"))
    if not folders:
        raise ValueError(f"gpu_gate: --resume needs the results of an earlier run in {out}, there are none of {name}")
    summary = json.loads((folders[-1] / "summary.json").read_text())
    return folders[-1], [result for result in summary["stages"] if has_ended(result)]


def judged(folder):
    """The goals, by all that the stages have left in a folder."""
    figures = {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json") if path.stem != "summary"}
    models = [row for name in MODELS for row in figures.get(name, [])]
    return _goals.judge(figures["rows"], figures.get("host_cost", []), models)


def parsed(argv):
    """What the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=25, help="for all stages together (default: 25)")
    parser.add_argument("--only", metavar="NAMES", help="stages, separated by commas: tests, a benchmark's operator")
    parser.add_argument("--quick", action="store_true", help="few shapes and rounds")
    parser.add_argument("--dry-run", action="store_true", help="without a GPU: interpreted, on tiny shapes")
    parser.add_argument("--resume", action="store_true", help="go on where the last run stopped")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results, of a dry run build/dry_run")
    args = parser.parse_args(argv)
    args.out = args.out or (ROOT / "build/dry_run" if args.dry_run else HERE / "results")  # no figure of it is kept
    return args


def main(argv=None):
    """Run all stages within the time given, write the summary, and print the table."""
    args = parsed(argv)
    deadline = time.monotonic() + 60 * args.minutes
    if args.dry_run:
        _processes.preload()

    import torch

    if not args.dry_run and not torch.cuda.is_available():
        print("gpu_gate: needs an NVIDIA GPU (or --dry-run), and torch finds none", file=sys.stderr)
        return NO_DEVICE
    found = environment("cpu" if args.dry_run else "cuda")
    print(json.dumps(found, indent=2), flush=True)
    name = re.sub(r"[^a-z0-9]+", "_", found["device"].lower()).strip("_")
    folder, results, goals = args.out / f"{name}_{found['date'][:19].replace(':', '')}", [], []
    with tempfile.TemporaryDirectory() as scratch:
        try:
            plan = chosen(list(stages(Path(scratch), args.quick, args.dry_run)), args.only)
            if args.resume:
                folder, results = resumed(args.out, name)
        except ValueError as error:
            print(error, file=sys.stderr)
            return NOTHING_TO_RUN
        folder.mkdir(parents=True, exist_ok=True)
        ended = {result["stage"] for result in results}
        plan = [stage for stage in plan if stage.name not in ended]
        for so_far in run_stages(plan, folder, deadline, results):
            results = so_far
            goals = judged(folder)
            summary = {"environment": found, "stages": results, "goals": list(map(asdict, goals))}
            (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    rows = json.loads((folder / "rows.json").read_text())
    for result in results:
        print(f"{result['stage']:<28}{result['seconds']:>8.1f} s  {result['result']}")
    print(*goals, sep="\n")
    print(f"written to {folder}")
    print(table(rows))
    return int(any(map(is_bad, results)))


if __name__ == "__main__":
    sys.exit(main())
