"""Compare the speed of callables: medians of alternating rounds, on the CPU and on a GPU."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

_MAX_CALLS = 10_000


@dataclass(frozen=True)
class Timing:
    """The time of one call, in seconds.

    Args:
        median: The median over the rounds.
        low: The fastest round.
        high: The slowest round.
        rounds: The number of rounds.
    """

    median: float
    low: float
    high: float
    rounds: int


def compare(
    candidates: dict[str, Callable],
    *,
    arguments: Sequence[tuple] = ((),),
    rounds: int = 7,
    round_seconds: float = 0.02,
    device: torch.device | str = "cpu",
    graph: bool = False,
) -> dict[str, Timing]:
    """Time callables against each other in one process, in alternating rounds.

    Every round runs each candidate once more, in an order that rotates and turns around, so that a machine that
    slows down slows all of them. A round repeats the call until it lasts about `round_seconds`, and its time is
    divided by the calls.

    Args:
        candidates: Name to callable.
        arguments: Argument tuples that the calls use in turn. Enough of them that their bytes exceed the cache
            (50 MB of L2 on an H100) measure a cold cache; a single one measures a warm cache. ``rotating`` makes them.
        rounds: At least 5.
        round_seconds: The aim for the length of a round.
        device: Where the callables run. A CUDA device is timed with events.
        graph: On CUDA, capture the calls of a round in a CUDA graph, which leaves out the host's cost.

    Returns:
        Name to timing, in the order of `candidates`.

    Raises:
        ValueError: fewer than 5 rounds, no candidate, no arguments, or a graph on another device than CUDA.
    """
    device = torch.device(device)
    if rounds < 5:
        raise ValueError(f"compare: rounds must be at least 5, got {rounds}")
    if not candidates or not arguments:
        raise ValueError("compare: candidates and arguments must not be empty")
    if graph and device.type != "cuda":
        raise ValueError(f"compare: graph must be used with a CUDA device, got {device}")
    runners = {name: _runner(call, arguments, device, graph, round_seconds) for name, call in candidates.items()}
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    names = list(candidates)
    for index in range(rounds):
        shift = index // 2 % len(names)
        order = names[shift:] + names[:shift]
        for name in order[::-1] if index % 2 else order:  # nobody always follows the same neighbour
            seconds[name].append(runners[name]())
    return {name: Timing(statistics.median(times), min(times), max(times), rounds) for name, times in seconds.items()}


def copy_bandwidth(num_bytes: int, **timed) -> float:
    """Bytes a second, read plus written, of a copy of random data: the most that anything bound by memory reaches.

    Args:
        num_bytes: Of the tensor that is copied, far beyond any cache.
        timed: `rounds`, `round_seconds` and `device` of `compare`.
    """
    source = torch.randn(num_bytes // 4, device=timed.get("device", "cpu"))
    copying = compare({"copy": torch.empty_like(source).copy_}, arguments=[(source,)], **timed)["copy"]
    return 2 * num_bytes / copying.median


def rotating(make: Callable[[int], tuple], bytes_per_call: int, *, cache_bytes: int = 128 * 2**20) -> list[tuple]:
    """Make enough argument tuples that a call never finds its operands in the cache.

    Args:
        make: Called with 0, 1, 2, ...; returns the arguments of one call, in fresh memory.
        bytes_per_call: The bytes that one call reads and writes.
        cache_bytes: More than the last cache level of the device.

    Returns:
        At least two tuples.
    """
    count = max(2, -(-cache_bytes // max(1, bytes_per_call)))
    return [make(index) for index in range(min(count, _MAX_CALLS))]


def _runner(
    call: Callable, arguments: Sequence[tuple], device: torch.device, graph: bool, round_seconds: float
) -> Callable[[], float]:
    """Return a function that runs one round and returns the seconds of a call."""
    for _ in range(2):  # the first call compiles, the second warms caches and allocators
        call(*arguments[0])
    run_calls = _cuda_calls if device.type == "cuda" else _cpu_calls
    supply = itertools.cycle(arguments)
    num_calls = 1
    while (lasted := run_calls(call, supply, num_calls, device)) < round_seconds / 4 and num_calls < _MAX_CALLS:
        num_calls *= 2
    num_calls = min(_MAX_CALLS, max(1, round(num_calls * round_seconds / max(lasted, 1e-9))))
    if graph:
        return _graph_round(call, supply, max(num_calls, len(arguments)), device)
    return lambda: run_calls(call, supply, num_calls, device) / num_calls


def _cpu_calls(call: Callable, supply: itertools.cycle, num_calls: int, device: torch.device) -> float:
    call(*next(supply))  # what the neighbour left in caches and allocator is not this candidate's
    batch = list(itertools.islice(supply, num_calls))
    start = time.perf_counter()
    for args in batch:
        call(*args)
    return time.perf_counter() - start


def _cuda_calls(call: Callable, supply: itertools.cycle, num_calls: int, device: torch.device) -> float:
    batch = list(itertools.islice(supply, num_calls))
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    with torch.cuda.device(device):
        start.record()
        for args in batch:
            call(*args)
        end.record()
        end.synchronize()
    return start.elapsed_time(end) / 1000.0


def _graph_round(call: Callable, supply: itertools.cycle, num_calls: int, device: torch.device) -> Callable[[], float]:
    """Capture a round of calls once; each round replays it."""
    with torch.cuda.device(device):
        captured = torch.cuda.CUDAGraph()
        side_stream = torch.cuda.Stream()
        side_stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side_stream):
            call(*next(supply))
        torch.cuda.current_stream().wait_stream(side_stream)
        with torch.cuda.graph(captured):
            for args in itertools.islice(supply, num_calls):
                call(*args)
    return lambda: _cuda_calls(captured.replay, itertools.repeat(()), 1, device) / num_calls
