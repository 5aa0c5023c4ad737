"""Look after what is stored: judge, export, import, merge, prune and clear."""

import contextlib
import os
from pathlib import Path

from fusedops._core.device import DeviceLimits, limits, triton_missing
from fusedops._core.register import operators
from fusedops._core.tuning import forget, tunables
from fusedops._core.tuning.entry import InvalidEntry, canonical, checksum, from_dict, parse
from fusedops._core.tuning.key import SCHEMA, digest, environment
from fusedops._core.tuning.store import (
    BAD,
    STALE_SECONDS,
    SUBFOLDER,
    SUFFIX,
    Layer,
    current_store,
    forget_memory,
    merged,
)
from fusedops._core.tuning.store import forget as forget_store

MAX_ARCHIVE_BYTES = 64 * 2**20
SECONDS_A_DAY = 86400.0
STALE = "was measured with other code"


def judge(entry):
    """Why an entry cannot be used, or None; STALE where only the code it was measured with has changed."""
    _import_kernels()
    tunable = tunables().get(entry.key["op"])
    if tunable is None:
        return None if triton_missing() else f"is for {entry.key['op']}, and there is no such kernel"
    sizes, flags, place = entry.key["sizes"], entry.key["flags"], entry.key["environment"]
    if {*sizes} != {*tunable.sizes} or {*flags} != {*tunable.flags, *tunable.also}:
        return STALE
    fields = *(sizes[name] for name in tunable.sizes), *(flags[name] for name in tunable.flags)
    try:
        device = DeviceLimits(place["gpu"], place["arch"], place["sm_count"], place["shared_memory"], place["l2"])
        key = tunable.key(device, fields, (None,) * len(tunable.also))
        if (key["source"], key["space"]) != (entry.key["source"], entry.key["space"]):
            return STALE
        config = tunable.from_values(entry.config, fields, device)
    except (KeyError, TypeError, ValueError, ArithmeticError, NotImplementedError) as error:
        return f"has a key that means nothing ({type(error).__name__})"
    return None if config is not None else "has a configuration that is not legal there"


def _import_kernels():
    """Tunables are known from the import of their kernels on."""
    if triton_missing() is None:
        for operator in operators().values():
            for kind in {"cuda", "triton"}.intersection(operator.implementations):
                operator.module(kind)


def archived(entries):
    """Entries as the bytes of one file."""
    data = [entry.as_dict() for entry in merged(entries)]
    return canonical({"schema": SCHEMA, "entries": [{**one, "checksum": checksum(one)} for one in data]}) + b"\n"


def unarchived(content):
    """(entries, reasons of those that were refused) of such a file. InvalidEntry: it is none."""
    if len(content) > MAX_ARCHIVE_BYTES:
        raise InvalidEntry(f"has more than {MAX_ARCHIVE_BYTES} bytes")
    data = parse(content)
    if type(data) is not dict or data.keys() != {"schema", "entries"} or type(data["entries"]) is not list:
        raise InvalidEntry("is no file of tuned configurations")
    if data["schema"] != SCHEMA:
        raise InvalidEntry(f"has schema {data['schema']}, not {SCHEMA}")
    entries, refused = [], []
    for number, one in enumerate(data["entries"]):
        try:
            entry = from_dict(one)
            reason = judge(entry)
        except InvalidEntry as error:
            reason = str(error)
        if reason is None:
            entries.append(entry)
        else:
            refused.append(f"entry {number} {reason}")
    return entries, refused


def collected(path):
    """(entries, reasons of those that were refused) of an exported file or a cache directory.

    Raises:
        InvalidEntry: it is neither.
        OSError: it cannot be read.
    """
    path = Path(path)
    if not path.is_dir():
        with open(path, "rb") as file:
            return unarchived(file.read(MAX_ARCHIVE_BYTES + 1))
    entries, refused = [], []
    for entry in Layer("site", path.absolute(), (SUBFOLDER,), False).entries():
        reason = judge(entry)
        entries += [entry] if reason is None else []
        refused += [] if reason is None else [f"{'/'.join(entry.folder)}/{entry.name} {reason}"]
    return entries, refused


def export(path, entries):
    """Write entries to one file, whole or not at all."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(archived(entries))
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def add(entries):
    """Put entries into the user's folder where they rank above what is there; how many were put."""
    user = current_store().user
    before = {(*entry.folder, entry.name): entry for entry in user.entries()}
    new = [entry for entry in merged(before.values(), entries) if before.get((*entry.folder, entry.name)) != entry]
    put = sum(user.put(entry) for entry in new)
    _look_anew()
    return put


def verify():
    """(layer, path, reason) of every entry that cannot be used; what is damaged is moved aside by being read."""
    found = []
    for layer in current_store().layers:
        for names in layer.folders():
            listed = layer.files(names)
            good = {entry.name: entry for entry in layer.scan(names)}
            for name in listed:
                reason = judge(good[name]) if name in good else "is damaged or not safe"
                if reason is not None:
                    found.append((layer.name, "/".join((str(layer.root), *names, name)), reason))
    return found


def prune(days=None, other_environments=False):
    """Remove what writers left behind and what was moved aside, and on demand what is old or of other machines."""
    here = {digest(environment(one)) for one in _devices()}

    def wanted(names, name, age):
        if name.endswith(SUFFIX) and not name.startswith("."):
            old = days is not None and age > days * SECONDS_A_DAY
            return old or (other_environments and names[1] not in here)
        return name.endswith(BAD) or age > STALE_SECONDS

    removed = current_store().user.remove(wanted)
    _look_anew()
    return removed


def clear(op=None):
    """Remove every entry of the user's folder, or of one kernel; how many files."""
    removed = current_store().user.remove(lambda names, name, age: op is None or names[2] == op)
    forget_memory()
    _look_anew()
    return removed


def _look_anew():
    """Look at the folders anew at the next use."""
    forget_store()
    forget()


def _devices():
    """The limits of every device that kernels may run on here."""
    import torch

    places = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    return [limits(torch.device(place)) for place in places]
