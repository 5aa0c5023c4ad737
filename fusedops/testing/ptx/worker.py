"""A child process that compiles for a process which interprets Triton.

The parent writes pickled requests to the child's standard input and reads pickled answers from its standard output;
the child ends when its input does. Functions travel as the file and the name that they are found by.
"""

from __future__ import annotations

import atexit
import importlib
import importlib.util
import io
import os
import pickle
import struct
import subprocess
import sys
import tempfile
import threading
import traceback
import types
from dataclasses import dataclass, replace

from fusedops._core import fingerprint

_LENGTH = struct.Struct("<Q")


@dataclass(frozen=True)
class _Place:
    """Where a function is found: a module's name and file, and the function's path inside."""

    module: str
    file: str
    path: str


def compile_in_child(binding) -> tuple[str, dict]:
    """Compile a `Binding` in this process's child, which is started if there is none.

    Raises:
        CompileError: Triton refused the kernel, or the child died.
        ValueError: the kernel stands inside a function, where another process cannot find it.
    """
    from fusedops.testing.ptx.compiler import CompileError

    plain = replace(binding, values={})
    request = pickle.dumps(sys.path) + _pickled((plain, fingerprint.of(binding.function)))
    answer = _child().ask(request)
    if isinstance(answer, str):
        raise CompileError(f"ptx: {binding.name} does not compile: {answer}")
    return answer


class _Child:
    """The process, its pipes and what it writes to standard error."""

    def __init__(self):
        self.owner = os.getpid()
        self.lock = threading.Lock()
        self.errors = tempfile.TemporaryFile()
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        root = os.path.dirname(importlib.util.find_spec("fusedops").submodule_search_locations[0])
        environment["PYTHONPATH"] = os.pathsep.join([root, *filter(None, [environment.get("PYTHONPATH")])])
        self.process = subprocess.Popen(
            [sys.executable, "-c", f"from {__name__} import main; main()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            env=environment,
        )

    def usable(self) -> bool:
        return self.owner == os.getpid() and self.process.poll() is None

    def ask(self, request: bytes):
        with self.lock:
            said = self.errors.seek(0, os.SEEK_END)
            try:
                _send(self.process.stdin, request)
                answer = pickle.loads(_receive(self.process.stdout))
            except (EOFError, BrokenPipeError):
                answer = f"the compiling process ended with status {self.process.wait()}"
            self.errors.seek(said)
            spoken = self.errors.read().decode(errors="replace").strip()
        return "\n".join(filter(None, (answer, spoken[-4000:]))) if isinstance(answer, str) else answer

    def end(self) -> None:
        if self.owner == os.getpid():
            self.process.stdin.close()
            self.process.wait()


_started: list[_Child] = []
_starting = threading.Lock()


def _child() -> _Child:
    with _starting:
        if not _started or not _started[-1].usable():
            _started.append(_Child())
            atexit.register(_started[-1].end)
        return _started[-1]


def _send(pipe, message: bytes) -> None:
    pipe.write(_LENGTH.pack(len(message)) + message)
    pipe.flush()


def _receive(pipe) -> bytes:
    (length,) = _LENGTH.unpack(_exactly(pipe, _LENGTH.size))
    return _exactly(pipe, length)


def _exactly(pipe, count: int) -> bytes:
    read = pipe.read(count)
    if len(read) < count:
        raise EOFError
    return read


def _pickled(message) -> bytes:
    stream = io.BytesIO()
    _Pickler(stream).dump(message)
    return stream.getvalue()


class _Pickler(pickle.Pickler):
    """Jitted functions, wherever they occur, become the places where they are found."""

    def persistent_id(self, value):
        return _place(value.fn) if fingerprint.is_jitted(value) else None


class _Unpickler(pickle.Unpickler):
    def persistent_load(self, place):
        return _find(place)


def _place(function) -> _Place:
    path = function.__qualname__
    if "<locals>" in path:
        raise ValueError(
            f"ptx: {path} stands inside a function; where TRITON_INTERPRET=1 is set, kernels must be defined at the "
            "top of a module, since another process compiles them"
        )
    return _Place(function.__module__, os.path.abspath(function.__code__.co_filename), path)


def _find(place: _Place):
    """Import a function and take it out of heuristics and autotuning."""
    found = _module(place)
    for name in place.path.split("."):
        found = getattr(found, name)
    while not fingerprint.is_jitted(found):
        found = found.fn
    return found


def _module(place: _Place) -> types.ModuleType:
    """The module of a file: by its name where that leads to the file, else by the file alone."""
    loaded = sys.modules.get(place.module) if place.module != "__main__" else sys.modules.get("__kernels__")
    if loaded is None and place.module != "__main__":
        try:
            loaded = importlib.import_module(place.module)
        except ImportError:
            loaded = None
    if loaded is not None and os.path.abspath(getattr(loaded, "__file__", None) or "") == place.file:
        return loaded
    # What the parent ran as its main program is imported here, so its "if __name__ ..." part does not run.
    name = "__kernels__" if place.module == "__main__" else place.module
    spec = importlib.util.spec_from_file_location(name, place.file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _answer(message: bytes):
    """The PTX and metadata of a request, or in words why there are none."""
    from fusedops.testing.ptx.compiler import compile_here

    try:
        stream = io.BytesIO(message)
        sys.path[:] = pickle.load(stream)  # before the rest, which imports the kernel's module
        binding, expected = _Unpickler(stream).load()
        if fingerprint.of(binding.function) != expected:
            return "its file or a global value that it uses changed after the import"
        return compile_here(binding)
    except Exception as error:
        return f"{error}" if type(error).__module__.startswith("triton.") else traceback.format_exc()


def main() -> None:
    """Answer requests until the parent goes away."""
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what imported modules print must not mix with answers
    while True:
        try:
            message = _receive(requests)
        except EOFError:
            return
        _send(answers, pickle.dumps(_answer(message)))
