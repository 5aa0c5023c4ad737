"""How a launcher gets its configuration: what was tuned for the call where there is something, else arithmetic.

A launcher asks a `Tunable`. A repeated question is one look into a dictionary; a new one goes through memory, the
user's folder, the site's and the package's own, first for the exact key and then for a near one, and ends with the
default. Nothing is measured here.
"""

import itertools
import threading
from contextlib import contextmanager
from dataclasses import dataclass, replace

from fusedops._core import env, replay
from fusedops._core.tuning.entry import MAX_TIMINGS, key_name
from fusedops._core.tuning.key import SCHEMA, bucket, digest, environment, environment_hash, near, plain, source_hash
from fusedops._core.tuning.store import counts, current_store

MAX_RESOLVED = 4096  # answers that one tunable remembers of a device
DEFAULT = "default by arithmetic"
EXACT = ("memory", "user", "site", "wheel")  # sources of what was tuned for this very bucket
_TUNABLES = {}
_aside = {}  # whatever turns `choose` from its short way: (what, thread) to what it means
_lock = threading.Lock()


@dataclass(frozen=True)
class Choice:
    """The answer to one question.

    Attributes:
        tunable: Who was asked.
        limits, fields, also: What was asked.
        config: The configuration.
        source: Where it came from: DEFAULT, the name of a layer, or of a layer and that the entry is a neighbour's.
        key: What the configuration holds for, as plain data.
    """

    tunable: object
    limits: object
    fields: tuple
    also: tuple
    config: object
    source: str
    key: dict

    @property
    def place(self):
        """Folders and name of the key's file."""
        return (f"v{SCHEMA}", digest(self.key["environment"]), self.tunable.name), key_name(self.key)


