"""What the meaning of a kernel depends on, as one hash: its source, that of what it calls, and global values."""

from __future__ import annotations

import functools
import hashlib
import inspect
import types

_PLAIN = (int, float, str, bytes, type(None))
_settled: set = set()  # functions that Triton has hashed after all their helpers


def of(function) -> str:
    """Hash a jitted function together with all that it refers to.

    It is the same in every process that imported the same text with the same global values, interpreting or not.

    Args:
        function: A ``@triton.jit`` or ``@gluon.jit`` function.
    """
    parts: list[str] = []
    _collect(function, set(), parts)
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def is_jitted(value) -> bool:
    """Whether a value is a jitted function: compiled, interpreted, or evaluated while compiling."""
    return isinstance(getattr(value, "fn", None), types.FunctionType)


def settle(function) -> None:
    """Have Triton hash the helpers of a kernel before the kernel.

    Triton's own hash of a function has the constants of those helpers alone that were hashed before it, so a kernel's
    key in its cache on disk would follow from what else ran earlier in the process, and another process miss it.
    """
    inner = function.fn
    if inner in _settled or not hasattr(function, "cache_key"):
        return
    _settled.add(inner)
    scope = _scope(inner)
    for name in _names(inner.__code__):
        if is_jitted(scope.get(name)):
            settle(scope[name])
    function.hash = None  # it may have been asked for already
    function.cache_key  # noqa: B018 - computed at this look


def _scope(inner) -> dict:
    free = zip(inner.__code__.co_freevars, (_content(cell) for cell in inner.__closure__ or ()))
    return {**inner.__globals__, **dict(free)}


def _collect(function, seen: set, parts: list[str]) -> None:
    """Append the source of a function, where it stands (line numbers are in the PTX), and of what it refers to."""
    inner = function.fn
    if inner in seen or inner.__module__.startswith("triton."):
        return
    seen.add(inner)
    code = inner.__code__
    parts.append(f"{code.co_filename}:{code.co_firstlineno}:{_source(inner)}")
    parts.append(repr([(name, constant(value)) for name, value in _defaults(inner)]))
    scope = _scope(inner)
    names = _names(code)
    for name in names:
        if name in scope:
            _collect_value(name, scope[name], names, seen, parts)


def _collect_value(name: str, value, names, seen: set, parts: list[str]) -> None:
    if is_jitted(value):
        _collect(value, seen, parts)
    elif isinstance(value, type):
        _collect_class(value, seen, parts)
    elif isinstance(value, types.ModuleType):
        if value.__name__.partition(".")[0] not in ("triton", "torch", "numpy", "math"):
            for inner in names:
                if hasattr(value, inner) and not isinstance(getattr(value, inner), types.ModuleType):
                    _collect_value(f"{name}.{inner}", getattr(value, inner), names, seen, parts)
    elif (text := constant(value)) is not None:
        parts.append(f"{name}={text}")


def _collect_class(value: type, seen: set, parts: list[str]) -> None:
    """A class used in a kernel: a named tuple or an aggregate; its methods count, and its own text."""
    if value in seen or value.__module__.partition(".")[0] in ("triton", "builtins", "typing"):
        return
    seen.add(value)
    for name, member in inspect.getmembers(value):
        if is_jitted(member):
            _collect(member, seen, parts)
        elif isinstance(member, types.FunctionType) and not member.__module__.startswith("triton."):
            parts.append(f"{name}:{_source(member)}")
    parts.append(f"{value.__qualname__}:{sorted(map(str, getattr(value, '__annotations__', {}).items()))}")


def constant(value) -> str | None:
    """A text that tells constants apart; None: the value is nothing that a kernel could take as a constant."""
    if is_jitted(value):
        return of(value)
    if isinstance(value, (tuple, list)):
        return f"{type(value).__name__}({', '.join(str(constant(one)) for one in value)})"
    if isinstance(value, _PLAIN) or type(value).__module__.startswith("triton."):
        return f"{type(value).__name__}:{value!r}"
    if isinstance(value, type) or callable(value):
        return f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', '')}"
    text = repr(value)
    return None if " at 0x" in text else text


@functools.cache
def _source(function) -> str:
    try:
        return inspect.getsource(function)
    except OSError:
        return ""


@functools.cache
def _names(code) -> tuple[str, ...]:
    """Every name that a function uses, those of its inner functions too."""
    names = set(code.co_names) | set(code.co_freevars)
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            names.update(_names(inner))
    return tuple(sorted(names))


def _defaults(function):
    parameters = inspect.signature(function).parameters.values()
    return [(one.name, one.default) for one in parameters if one.default is not one.empty]


def _content(cell):
    try:
        return cell.cell_contents
    except ValueError:  # not yet bound
        return None
