"""Find the fastest of the right configurations of one question."""

import datetime
import platform
import time
from dataclasses import dataclass, field

import torch

from fusedops._core.tuning import Choice, forced
from fusedops._core.tuning.entry import Entry
from fusedops.testing.timing import compare, rotating
from fusedops.tuning.oracle import Wrong, cloned

MARGIN = 0.02  # within which two configurations are equally fast
BATCH = 8  # configurations that are timed side by side with the default
FINALISTS = 4


@dataclass
class Tuned:
    """What was found for one question.

    Attributes:
        before: The configuration and its source, as the call would have used.
        config: The configuration that it uses from now on.
        state: "measured", "partly measured" (out of time; the next call goes on), "known" or "failed".
        timings: Seconds by configuration.
        refused: Why a configuration may not win, by configuration.
        entry: What was stored, or None.
    """

    before: Choice
    config: object
    state: str
    timings: dict = field(default_factory=dict)
    refused: dict = field(default_factory=dict)
    entry: Entry | None = None

    def __str__(self):
        name, first = self.before.tunable.name, label(self.before.tunable, self.before.config)
        text = f"{name}: {label(self.before.tunable, self.config)} ({self.state}"
        if self.timings:
            now, default = self.timings[label(self.before.tunable, self.config)], next(iter(self.timings.values()))
            text += f", {now * 1e6:.2f} us, the default {default * 1e6:.2f} us, of {len(self.timings)}"
        text += f", {len(self.refused)} refused)" if self.refused else ")"
        return text + (f": {self.refused[first]}" if self.state == "failed" else "")


def label(tunable, config):
    """A configuration as text: its tuned parameters."""
    return " ".join(f"{name}={value}" for name, value in tunable.values(config).items())


def measure_side_by_side(calls, arguments, device):
    """Name to `Timing`, of calls on the argument tuples in turn; on a GPU without the host's cost."""
    return compare(calls, arguments=arguments, rounds=7, round_seconds=0.01, device=device, graph=device.type == "cuda")


class Search:
    """One question's search.

    Args:
        choice: The question, with what would be used now.
        operator, args: The call that asks it.
        oracle: Who judges results.
        timer: Function (calls by name, argument tuples, device) that gives a timing for each, as `compare` does.
        deadline: Of `time.monotonic`, after which no further configuration is begun.
        progress: Function (text, done, total), or None.
        known: The entry of an earlier search that ran out of time, or None.
    """

    def __init__(self, choice, operator, args, *, oracle, timer, deadline, progress=None, known=None):
        self._choice, self._operator, self._args = choice, operator, args
        self._oracle, self._timer, self._deadline, self._progress = oracle, timer, deadline, progress
        found = choice.tunable.candidates(choice.limits, choice.fields)
        self._configs = {label(choice.tunable, config): config for config in found}
        self._default = next(iter(self._configs))
        self._known = dict(known.timings) if known else {}
        self._timings, self._refused = {}, {}

    def run(self):
        """The best configuration that was found in time, as a `Tuned`."""
        if not self._is_right(self._default):
            return Tuned(self._choice, self._configs[self._default], "failed", {}, self._refused)
        arguments = self._argument_sets()
        complete = self._screen(arguments)
        ranked = sorted(self._timings, key=self._timings.get)
        finalists = [name for name in self._configs if name == self._default or name in ranked[:FINALISTS]]
        finalists = [name for name in finalists if self._is_right(name)]
        final = self._time(finalists, arguments)
        noise = max((timing.median - timing.low) / timing.median for timing in final.values())
        winner = first_of_the_fastest({name: timing.median for name, timing in final.items()}, max(MARGIN, noise))
        self._timings.update({name: timing.median for name, timing in final.items()})
        state = "measured" if complete else "partly measured"
        entry = self._entry(winner, noise, complete)
        return Tuned(self._choice, self._configs[winner], state, self._ordered(), self._refused, entry)

    def _screen(self, arguments):
        """Check and time all configurations in batches; whether there was time for all."""
        names = list(self._configs)
        self._timings = {name: seconds for name, seconds in self._known.items() if name in self._configs}
        waiting = [name for name in names if name != self._default and name not in self._timings]
        for start in range(0, len(waiting), BATCH):
            batch = []
            for name in waiting[start : start + BATCH]:
                if time.monotonic() > self._deadline:
                    break
                batch += [name] if self._is_right(name) else []
            measured = self._time([self._default, *batch], arguments)
            unit = measured[self._default].median
            base = self._timings.setdefault(self._default, unit)
            for name in batch:  # in units of the default beside it, which a slower hour slows as much
                self._timings[name] = measured[name].median / unit * base
            if time.monotonic() > self._deadline:
                return all(name in self._timings or name in self._refused for name in names)
        return True

    def _is_right(self, name):
        """Whether a configuration runs, and computes what it should."""
        if name in self._refused:
            return False
        if self._progress is not None:
            self._progress(f"{self._choice.tunable.name} {name}", len(self._timings), len(self._configs))
        try:
            with forced(self._choice.tunable, self._configs[name]):
                self._oracle.check()
        except Wrong as error:
            self._refused[name] = str(error)
        except Exception as error:  # a compiler's refusal has many types; each means that this one cannot run
            self._refused[name] = f"{type(error).__name__}: {error}"
        return name not in self._refused

    def _time(self, names, arguments):
        with torch.no_grad():
            return self._timer({name: self._call(name) for name in names}, arguments, self._args[0].device)

    def _call(self, name):
        tunable, config, operator = self._choice.tunable, self._configs[name], self._operator

        def call(*args):
            with forced(tunable, config):
                return operator(*args)

        return call

    def _argument_sets(self):
        """Clones, on a GPU so many that no call finds its operands in the cache."""
        num_bytes = sum(arg.numel() * arg.element_size() for arg in self._args if isinstance(arg, torch.Tensor))
        if self._args[0].device.type != "cuda":
            return [tuple(cloned(self._args))]
        return rotating(lambda index: tuple(cloned(self._args)), num_bytes)

    def _ordered(self):
        return {name: self._timings[name] for name in self._configs if name in self._timings}

    def _entry(self, winner, noise, complete):
        return Entry(
            key=self._choice.key,
            config=self._choice.tunable.values(self._configs[winner]),
            timings={name: float(seconds) for name, seconds in self._ordered().items()},
            noise=float(max(noise, 0.0)),
            validation={"by": "reference in float64, twice, on memory of NaN", "refused": len(self._refused)},
            complete=complete,
            host=platform.node(),
            date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        )


def first_of_the_fastest(seconds, margin):
    """Of names in a fixed order the first that no other beats by more than `margin`, a share of the fastest's time."""
    limit = min(seconds.values()) * (1 + margin)
    return next(name for name, found in seconds.items() if found <= limit)
