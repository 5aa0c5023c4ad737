"""FUSEDOPS_JIT: with ``forbid`` a launch that would have to compile one of our kernels is an error, before it does.

Triton compiles in ``JITFunction._do_compile``, which a launch reaches only with arguments that are new to the process.
There it asks its cache on disk; what is not in it goes through the backend's stages. Both are wrapped once: the first
says whose kernel it is, the second is where nothing was found. A launch of a compiled kernel passes neither.
"""

import functools
from contextvars import ContextVar

from fusedops._core import env, fingerprint

OURS = "fusedops."
_asked_for = ContextVar("the launch of ours that Triton looks for in its cache", default=None)


@functools.cache
def watch():
    """From now on launches keep to FUSEDOPS_JIT. Called before the first of them; triton is imported here."""
    from triton.runtime.jit import JITFunction

    JITFunction._do_compile = _watching(JITFunction._do_compile)


def _watching(original):
    @functools.wraps(original)
    def _do_compile(self, key, signature, device, constexprs, *rest):
        ours = self.fn.__module__.startswith(OURS)
        if ours:
            fingerprint.settle(self)
        if env.jit() == "allow" or not ours:
            return original(self, key, signature, device, constexprs, *rest)
        _, _, target, backend, _ = self.device_caches[device]
        _guard(type(backend))
        token = _asked_for.set((self, signature, constexprs, target))
        try:
            return original(self, key, signature, device, constexprs, *rest)
        finally:
            _asked_for.reset(token)

    return _do_compile


@functools.cache
def _guard(backend):
    """Let a compiler refuse what is asked for by a launch of ours."""
    original = backend.add_stages

    @functools.wraps(original)
    def add_stages(self, *args, **kwargs):
        launch = _asked_for.get()
        if launch is not None:
            raise RuntimeError(_refusal(*launch))
        return original(self, *args, **kwargs)

    backend.add_stages = add_stages


def _refusal(function, signature, constexprs, target):
    names = list(signature)
    constants = {names[path[0]]: value for path, value in constexprs.items() if len(path) == 1}
    described = ", ".join(f"{name}={constants[name]!r}" if name in constants else f"{name}: {kind}"
                          for name, kind in signature.items())  # fmt: skip
    place = function.fn.__module__.split(".")
    operator = place[2] if place[1] == "ops" else place[1]
    return (
        f"{operator}: {function.fn.__name__}({described}) must be compiled for {target.backend} {target.arch} before "
        "it is launched with FUSEDOPS_JIT=forbid; compile what a model needs with: fusedops warmup --model DIR"
    )
