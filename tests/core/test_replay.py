"""Calls that are repeated by their launches alone launch the same, and only where nothing else was done."""

import json
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from fusedops._core import replay, tuning
from fusedops._core.relaunch import Relauncher
from fusedops._core.replay import record
from fusedops._core.signature import signature

knobs = pytest.importorskip("triton.knobs", reason="a launch is Triton's")
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def no_stream(monkeypatch):
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 77, raising=False)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)


class Kernel:
    """Stands for a kernel of Triton, compiled or not; keeps what the driver would be given."""

    arg_names = ("x_ptr", "out_ptr", "N", "BLOCK")

    def __init__(self, spread=False):
        self.seen = []
        run = types.SimpleNamespace(
            launch=self._launch, global_scratch_size=0, profile_scratch_size=0,
            launch_cooperative_grid=False, launch_pdl=False,
        )  # fmt: skip
        if not spread:
            run.arg_annotations, run.kernel_signature = "annotations", "signature"
        self.run, self.function, self.packed_metadata = run, 5, "packed"

    def _launch(self, *given):
        self.seen.append(given)

    def __getitem__(self, grid):
        """Triton's launch, of the kernel and of what is compiled: it tells profilers."""

        def launch(*args, **constants):
            for call in knobs.runtime.launch_enter_hook.calls:
                call(None)
            return self

        return launch


def double(run, x, number=3, buffers=1):
    """An operator in the way of ours: it allocates, launches once or twice, and returns its output."""
    out = torch.empty_like(x)
    between = out if buffers == 1 else x.new_empty(4, 8, dtype=torch.int32)
    run((2, 1, 1), (x, between), (number,), {"BLOCK": 16}, 4)
    if buffers == 2:
        run((1, 3, 1), (between[1], out), (0.5,), {"BLOCK": 16}, 4)
    return out


def watched(kernel, function, *args):
    """The replaying function of the second call; the first one compiles."""
    function(*args)
    _, replay = record(function, args)
    kernel.seen.clear()
    return replay


@pytest.mark.parametrize("spread", [False, True])
@pytest.mark.parametrize("buffers", [1, 2])
def test_a_replay_launches_the_same_on_other_memory(spread, buffers):
    kernel = Kernel(spread)
    run = Relauncher(kernel)

    def function(x, number):
        return double(run, x, number, buffers)

    again = watched(kernel, function, torch.zeros(3, 16), 3)
    x = torch.ones(3, 16)
    ordinary_out = function(x, 3)
    ordinary = list(kernel.seen)
    kernel.seen.clear()
    out = again(x, 3)
    assert out.shape == ordinary_out.shape and out.dtype == ordinary_out.dtype
    assert len(kernel.seen) == len(ordinary) == buffers
    for repeated, first in zip(kernel.seen, ordinary):
        head, args = (repeated[:-4], repeated[-4:]) if spread else (repeated[:-1], repeated[-1])
        head_first, args_first = (first[:-4], first[-4:]) if spread else (first[:-1], first[-1])
        assert head == head_first and args[2:] == args_first[2:] and head[:4] in ((2, 1, 1, 77), (1, 3, 1, 77))
    arguments = [one[-4:] if spread else one[-1] for one in kernel.seen]
    assert arguments[0][0] == x.data_ptr() and arguments[-1][1] == out.data_ptr()
    if buffers == 2:
        assert arguments[1][0] - arguments[0][1] == 8 * 4  # a view one row behind the start of the buffer


def _filled(run, x):
    out = double(run, x)
    out[0] = 0.0
    return out


def _foreign(run, x):
    out = double(run, x)
    run._kernel[(1,)](x, out, 3, BLOCK=16)
    return out


def _kept(run, x, place=torch.zeros(3, 16)):  # noqa: B008 - memory that is neither an argument nor allocated
    run((2, 1, 1), (x, place), (3,), {"BLOCK": 16}, 4)
    return torch.empty_like(x)


def _diverted(run, x):
    return torch.empty_like(x)  # as where launches went elsewhere: nothing that could be replayed


def _given_back(run, x):
    double(run, x)
    return x


@pytest.mark.parametrize("function", [_filled, _foreign, _kept, _diverted, _given_back])
def test_a_call_that_does_more_is_not_replayed(function):
    kernel = Kernel()
    run = Relauncher(kernel)
    assert watched(kernel, lambda x: function(run, x), torch.zeros(3, 16)) is None
    assert watched(kernel, lambda x: double(run, x), torch.zeros(3, 16)) is not None


