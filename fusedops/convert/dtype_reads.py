"""Linears of whose weight a model's own code asks the dtype, to cast activations to it: codes would give theirs."""

import dis
import functools
import inspect

from torch import nn


def read_dtypes(model):
    """{id of a module: path of the one whose code reads ``self.<module>.weight.dtype``} of all modules in a model."""
    found = {}
    for path, module in model.named_modules():
        for names in _reads(type(module)):
            child = functools.reduce(lambda inner, name: getattr(inner, "_modules", {}).get(name), names, module)
            if isinstance(child, nn.Module):
                found.setdefault(id(child), path or type(module).__name__)
    return found


@functools.cache
def _reads(cls):
    """Chains of names between ``self`` and ``.weight.dtype`` in the methods of a class."""
    chains = set()
    for base in cls.__mro__:
        if base.__module__.split(".")[0] in ("torch", "builtins", "fusedops"):
            continue
        for function in vars(base).values():
            code = getattr(inspect.unwrap(function), "__code__", None) if callable(function) else None
            if code is not None and {"weight", "dtype"} <= set(code.co_names):
                chains.update(_chains(code))
    return frozenset(chains)


def _chains(code):
    """The same of one function, from its instructions: a source need not be at hand."""
    names = None
    for step in dis.get_instructions(code):
        if step.opname.startswith("LOAD_FAST"):
            names = [] if step.argval == code.co_varnames[0] else None
        elif step.opname == "LOAD_ATTR" and names is not None:
            names.append(step.argval)
            if names[-2:] == ["weight", "dtype"] and len(names) > 2:
                yield tuple(names[:-2])
        else:
            names = None
