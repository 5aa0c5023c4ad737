"""Time an operator against torch's own ways on this machine; needs a source checkout."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import fusedops
from fusedops.cli.console import CommandError, check_output, write_json

FOLDER = Path(fusedops.__file__).resolve().parent.parent / "benchmarks"


def add_arguments(parser):
    """Declare the command's arguments."""
    parser.add_argument("op", help="benchmark to run, or all")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument("--quick", action="store_true", help="few shapes and rounds, to see that it runs")
    parser.add_argument("--json", metavar="FILE", help="write every row to a file")


def run(args):
    """Run the benchmarks one after the other; 1 where one of them failed."""
    scripts = available()
    if not scripts:
        raise CommandError(f"needs a source checkout: there is no benchmark in {FOLDER}")
    if args.op != "all" and args.op not in scripts:
        raise CommandError(f"op must be all or one of {', '.join(scripts)}, got {args.op!r}")
    check_output(args.json)
    chosen = scripts if args.op == "all" else {args.op: scripts[args.op]}
    failed, rows = [], []
    with tempfile.TemporaryDirectory() as folder:
        for name, script in chosen.items():
            output = Path(folder) / f"{name}.json"
            if subprocess.run(command(script, args.device, args.quick, output)).returncode:
                failed.append(name)
            if output.exists():
                rows += json.loads(output.read_text())
    if args.json:
        write_json(args.json, rows)
    if failed:
        print(f"fusedops bench: failed: {', '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


def available():
    """Benchmark scripts by the name of their operator."""
    return {path.stem.removeprefix("bench_"): path for path in sorted(FOLDER.glob("bench_*.py"))}


def command(script, device, quick, output):
    """The command line that runs one benchmark script."""
    line = [sys.executable, str(script), "--json", str(output)]
    return line + (["--device", device] if device else []) + (["--quick"] if quick else [])
