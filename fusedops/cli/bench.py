"""Time an operator against torch's own ways on this machine, or compare two earlier results.

Timing needs a source checkout. ``bench compare A.json B.json`` tells what moved from A to B beyond noise. ``bench
model`` and ``bench accuracy`` are commands of their own, `fusedops.cli.bench_model` and `fusedops.cli.bench_accuracy`.
"""

import importlib.util
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import fusedops
from fusedops.cli.console import CommandError, Console, check_output, first_line, write_json

FOLDER = Path(fusedops.__file__).resolve().parent.parent / "benchmarks"
NOISE = 0.03  # of the time: what clocks and neighbours move it by from run to run
NEEDED = ("seconds", "low", "high", "environment")  # of a row, beside what names it
MATTERS = ("driver", "torch", "triton", "threads", "quick")  # to times, of what an environment says


def add_arguments(parser):
    """Declare the command's arguments."""
    parser.add_argument("op", help="benchmark to run, or all, or compare; model, accuracy: see their --help")
    parser.add_argument("files", nargs="*", metavar="FILE", help="with compare: rows before and after, from --json")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument("--quick", action="store_true", help="few shapes and rounds, to see that it runs")
    parser.add_argument("--json", metavar="FILE", help="write every row to a file")
    parser.add_argument("--plot", metavar="DIR", help="draw the roofline, bars beside peers, latency against rows")


def run(args):
    """Run the benchmarks one after the other, or compare two files; 1 where one failed, or became slower."""
    if args.op == "compare":
        return compare_files(args.files)
    if args.op in ("model", "accuracy"):
        raise CommandError(f"{args.op} must come right after bench, and its options after it")
    if args.files:
        raise CommandError(f"{args.op} must stand alone; files are for compare, got {' '.join(args.files)}")
    scripts = available()
    if not scripts:
        raise CommandError(f"needs a source checkout: there is no benchmark in {FOLDER}")
    if args.op != "all" and args.op not in scripts:
        raise CommandError(f"op must be all or one of {', '.join(scripts)}, got {args.op!r}")
    check_output(args.json)
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        raise CommandError("--plot needs matplotlib: pip install 'fusedops[bench]'")
    chosen = scripts if args.op == "all" else {args.op: scripts[args.op]}
    failed, rows = [], []
    with tempfile.TemporaryDirectory() as folder:
        for name, script in chosen.items():
            output = Path(folder) / f"{name}.json"
            if subprocess.run(command(script, args.device, args.quick, output)).returncode:
                failed.append(name)
            if output.exists():
                rows += json.loads(output.read_text())
        if args.plot and rows and draw(rows, args.plot, args.op, Path(folder) / "rows.json"):
            failed.append("--plot")
    if args.json:
        write_json(args.json, rows)
    if failed:
        print(f"fusedops bench: failed: {', '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


def draw(rows, folder, prefix, scratch):
    """Draw rows into a folder as ``<prefix>_<picture>.png``, and return the exit status of what draws."""
    scratch.write_text(json.dumps(rows))
    return subprocess.run([sys.executable, str(FOLDER / "plots.py"), str(scratch), str(folder), prefix]).returncode


def compare_files(files):
    """Print what moved between two files of rows; 1 where something became slower."""
    if len(files) != 2:
        raise CommandError(f"compare must have two files, got {len(files)}")
    before, after = map(read_rows, files)
    devices = valued("device", before, after)
    if len(devices) > 1:
        raise CommandError(f"compare must have rows of one device, got {' and '.join(devices)}")
    if not before.keys() & after.keys():
        raise CommandError(f"compare must have files with a row in common, {files[0]} and {files[1]} have none")
    moved, slower = movements(before, after)
    console = Console()
    for name in MATTERS:
        if len(values := valued(name, before, after)) > 1:
            console.line(f"Not alike: {name} {' and '.join(values)}")
    if moved:
        header = ("", "shape", "dtype", "timed", "before us", "after us", "change")
        console.table("Beyond noise", header, moved)
    same = len(before.keys() & after.keys()) - len(moved)
    console.line(f"{same} rows unchanged, {len(moved) - slower} faster, {slower} slower")
    for name, only in (("before", before.keys() - after.keys()), ("after", after.keys() - before.keys())):
        if only:
            console.line(f"{len(only)} rows only {name}: {', '.join(' '.join(key[:3]) for key in sorted(only))}")
    return int(slower > 0)


def valued(name, *files):
    """What the environments of files of rows say of a name, as sorted text."""
    return sorted({str(row["environment"].get(name)) for rows in files for row in rows.values()})


def read_rows(path):
    """Rows of a file by operator, shape, dtype and way of timing."""
    try:
        rows = json.loads(Path(path).read_text())
        if missing := [name for name in NEEDED for row in rows if name not in row]:
            raise ValueError(f"a row without {missing[0]}")
        return {(row["op"], row["shape"], row["dtype"], row["timed"]): row for row in rows}
    except OSError as error:
        raise CommandError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, TypeError, KeyError) as error:
        raise CommandError(f"{path} must hold rows that bench --json wrote, got {first_line(error)}") from error


def movements(before, after):
    """Table lines of the rows whose rounds do not overlap and whose medians differ by more than NOISE; and how many
    of them are slower."""
    lines, slower = [], 0
    for key in before.keys() & after.keys():
        old, new = before[key], after[key]
        change = new["seconds"] / old["seconds"] - 1
        apart = new["low"] > old["high"] or new["high"] < old["low"]
        if apart and abs(change) > NOISE:
            slower += change > 0
            timed = key[3].split(" time ")[0]
            times = [f"{row['seconds'] * 1e6:.1f}" for row in (old, new)]
            lines.append((change, (*key[:3], timed, *times, f"{change:+.1%}")))
    return [line for _, line in sorted(lines, reverse=True)], slower


def available():
    """Benchmark scripts by the name of their operator."""
    return {path.stem.removeprefix("bench_"): path for path in sorted(FOLDER.glob("bench_*.py"))}


def command(script, device, quick, output):
    """The command line that runs one benchmark script."""
    line = [sys.executable, str(script), "--json", str(output)]
    return line + (["--device", device] if device else []) + (["--quick"] if quick else [])
