"""Divert Triton's own launches, ``kernel[grid](...)``, to the emulator for the length of a block.

So a launcher that was written for a GPU runs unchanged on CPU tensors: with its own checks, tiles and strides.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from contextvars import ContextVar

_options: ContextVar[dict | None] = ContextVar("options of diverted launches", default=None)
_lock = threading.Lock()
_originals: dict[type, object] = {}  # of each kind of kernel its own `run`, while some block is open
_open_blocks = 0


@contextlib.contextmanager
def diverted(defaults=None, **options):
    """Every launch that this thread makes in the block is `ptx.run` with these options, such as ``target="sm_80"``.

    Options of a block around this one hold here too, unless given again; `defaults` are for what neither gives. A
    launch gives None then, as in Triton's interpreter, where it would give the compiled kernel.
    """
    token = _options.set({**(defaults or {}), **(_options.get() or {}), **options})
    _enter()
    try:
        yield
    finally:
        _leave()
        _options.reset(token)


def _enter():
    global _open_blocks
    with _lock:
        _open_blocks += 1
        for kind in _kinds():
            if kind not in _originals:
                _originals[kind] = kind.run
                kind.run = _diverting(kind.run)


def _leave():
    global _open_blocks
    with _lock:
        _open_blocks -= 1
        while _open_blocks == 0 and _originals:
            kind, run = _originals.popitem()
            kind.run = run


def _kinds():
    """The classes of kernels: compiled ones, and where TRITON_INTERPRET=1 is set those of the interpreter."""
    from triton.runtime.jit import JITFunction

    interpreter = sys.modules.get("triton.runtime.interpreter")
    return (JITFunction,) if interpreter is None else (JITFunction, interpreter.InterpretedFunction)


def _diverting(original):
    def run(self, *args, grid, warmup, **kwargs):
        options = _options.get()
        if options is None:  # another thread's launch
            return original(self, *args, grid=grid, warmup=warmup, **kwargs)
        if not warmup:
            from fusedops.testing import ptx

            ptx.run(self, grid, *args, **options, **kwargs)
        return None

    return run