class Tunable:
    """A kernel's configuration: how it is computed, and what of it may be measured instead.

    Args:
        name: Of the kernel; a folder of the store.
        default: Function (*fields, limits) that computes the configuration, a frozen dataclass.
        sizes: Names of the first fields, numbers that are put into buckets.
        flags: Names of the other fields, which must be equal.
        also: Names of what only tells calls apart: dtypes, layouts, options.
        space: Parameter to its values, in the order in which they are tried.
        fits: Function (config, *fields, limits) that says whether a configuration is legal: the device holds it and
            the kernel takes it.
        source: ``__file__`` of the module that holds the kernel, or several such paths: see `key.source_hash`.
        complete: Function (config, *fields, limits) that computes the parameters that follow from the tuned ones.
    """

    def __init__(self, name, *, default, sizes, flags=(), also=(), space, fits, source, complete=None):
        assert name not in _TUNABLES and not set(sizes) & {*flags, *also} and not set(flags) & set(also)
        self.name = name
        self.default = default
        self.sizes, self.flags, self.also = tuple(sizes), tuple(flags), tuple(also)
        self.space = space
        self._fits = fits
        self._sources = (source,) if isinstance(source, str) else tuple(source)
        self._complete = complete
        self._resolved = {}
        _TUNABLES[name] = self

    def choose(self, device_limits, fields, also=()):
        """The configuration of a call; fields and also are tuples in the order of their names."""
        if _aside:
            return self._choose_aside(device_limits, fields, also)
        answers = self._resolved.get(id(device_limits))  # the object is kept with its answers, so its id is its own
        config = None if answers is None else answers.get((fields, also))
        return config if config is not None else self._remember(device_limits, fields, also)

    def _remember(self, device_limits, fields, also):
        choice = self.look_up(device_limits, fields, also)
        counts["hit" if choice.source in EXACT else "miss"] += 1
        if choice.source not in EXACT:
            counts["default" if choice.source == DEFAULT else "fallback"] += 1
        answers = self._resolved.get(id(device_limits))
        if answers is None or len(answers) > MAX_RESOLVED:
            answers = self._resolved[id(device_limits)] = {None: device_limits}
        answers[fields, also] = choice.config
        return choice.config

    def _choose_aside(self, device_limits, fields, also):
        thread = threading.get_ident()
        forced = _aside.get(("forced", thread), {}).get(self.name)
        observed = _aside.get(("observed", thread))
        if forced is not None:
            return forced
        if observed is not None:
            choice = self.look_up(device_limits, fields, also)
            observed.append(choice)
            return choice.config
        if ("default", None) in _aside:
            return self.default(*fields, device_limits)
        return self._remember(device_limits, fields, also)

    def look_up(self, device_limits, fields, also=()):
        """The Choice of a call, through all layers; what is found is checked against this very call."""
        key = self.key(device_limits, fields, also)
        chosen = self.default(*fields, device_limits)
        ask = self, device_limits, fields, also
        if ("default", None) in _aside:
            return Choice(*ask, chosen, DEFAULT, key)
        names = f"v{SCHEMA}", environment_hash(device_limits), self.name
        entry, layer = current_store().get(names, key_name(key))
        if entry is not None and entry.key == key:
            config = self.from_values(entry.config, fields, device_limits)
            if config is not None:
                return Choice(*ask, config, layer, key)
            counts["invalid"] += 1
        for entry, layer, config in self._neighbours(names, key, fields, device_limits):
            sizes = ", ".join(f"{name}={size}" for name, size in entry.key["sizes"].items())
            return Choice(*ask, config, f"{layer}, tuned for {sizes}", key)
        return Choice(*ask, chosen, DEFAULT, key)

    def _neighbours(self, names, key, fields, device_limits):
        """Entries that differ in sizes alone, none by more than MAX_DISTANCE, the nearest first."""
        found = []
        for order, (entry, layer) in enumerate(current_store().all_of(names)):
            if {**entry.key, "sizes": key["sizes"]} == key and near(entry.key["sizes"], key["sizes"]):
                ratios = [_ratio(size, key["sizes"][name]) for name, size in entry.key["sizes"].items()]
                found.append((max(ratios), sum(ratios), order, entry, layer))
        for *_, entry, layer in sorted(found, key=lambda item: item[:3]):
            config = self.from_values(entry.config, fields, device_limits)
            if config is not None:
                yield entry, layer, config

    def key(self, device_limits, fields, also=()):
        """What a configuration of a call holds for."""
        assert len(fields) == len(self.sizes) + len(self.flags) and len(also) == len(self.also)
        split = len(self.sizes)
        flags = dict(zip((*self.flags, *self.also), map(plain, (*fields[split:], *also))))
        return {
            "environment": environment(device_limits),
            "op": self.name,
            "source": source_hash(*self._sources),
            "space": digest({name: [plain(value) for value in values] for name, values in self.space.items()}),
            "sizes": dict(zip(self.sizes, map(bucket, fields[:split]))),
            "flags": flags,
            "numerics": "default",
        }

    def candidates(self, device_limits, fields):
        """The default and every legal configuration of the space, in a fixed order, none twice."""
        first = self.default(*fields, device_limits)
        found = {first: None}
        for values in itertools.product(*self.space.values()):
            config = self._build(first, dict(zip(self.space, values)), fields, device_limits)
            if config is not None:
                found[config] = None
        return list(itertools.islice(found, MAX_TIMINGS))

    def _build(self, first, values, fields, device_limits):
        config = replace(first, **values)
        if self._complete is not None:
            config = self._complete(config, *fields, device_limits)
        return config if config == first or self._fits(config, *fields, device_limits) else None

    def values(self, config):
        """What a configuration is stored as: the tuned parameters by name."""
        return {name: getattr(config, name) for name in self.space}

    def from_values(self, values, fields, device_limits):
        """The configuration of stored values for a call; None where they are not legal there."""
        if values.keys() != self.space.keys():
            return None
        first = self.default(*fields, device_limits)
        for name, value in values.items():
            legal = (*self.space[name], getattr(first, name))
            if not any(type(value) is type(one) and value == one for one in legal):
                return None
        return self._build(first, values, fields, device_limits)

    def forget(self):
        """Look everything up anew at the next use."""
        self._resolved.clear()


def _ratio(one, other):
    return max(one, other) / max(min(one, other), 1)


def tunables():
    """Every tunable whose kernels are imported, by name."""
    return dict(_TUNABLES)


def forget():
    """Look every configuration up anew at its next use."""
    for tunable in _TUNABLES.values():
        tunable.forget()
    replay.forget()


@contextmanager
def _turned_aside(what, meaning):
    with _lock:
        before = _aside.get(what)
        _aside[what] = meaning
    try:
        with replay.held():
            yield meaning
    finally:
        with _lock:
            if before is None:
                del _aside[what]
            else:
                _aside[what] = before


def forced(tunable, config):
    """For this thread and the length of a block, a tunable answers with this configuration."""
    what = "forced", threading.get_ident()
    return _turned_aside(what, {**_aside.get(what, {}), tunable.name: config})


def observed():
    """The block's list gets a Choice for every question that this thread asks."""
    return _turned_aside(("observed", threading.get_ident()), [])


@contextmanager
def defaults_only():
    """For the length of a block, in every thread, nothing that was tuned is used."""
    with _lock:
        _aside["default", None] = _aside.get(("default", None), 0) + 1
    replay.forget()
    try:
        yield
    finally:
        with _lock:
            _aside["default", None] -= 1
            if not _aside["default", None]:
                del _aside["default", None]
        replay.forget()


def uses_defaults_only():
    """Whether a block of `defaults_only` is running."""
    return ("default", None) in _aside


env.on_change(forget)
