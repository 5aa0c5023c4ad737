"""Divert launches, Triton's own ``kernel[grid](...)`` and ours of CUDA kernels, to a function for a block of code.

So a launcher that was written for a GPU runs unchanged: with its own checks, tiles and strides.
"""

import contextlib
import sys
import threading
from contextvars import ContextVar

_handler = ContextVar("what takes this thread's launches", default=None)
_lock = threading.Lock()
_originals = {}  # of each kind of kernel its own `run`, while some block is open
_open_blocks = 0


def handler():
    """What takes this thread's launches, or None."""
    return _handler.get()


@contextlib.contextmanager
def diverted(handler):
    """Every launch that this thread makes in the block is ``handler(kernel, grid, arguments, keywords)``.

    A kernel is Triton's or a `cuda.Kernel`; keywords of the latter are block, shared and cluster.

    It gives None then, as in Triton's interpreter, where it would give the compiled kernel.
    """
    token = _handler.set(handler)
    _enter()
    try:
        yield
    finally:
        _leave()
        _handler.reset(token)


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
        handler = _handler.get()
        if handler is None:  # another thread's launch
            return original(self, *args, grid=grid, warmup=warmup, **kwargs)
        if not warmup:
            handler(self, grid, args, kwargs)
        return None

    return run
