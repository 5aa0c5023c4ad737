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
    "tests/attention": 2, "tests/operators": 2, "attention": 2, "ceilings": 0.5, "host_cost": 0.5, "sanitizer": 0.5,
    "model": 3, "model_batch": 2, "tune": 2,
}  # fmt: skip
SANITIZED = "test_accuracy_and_determinism"  # small grids of the operators of one tensor
MODEL = ROOT / "tests/data/configs/llama_3_1_8b.json"
MODELS = {  # stage -> options of bench model
    "model": ["--prompts", "1", "--prompt-tokens", "128", "--new-tokens", "128"],
    "model_batch": ["--prompts", "32", "--prompt-tokens", "16-512", "--new-tokens", "64"],
}
DRY_RUN = {"TRITON_INTERPRET": "1", "GPU_TESTS_DRY_RUN": "1"}
NEEDS_GPU = "needs a GPU: this is a dry run"
NOT_INTERPRETED = {"tests/attention_hopper": "no interpreter has the Hopper kernel; make test runs these emulated"}


@dataclass(frozen=True)
class Stage:
    """A process to run.

    Attributes:
        name: What `--only` calls it; those of tests are ``tests/<file>``.
        command: Its command line.
        weight: Its part of the time.
        rows: The file that it writes, if any, with rows of operators.
        figures: The file that it writes, if any, with figures of another kind.
        variables: What it finds in the environment beside the usual.
        grace: Seconds beyond those that ``--seconds`` tells it; None: it is not told.
        absent: Why it cannot run on this machine.
        forked: Whether it begins as a copy of the gate's process, which has imported what it needs.
    """

    name: str
    command: list
    weight: float = 1
    rows: Path | None = None
    figures: Path | None = None
    variables: dict = field(default_factory=dict)
    grace: float | None = None
    absent: str | None = None
    forked: bool = False

    @property
    def is_test(self):
        """Whether it runs GPU tests."""
        return self.name.startswith("tests/")


def stages(scratch, quick, dry_run):
    """Every stage in order: ceilings, build, GPU tests by file, benchmarks, host cost, models, sanitizer, tuning.

    Those of a dry run compute on the CPU, interpret kernels, and are forked from the gate's process: importing would
    take most of their time.
    """
    device = "cpu" if dry_run else "cuda"
    measured = _measured(scratch, dry_run, ["--device", device] + ["--quick"] * (quick or dry_run))
    for stage in (*measured, *_only_on_gpu(scratch, NEEDS_GPU if dry_run else None)):
        stage = replace(stage, weight=WEIGHTS.get(stage.name, 1))
        if dry_run:
            absent = stage.absent or NOT_INTERPRETED.get(stage.name)
            stage = replace(stage, variables=DRY_RUN, forked=True, absent=absent)
        yield stage


def _measured(scratch, dry_run, options):
    """What runs everywhere."""
    yield Stage("ceilings", [sys.executable, str(HERE / "ceilings.py"), *options])
    built = scratch / "cubin" if dry_run else ROOT / "fusedops" / "_cubin"
    yield Stage("build", [sys.executable, str(HERE / "build_kernels.py"), str(built)])
    has_xdist = importlib.util.find_spec("xdist") is not None and not dry_run
    parallel = ["-n", str(min(TEST_PROCESSES, os.cpu_count()))] if has_xdist else []
    for path in sorted((ROOT / "tests/gpu").glob("test_*.py")):  # a context that breaks costs one file
        yield Stage(f"tests/{path.stem.removeprefix('test_')}", [*PYTEST, *parallel, str(path)])
    for script in sorted(HERE.glob("bench_*.py")):
        rows = scratch / f"{script.stem}.json"
        command = [sys.executable, str(script), "--json", str(rows), *options]
        yield Stage(script.stem.removeprefix("bench_"), command, rows=rows, grace=20)  # to finish a case
    figures = scratch / "host_cost.json"
    command = [sys.executable, str(HERE / "host_cost.py"), "--json", str(figures), *options[2:]]
    absent = None if shutil.which(os.environ.get("CC", "cc")) else "needs a C compiler, for the driver's stub"
    yield Stage("host_cost", command, figures=figures, absent=absent)


def _only_on_gpu(scratch, absent):
    """What has no tiny version, with the reason why it is left out, if any."""
    without_hf = None if importlib.util.find_spec("transformers") else "transformers is not installed"
    for name, options in MODELS.items():
        figures = scratch / f"{name}.json"
        command = [sys.executable, "-m", "fusedops", "bench", "model", "--model", str(MODEL), "--device", "cuda"]
        command += ["--dtype", "bfloat16", "--json", str(figures), *options]
        yield Stage(name, command, figures=figures, absent=absent or without_hf)
    sanitizer = shutil.which("compute-sanitizer")
    command = [sanitizer, "--error-exitcode", "99", *PYTEST, "-k", SANITIZED, str(ROOT / "tests/gpu/test_operators.py")]
    without = None if sanitizer else "compute-sanitizer is not installed"
    yield Stage("sanitizer", command, absent=absent or without, variables={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
    command = [sys.executable, "-m", "fusedops", "tune", "--model", str(MODEL)]
    yield Stage("tune", command, grace=30, absent=absent)


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
