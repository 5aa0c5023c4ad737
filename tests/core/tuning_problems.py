"""What the tests of tuning share: a store of their own, entries, a clock that needs no device, and damaged files."""

import json
import random
from dataclasses import dataclass, replace

from fusedops._core.device import INTERPRETER
from fusedops._core.tuning import Tunable
from fusedops._core.tuning.entry import MAX_BYTES, Entry, checksum, encode


@dataclass(frozen=True)
class Tile:
    """A configuration of nothing."""

    block: int = 64
    num_warps: int = 4


def tile_fits(tile, rows, width, narrow, limits):
    return tile.block * width <= limits.shared_memory // 8 and tile.num_warps * 16 <= tile.block


TOY = Tunable(
    "toy",
    default=lambda rows, width, narrow, limits: Tile(),
    sizes=("rows", "width"),
    flags=("narrow",),
    also=("dtype",),
    space={"block": (32, 64, 128, 256), "num_warps": (2, 4, 8)},
    fits=tile_fits,
    source=__file__,
)
ASKED = (100, 64, False), ("bf16",)


def entry_of(fields=ASKED[0], also=ASKED[1], limits=INTERPRETER, config=None, **changes):
    """An entry of the toy."""
    config = {"block": 128, "num_warps": 8} if config is None else config
    timings = {"block=64 num_warps=4": 2.0, "block=128 num_warps=8": 1.0}
    entry = Entry(TOY.key(limits, fields, also), config, timings, 0.01, {"by": "hand"}, True, "host", "2026-01-01")
    return replace(entry, **changes)


@dataclass(frozen=True)
class Time:
    """The part of a timing that a search reads."""

    median: float
    low: float


class Clock:
    """A timer that runs each call once and says what it was told to."""

    def __init__(self, seconds, run=True):
        self.seconds = seconds
        self.run = run
        self.rounds = []

    def __call__(self, calls, arguments, device):
        self.rounds.append(list(calls))
        for call in calls.values():
            if self.run:
                call(*arguments[0])
        return {name: self._time(name) for name in calls}

    def _time(self, name):
        seconds = self.seconds(name)
        return seconds if isinstance(seconds, Time) else Time(seconds, seconds)


def damaged(entry, seed):
    """The bytes of an entry's file after one of the things that happen to files; never what `decode` may take."""
    random_number = random.Random(seed)
    content = encode(entry)
    data = {**entry.as_dict(), "checksum": checksum(entry.as_dict())}
    kind = seed % 10
    if kind == 0:
        return content[: random_number.randrange(len(content) - 2)]
    if kind == 1:
        place = random_number.randrange(len(content) - 1)
        return content[:place] + bytes([content[place] ^ (1 << random_number.randrange(8))]) + content[place + 1 :]
    if kind == 2:
        return _signed(_mistyped(data, random_number))
    if kind == 3:
        return b" " * random_number.randrange(1, MAX_BYTES) + content + b" " * MAX_BYTES
    if kind == 4:
        depth = random_number.randrange(2000, MAX_BYTES // 6)
        return random_number.choice((b"[", b'{"a":')) * depth
    if kind == 5:
        return _signed({**data, "schema": random_number.choice((0, 2, 99, True, "1"))})
    if kind == 6:
        return _signed({**data, "extra": 1}) if seed % 20 == 6 else _signed(_without(data, random_number))
    if kind == 7:
        return _signed({**data, "config": random_number.choice(({"block": 1.5}, {"block": [1]}, {"block": None}))})
    if kind == 8:
        key = {**data["key"], "op": "../toy"} if seed % 20 == 8 else _mistyped(data["key"], random_number)
        return _signed({**data, "key": key})
    return bytes(random_number.randrange(256) for _ in range(random_number.randrange(4096)))


_WRONG = (None, 1.5, [], [[]], {"a": {"b": []}}, float("inf"), float("nan"), 10**400, "text")


def _mistyped(data, random_number):
    name = random_number.choice([name for name in data if name != "checksum"])
    return {**data, name: random_number.choice([wrong for wrong in _WRONG if type(wrong) is not type(data[name])])}


def _without(data, random_number):
    name = random_number.choice(list(data))
    return {key: value for key, value in data.items() if key != name}


def _signed(data):
    """With a checksum that fits, so that something else must find the fault."""
    body = {name: value for name, value in data.items() if name != "checksum"}
    try:
        data = {**data, "checksum": checksum(body)} if "checksum" in data else data
    except (ValueError, TypeError):
        pass
    return json.dumps(data, sort_keys=True, separators=(",", ":")).encode()
