"""Every candidate of every case of the benchmarks as a benchmark of pytest-benchmark; those of a case are one group.

    pytest benchmarks --benchmark-only [--device cpu|cuda] [--full] [-k rotary]

A call's time on the wall, with its end waited for. One candidate is measured after the other: for ratios, and for the
device's own time, run the scripts, which alternate.
"""

import importlib
import itertools
from pathlib import Path

import pytest
import torch
from _common import copies, effort_of, forget_compiled, why_left_out

from fusedops import explain
from fusedops.testing import rotating

pytest.importorskip("pytest_benchmark", reason="pytest-benchmark is not installed")
SCRIPTS = sorted(path.stem for path in Path(__file__).parent.glob("bench_*.py"))
QUICK = {"min_rounds": 5, "min_time": 1e-4, "max_time": 5e-3}


def pytest_generate_tests(metafunc):
    device, full = metafunc.config.getoption("--device"), metafunc.config.getoption("--full")
    effort = effort_of(device, quick=not full)
    marks = () if full else pytest.mark.benchmark(**QUICK)
    found = []
    for script in SCRIPTS:
        with torch.no_grad():
            cases = list(importlib.import_module(script).cases(device, not full))
        for case in cases:
            about = f"{script.removeprefix('bench_')}-{group_of(case)}"
            for name in case.candidates:
                found.append(pytest.param(case, name, device, effort, id=f"{about}-{name}", marks=marks))
    metafunc.parametrize(("case", "name", "device", "effort"), found)


def group_of(case):
    return f"{case.op} {case.shape} {str(case.dtype).removeprefix('torch.')}"


@torch.no_grad()
def test_benchmark(benchmark, case, name, device, effort):
    forget_compiled()
    ours, arguments = next(iter(case.candidates)), case.make(0)
    if name != ours:
        wanted = case.candidates[ours](*copies(arguments))
        reason = why_left_out(case, name, arguments, wanted)
        if reason:
            pytest.skip(f"left out: {reason}")
    explanation = explain(case.op, *case.make(0), **case.options)
    num_bytes, operations = case.cost or (explanation.bytes, explanation.operations)
    benchmark.group = group_of(case)
    benchmark.extra_info.update(
        device=device, candidate=name, is_ours=name == ours, backend=explanation.backend, config=explanation.config,
        config_source=explanation.config_source, bytes=num_bytes, operations=operations,
    )  # fmt: skip
    function = case.candidates[name]
    supply = itertools.cycle(rotating(case.make, num_bytes, cache_bytes=effort.rotating_bytes))

    def call():
        out = function(*next(supply))
        if device == "cuda":
            torch.cuda.synchronize()
        return out

    assert benchmark(call) is not None
