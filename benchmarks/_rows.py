"""Rows of results: what they depend on, how they are kept, and the tables made of them. Needs nothing but Python."""

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ON_DEVICE = "device time under a CUDA graph"
EAGER = "wall time of eager calls"
NOT_RUN = 77  # exit status of a stage of the gate that cannot run here, and whose last line says why
SCHEMA = json.loads(Path(__file__).with_name("schema.json").read_text())  # what every row must say
JSON_TYPES = {
    "array": list, "boolean": bool, "integer": int, "null": type(None), "number": (int, float), "object": dict,
    "string": str,
}  # fmt: skip


def violations(value, schema=SCHEMA, path="row"):
    """What of a value is not as its JSON schema says, one sentence each; of the keywords that schema.json has."""
    types = [schema["type"]] if isinstance(schema.get("type"), str) else schema.get("type", list(JSON_TYPES))
    is_bool = isinstance(value, bool)  # no number in JSON, but one in Python
    if not any(isinstance(value, JSON_TYPES[name]) and (not is_bool or name == "boolean") for name in types):
        return [f"{path} must be {' or '.join(types)}, got {value!r}"]
    found = []
    if "enum" in schema and value not in schema["enum"]:
        found.append(f"{path} must be one of {schema['enum']}, got {value!r}")
    if isinstance(value, int | float) and not is_bool:
        if value != value or value <= schema.get("exclusiveMinimum", float("-inf")):
            found.append(f"{path} must be above {schema.get('exclusiveMinimum', '-inf')}, got {value!r}")
    if isinstance(value, dict):
        found += [f"{path}.{name} is missing" for name in schema.get("required", ()) if name not in value]
        known, other = schema.get("properties", {}), schema.get("additionalProperties", {})
        for name, inner in value.items():
            found += violations(inner, known.get(name, other), f"{path}.{name}")
    return found


def first_line_of(*command):
    """First line that a command prints, None where it cannot run or prints nothing."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")[0] or None
    except (OSError, subprocess.CalledProcessError):
        return None


def commit():
    """The checkout's commit, marked where files differ from it; $SOURCE_COMMIT where there is no git to ask."""
    described = first_line_of("git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude", "*")
    return described or os.environ.get("SOURCE_COMMIT")


def version_of(package):
    """Version of an installed package, None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def version_of_module(module):
    """Version of the package that a module came from, None where none says so."""
    name = module.partition(".")[0]
    return next(filter(None, map(version_of, importlib.metadata.packages_distributions().get(name, ()))), None)


def environment(device):
    """What the numbers depend on, as plain data. `device` is "cpu" or "cuda"."""
    import torch

    found = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version_of("triton"),
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
    if device == "cpu":
        from fusedops._core.device import cpu_name

        return {"device": cpu_name(), "threads": torch.get_num_threads(), "driver": None, "cuda": None, **found}
    properties = torch.cuda.get_device_properties(0)
    return {
        "device": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_bytes": properties.total_memory,
        "driver": first_line_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "cuda": torch.version.cuda,
        **found,
    }


def write(path, rows):
    """Replace a file of rows in one step, so that a process that is killed leaves the last whole one."""
    unfinished = path.with_name(path.name + ".new")
    unfinished.write_text(json.dumps(rows, indent=1) + "\n")
    unfinished.replace(path)


def share(row):
    """The part of this machine's ceiling that a row reaches, as text: of the copy (BW*) or the product (TC*)."""
    if row.get("share_of_matmul_rate") is not None:
        return f"{row['share_of_matmul_rate']:.0%} TC*"
    return f"{row['share_of_copy_bandwidth']:.0%} BW*"


def table(rows):
    """The rows as text, one line an operator and shape; the last column holds the ratio for eager calls on a GPU."""
    eager = {key(row): row for row in rows if row["timed"] == EAGER}
    on_device = {key(row): row for row in rows if row["timed"] == ON_DEVICE}
    lines = [
        f"{'operator':<23}{'shape':<34}{'dtype':<14}{'ours us':>10} {'best peer':<17}{'peer us':>10}"
        f"{'ratio':>7}{'reached':>10}{'goal':>6}{'error':>9}{'eager us':>10}{'ratio':>7}"
    ]
    for row_key in dict.fromkeys(key(row) for row in rows):
        row = on_device.get(row_key) or eager[row_key]
        best = row["peers"][row["best_peer"]] if row["best_peer"] else None
        line = (
            f"{row['op']:<23}{row['shape']:<34}{row['dtype']:<14}{row['seconds'] * 1e6:>10.1f} "
            f"{row['best_peer'] or '-':<17}{microseconds(best):>10}{ratio(row):>7}{share(row):>10}"
            f"{goal(row):>6}{error(row):>9}"
        )
        if row_key in on_device and row_key in eager:
            line += f"{microseconds(eager[row_key]['seconds']):>10}{ratio(eager[row_key]):>7}"
        lines.append(line)
    return "\n".join(lines)


def key(row):
    """What one line of a table is about."""
    return row["op"], row["shape"], row["dtype"]


def microseconds(seconds):
    return "-" if seconds is None else f"{seconds * 1e6:.1f}"


def ratio(row):
    """Time of the best peer by ours: above 1 ours is faster."""
    return "-" if row["speedup"] is None else f"{row['speedup']:.2f}"


def goal(row):
    """Whether it reaches what performance.md asks for."""
    return {None: "-", True: "met", False: "no"}[row.get("goal_met")]


def error(row):
    """Our error against float64, by norm."""
    return "-" if row.get("error") is None else f"{row['error']:.1e}"
