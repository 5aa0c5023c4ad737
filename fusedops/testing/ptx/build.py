"""Build the machine: its C++ sources become one shared library, once for each compiler, processor and content."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from fusedops._core import env

SOURCES = Path(__file__).parent / "machine"
# Products and sums stay apart (-ffp-contract): only what PTX calls fma rounds once.
_MATH = ("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math")
FLAGS = ("-std=c++17", "-O3", *_MATH, "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra")


def compiler() -> str | None:
    """The C++ compiler: the variable CXX, else g++, clang++ or c++; None where there is none."""
    named = os.environ.get("CXX")
    return shutil.which(named) if named else next(filter(None, map(shutil.which, ("g++", "clang++", "c++"))), None)


def missing() -> str | None:
    """Why the machine cannot be built here, or None."""
    if platform.system() != "Linux":
        return f"the machine is built on Linux only, this is {platform.system()}"
    if compiler() is None:
        return "the machine needs a C++17 compiler (g++ or clang++), and none was found"
    return None


@functools.cache
def library() -> Path:
    """The path of the built library; building takes some seconds, the first time only.

    Raises:
        RuntimeError: there is no C++ compiler, or it failed (its own words follow).
    """
    reason = missing()
    if reason is not None:
        raise RuntimeError(f"ptx: {reason}")
    flags = (*FLAGS, *_native_flags())
    headers = _digest(path.read_bytes() for path in sorted(SOURCES.glob("*.h")))
    base = _digest([headers.encode(), " ".join(flags).encode(), _version(compiler()), _processor()])
    folder = env.cache_dir() / "ptx" / "machine"
    folder.mkdir(parents=True, exist_ok=True)
    sources = sorted(SOURCES.glob("*.cpp"))
    objects = {
        source: folder / f"{source.stem}-{_digest([base.encode(), source.read_bytes()])}.o" for source in sources
    }
    built = folder / f"libptx-{_digest(path.name.encode() for path in objects.values())}.so"
    if built.exists():
        return built
    with _locked(folder / "lock"):  # test processes that start together build once
        if not built.exists():
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                list(pool.map(lambda item: _compile(flags, *item), objects.items()))
            _make(built, ("-shared", *map(str, objects.values())))
            _drop_older(folder, {built, *objects.values()})
    return built


def _native_flags() -> tuple[str, ...]:
    return ("-march=native",) if platform.machine() in ("x86_64", "AMD64") else ("-mcpu=native",)


def _digest(parts) -> str:
    total = hashlib.sha256()
    for part in parts:
        total.update(hashlib.sha256(part).digest())
    return total.hexdigest()[:20]


def _version(path: str) -> bytes:
    return subprocess.run([path, "--version"], capture_output=True, check=True).stdout


def _processor() -> bytes:
    """What -march=native depends on: a cache may be shared by machines that differ."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor().encode()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "").encode()


@contextlib.contextmanager
def _locked(path: Path):
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _compile(flags, source: Path, made: Path) -> None:
    if not made.exists():
        _make(made, (*flags, "-c", str(source)))


def _make(made: Path, arguments) -> None:
    """Run the compiler; the result appears whole or not at all."""
    handle, partial = tempfile.mkstemp(dir=made.parent, suffix=made.suffix)
    os.close(handle)
    ended = subprocess.run([compiler(), *arguments, "-o", partial], capture_output=True, text=True)
    if ended.returncode != 0:
        os.unlink(partial)
        raise RuntimeError(f"ptx: the machine could not be built:\n{ended.stderr.strip()[-4000:]}")
    os.chmod(partial, 0o644)
    os.replace(partial, made)


def _drop_older(folder: Path, kept: set[Path], count: int = 400) -> None:
    """Keep the newest files of earlier sources, so that going back and forth stays cheap, and no more."""
    others = [path for path in folder.iterdir() if path.suffix in (".o", ".so") and path not in kept]
    others.sort(key=lambda path: path.stat().st_mtime, reverse=True)
    for path in others[count:]:
        path.unlink(missing_ok=True)
