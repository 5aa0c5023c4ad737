"""What was compiled for a model, so that a second warm-up only looks whether it is still there."""

import contextlib
import hashlib
import importlib.metadata
import json
from pathlib import Path

from fusedops._core import env
from fusedops._core.cuda import images
from fusedops._core.files import write_whole

CUDA = "CUDA "  # begins the name of a CUDA source; its hash is the source's
PACKAGE = Path(__file__).resolve().parents[1]


class Listing:
    """The kernels of one model at one set of limits, in a file of the cache directory."""

    def __init__(self, key):
        self._path = env.cache_dir() / "warmup" / f"{key}.json"

    def read(self):
        """([[name, Triton's hash]], {operator: reason}), or (None, {}) where nothing is known."""
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # what cannot be read is made again
            data = json.loads(self._path.read_text())
            kernels = [[str(name), str(bytes.fromhex(code).hex())] for name, code in data["kernels"]]
            return kernels, dict(data["left"])
        return None, {}

    def write(self, kernels, left):
        """Keep what was found; a folder that cannot be written costs the next warm-up a look at every kernel."""
        with contextlib.suppress(OSError):
            write_whole(self._path, json.dumps({"kernels": kernels, "left": left}))


def is_compiled(kernel):
    """Whether a kernel is on disk, whole: in Triton's cache, or a CUDA source's machine code in the package or ours."""
    from triton.runtime.cache import get_cache_manager

    name, code = kernel
    if name.startswith(CUDA):
        source, _, target = name.removeprefix(CUDA).partition(".cu for ")
        return images.is_kept(source, target, code)
    name = name[:150]  # Triton shortens names of files so
    group = get_cache_manager(code).get_group(f"{name}.json") or {}
    return f"{name}.json" in group and f"{name}.cubin" in group


def surroundings():
    """What a listing follows from beside its arguments: our sources, versions, Triton's settings, tuned choices."""
    from triton._C.libtriton import get_cache_invalidating_env_vars

    sources = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*.py")):
        sources.update(path.read_bytes())
    versions = [importlib.metadata.version(name) for name in ("torch", "triton", "transformers")]
    tuned = [
        (str(path), path.stat().st_mtime_ns)
        for root in (env.cache_dir(), *env.cache_path())
        for path in sorted(root.glob("tuning/**/*.json"))
    ]
    return sources.hexdigest(), versions, sorted(get_cache_invalidating_env_vars().items()), tuned
