"""Tools for testing kernels: accuracy in epsilons, hostile inputs, planted faults, timing, and a repaired interpreter.

They work on anybody's kernel, not only on this library's. Importing this package needs torch alone;
``strategies`` needs hypothesis, ``interpreter`` needs triton and numpy, and each says so when it is missing.
"""

from __future__ import annotations

import importlib

_HOME = {
    "Budget": "accuracy",
    "Errors": "accuracy",
    "errors": "accuracy",
    "assert_accurate": "accuracy",
    "make_tensor": "inputs",
    "hostile_rows": "inputs",
    "special_values": "inputs",
    "huge_stride_rows": "inputs",
    "Fault": "faults",
    "standard_faults": "faults",
    "argument_faults": "faults",
    "metadata_faults": "faults",
    "option_fault": "faults",
    "assert_faults_rejected": "faults",
    "Timing": "timing",
    "compare": "timing",
    "rotating": "timing",
}
_SUBMODULES = ("accuracy", "faults", "formats", "inputs", "interpreter", "ptx", "strategies", "timing")

__all__ = [*_HOME, *_SUBMODULES]


def __getattr__(name: str):
    if name in _HOME:
        return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    if name in _SUBMODULES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