def test_arguments_that_share_memory_are_told_apart():
    """Two views of one buffer may lie otherwise the next time: each is found by itself, or nothing is replayed."""
    kernel = Kernel()
    run = Relauncher(kernel)

    def function(x, y):
        run((1, 1, 1), (x, y), (3,), {"BLOCK": 16}, 4)
        return torch.empty_like(x)

    def of_rows(x, y):
        run((1, 1, 1), (x[0], y), (3,), {"BLOCK": 16}, 4)
        return torch.empty_like(x)

    buffer = torch.zeros(4, 2, 16)
    again = watched(kernel, function, buffer[0], buffer[1])
    again(buffer[3], buffer[2])
    assert kernel.seen[0][-1][:2] == (buffer[3].data_ptr(), buffer[2].data_ptr())
    assert watched(kernel, of_rows, buffer[0], buffer[1]) is None


def test_one_tensor_given_twice_is_not_replayed():
    kernel = Kernel()
    run = Relauncher(kernel)

    def function(x, y):
        run((1, 1, 1), (x, y), (3,), {"BLOCK": 16}, 4)
        return torch.empty_like(x)

    x = torch.zeros(3, 16)
    assert watched(kernel, function, x, x) is None


def test_nothing_is_replayed_while_a_configuration_is_on_trial_nor_after_it_was():
    kernel, dropped = Kernel(), []
    run = Relauncher(kernel)
    replay.on_forget(lambda: dropped.append(True))
    try:
        with tuning.forced(types.SimpleNamespace(name="any"), None):
            assert watched(kernel, lambda x: double(run, x), torch.zeros(3, 16)) is None and dropped
            dropped.clear()
        assert dropped and watched(kernel, lambda x: double(run, x), torch.zeros(3, 16)) is not None
        dropped.clear()
        with tuning.defaults_only():
            assert len(dropped) == 1
        assert len(dropped) == 2
        dropped.clear()
        tuning.forget()
        assert dropped
    finally:
        replay._forgetters.pop()


def test_misaligned_arguments_and_profilers_take_the_ordinary_way():
    kernel = Kernel()
    run = Relauncher(kernel)
    ordinary = []

    def function(x):
        ordinary.append(x)
        return double(run, x)

    buffer = torch.zeros(64)
    assert watched(kernel, function, buffer[1:17]) is None  # compiled for any address
    again = watched(kernel, function, buffer[:16])
    ordinary.clear()
    again(buffer[16:32])
    assert not ordinary and len(kernel.seen) == 1
    again(buffer[1:17])
    assert len(ordinary) == 1
    heard = []
    knobs.runtime.launch_enter_hook.add(heard.append)
    try:
        again(buffer[:16])
    finally:
        knobs.runtime.launch_enter_hook.remove(heard.append)
    assert len(ordinary) == 2


def test_a_signature_keeps_all_that_a_plan_depends_on():
    key = signature("f(Tensor x, Tensor? y, float eps, str mode) -> Tensor")
    x = torch.zeros(4, 8)
    given = x, None, 0.5, "once"
    assert key(*given) == key(torch.ones(4, 8), None, 0.5, "once")
    others = [
        (x.half(), *given[1:]), (torch.zeros(8, 4), *given[1:]), (torch.zeros(8, 4).T, *given[1:]),
        (torch.zeros(4, 8, device="meta"), *given[1:]), (torch.zeros(4, 8, requires_grad=True), *given[1:]),
        (x, x, 0.5, "once"), (x, None, 0.25, "once"), (x, None, 0.5, "llama"),
    ]  # fmt: skip
    keys = [key(*given), *(key(*other) for other in others)]
    with torch.no_grad():
        keys.append(key(*given))
        assert key(x.clone().requires_grad_(), *given[1:]) == keys[-1]
    assert len(set(keys)) == len(keys) == 10
    assert key(torch.zeros(4, 8).as_subclass(type("Other", (torch.Tensor,), {})), *given[1:]) is None


def test_repeated_calls_of_operators_launch_what_the_first_ones_did():
    """With Triton's own launcher, on a driver that runs nothing: third calls give the driver what ordinary ones do."""
    worker = ROOT / "tests/data/replay_worker.py"
    found = subprocess.run([sys.executable, worker], capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert found.returncode == 0, found.stderr[-2000:]
    lines = [json.loads(line) for line in found.stdout.splitlines()]
    assert {line["op"] for line in lines if line["replayed"]} == {line["op"] for line in lines}
    assert len(lines) >= 9 and [line for line in lines if not line["same"]] == []


def test_the_benchmark_of_the_host_runs(tmp_path):
    """Few rounds: its figures are no measurement, but every line is there and nothing is left out silently."""
    rows = tmp_path / "rows.json"
    command = [sys.executable, ROOT / "benchmarks/host_cost.py", "--quick", "--json", rows]
    found = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert found.returncode == 0, found.stderr[-2000:]
    kept = {row["op"]: row for row in json.loads(rows.read_text())}
    assert {"empty_like", "rms_norm", "kernel[grid] of rms_norm", "custom_op of rms_norm"} < kept.keys()
    assert all(0 < row["low"] <= row["seconds"] <= row["high"] for row in kept.values())
    assert all(f"{peer} rms_norm" in found.stdout for peer in ("liger", "quack"))
