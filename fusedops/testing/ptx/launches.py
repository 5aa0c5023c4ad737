"""Divert Triton's own launches, ``kernel[grid](...)``, to the emulator for the length of a block."""

from __future__ import annotations

import contextlib
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
        from fusedops.testing import ptx

        ptx.run(kernel, grid, *arguments, **options, **keywords)

    token = _options.set(options)
    try:
        with diversion.diverted(emulate):
            yield
    finally:
        _options.reset(token)
