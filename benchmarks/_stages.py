"""What the gate runs: its stages in order, and which of them the command line chooses. Needs nothing but Python."""

import importlib.util
import os
import shutil
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

from _rows import ROOT

HERE = Path(__file__).resolve().parent
PYTEST = [sys.executable, "-m", "pytest", "-v", "-ra", "--tb=short", "-m", "gpu"]  # -v: killed, it has named the tests
TEST_PROCESSES = 12  # most of their time is compilation; more would fill the GPU's memory
WEIGHTS = {  # parts of the time; 1 for all others
    "tests/attention": 2, "tests/operators": 2, "attention": 2, "ceilings": 0.5, "sanitizer": 0.5, "tune": 2,
}  # fmt: skip
SANITIZED = "test_accuracy_and_determinism"  # small grids of the operators of one tensor
TUNED_MODEL = ROOT / "tests/data/configs/llama_3_1_8b.json"
DRY_RUN = {"TRITON_INTERPRET": "1", "GPU_TESTS_DRY_RUN": "1"}
NEEDS_GPU = "needs a GPU: this is a dry run"


@dataclass(frozen=True)
class Stage:
    """A process to run.

    Attributes:
        name: What `--only` calls it; those of tests are ``tests/<file>``.
        command: Its command line.
        weight: Its part of the time.
        rows: The file of rows that it writes, if any.
        variables: What it finds in the environment beside the usual.
        grace: Seconds beyond those that ``--seconds`` tells it; None: it is not told.
        absent: Why it cannot run on this machine.
    """

    name: str
    command: list
    weight: float = 1
    rows: Path | None = None
    variables: dict = field(default_factory=dict)
    grace: float | None = None
    absent: str | None = None

    @property
    def is_test(self):
        """Whether it runs GPU tests."""
        return self.name.startswith("tests/")


def stages(scratch, quick, dry_run):
    """Every stage in order: ceilings, build, GPU tests by file, benchmarks, sanitizer, tuning."""
    device = "cpu" if dry_run else "cuda"
    yield _stage("ceilings", [sys.executable, str(HERE / "ceilings.py"), "--device", device])
    built = scratch / "cubin" if dry_run else ROOT / "fusedops" / "_cubin"
    yield _stage("build", [sys.executable, str(HERE / "build_kernels.py"), str(built)])
    parallel = ["-n", str(min(TEST_PROCESSES, os.cpu_count()))] if importlib.util.find_spec("xdist") else []
    variables = DRY_RUN if dry_run else {}
    for path in sorted((ROOT / "tests/gpu").glob("test_*.py")):  # a context that breaks costs one file
        name = f"tests/{path.stem.removeprefix('test_')}"
        yield _stage(name, [*PYTEST, *parallel, str(path)], variables=variables)
    options = ["--device", device] + ["--quick"] * (quick or dry_run)
    for script in sorted(HERE.glob("bench_*.py")):
        name, rows = script.stem.removeprefix("bench_"), scratch / f"{script.stem}.json"
        command = [sys.executable, str(script), "--json", str(rows), *options]
        yield _stage(name, command, rows=rows, grace=20)  # to finish a case
    sanitizer = shutil.which("compute-sanitizer")
    absent = NEEDS_GPU if dry_run else None if sanitizer else "compute-sanitizer is not installed"
    command = [sanitizer, "--error-exitcode", "99", *PYTEST, "-k", SANITIZED, str(ROOT / "tests/gpu/test_operators.py")]
    yield _stage("sanitizer", command, absent=absent, variables={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
    command = [sys.executable, "-m", "fusedops", "tune", "--model", str(TUNED_MODEL)]
    yield _stage("tune", command, grace=30, absent=NEEDS_GPU if dry_run else None)


def _stage(name, command, **more):
    return Stage(name, command, WEIGHTS.get(name, 1), **more)


def chosen(found, only):
    """The stages that `only` names; the tests among them are those of the operators named beside them, if any.

    Raises:
        ValueError: a name is not that of a stage.
    """
    if not only:
        return found
    wanted = set(only.split(","))
    names = {"tests"} | {stage.name for stage in found}
    if unknown := sorted(wanted - names):
        known = ", ".join(sorted(names))
        raise ValueError(f"gpu_gate: --only must name stages out of {known}, got {', '.join(unknown)}")
    operators = [stage.name for stage in found if stage.rows and stage.name in wanted]
    chosen_tests = ["-k", " or ".join(operators)] if operators else []
    picked = []
    for stage in found:
        if stage.is_test and wanted & {"tests", stage.name}:
            picked.append(replace(stage, command=stage.command + chosen_tests))
        elif stage.name in wanted:
            picked.append(stage)
    return picked
