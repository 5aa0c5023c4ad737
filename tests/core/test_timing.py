"""Timing is honest: what takes a known time is shown to take that, by `compare` and in a whole row of a benchmark."""

import importlib
import statistics
import time
from pathlib import Path

import pytest
import torch

from fusedops.testing import compare, rotating
from tests.core.simulated import Graph, Machine

timing = importlib.import_module("fusedops.testing.timing")
BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
LENGTHS = (1e-6, 3.7e-5, 2e-3, 0.3)
NEAR = 0.02
ATTEMPTS = 12  # a neighbour may delay the end of any sleep


@pytest.fixture
def common(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("_common")


@pytest.fixture
def machine(monkeypatch):
    simulated = Machine()
    simulated.install(monkeypatch, timing)
    return simulated


class Sleeper:
    """Sleeps, and keeps by a stopwatch of its own how long that really was."""

    def __init__(self, seconds):
        self.seconds, self.took = seconds, []

    def __call__(self, x=None, *rest):
        start = time.perf_counter()
        time.sleep(self.seconds)
        self.took.append(time.perf_counter() - start)
        return x

    def truth(self):
        return statistics.median(self.took)


def closest(measured):
    """The least, of some attempts, of how far ``measured()`` is from 1; what is wrong by more stays so in all."""
    away = float("inf")
    for _ in range(ATTEMPTS):
        away = min(away, max(abs(ratio - 1) for ratio in measured()))
        if away <= NEAR:
            break
    return away


def test_sleeps_take_as_long_as_a_stopwatch_says():
    def measured():
        sleepers = {"short": Sleeper(3e-3), "middle": Sleeper(8e-3), "long": Sleeper(24e-3)}
        found = compare(sleepers, rounds=5)
        truth = {name: sleeper.truth() for name, sleeper in sleepers.items()}
        ratio = found["long"].median / found["short"].median / (truth["long"] / truth["short"])
        return [ratio, *(found[name].median / truth[name] for name in sleepers)]

    assert closest(measured) <= NEAR


def test_a_row_of_a_benchmark_says_how_long_sleeps_take(common):
    effort, ceilings = common.Effort(rounds=5, rotating_bytes=4096), common.Ceilings(1e9, 1e12)

    def make(seed):
        return torch.randn(4, 8), torch.randn(8)

    def measured():
        ours, theirs = Sleeper(4e-3), Sleeper(12e-3)
        candidates = {"fusedops": ours, "torch": theirs}
        case = common.Case("rms_norm", "4x8", torch.float32, make, candidates, {}, check=None)
        row = common.measure(case, "cpu", effort, ceilings, graph=False)
        assert row["best_peer"] == "torch" and row["low"] <= row["seconds"] <= row["high"]
        assert row["share_of_copy_bandwidth"] == pytest.approx(row["bytes"] / row["seconds"] / 1e9)
        return [
            row["seconds"] / ours.truth(), row["peers"]["torch"] / theirs.truth(),
            row["speedup"] / (theirs.truth() / ours.truth()),
        ]  # fmt: skip

    assert closest(measured) <= NEAR


@pytest.mark.parametrize("seconds", LENGTHS)
def test_calls_on_the_host_take_their_time_exactly(machine, seconds):
    """To the last call, and nothing of what surrounds them."""
    calls = {"once": lambda: machine.work(seconds), "twice": lambda: machine.work(2 * seconds)}
    found = compare(calls, rounds=5)
    for name, factor in (("once", 1), ("twice", 2)):
        for value in (found[name].median, found[name].low, found[name].high):
            assert value == pytest.approx(factor * seconds, rel=1e-6)


def test_the_first_calls_are_not_counted(machine):
    calls = []

    def compiles_first():
        calls.append(None)
        machine.work(10.0 if len(calls) == 1 else 0.1 if len(calls) == 2 else 1e-3)

    assert compare({"it": compiles_first}, rounds=5)["it"].high == pytest.approx(1e-3)


def test_what_a_neighbour_leaves_behind_is_not_counted(machine):
    before = [None]

    def of(name):
        def call():
            machine.work(1e-3 if before[0] == name else 7e-3)  # a cache that the other one filled
            before[0] = name

        return call

    found = compare({name: of(name) for name in "ab"}, rounds=5)
    assert [found[name].high for name in "ab"] == pytest.approx([1e-3, 1e-3])


def test_everybody_runs_first_as_often_and_before_each_other_as_often(machine):
    ran = []

    def of(name):
        def call():
            ran.append(name)
            machine.work(1e-3)

        return call

    compare({name: of(name) for name in "abc"}, rounds=6, round_seconds=2e-3)
    calls = 3  # in a round: the one before it, and two
    rounds = ["".join(ran[-6 * 9 :][start : start + 9 : calls]) for start in range(0, 54, 9)]
    assert [set(turn) for turn in rounds] == [set("abc")] * 6
    assert sorted(turn[0] for turn in rounds) == list("aabbcc")
    for one, other in ("ab", "bc", "ca"):
        assert sum(turn.index(one) < turn.index(other) for turn in rounds) == 3


def test_a_median_is_of_the_rounds(machine):
    """Every third round is ten times as slow, and a machine that becomes slower does so for everybody."""
    begun = machine.now

    def drifting(factor):
        machine.work(factor * 1e-4 * (1 + (machine.now - begun)))

    rounds = 12
    found = compare({"one": lambda: drifting(1), "two": lambda: drifting(2)}, rounds=rounds)
    assert found["one"].high > 1.2 * found["one"].low  # it did become slower
    assert found["two"].median / found["one"].median == pytest.approx(2, rel=NEAR)
    assert found["one"].rounds == rounds


@pytest.mark.parametrize("device_seconds", [2e-6, 4e-5, 3e-3])
def test_a_gpu_s_time_is_that_of_its_work_under_a_graph_and_of_the_slower_side_without(machine, device_seconds):
    host_seconds = 2e-5
    call = {"it": lambda x: machine.work(host_seconds, device_seconds)}
    arguments = rotating(lambda index: (index,), 2**20)
    eager = compare(call, arguments=arguments, rounds=5, device="cuda")["it"].median
    captured = compare(call, arguments=arguments, rounds=5, device="cuda", graph=True)["it"].median
    assert eager == pytest.approx(max(host_seconds, device_seconds), rel=NEAR)
    calls = max(timing_calls(device_seconds, host_seconds), len(arguments))
    assert captured == pytest.approx(device_seconds, abs=2 * Graph.LAUNCH / calls)


def timing_calls(device_seconds, host_seconds):
    """How many calls a round of 20 ms has."""
    return round(0.02 / max(device_seconds, host_seconds))


@pytest.mark.parametrize("graph", [False, True])
def test_buffers_are_used_in_turn(machine, graph):
    """A cache would hold those that come again sooner; a graph, which comes again as a whole, has a call for each."""
    seen, captured = [], []

    def call(x):
        (seen if machine.captured is None else captured).append(x)
        machine.work(2e-6, 5e-3)

    arguments = rotating(lambda index: (index,), 2**20, cache_bytes=2**25)
    assert len(arguments) == 32
    compare({"it": call}, arguments=arguments, rounds=5, device="cuda", graph=graph)
    turns = [x % 32 for x in range(len(seen) + len(captured))]
    assert seen[:2] == [0, 0] and seen[2:] + captured == turns[:-2]
    assert len(captured) == 32 if graph else len(seen) > 20


def test_rotating_buffers_exceed_every_cache(common, monkeypatch, tmp_path):
    for index, size in enumerate(("48K", "2048K", "266240K")):
        (tmp_path / f"index{index}").mkdir()
        (tmp_path / f"index{index}" / "size").write_text(f"{size}\n")
    monkeypatch.setattr(common, "CPU_CACHES", tmp_path)
    assert common.effort_of("cpu", quick=False).rotating_bytes == 2 * 266240 * 2**10
    monkeypatch.setattr(common, "CPU_CACHES", tmp_path / "none")
    assert common.effort_of("cpu", quick=False).rotating_bytes == 2**27
    made = rotating(lambda index: (torch.empty(2**20),), 2**22, cache_bytes=2**25)
    assert len({args[0].data_ptr() for args in made}) == len(made) == 8
