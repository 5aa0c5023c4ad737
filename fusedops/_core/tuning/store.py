"""Where tuned configurations are kept: memory, the user's folder, read-only folders of a site, and the package's own.

Nothing here raises for what it finds on a disk: what cannot be read is a miss, what cannot be written stays in memory,
and each reason is told once.
"""

import errno
import os
import stat
import time
import warnings
from collections import Counter
from pathlib import Path

from fusedops._core import env
from fusedops._core.tuning import folder as folders
from fusedops._core.tuning.entry import MAX_BYTES, InvalidEntry, decode, encode

SUBFOLDER = "tuning"
SUFFIX, BAD = ".json", ".bad"
MAX_SCANNED = 1024  # files of one operator that are read at its first use
STALE_SECONDS = 3600.0  # after which what a writer left behind is nobody's any more
SHIPPED = Path(__file__).parents[2] / "_tuned"  # as safe as the code beside it
counts = Counter()  # hit, miss, invalid, default, fallback
_memory = {}  # entries of this process by folders and name; they outlive a change of the environment
_warned = set()


class TuningWarning(UserWarning):
    """A file or folder of tuned configurations cannot be used; what needs it runs with the default."""


class Layer:
    """One folder of entries.

    Attributes:
        name: "user", "site" or "wheel".
        root: The folder; tuning/v<schema>/<environment>/<operator>/<key>.json stand in it. None where there is none.
        writable: Whether entries may be put, and bad files moved aside.
    """

    def __init__(self, name, root, below, writable):
        self.name = name
        self.root = root
        self.writable = writable
        self._below = below

    def _owners(self):
        """Who may own what is read: the user, of a site also the administrator; None is anybody."""
        if self.name == "wheel":
            return None
        return {os.getuid()} if self.writable else {0, os.getuid()}

    def _warn(self, what, why):
        if (what, why) not in _warned:
            _warned.add((what, why))
            warnings.warn(f"tuned configurations: {what} {why}", TuningWarning, stacklevel=2)

    def _open(self, names, create=False):
        """A descriptor of a folder, or None; says why unless nothing is there."""
        if self.root is None:
            return None
        try:
            return folders.open_folder(self.root, (*self._below, *names), self._owners(), create)
        except folders.Refused as error:
            self._warn(str(self.root), f"is not used: {error}")
        except FileNotFoundError as error:
            if create:
                self._warn(str(self.root), f"cannot be written, kept in memory: {error.strerror}")
        except OSError as error:
            self._warn(str(self.root), f"cannot be used, kept in memory: {error.strerror}")
        return None

    def get(self, names, name):
        """The entry of a file, or None."""
        found = self._open(names)
        if found is None:
            return None
        try:
            return self._read(found, names, name)
        finally:
            os.close(found)

    def _read(self, found, names, name):
        """The entry of a file in an open folder, or None; what is bad is moved aside and told once."""
        identity = None
        try:
            content, identity = folders.read_file(found, name, self._owners(), MAX_BYTES)
            entry = decode(content)
            if (*entry.folder, entry.name) != (*names, name):
                raise InvalidEntry("stands under another key's name")
            return entry
        except FileNotFoundError:
            return None
        except (InvalidEntry, folders.Refused) as error:
            counts["invalid"] += 1
            aside = self.writable and folders.move_aside(found, name, identity, BAD)
            self._warn(os.path.join(self.root, *names, name), f"{error}{', moved aside' if aside else ''}")
        except OSError as error:
            self._warn(os.path.join(self.root, *names, name), f"cannot be read: {error.strerror}")
        return None

    def scan(self, names, most=None):
        """The entries of one operator's folder, of its first `most` files, in the order of their names."""
        found = self._open(names)
        if found is None:
            return []
        try:
            entries = (self._read(found, names, name) for name in _files(found)[:most])
            return [entry for entry in entries if entry is not None]
        except OSError as error:
            self._warn(os.path.join(self.root, *names), f"cannot be read: {error.strerror}")
            return []
        finally:
            os.close(found)

    def files(self, names):
        """The names of the files of one operator's folder."""
        found = self._open(names)
        if found is None:
            return []
        try:
            return _files(found)
        finally:
            os.close(found)

    def put(self, entry):
        """Keep an entry; whether it is on the disk now."""
        if not self.writable or self.root is None:
            return False
        content = encode(entry)
        for attempt in range(2):  # the folder may be cleared, or its server restarted, between two steps
            found = self._open(entry.folder, create=True)
            if found is None:
                return False
            try:
                folders.write_file(found, entry.name, content)
                return True
            except OSError as error:
                if attempt or error.errno not in (errno.ENOENT, errno.ESTALE):
                    self._warn(str(self.root), f"cannot be written, kept in memory: {error.strerror}")
                    return False
            finally:
                os.close(found)
        return False

    def folders(self):
        """The (schema, environment, operator) folders that exist."""
        return [
            (version, place, op)
            for version in self._list(())
            for place in self._list((version,))
            for op in self._list((version, place))
        ]

    def _list(self, names):
        found = self._open(names)
        if found is None:
            return []
        try:
            return sorted(name for name in os.listdir(found) if _is_folder(found, name))
        finally:
            os.close(found)

    def entries(self):
        """Every entry of the layer."""
        return [entry for names in self.folders() for entry in self.scan(names)]

    def remove(self, wanted):
        """Remove the files for which `wanted(names, name, age in seconds)` says so; how many."""
        removed = 0
        for names in self.folders():
            found = self._open(names)
            if found is None:
                continue
            try:
                for name in os.listdir(found):
                    age = time.time() - os.stat(name, dir_fd=found, follow_symlinks=False).st_mtime
                    if wanted(names, name, age):
                        removed += folders.remove(found, name)
            except OSError as error:
                self._warn(os.path.join(self.root, *names), f"cannot be cleaned: {error.strerror}")
            finally:
                os.close(found)
        return removed


