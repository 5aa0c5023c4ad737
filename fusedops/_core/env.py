"""Every environment variable of the library, in one place.

Each is read once, at its first use; `refresh` reads them again and `override` sets one for the length of a block.
"""

import contextlib
import os
from pathlib import Path

VARIABLES = {
    "FUSEDOPS_BACKEND": (
        ("auto", "triton", "cuda", "torch", "reference", "emulate"),
        "Forces one implementation for every operator; one that cannot run raises with the reason. `emulate` runs the "
        "Triton and CUDA kernels on CPU tensors as they are compiled for a GPU, instruction by instruction.",
    ),
    "FUSEDOPS_FALLBACK": (
        ("warn", "raise", "silent"),
        "What happens where a call on CUDA tensors leaves the fused path: warn once, raise, or only count.",
    ),
    "FUSEDOPS_VALIDATE": (
        ("1", "0", "2"),
        "0: only what prevents undefined behaviour; 1: every value known on the host; 2: values in device memory too.",
    ),
    "FUSEDOPS_EMULATE_TARGET": (
        ("sm_90a", "sm_89", "sm_86", "sm_80"),
        "The GPU that `FUSEDOPS_BACKEND=emulate` compiles for and takes its limits from, but for its size.",
    ),
    "FUSEDOPS_JIT": (
        ("allow", "forbid"),
        "`forbid`: a launch that would have to compile a kernel is an error, not a stall. A kernel that Triton has "
        "in its cache on disk, or CUDA code that was shipped, is no compilation; `fusedops warmup` makes both.",
    ),
    "FUSEDOPS_CACHE_DIR": (None, "Directory of everything that the library keeps between runs."),
    "FUSEDOPS_CACHE_PATH": (
        None,
        "More such directories, joined as those of `PATH`, that tuned configurations are read from and never written.",
    ),
}

_values: dict[str, str] = {}
_listeners = []


def read(name):
    """The value of a listed variable; the first choice is the default. ValueError: a value that is no choice."""
    value = _values.get(name)
    if value is not None:
        return value
    choices, _ = VARIABLES[name]
    value = os.environ.get(name, "")
    if choices is not None:
        value = value or choices[0]
        if value not in choices:
            raise ValueError(f"{name} must be one of {', '.join(sorted(choices))}, got {value!r}")
    _values[name] = value
    return value


def on_change(listener):
    """Call a function whenever a value may have changed."""
    _listeners.append(listener)


def changed():
    """Tell every listener."""
    for listener in _listeners:
        listener()


def refresh():
    """Forget what was read, so that the next use reads the environment again."""
    _values.clear()
    changed()


@contextlib.contextmanager
def override(name, value):
    """Set a variable for the length of a block, for every thread of the process."""
    choices, _ = VARIABLES[name]
    if choices is not None and value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(sorted(choices))}, got {value!r}")
    before = _values.get(name)
    _values[name] = value
    changed()
    try:
        yield
    finally:
        if before is None:
            _values.pop(name, None)
        else:
            _values[name] = before
        changed()


def backend():
    """The implementation to use: "auto" or one name."""
    return _values.get("FUSEDOPS_BACKEND") or read("FUSEDOPS_BACKEND")


def emulate_target():
    """The GPU that emulated kernels are compiled for."""
    return _values.get("FUSEDOPS_EMULATE_TARGET") or read("FUSEDOPS_EMULATE_TARGET")


def fallback():
    """What to do where a CUDA call leaves the fused path: "warn", "raise" or "silent"."""
    return read("FUSEDOPS_FALLBACK")


def validate():
    """The validation level: 0, 1 or 2."""
    return int(_values.get("FUSEDOPS_VALIDATE") or read("FUSEDOPS_VALIDATE"))


def jit():
    """Whether a launch may compile its kernel: "allow" or "forbid"."""
    return _values.get("FUSEDOPS_JIT") or read("FUSEDOPS_JIT")


def cache_dir():
    """The directory of everything kept between runs: the variable, or fusedops under the XDG cache directory."""
    chosen = read("FUSEDOPS_CACHE_DIR")
    if chosen:
        return Path(chosen).expanduser()
    root = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(root) / "fusedops"


def cache_path():
    """The read-only directories that FUSEDOPS_CACHE_PATH names, in their order."""
    return [Path(folder).expanduser() for folder in read("FUSEDOPS_CACHE_PATH").split(os.pathsep) if folder]
