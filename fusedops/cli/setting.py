"""What commands that run a model share: its place, the description of the machine, and a patched twin."""

import argparse
import datetime
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

from fusedops._core.device import cpu_name
from fusedops.cli import models
from fusedops.cli.console import CommandError, first_line


def positive(text):
    """A positive integer, for argparse."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"must be a positive integer, got {text!r}")
    return int(text)


def positive_number(text):
    """A positive number, for argparse."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a positive number, got {text!r}")
    return number


def add_arguments(parser):
    """Declare --model, --device and --dtype."""
    parser.add_argument(
        "--model", metavar="DIR|ID", help=f"directory or hub id of a model (default: {models.DEMO_NAME})"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="auto: float32 on cpu, bfloat16 on cuda",
    )


def place(args, cpu_dtype="float32"):
    """The torch device and dtype that the arguments ask for; `cpu_dtype` is what auto means on a CPU."""
    import torch

    available = torch.cuda.is_available()
    if args.device == "cuda" and not available:
        raise CommandError("--device cuda needs a CUDA device, and torch finds none")
    device = torch.device(args.device or ("cuda" if available else "cpu"))
    name = {"cpu": cpu_dtype, "cuda": "bfloat16"}[device.type] if args.dtype == "auto" else args.dtype
    return device, getattr(torch, name)


def load():
    """Processes that wanted to run in the last minute, None where the system does not tell: ask before own work."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def environment(device, dtype, load_before):
    """What the numbers depend on, as plain data."""
    import torch
    import transformers

    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "transformers": transformers.__version__,
        "commit": _commit(),
        "load": load_before,
    }


def _version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit():
    """The source checkout's commit, marked where files differ from it; without one, $SOURCE_COMMIT or None."""
    root = Path(__file__).resolve().parents[2]
    if (root / ".git").exists():
        asked = ("git", "-C", str(root), "describe", "--always", "--dirty", "--exclude", "*")
        try:
            return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            pass
    return os.environ.get("SOURCE_COMMIT")


def describe(told, console):
    """Print device, versions and date, and whether other programs will disturb what is timed."""
    line = "{device}, {threads} threads, torch {torch}, transformers {transformers}, {date}"
    console.line(line.format(**{**told, "date": told["date"][:10]}))
    if (told["load"] or 0) > told["cores"] / 2:
        console.line(f"Other programs are busy (load {told['load']:.1f}): the times below will be disturbed.")


def patched_twin(model, console):
    """A patched model that shares the weights of `model`, which stays as it is, and the patch's handle."""
    from fusedops.cli import measure

    patched = measure.twin(model)
    return patched, patch(patched, console)


def patch(model, console):
    """Patch a model, and return the patch's handle."""
    import fusedops

    try:
        with console.step("Patching"):
            handle = fusedops.patch(model)
    except (ValueError, RuntimeError, NotImplementedError) as error:
        raise CommandError(f"this model cannot be patched: {first_line(error)}") from error
    console.line(str(handle.report))
    fusedops.reset_counters()
    return handle
