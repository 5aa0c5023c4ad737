"""Which linears of a model are replaced, and why the others are not."""

import fnmatch
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn import Parameter

from fusedops._core.modules import foreign_attribute
from fusedops.convert.dtype_reads import read_dtypes
from fusedops.convert.report import Row
from fusedops.nn import QuantizedLinear, Sparse24Linear

DEFAULT_SKIP = ("lm_head",)  # a model need not have one
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@dataclass(eq=False)
class Target:
    """One linear that is replaced.

    Attributes:
        path: Its name in the model; the first, where it stands at several places.
        places: (parent, name) of every place.
        linear: The module.
        twin: The Target whose weight it shares, which comes earlier; None where the weight is its own.
        is_tied: Whether other modules share its weight or its bias.
        embeddings: {path: embedding} of those that share its weight and get its codes; empty where it has a twin.
    """

    path: str
    places: list
    linear: nn.Linear
    twin: "Target | None" = None
    is_tied: bool = False
    embeddings: dict = field(default_factory=dict)


@dataclass
class Selection:
    """Targets of a model, in its order, and a Row for every linear that is left alone.

    Attributes:
        targets, rows: See above.
        unmatched: Entries of `skip` that name nothing.
    """

    targets: list = field(default_factory=list)
    rows: list = field(default_factory=list)
    unmatched: tuple = ()


def select(op, model, scheme, skip, layers=None, takes_sparse=False, takes_tied=False):
    """Find the linears that `scheme` can replace.

    Args:
        op: Who asks, for the messages.
        model: A module.
        scheme: A Scheme.
        skip: Names, last parts of names, or patterns of `fnmatch`, of linears or of modules around them.
        layers: The same, of what is taken; None takes all.
        takes_sparse: Whether 2:4 sparse layers of float values are linears to replace.
        takes_tied: Whether a linear is replaced whose weight an embedding uses too, together with that.

    Raises:
        TypeError: model is not a module, or skip or layers do not hold strings.
        ValueError: model is itself a linear, nothing is left to replace, an entry of layers names no linear, or a
            weight that would be replaced is on the meta device or holds NaN or infinity.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"{op}: model must be a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, nn.Linear):
        raise ValueError(f"{op}: model must hold its linears as children, got a {type(model).__name__} itself")
    skip = _checked_names(op, "skip", skip)
    linears = [(path, m) for path, m in model.named_modules() if isinstance(m, nn.Linear | QuantizedLinear)]
    named, unmatched = _named_in_skip(model, skip)
    if layers is not None:
        named = _not_in_layers(op, model, linears, _checked_names(op, "layers", layers)) | named
    reasons = {id(m): named.get(id(m)) or obstacle(m, scheme, takes_sparse) for _, m in linears}
    readers = read_dtypes(model) if scheme.stores_codes else {}
    for key in reasons.keys() & readers.keys():
        reasons[key] = reasons[key] or f"{readers[key]} reads its weight's dtype"
    owners = parameter_owners(model)
    embeddings = _embeddings(owners, named, readers) if takes_tied else {}
    for _, linear in linears:
        reasons[id(linear)] = reasons[id(linear)] or _tied_elsewhere(linear, owners, reasons, embeddings)
    selection = Selection(unmatched=unmatched)
    places = module_places(model)
    by_weight = {}
    for path, linear in linears:
        reason = reasons[id(linear)]
        if reason is not None:
            shape = (linear.out_features, linear.in_features)
            selection.rows.append(Row(path, type(linear).__name__, shape, "skipped", reason=reason))
            continue
        shared = max(len(owners[id(p)]) for p in linear.parameters()) > 1
        target = Target(path, places[id(linear)], linear, by_weight.get(id(linear.weight)), shared)
        if target.twin is None:
            target.embeddings = {path: m for path, m in embeddings.items() if m.weight is linear.weight}
        by_weight.setdefault(id(linear.weight), target)
        selection.targets.append(target)
    _check_values(op, model, selection)
    return selection


def obstacle(linear, scheme, takes_sparse=False):
    """Why a linear is not replaced, or None: its class, what hangs on it, or its weight."""
    if isinstance(linear, QuantizedLinear):
        is_sparse = isinstance(linear, Sparse24Linear)
        if is_sparse and not takes_sparse:
            return "2:4 sparse already"
        if not is_sparse or linear.options["format"] is not None:
            return "quantised already"
    elif type(linear) is not nn.Linear:
        return "a subclass of torch.nn.Linear"
    reason = _held(linear)
    if reason is not None:
        return reason
    for name in ("weight", "bias"):
        tensor = linear._parameters.get(name)
        if tensor is None and name == "bias" and linear.bias is None:
            continue
        if type(tensor) is not Parameter or type(tensor.data) is not torch.Tensor:
            return f"its {name} is a {type(getattr(linear, name, None)).__name__}, not a plain parameter"
    return scheme.obstacle(linear)


def _held(module):
    """What stands on a module's instance, which another in its place would not have; or None."""
    if "_hf_hook" in vars(module):
        return "accelerate's hook is on it"
    hooks = sum(len(getattr(module, name) or ()) for name in _HOOKS)
    if hooks:
        return f"{hooks} {'hook is' if hooks == 1 else 'hooks are'} on it"
    return None if foreign_attribute(module) is None else "its forward was replaced"


