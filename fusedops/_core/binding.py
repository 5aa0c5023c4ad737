"""What Triton would make of the arguments of a launch: types, constants, attributes and options."""

from __future__ import annotations

import functools
import hashlib
import re
from dataclasses import dataclass

from fusedops._core import fingerprint


@dataclass(frozen=True)
class Binding:
    """A kernel specialised for the arguments of one launch.

    Attributes:
        function: The jitted function as a compiler takes it, without decorators around it.
        values: Every parameter's name and value, defaults included.
        signature: Every parameter's name and Triton type; ``"constexpr"`` where it is no parameter of the PTX.
        constants: Path of a parameter, such as ``(3,)``, to its value at compile time.
        attributes: Path to what is known about a run-time parameter.
        options: Triton's compile options.
        capability: 90 for ``"sm_90a"``.
    """

    function: object
    values: dict
    signature: dict
    constants: dict
    attributes: dict
    options: object
    capability: int

    @property
    def name(self) -> str:
        """The kernel's name in Python."""
        return self.function.fn.__name__

    def key(self) -> str:
        """A hash of all that the machine code follows from: the sources, triton, the specialisation and the target."""
        import triton
        from triton._C.libtriton import get_cache_invalidating_env_vars

        constants = [(path, fingerprint.constant(value)) for path, value in self.constants.items()]
        parts = (
            triton.__version__,
            fingerprint.of(self.function),
            list(self.signature.items()),
            constants,
            sorted(map(str, self.attributes.items())),
            self.options,
            self.capability,
            sorted(get_cache_invalidating_env_vars().items()),
        )
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:40]


def bind(kernel, target: str, arguments: tuple, keywords: dict) -> Binding:
    """Bind arguments to a kernel's parameters and specialise it as a launch does.

    Args:
        kernel: ``@triton.jit`` or ``@gluon.jit`` function; ``@triton.heuristics`` are applied, and of
            ``@triton.autotune`` only the function is used: its choices must be given.
        target: Such as ``"sm_90a"``; the suffix may be left out.
        arguments, keywords: As in a launch; ``num_warps`` and other compile options are keywords.

    Raises:
        TypeError: the kernel is none, or an argument is missing, unknown or of a type that Triton does not take.
        ValueError: the target has another form.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    capability = _capability(target)
    kernel, keywords = _unwrap(kernel, arguments, dict(keywords))
    function = _compilable(kernel)
    backend = make_backend(GPUTarget("cuda", capability, 32))
    binder = create_function_from_signature(function.signature, function.params, backend)
    keywords["debug"] = bool(keywords.get("debug", function.debug))
    try:
        values, specialization, _ = binder(*arguments, **keywords)
        options, signature, constants, attributes = function._pack_args(
            backend, keywords, values, specialization, keywords
        )
    except (TypeError, KeyError) as error:
        why = str(error.args[0] if error.args else error).replace("dynamic_func()", f"{function.__name__}()")
        raise TypeError(f"ptx: {why}") from error
    return Binding(function, values, signature, constants, attributes, options, capability)


def _capability(target: str) -> int:
    matched = re.fullmatch(r"sm_(\d{2,3})[af]?", target)
    if matched is None:
        raise ValueError(f"ptx: target must look like 'sm_90a', got {target!r}")
    return int(matched[1])


def _unwrap(kernel, arguments: tuple, keywords: dict):
    """The function inside of heuristics and autotuning, and the keywords with what the heuristics say."""
    while not fingerprint.is_jitted(kernel):
        inner = getattr(kernel, "fn", None)
        if inner is None:
            raise TypeError(f"ptx: kernel must be a jitted function or PTX, got {kernel!r}")
        known = {**dict(zip(kernel.arg_names, arguments)), **keywords}
        for name, heuristic in getattr(kernel, "values", {}).items():
            keywords[name] = known[name] = heuristic(known)
        kernel = inner
    return kernel, keywords


def _compilable(kernel):
    """A JITFunction for a function that this process may have made for the interpreter."""
    from triton.runtime.interpreter import InterpretedFunction

    return _jit(kernel) if isinstance(kernel, InterpretedFunction) else kernel


@functools.cache
def _jit(interpreted):
    from triton.runtime.jit import JITFunction

    return JITFunction(interpreted.fn, **interpreted.kwargs)