def _files(found):
    """The names of the entries in an open folder."""
    return sorted(name for name in os.listdir(found) if name.endswith(SUFFIX) and not name.startswith("."))


def _is_folder(found, name):
    """Whether a name in an open folder is one; a link is none."""
    try:
        status = os.stat(name, dir_fd=found, follow_symlinks=False)
    except OSError:
        return False
    return stat.S_ISDIR(status.st_mode)


def _user_root():
    """The user's folder, or None where there is no home to have it in."""
    try:
        root = env.cache_dir()
    except RuntimeError:  # ~name of nobody
        return None
    return None if str(root).startswith("~") else root.absolute()


def _site_roots():
    try:
        return [path.absolute() for path in env.cache_path()]
    except RuntimeError:
        return []


class Store:
    """All layers together; what the first one has is used."""

    def __init__(self):
        posix = os.name == "posix"  # elsewhere folders cannot be opened, and no kernel runs
        self.user = Layer("user", _user_root() if posix else None, (SUBFOLDER,), True)
        self.layers = [
            self.user,
            *(Layer("site", root, (SUBFOLDER,), False) for root in (_site_roots() if posix else ())),
            Layer("wheel", SHIPPED if posix else None, (), False),
        ]
        self._scanned = {}

    def get(self, names, name):
        """(entry, name of its layer) of a key, or (None, None)."""
        entry = _memory.get((*names, name))
        if entry is not None:
            return entry, "memory"
        listed, whole = self._listed(names)
        found = listed.get(name)
        if found is None and not whole:
            read = ((layer.get(names, name), layer.name) for layer in self.layers)
            found = next((pair for pair in read if pair[0] is not None), None)
        return found or (None, None)

    def all_of(self, names):
        """(entry, name of its layer) of everything known of one operator."""
        memory = [(entry, "memory") for key, entry in _memory.items() if key[:-1] == names]
        return memory + list(self._listed(names)[0].values())

    def _listed(self, names):
        """((entry, name of its layer) by file's name, of the first layer that has it, and whether that is all).

        The disk is read once, so that what a process uses does not change while it runs.
        """
        if names not in self._scanned:
            found = {}
            whole = all(len(layer.files(names)) <= MAX_SCANNED for layer in self.layers)
            self._scanned[names] = found, whole
            for layer in self.layers:
                for entry in layer.scan(names, MAX_SCANNED):
                    found.setdefault(entry.name, (entry, layer.name))
        return self._scanned[names]

    def put(self, entry, *, keep=True):
        """Remember an entry for this process, and with `keep` for the next ones; whether it is on the disk now."""
        _memory[(*entry.folder, entry.name)] = entry
        return keep and self.user.put(entry)


_current = None


def current_store():
    """The store of the folders that the environment names now."""
    global _current
    if _current is None:
        _current = Store()
    return _current


def forget():
    """Look at the folders anew at the next use."""
    global _current
    _current = None


def forget_memory():
    """Forget what this process alone knows, and what was told once."""
    _memory.clear()
    _warned.clear()
    forget()


def merged(*collections):
    """Of several collections of entries one: of two with one key the one of higher rank, whatever the order."""
    best = {}
    for entries in collections:
        for entry in entries:
            place = (*entry.folder, entry.name)
            if place not in best or entry.rank > best[place].rank:
                best[place] = entry
    return [best[place] for place in sorted(best)]


env.on_change(forget)
