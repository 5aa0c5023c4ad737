"""How an attention of transformers calls its attention function, read from the source of its forward."""

import ast
import functools
import sys
from dataclasses import dataclass
from types import FunctionType

from fusedops.patch import rebuild

MASK = "attention_mask"
FIRST_ARGUMENTS = ("module", "query", "key", "value", MASK)


@dataclass(frozen=True)
class Reading:
    """What the forward of an attention class says.

    Attributes:
        interface: The registry from which it takes its attention function.
        eager: The function of its file that it calls without one, or None.
        options: {keyword of the call: name of the attribute of self that is given, or None}.
        computes_with_mask: Whether the forward does more with its mask than to hand it on.
    """

    interface: object
    eager: FunctionType | None
    options: dict
    computes_with_mask: bool


@functools.lru_cache(maxsize=256)
def read_forward(owner):
    """The Reading of a class, or None where its forward does not ask transformers for an attention function."""
    registries = sys.modules.get("transformers.modeling_utils")
    forward = rebuild.innermost(owner.forward)
    names = getattr(getattr(forward, "__code__", None), "co_names", ())
    values = [forward.__globals__.get(name) for name in names]
    kind = getattr(registries, "AttentionInterface", ())
    interfaces = [value for value in values if kind and isinstance(value, kind)]
    if len(interfaces) != 1:
        return None
    eager = [value for value in values if isinstance(value, FunctionType) and _arguments(value) == FIRST_ARGUMENTS]
    try:
        definition = rebuild.parse(forward)
    except rebuild.CannotRebuildError:
        definition = ast.Module([], [])
    eager = eager[0] if len(eager) == 1 else None
    return Reading(interfaces[0], eager, _options_of_call(definition), _computes_with_mask(definition))


def _arguments(function):
    return function.__code__.co_varnames[: min(5, function.__code__.co_argcount)]


def _options_of_call(definition):
    """The keywords of the calls that have a scaling or a dropout among them."""
    options = {}
    for node in ast.walk(definition):
        keywords = {keyword.arg: keyword.value for keyword in getattr(node, "keywords", ()) if keyword.arg}
        if isinstance(node, ast.Call) and not keywords.keys().isdisjoint(("scaling", "dropout")):
            options |= {name: getattr(value, "attr", None) for name, value in keywords.items()}
    return {name: value for name, value in options.items() if name not in FIRST_ARGUMENTS}


def _computes_with_mask(definition):
    kinds = ast.BinOp | ast.UnaryOp | ast.Attribute | ast.Subscript
    uses = (node for node in ast.walk(definition) if isinstance(node, kinds))
    parts = (part for use in uses for part in ast.iter_child_nodes(use))
    return any(isinstance(part, ast.Name) and part.id == MASK for part in parts)
