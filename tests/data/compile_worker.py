"""Compile the examples of one Triton file and print their reports as JSON. Runs without Triton's interpreter.

Usage: python -m tests.data.compile_worker MODULE DTYPE,DTYPE TARGET,TARGET
"""

import importlib
import itertools
import json
import sys
from concurrent.futures import ThreadPoolExecutor

from fusedops._core import cubin
from fusedops._core.device import TARGETS

DISASSEMBLED = ("sm_80", "sm_90a")  # one target per generation of instructions that the gates name


def compile_all(module, dtypes, targets):
    """One row per example, dtype and target; two threads disassemble while this one compiles."""
    rows = []
    with ThreadPoolExecutor(max_workers=2) as pool:
        for target, dtype in itertools.product(targets, dtypes):
            for example in module.examples(dtype, TARGETS[target]):
                row = {
                    "kernel": example.kernel.__name__,
                    "dtype": dtype,
                    "target": target,
                    "constants": {name: str(value) for name, value in example.constants.items()},
                    "wide_access": example.wide_access,
                }
                try:
                    compiled = cubin.compile_example(example, target)
                    row["report"] = pool.submit(cubin.read, compiled, disassemble=target in DISASSEMBLED)
                except Exception as error:  # any failure of any compiler stage is a finding, not a crash
                    row["error"] = f"{type(error).__name__}: {error}"
                rows.append(row)
        for row in rows:
            if "report" in row:
                row["report"] = row["report"].result().as_dict()
    return rows


if __name__ == "__main__":
    name, dtype_list, target_list = sys.argv[1:]
    json.dump(compile_all(importlib.import_module(name), dtype_list.split(","), target_list.split(",")), sys.stdout)
