"""Where a kernel's machine code or PTX comes from: the package, the cache directory, or a compiler."""

import contextlib
import functools
import json
from dataclasses import dataclass
from pathlib import Path

from fusedops._core import env
from fusedops._core.cuda import toolchain
from fusedops._core.files import write_whole

PACKAGE = Path(__file__).resolve().parents[2]
SHIPPED = PACKAGE / "_cubin"
MANIFEST = "manifest.json"
PRODUCTS = ("sm_80.cubin", "sm_90a.cubin", "sm_80.ptx", "sm_90a.ptx")  # all that any GPU or the emulator takes


@dataclass(frozen=True)
class Image:
    """What a driver or the emulator loads.

    Attributes:
        content: Machine code, or text of PTX.
        product: What it is for, such as ``sm_90a.cubin``.
        origin: Where it was found, in words.
    """

    content: bytes
    product: str
    origin: str


def sources():
    """The folder of the ``.cu`` files: in an installed package its own, else that of the checkout."""
    own = PACKAGE / "_csrc"
    return own if own.is_dir() else PACKAGE.parent / "csrc" / "cuda"


def names():
    """Names of all sources."""
    return sorted(path.stem for path in sources().glob("*.cu"))


def fingerprint(name):
    """A hash of a source and its headers as they were when it was first asked for."""
    return _fingerprint(sources() / f"{name}.cu")


@functools.cache
def _fingerprint(source):
    return toolchain.fingerprint(source)


def is_kept(name, target, made_from):
    """Whether the best image for a GPU is there, from the source with this hash."""
    return fingerprint(name) == made_from and kept(name, products(target)[0]) is not None


def products(target):
    """What a GPU can load, the best first: machine code of its own, and PTX that the driver compiles."""
    number = int("".join(character for character in target if character.isdigit()))
    if target == "sm_90a":
        return "sm_90a.cubin", "sm_90a.ptx"
    return ("sm_80.cubin", "sm_80.ptx") if 80 <= number < 90 else ("sm_80.ptx",)


def ready(name, target):
    """The best image that nothing must be compiled for by us, or None."""
    for product in products(target):
        image = kept(name, product)
        if image is not None:
            return image
    return None


def find(name, target):
    """The image for a GPU, compiled and kept where there is none.

    Raises:
        RuntimeError: it must be compiled, and there is no compiler, or FUSEDOPS_JIT=forbid.
    """
    best = products(target)[0]
    image = kept(name, best)
    if image is not None:
        return image
    if env.jit() == "forbid":
        raise RuntimeError(
            f"{name}: its CUDA kernels must be compiled for {target} before they are launched with "
            "FUSEDOPS_JIT=forbid; compile what a model needs with: fusedops warmup --model DIR"
        )
    return _made_or_ready(name, target, best)


def compile_now(name, target):
    """(image, whether it had to be compiled), whatever FUSEDOPS_JIT says. RuntimeError: there is no compiler."""
    best = products(target)[0]
    image = kept(name, best)
    return (image, False) if image is not None else (_compiled(name, best), True)


def ptx(name, target):
    """PTX of a source for the emulator. RuntimeError: there is none, and no compiler that makes it."""
    product = products(target)[-1]
    return (kept(name, product) or _compiled(name, product)).content.decode()


def _made_or_ready(name, target, product):
    """Compiled, or without a compiler what the driver compiles."""
    if toolchain.found() is None:
        image = ready(name, target)
        if image is not None:
            return image
    return _compiled(name, product)


def kept(name, product):
    """An image that was shipped or cached and is made from the source as it is, or None."""
    source = sources() / f"{name}.cu"
    wanted = fingerprint(name)
    for path, origin in (
        (SHIPPED / f"{name}.{product}", "shipped"),
        (source.parent / "ptx" / f"{name}.{product}", "shipped as PTX"),
        (_cache_path(name, product), "cached"),
    ):
        if path.is_file() and _made_from(path) == wanted:
            return Image(path.read_bytes(), product, origin)
    return None


def _cache_path(name, product):
    return env.cache_dir() / "cuda" / f"{name}-{fingerprint(name)}.{product}"


def _made_from(path):
    """The fingerprint of the source that a file was made from."""
    if path.parent == SHIPPED:
        try:
            return json.loads((SHIPPED / MANIFEST).read_text())["fingerprints"].get(path.name)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None
    if path.parent.name == "ptx":
        with open(path) as file:
            return file.readline().rpartition(" ")[2].strip()
    return path.name.split(".")[0].rpartition("-")[2]


def _compiled(name, product):
    content = toolchain.compile_source(sources() / f"{name}.cu", product)
    with contextlib.suppress(OSError):  # a folder that cannot be written costs the next process a compilation
        write_whole(_cache_path(name, product), content)
    return Image(content, product, "compiled")
