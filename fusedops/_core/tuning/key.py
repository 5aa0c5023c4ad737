"""What a tuned configuration holds for: its key, the bucket of a size, and the environment."""

import ctypes
import functools
import hashlib
import importlib.metadata
import json
from pathlib import Path

import torch

SCHEMA = 1
BUCKETS_AN_OCTAVE = 4
MAX_DISTANCE = 2  # a neighbour's size is at most so many times this one's, and at least its inverse
# of _core, what kernels are written with
_SHARED = ("tl.py", "tl_epilogue.py", "gl.py", "codes.py", "activations.py", "rows.py")


def bucket(size):
    """The least of four steps an octave that is no smaller: the sizes of models stay, others rise by less than 25 %."""
    if size <= 2 * BUCKETS_AN_OCTAVE:
        return size
    step = 1 << ((size - 1).bit_length() - BUCKETS_AN_OCTAVE.bit_length())
    return -(-size // step) * step


def near(sizes, others):
    """Whether no size is more than MAX_DISTANCE times the other; both are buckets by name."""
    return sizes.keys() == others.keys() and all(
        max(sizes[name], others[name]) <= MAX_DISTANCE * min(sizes[name], others[name]) for name in sizes
    )


def canonical(data):
    """The bytes of JSON data that are the same for equal data."""
    return json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def digest(data):
    """A short hash of JSON data, for names of files and folders."""
    return hashlib.sha256(canonical(data)).hexdigest()[:32]


def plain(value):
    """A key field as JSON data: numbers and texts as they are, dtypes and the like by name."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (tuple, list)):
        return [plain(part) for part in value]
    return str(value)


@functools.cache
def _software():
    return {
        "triton": _version("triton"),
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "none",
        "driver": _driver(),
    }


def _version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _driver():
    """The major version of CUDA that the driver speaks, asked without creating a context; 0 without a driver."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    version = ctypes.c_int()
    library.cuDriverGetVersion(ctypes.byref(version))
    return version.value // 1000


@functools.lru_cache(maxsize=64)
def environment_hash(limits):
    """The short hash of the environment."""
    return digest(environment(limits))


def environment(limits):
    """What of software and device a configuration was measured with; a change of any field makes every entry a miss."""
    return {
        **_software(),
        "arch": limits.arch,
        "gpu": limits.name,
        "sm_count": limits.sm_count,
        "shared_memory": limits.shared_memory,
        "l2": limits.l2,
    }


@functools.cache
def source_hash(*paths):
    """A hash of the code of a kernel, and of what kernels share.

    A path is a Python file, of a package's ``__init__.py`` its folder's files, or a CUDA source with its headers.
    """
    files = [file for path in map(Path, paths) for file in _files_of(path)]
    hashed = hashlib.sha256()
    for file in (*files, *(Path(__file__).parents[1] / name for name in _SHARED)):
        hashed.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return hashed.hexdigest()[:32]


def _files_of(path):
    if path.suffix == ".cu":
        return [path, *sorted(path.parent.glob("*.cuh"))]
    return sorted(path.parent.glob("*.py")) if path.name == "__init__.py" else [path]
