"""Calls that are repeated by their launches alone launch the same, and only where nothing else was done."""

import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from fusedops._core import relaunch, replay, tuning
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
            run.arg_annotations, run.kernel_signature = ["x", "out", "N", "BLOCK"], "signature"
        kinds = dict(zip(self.arg_names, ("*fp32", "*fp32", "i32", "constexpr")))
        self.src = types.SimpleNamespace(signature=kinds)
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
    _, found = record(function, args)
    kernel.seen.clear()
    return found and found.whole.compile("replay")


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


def parts(run, x):
    """An operator with two results, two allocations between them, one that is empty and one that nobody uses."""
    out, lse = torch.empty_like(x), x.new_empty(3)
    sums, states, empty = x.new_empty(7, 4), x.new_empty(40, dtype=torch.int32), x.new_empty(0, 8)
    x.new_empty(1 << 20)
    run((1, 1, 1), (x, sums), (3,), {"BLOCK": 16}, 4)
    run((1, 1, 1), (sums[1], states), (3,), {"BLOCK": 16}, 4)
    run((1, 1, 1), (empty, lse), (3,), {"BLOCK": 16}, 4)
    run((1, 1, 1), (states, out), (3,), {"BLOCK": 16}, 4)
    return out, lse


@pytest.mark.parametrize("first", [False, True])
def test_what_is_not_returned_is_one_allocation(first, monkeypatch):
    """Its parts lie apart, each where an allocation might; with `first` the second result is one of them."""
    kernel, made = Kernel(), []
    run = Relauncher(kernel)
    parts(run, torch.zeros(3, 16))
    allocate = replay._ALLOCATORS["cpu"]
    monkeypatch.setitem(replay._ALLOCATORS, "cpu", lambda *given: made.append(allocate(*given)) or made[-1])
    _, found = record(lambda x: parts(run, x), (torch.zeros(3, 16),))
    kernel.seen.clear()
    x = torch.zeros(3, 16)
    result = (found.first if first else found.whole).compile("again")(x)
    out, lse = (result, None) if first else result
    (x_, sums), (row, states), (empty, lse_), (states_, out_) = [seen[-1][:2] for seen in kernel.seen]
    assert x_ == x.data_ptr() and out_ == out.data_ptr() and row - sums == 4 * 4 and states_ == states and empty == 0
    common = made[-1]
    assert len(made) == (2 if first else 3) and common.dtype == torch.uint8
    starts = {"sums": sums - common.data_ptr(), "states": states - common.data_ptr()}
    if first:
        starts["lse"] = lse_ - common.data_ptr()
    else:
        assert lse_ == lse.data_ptr() and lse.shape == (3,)
    assert sorted(starts.values()) == [512 * number for number in range(len(starts))]
    assert common.numel() == 512 * len(starts)


def test_memory_is_filled_where_torch_is_told_to(monkeypatch):
    """The short way to memory does not know of it."""
    kernel = Kernel()
    run = Relauncher(kernel)
    again = watched(kernel, lambda x: double(run, x), torch.zeros(3, 16))
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    assert torch.are_deterministic_algorithms_enabled() and again(torch.zeros(3, 16)).isnan().all()
    torch.use_deterministic_algorithms(False)
    again(torch.zeros(3, 16))
    assert len(kernel.seen) == 2


def test_without_torchs_allocators_its_functions_are_called(monkeypatch):
    monkeypatch.setattr(replay, "_ALLOCATORS", {})
    kernel = Kernel()
    run = Relauncher(kernel)
    again = watched(kernel, lambda x: double(run, x, buffers=2), torch.zeros(3, 16))
    assert again.__globals__["empty_like"] is torch.empty_like and "allocate" not in again.__globals__
    out = again(torch.zeros(3, 16))
    assert out.shape == (3, 16) and kernel.seen[1][-1][1] == out.data_ptr()


@pytest.mark.parametrize("kind", ["constexpr", "tuple", "tensordesc<fp32[8, 8]>"])
def test_constants_are_not_passed_unless_an_argument_is_made_of_several(kind):
    kernel = Kernel()
    kernel.src.signature["x_ptr"] = ("i32", "i32") if kind == "tuple" else kind
    launch = relaunch.Launch(kernel, None)
    number = len(kernel.arg_names)
    if kind == "constexpr":
        assert launch.passed == [1, 2] and launch.head[-2] == ["out", "N"]
    else:
        assert launch.passed is None and len(launch.head[-2]) == number
    launch((1, 1, 1), (None, None), (3, 16))
    assert len(kernel.seen[0][-1]) == (2 if kind == "constexpr" else number)


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
    assert len(lines) >= 11
    assert [line for line in lines if not (line["same"] and line["replayed"] and line["recognised"])] == []


def test_the_benchmark_of_the_host_runs(tmp_path):
    """Few rounds: its figures are no measurement, but every line is there and nothing is left out silently."""
    rows = tmp_path / "rows.json"
    command = [sys.executable, ROOT / "benchmarks/host_cost.py", "--quick", "--json", rows]
    own = {**os.environ, "PYTHONPATH": str(ROOT)}  # of this checkout, whatever is installed
    found = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=own, timeout=300)
    assert found.returncode == 0, found.stderr[-2000:]
    kept = {row["op"]: row for row in json.loads(rows.read_text())}
    assert {"empty_like", "rms_norm", "kernel[grid] of rms_norm", "custom_op of rms_norm"} < kept.keys()
    for name in ("rms_norm", "paged_attention, 8 x 100 keys", "paged_attention, 8 x 1000 keys"):
        assert {name, name + ", level 0", name + ", launches alone"} < kept.keys()
    assert all(0 < row["low"] <= row["seconds"] <= row["high"] for row in kept.values())
    assert all(f"{peer} rms_norm" in found.stdout for peer in ("liger", "quack"))
