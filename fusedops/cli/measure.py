"""Time greedy generation, token by token, on several models side by side."""

import contextlib
import copy
import gc
import os
import statistics
import sys
import time
from dataclasses import dataclass

import torch

WARM_UP_TOKENS = 16
RESET_PEAK = "/proc/self/clear_refs"  # writing 5 resets the peak resident size of the process


@dataclass(frozen=True)
class Run:
    """One timed generation.

    Attributes:
        tokens: The generated token ids.
        first: Seconds from the call to the first token.
        intervals: Seconds between consecutive tokens.
        peak_bytes: Peak memory during the run; see `PeakMemory`.
    """

    tokens: tuple[int, ...]
    first: float
    intervals: tuple[float, ...]
    peak_bytes: int

    @property
    def tokens_per_second(self):
        """All tokens over the whole time, the prompt's share included."""
        return len(self.tokens) / (self.first + sum(self.intervals))


class TokenClock:
    """A streamer for ``generate`` that notes when each token reaches the host; `show` may also print them."""

    def __init__(self, show=None):
        self.start = time.perf_counter()
        self.times = []
        self.tokens = []
        self._prompt_seen = False
        self._show = show

    def put(self, value):
        """Take the prompt first, then one token at a time."""
        if self._prompt_seen:
            self.times.append(time.perf_counter())
            self.tokens.extend(value.tolist())
        self._prompt_seen = True
        if self._show is not None:
            self._show.put(value)

    def end(self):
        """Called once after the last token."""
        if self._show is not None:
            self._show.end()


class PeakMemory:
    """Peak memory during a block: of torch's allocator on CUDA, of the whole process on a CPU.

    Linux can reset a process's peak; elsewhere the peak is that since the process began, and `describe` says so.
    """

    def __init__(self, device):
        self._cuda = device.type == "cuda"
        self._resettable = os.access(RESET_PEAK, os.W_OK)
        self.bytes = 0

    def __enter__(self):
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()
        elif self._resettable:
            with open(RESET_PEAK, "w") as control:
                control.write("5")
        return self

    def __exit__(self, *_):
        if self._cuda:
            self.bytes = torch.cuda.max_memory_allocated()
        elif self._resettable:
            with open("/proc/self/status") as status:
                peak = next(line for line in status if line.startswith("VmHWM:"))
            self.bytes = int(peak.split()[1]) * 1024
        else:
            self.bytes = _peak_since_start()

    def describe(self):
        """What the number is, in words."""
        if self._cuda:
            return "peak GPU memory"
        return "peak memory of the process" + ("" if self._resettable else " since its start")


def _peak_since_start():
    """Peak resident memory of the process in bytes; 0 where the system does not tell."""
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def twin(model):
    """A second model that shares every weight with the first: patching one leaves the other as it is."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


def generate(model, inputs, num_tokens, *, exactly=False, show=None):
    """Generate greedily and return a `Run`.

    Args:
        inputs: ``input_ids`` and ``attention_mask`` of one prompt.
        num_tokens: The most tokens to generate.
        exactly: Go on past the end of the answer, to `num_tokens`.
        show: A streamer that prints the text as it comes.
    """
    clock = TokenClock(show)
    limits = {"max_new_tokens": num_tokens, "min_new_tokens": num_tokens if exactly else None}
    with PeakMemory(model.device) as peak:
        clock.start = time.perf_counter()
        model.generate(
            **inputs, **limits, streamer=clock, do_sample=False, num_beams=1, temperature=None, top_p=None, top_k=None
        )
    intervals = tuple(after - before for before, after in zip(clock.times, clock.times[1:], strict=False))
    return Run(tuple(clock.tokens), clock.times[0] - clock.start, intervals, peak.bytes)


def alternate(models, inputs, num_tokens, rounds, progress=None):
    """Time every model in each round, first to last and then last to first, after a warm-up of each.

    Args:
        models: Models by name.
        progress: Called with the number of rounds done, after each.

    Returns:
        The list of runs of each name; the n-th runs of two names belong to the same round.
    """
    runs = {name: [] for name in models}
    for model in models.values():
        generate(model, inputs, min(num_tokens, WARM_UP_TOKENS), exactly=True)
    for done in range(rounds):
        names = list(models) if done % 2 == 0 else list(reversed(models))
        for name in names:
            with no_garbage_collection():
                runs[name].append(generate(models[name], inputs, num_tokens, exactly=True))
        if progress is not None:
            progress(done + 1)
    return runs


@contextlib.contextmanager
def no_garbage_collection():
    """Collect before the block, and not in it: a collection would fall on one model by chance."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def first_difference(a, b):
    """Index of the first token that differs, None where both sequences are equal."""
    for index, (left, right) in enumerate(zip(a, b, strict=False)):
        if left != right:
            return index
    return None if len(a) == len(b) else min(len(a), len(b))


def percentile(values, share):
    """The value below which `share` of the values lie (nearest rank)."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def summarise(runs):
    """Medians over the runs of one model, in seconds, bytes and tokens per second; None where there is no interval."""
    intervals = [interval for run in runs for interval in run.intervals]
    return {
        "first_token": statistics.median(run.first for run in runs),
        "between_tokens": statistics.median(intervals) if intervals else None,
        "between_tokens_p95": percentile(intervals, 0.95) if intervals else None,
        "tokens_per_second": statistics.median(run.tokens_per_second for run in runs),
        "peak_bytes": max(run.peak_bytes for run in runs),
    }


def ratios(before, after):
    """How many times as fast `after` is as `before`: the median of the ratios of each round, None without intervals."""
    pairs = list(zip(before, after, strict=True))
    with_intervals = all(run.intervals for run in (*before, *after))
    between = (
        [statistics.median(a.intervals) / statistics.median(b.intervals) for a, b in pairs] if with_intervals else None
    )
    return {
        "first_token": statistics.median(a.first / b.first for a, b in pairs),
        "between_tokens": statistics.median(between) if between else None,
        "tokens_per_second": statistics.median(b.tokens_per_second / a.tokens_per_second for a, b in pairs),
    }
