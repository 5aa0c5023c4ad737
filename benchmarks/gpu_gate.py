"""On a machine with an NVIDIA GPU: run the GPU tests and every benchmark, and keep what they say in one place.

    python benchmarks/gpu_gate.py [--minutes 25] [--quick] [--output benchmarks/results]

Stages run one after the other; one that fails or runs out of time does not stop the next. The folder
``<output>/<gpu>_<date>/`` receives one JSON file of rows per benchmark, the output of each stage, and ``summary.json``.
Exit status: 0 all stages passed, 1 one did not, 2 there is no CUDA device.
"""

import argparse
import datetime
import json
import os
import platform
import re
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
NO_DEVICE = 2
COMPILED = {**os.environ, "TRITON_INTERPRET": "0"}  # the tests would choose the interpreter
NO_TESTS_COLLECTED = 5  # pytest's exit status


def environment(torch, triton):
    """What the numbers depend on, as plain data."""
    properties = torch.cuda.get_device_properties(0)
    return {
        "device": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_bytes": properties.total_memory,
        "driver": first_line_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
        "commit": first_line_of("git", "-C", str(ROOT), "rev-parse", "HEAD"),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def first_line_of(*command):
    """First line that a command prints, None where it cannot run."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")[0]
    except (OSError, subprocess.CalledProcessError):
        return None


def stages(folder, quick):
    """(name, command) of every stage, in order: the tests, then each benchmark."""
    yield "tests", [sys.executable, "-m", "pytest", "-q", "-m", "gpu", str(ROOT / "tests")]
    for script in sorted(HERE.glob("bench_*.py")):
        command = [sys.executable, str(script), "--device", "cuda", "--json", str(folder / f"{script.stem}.json")]
        yield script.stem, command + (["--quick"] if quick else [])


def run_stage(name, command, folder, seconds):
    """Run one stage with a time limit, show and keep its output, and return what became of it."""
    start = time.monotonic()
    log = folder / f"{name}.log"
    print(f"== {name}: {' '.join(command)}", flush=True)
    if seconds <= 0:
        return {"stage": name, "result": "not run, out of time", "seconds": 0.0}
    with open(log, "w") as output:
        try:
            status = subprocess.run(
                command, stdout=output, stderr=subprocess.STDOUT, cwd=ROOT, timeout=seconds, env=COMPILED
            ).returncode
        except subprocess.TimeoutExpired:
            status = None
    print(log.read_text(errors="replace")[-4000:], flush=True)
    result = {None: "out of time", 0: "passed"}.get(status, f"failed with status {status}")
    if name == "tests" and status == NO_TESTS_COLLECTED:
        result = "there is no GPU test"
    return {"stage": name, "result": result, "seconds": round(time.monotonic() - start, 1)}


def main(argv=None):
    """Run all stages within the time given and write the summary."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=25, help="for all stages together (default: 25)")
    parser.add_argument("--quick", action="store_true", help="few shapes and rounds")
    parser.add_argument("--output", type=Path, default=HERE / "results", help="default: benchmarks/results")
    args = parser.parse_args(argv)
    deadline = time.monotonic() + 60 * args.minutes

    import torch

    if not torch.cuda.is_available():
        print("gpu_gate: needs an NVIDIA GPU, and torch finds none", file=sys.stderr)
        return NO_DEVICE
    import triton

    found = environment(torch, triton)
    print(json.dumps(found, indent=2), flush=True)
    gpu = re.sub(r"[^a-z0-9]+", "_", found["device"].lower()).strip("_")
    folder = args.output / f"{gpu}_{found['date'][:16].replace(':', '')}"
    folder.mkdir(parents=True, exist_ok=True)
    summary = {"environment": found, "stages": []}
    for name, command in stages(folder, args.quick):
        summary["stages"].append(run_stage(name, command, folder, deadline - time.monotonic()))
        (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    for stage in summary["stages"]:
        print(f"{stage['stage']:<24}{stage['result']:<24}{stage['seconds']:>8.1f} s")
    print(f"written to {folder}")
    return int(any(stage["result"] != "passed" for stage in summary["stages"]))


if __name__ == "__main__":
    sys.exit(main())
