"""Compile the kernels that a model needs before it runs, so that nothing is compiled while it does."""

import hashlib
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from fusedops._core import env
from fusedops._core.device import interpreting
from fusedops._core.inspection import limits_named
from fusedops.patch.continuous_attention import operator_page_size
from fusedops.patch.skeleton import skeleton
from fusedops.warm import calls, kernels, listing, pool

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class WarmUp:
    """What `warmup` did.

    Attributes:
        target: The architecture.
        kernels: Number of kernels that the model needs.
        compiled: How many of them had to be compiled.
        failed: {kernel: why it could not be}.
        left: {operator: why some of its calls launch no kernel of ours}.
        seconds: Of it all.
    """

    target: str
    kernels: int
    compiled: int
    failed: dict
    left: dict
    seconds: float

    def as_dict(self):
        """The same as plain data, for JSON."""
        return asdict(self)

    def __str__(self):
        lines = [
            f"{self.target}: {self.kernels} kernels, {self.compiled} compiled, "
            f"{self.kernels - self.compiled - len(self.failed)} found, {self.seconds:.1f} s"
        ]
        lines += [f"  {name} cannot be compiled: {why}" for name, why in self.failed.items()]
        lines += [f"  not ours: {why}" for why in self.left.values()]
        return "\n".join(lines)


def warmup(
    model, *, dtype=torch.bfloat16, max_batch=8, max_seqlen=4096, target=None, scheme=None, sparsity=None, page_size=16,
    gradients=False, jobs=None, progress=None,
):  # fmt: skip
    """Compile the kernels that a patched model needs, in parallel processes, into Triton's own cache.

    Needs no weights, and for a named target no GPU. The model is built without memory, with a layer or two of each
    kind, and run at many shapes up to the limits; what it launches is recorded and compiled. A second call finds all.

    Args:
        model: Path of a config.json, or of the directory that holds one.
        dtype: Of weights and activations.
        max_batch: Rows of a batch.
        max_seqlen: Tokens of a row.
        target: A named GPU (``"sm_80"``, ``"sm_90a"``, ...). None: the GPU at hand, without one ``"sm_90a"``.
        scheme: How its linears are quantised, a name of `quantize_`.
        sparsity: ``"2:4"`` where its linears are pruned. With neither the config tells, as `FusedOpsConfig` writes it.
        page_size: Tokens of a page of `PagedCache`.
        gradients: Also what training launches.
        jobs: Processes; None is one for each processor.
        progress: Function of (done, total, name of the kernel).

    Returns:
        WarmUp; ``print`` it.

    Raises:
        ValueError: an argument is not one of the above, or transformers cannot build the model.
        RuntimeError: a compiling process ended by itself, or triton was imported with TRITON_INTERPRET=1.
    """
    begun = time.perf_counter()
    path = _config_file(model)
    _check(dtype, page_size, max_batch=max_batch, max_seqlen=max_seqlen, jobs=1 if jobs is None else jobs)
    limits = _limits(target)
    wanted = max_batch, max_seqlen, page_size, gradients
    known = listing.Listing(_key(path, dtype, limits, scheme, sparsity, *wanted))
    hashes, left = known.read()
    if hashes is not None and all(map(listing.is_compiled, hashes)):
        return WarmUp(limits.arch, len(hashes), 0, {}, left, time.perf_counter() - begun)
    found = calls.of_model(skeleton(path, dtype, scheme, sparsity), *wanted)
    needed, left = kernels.of_calls(found, limits)
    at_hand = torch.cuda.is_available() and limits_named(None) == limits
    results = pool.compile_all(needed, jobs or len(os.sched_getaffinity(0)), at_hand, progress or (lambda *args: None))
    failed = {result["name"]: result["error"] for result in results if "error" in result}
    if not failed:
        known.write([(result["name"], result["hash"]) for result in results], left)
    compiled = sum(result.get("compiled", False) for result in results)
    return WarmUp(limits.arch, len(results), compiled, failed, left, time.perf_counter() - begun)


def _limits(target):
    if interpreting():
        raise RuntimeError("warmup: kernels compile only in a process that imported triton without TRITON_INTERPRET=1")
    try:
        return limits_named(target)
    except ValueError as error:
        raise ValueError(str(error).replace("inspect:", "warmup:", 1)) from error


def _config_file(model):
    path = Path(model)
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"warmup: model must be a config.json or a directory that holds one, got {model}")
    return path


def _check(dtype, page_size, **sizes):
    if dtype not in DTYPES:
        raise ValueError(f"warmup: dtype must be float16, bfloat16 or float32, got {dtype}")
    if type(page_size) is not int or operator_page_size(page_size) != page_size:
        raise ValueError(f"warmup: page_size must be 1 or a multiple of 8 up to 256, got {page_size!r}")
    for name, size in sizes.items():
        if type(size) is not int or size < (2 if name == "max_seqlen" else 1):
            raise ValueError(f"warmup: {name} must be a positive number, of tokens at least 2, got {size!r}")


def _key(path, *options):
    """A hash of all that the kernels of a model follow from."""
    parts = (path.read_bytes(), *options, env.backend(), listing.surroundings())
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:40]