def _embeddings(owners, named, readers):
    """{path: embedding} of those whose place can be taken: torch's own class, with nothing beyond a lookup."""
    found = {}
    for path, module in (owner for held in owners.values() for owner in held):
        is_plain = type(module) is nn.Embedding and module.max_norm is None and _held(module) is None
        if is_plain and id(module) not in named and id(module) not in readers:
            found[path.removesuffix(".weight")] = module
    return found


def module_places(model):
    """{id of a module: [(parent, name)]} of every module below `model`."""
    places = {}
    for parent in model.modules():
        for name, child in parent._modules.items():
            if child is not None:
                places.setdefault(id(child), []).append((parent, name))
    return places


def parameter_owners(model):
    """{id of a parameter: [(path, module)]} of every module that holds it."""
    owners = {}
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append((f"{path}.{name}".lstrip("."), module))
    return owners


def _checked_names(op, argument, names):
    if isinstance(names, str):
        names = (names,)
    try:
        names = tuple(names)
    except TypeError:
        raise TypeError(f"{op}: {argument} must hold names, got {type(names).__name__}") from None
    for entry in names:
        if not isinstance(entry, str):
            raise TypeError(f"{op}: {argument} must hold names, got {entry!r}")
    return names


def _not_in_layers(op, model, linears, layers):
    """{id of a linear: reason} of those that `layers` do not name, themselves or a module around them."""
    known, named = {id(linear) for _, linear in linears}, set()
    for entry in layers:
        around = [m for path, m in model.named_modules(remove_duplicate=False) if path and _matches(path, entry)]
        found = {id(below) for module in around for below in module.modules()} & known
        if not found:
            raise ValueError(f"{op}: layers must name linears or modules around them, got {entry!r}, which names none")
        named |= found
    return dict.fromkeys(known - named, "not named in layers")


def _named_in_skip(model, skip):
    """({id of a module: reason} of everything that `skip` names, or that lies below; entries that name nothing)."""
    reasons, used = {}, set()
    for path, module in model.named_modules(remove_duplicate=False):
        entries = [entry for entry in skip if path and _matches(path, entry)]
        used.update(entries)
        for below in module.modules() if entries else ():
            reasons.setdefault(id(below), f"named in skip ({entries[0]!r})")
    return reasons, tuple(entry for entry in skip if entry not in used and entry not in DEFAULT_SKIP)


def _matches(path, entry):
    return path == entry or path.endswith(f".{entry}") or fnmatch.fnmatchcase(path, entry)


def _tied_elsewhere(linear, owners, reasons, embeddings):
    """Why a weight that others hold too is left alone: one of them is not replaced."""
    if type(linear) not in (nn.Linear, Sparse24Linear):
        return None
    for path, owner in owners[id(linear.weight)]:
        is_weight = type(owner) is type(linear) and owner.weight is linear.weight and path.endswith("weight")
        is_replaced = is_weight and reasons[id(owner)] is None
        if not is_replaced and embeddings.get(path.removesuffix(".weight")) is not owner:
            return f"its weight is also {path}"
    return None


def _check_values(op, model, selection):
    """Refuse what could not be quantised, before anything is changed."""
    if not selection.targets:
        why = "; ".join(f"{row.path}: {row.reason}" for row in selection.rows[:8]) or "it has none"
        raise ValueError(f"{op}: model must contain a torch.nn.Linear to replace, got {type(model).__name__} ({why})")
    for target in selection.targets:
        if target.linear.weight.is_meta:
            raise ValueError(f"{op}: weights must be loaded, got {target.path} on the meta device")
    check_finite(op, selection.targets)


def check_finite(op, targets):
    """Raise ValueError where a weight holds NaN or infinity."""
    for target in targets:
        if target.twin is None and not bool(target.linear.weight.detach().isfinite().all()):
            raise ValueError(f"{op}: weights must be finite, got NaN or infinity in {target.path}")
