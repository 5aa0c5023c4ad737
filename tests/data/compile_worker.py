"""Compile the examples of one Triton file and print their reports as JSON. Runs without Triton's interpreter.

Usage: python -m tests.data.compile_worker MODULE TARGET/DTYPE ...
       python -m tests.data.compile_worker --same-ptx MODULE DTYPE ...
"""

import importlib
import json
import re
import sys
from types import SimpleNamespace

from fusedops._core import cubin
from fusedops._core.device import TARGETS

# Triton makes the same PTX for both from the same example, so only ptxas runs for the second (--same-ptx compares).
ASSEMBLED_FROM = {"sm_89": "sm_80"}


def compile_all(module, combinations):
    """One row per example of each (target, dtype)."""
    rows, kernels, done = [], [], {}
    for target, dtype in combinations:
        for example in module.examples(dtype, TARGETS[target]):
            row = {
                "kernel": example.kernel.__name__,
                "dtype": dtype,
                "target": target,
                "types": example.types,
                "constants": {name: str(value) for name, value in example.constants.items()},
                "num_warps": example.num_warps,
                "num_stages": example.num_stages,
                "wide_access": example.wide_access,
            }
            try:
                kernels.append(kept(compile_one(example, target, dtype, done)))
                row["report"] = len(kernels) - 1
            except Exception as error:  # any failure of any compiler stage is a finding, not a crash
                row["error"] = f"{type(error).__name__}: {error}"
            rows.append(row)
    reports = cubin.read_all(kernels)
    for row in rows:
        if "report" in row:
            row["report"] = reports[row["report"]].as_dict()
    return rows


def kept(compiled):
    """What is read in the end, without the stages in between."""
    return SimpleNamespace(asm={name: compiled.asm[name] for name in ("ptx", "cubin")}, metadata=compiled.metadata)


def compile_one(example, target, dtype, done):
    """Machine code of an example; `done` keeps what was compiled for targets that others assemble from."""
    for other, compiled in done.get((ASSEMBLED_FROM.get(target), dtype), []):
        if other == example:
            return cubin.assemble_for(compiled, target)
    compiled = cubin.compile_example(example, target)
    if target in ASSEMBLED_FROM.values():
        done.setdefault((target, dtype), []).append((example, compiled))
    return compiled


def ptx_differences(module, dtypes):
    """The examples whose PTX is not the same for two targets of ASSEMBLED_FROM, and how many were compared."""
    different, compared = [], 0
    for target, source in ASSEMBLED_FROM.items():
        for dtype in dtypes:
            others = list(module.examples(dtype, TARGETS[source]))
            for example in module.examples(dtype, TARGETS[target]):
                if example not in others:
                    continue
                texts = [cubin.compile_example(example, name).asm["ptx"] for name in (source, target)]
                compared += 1
                if len({re.sub(r"^\.target\s.*$", "", text, flags=re.MULTILINE) for text in texts}) > 1:
                    different.append(f"{example.kernel.__name__} {dtype} {example.constants}")
    return {"compared": compared, "different": different}


if __name__ == "__main__":
    if sys.argv[1] == "--same-ptx":
        printed = ptx_differences(importlib.import_module(sys.argv[2]), sys.argv[3:])
    else:
        printed = compile_all(importlib.import_module(sys.argv[1]), [pair.split("/") for pair in sys.argv[2:]])
    json.dump(printed, sys.stdout)
