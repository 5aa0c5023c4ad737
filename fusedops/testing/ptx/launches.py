"""Divert launches, Triton's ``kernel[grid](...)`` and those of CUDA kernels, to the emulator for a block of code."""

from __future__ import annotations

import contextlib
import ctypes
from contextvars import ContextVar

from fusedops._core import diversion

_options: ContextVar[dict | None] = ContextVar("options of diverted launches", default=None)


@contextlib.contextmanager
def diverted(defaults=None, **options):
    """Every launch that this thread makes in the block is `ptx.run` with these options, such as ``target="sm_80"``.

    Options of a block around this one hold here too, unless given again; `defaults` are for what neither gives. A
    launch gives None then, as in Triton's interpreter, where it would give the compiled kernel.
    """
    options = {**(defaults or {}), **(_options.get() or {}), **options}

    def emulate(kernel, grid, arguments, keywords):
        from fusedops._core.cuda import Kernel
        from fusedops.testing import ptx

        if isinstance(kernel, Kernel):
            arguments = [bytes(one) if isinstance(one, ctypes._SimpleCData) else one for one in arguments]
            kernel, keywords = kernel.ptx(), {"kernel_name": kernel.symbol, **keywords}
        ptx.run(kernel, grid, *arguments, **options, **keywords)

    token = _options.set(options)
    try:
        with diversion.diverted(emulate):
            yield
    finally:
        _options.reset(token)
