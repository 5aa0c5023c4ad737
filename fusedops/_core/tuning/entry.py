"""One tuned configuration as data and as the bytes of a file. Whatever is not exactly right is refused."""

import hashlib
import json
import math
from dataclasses import dataclass, field

from fusedops._core.tuning.key import SCHEMA, canonical, digest

MAX_BYTES = 64 * 1024
MAX_TIMINGS = 256
KEY_FIELDS = {
    "environment": dict, "op": str, "source": str, "space": str, "sizes": dict, "flags": dict, "numerics": str,
}  # fmt: skip
FIELDS = {
    "schema": int, "key": dict, "config": dict, "timings": dict, "noise": float, "validation": dict, "complete": bool,
    "host": str, "date": str, "checksum": str,
}  # fmt: skip


class InvalidEntry(ValueError):
    """The bytes are no entry; the message says what is wrong."""


@dataclass(frozen=True)
class Entry:
    """A tuned configuration.

    Attributes:
        key: What it holds for.
        config: The tuned parameters by name.
        timings: Seconds of every candidate that was measured, by its description.
        noise: What the timings scattered by, as a share.
        validation: How the winner was checked.
        complete: Whether every candidate was looked at.
        host, date: Where and when it was measured; the date is ISO 8601 in UTC.
    """

    key: dict
    config: dict
    timings: dict = field(default_factory=dict)
    noise: float = 0.0
    validation: dict = field(default_factory=dict)
    complete: bool = True
    host: str = ""
    date: str = ""

    @property
    def folder(self):
        """The names of the folders that hold the entry's file."""
        return f"v{SCHEMA}", digest(self.key["environment"]), self.key["op"]

    @property
    def name(self):
        """The name of the entry's file."""
        return key_name(self.key)

    @property
    def rank(self):
        """Of two entries with one key the one of higher rank stays, in whatever order they come."""
        return self.complete, self.date, checksum(self.as_dict())

    def as_dict(self):
        """The same as plain data, without the checksum."""
        return {
            "schema": SCHEMA, "key": self.key, "config": self.config, "timings": self.timings, "noise": self.noise,
            "validation": self.validation, "complete": self.complete, "host": self.host, "date": self.date,
        }  # fmt: skip


def key_name(key):
    """The file's name of a key."""
    return digest({name: value for name, value in key.items() if name != "environment"}) + ".json"


def checksum(data):
    """The checksum of an entry's plain data."""
    return hashlib.sha256(canonical(data)).hexdigest()


def encode(entry):
    """The bytes of an entry's file. InvalidEntry: it is too large, or not plain data."""
    data = entry.as_dict()
    try:
        encoded = canonical({**data, "checksum": checksum(data)}) + b"\n"
    except (ValueError, TypeError) as error:
        raise InvalidEntry(f"is no plain data: {error}") from error
    if len(encoded) > MAX_BYTES:
        raise InvalidEntry(f"has {len(encoded)} bytes, at most {MAX_BYTES} are allowed")
    return encoded


def decode(encoded):
    """The entry of a file's bytes. InvalidEntry: anything about them is wrong."""
    if len(encoded) > MAX_BYTES:
        raise InvalidEntry(f"has more than {MAX_BYTES} bytes")
    return from_dict(parse(encoded))


def parse(encoded):
    """JSON without repeated names, NaN and infinity. InvalidEntry: it is something else."""
    try:
        return json.loads(encoded.decode(), object_pairs_hook=_once_each, parse_constant=_refuse)
    except InvalidEntry:
        raise
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise InvalidEntry(f"is no JSON: {type(error).__name__}") from error


def _once_each(pairs):
    found = dict(pairs)
    if len(found) != len(pairs):
        raise InvalidEntry("names a field twice")
    return found


def _refuse(text):
    raise InvalidEntry(f"has the number {text}")


def from_dict(data):
    """The entry of plain data with its checksum. InvalidEntry: a field, a type, a bound or the checksum is wrong."""
    _check_fields("", data, FIELDS)
    if data["schema"] != SCHEMA:
        raise InvalidEntry(f"has schema {data['schema']}, not {SCHEMA}")
    try:
        expected = checksum({name: value for name, value in data.items() if name != "checksum"})
    except (ValueError, RecursionError) as error:
        raise InvalidEntry(f"is no plain data: {type(error).__name__}") from error
    if data["checksum"] != expected:
        raise InvalidEntry("has a wrong checksum")
    _check_fields("key.", data["key"], KEY_FIELDS)
    op = data["key"]["op"]
    if not (op.isidentifier() and op.isascii()):  # it names a folder
        raise InvalidEntry("has a key.op that is no name")
    _check_numbers("key.sizes", data["key"]["sizes"], int)
    _check_numbers("timings", data["timings"], float)
    if len(data["timings"]) > MAX_TIMINGS or not 0.0 <= data["noise"] < math.inf:
        raise InvalidEntry("has timings or a noise out of range")
    if not all(type(value) in (int, bool, str) for value in data["config"].values()):
        raise InvalidEntry("has a config that is not made of numbers and names")
    return Entry(**{name: value for name, value in data.items() if name not in ("schema", "checksum")})


def _check_fields(prefix, data, fields):
    if type(data) is not dict or data.keys() != fields.keys():
        raise InvalidEntry(f"has other fields than {prefix}{{{', '.join(fields)}}}")
    for name, kind in fields.items():
        if type(data[name]) is not kind:
            raise InvalidEntry(f"has a {prefix}{name} that is no {kind.__name__}")


def _check_numbers(name, numbers, kind):
    if not all(type(value) is kind and 0 <= value < math.inf for value in numbers.values()):
        raise InvalidEntry(f"has {name} that are no {kind.__name__} of at least 0")
