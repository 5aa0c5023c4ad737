"""A process that compiles kernels: reads pickled jobs, writes what became of each, until its input ends."""

import importlib
import pickle
import sys
import time

from fusedops._core import cubin
from fusedops._core.binding import Binding
from fusedops._core.cuda import images
from fusedops.warm import kernels


def main():
    """Serve standard input and output; what compilers print goes to standard error."""
    source, replies = sys.stdin.buffer, sys.stdout.buffer
    sys.stdout = sys.stderr
    while True:
        try:
            job, launcher = pickle.load(source)
        except EOFError:
            return
        pickle.dump(_done(job, launcher), replies)
        replies.flush()


def _done(job, launcher):
    """What became of a job, as plain data."""
    begun = time.perf_counter()
    try:
        if isinstance(job, kernels.CudaJob):
            return _cuda_done(job)
        found, compiled = compiled_now(job)
        if launcher:
            make_launcher(found)
    except Exception as error:  # whatever a compiler raises is the finding
        return {"name": job.name, "error": f"{type(error).__name__}: {error}"}
    seconds = time.perf_counter() - begun
    return {"name": found.metadata.name, "hash": found.hash, "compiled": compiled, "seconds": seconds}


def _cuda_done(job):
    begun = time.perf_counter()
    compiled = images.compile_now(job.source, job.target)[1]
    made_from = images.fingerprint(job.source)
    return {"name": job.name, "hash": made_from, "compiled": compiled, "seconds": time.perf_counter() - begun}


def compiled_now(job):
    """(the compiled kernel, whether it was not in Triton's cache)."""
    import triton

    missed = []
    function = getattr(importlib.import_module(job.module), job.name)
    binding = Binding(function, {}, job.signature, job.constants, job.attributes, job.options, job.capability)
    knobs = triton.knobs.compilation
    with knobs.scope():
        knobs.listener = lambda *, cache_hit, **others: missed.append(not cache_hit)
        try:
            return cubin.compile_bound(binding), any(missed)
        except (KeyError, OSError):  # Triton takes an entry of its cache without machine code for a whole one
            knobs.always_compile = True
            return cubin.compile_bound(binding), True


def make_launcher(found):
    """Compile what launches a kernel on the GPU at hand: Triton 3.6 makes a C file for each signature, later none."""
    import triton

    triton.runtime.driver.active.launcher_cls(found.src, found.metadata)


if __name__ == "__main__":
    main()
