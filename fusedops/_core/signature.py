"""What checks, selection and launches can see of an operator's arguments, as a key."""

import torch
from torch.nn import Parameter

PLAIN = frozenset((torch.Tensor, Parameter))


def signature(schema):
    """The function (args) -> key for an operator's schema; the key is None where a tensor is of another class.

    Of a tensor it keeps dtype, shape, strides and device, and whether it wants a gradient where gradients are recorded;
    any other argument is kept itself. The text of the function names every argument: a loop over them takes as long
    again.
    """
    declared = schema.partition("(")[2].rpartition(") ->")[0].split(", ")
    names = [f"a{number}" for number in range(len(declared))]
    kinds = dict(zip(names, (argument.split()[0] for argument in declared), strict=True))
    tensors = [name for name in names if kinds[name].startswith("Tensor")]
    others = [name for name in names if name not in tensors]
    foreign = " or ".join(f"{_unless_none(name, kinds[name], 'type({0}) not in PLAIN')}" for name in tensors)
    seen = "({0}.dtype, {0}.shape, {0}.is_contiguous() or {0}.stride(), {0}.device)"
    wanted = "{0}.requires_grad"
    lines = [
        f"def signature({', '.join(names)}):",
        f"    if {foreign}: return None",
        f"    key = ({''.join(_unless_none(name, kinds[name], seen) + ', ' for name in tensors)}{', '.join(others)})",
        "    if not is_grad_enabled(): return key",
        f"    return ({''.join(_unless_none(name, kinds[name], wanted) + ', ' for name in tensors)}) + key",
    ]
    namespace = {"PLAIN": PLAIN, "is_grad_enabled": torch.is_grad_enabled}
    exec("\n".join(lines), namespace)  # as dataclasses and named tuples are made
    return namespace["signature"]


def _unless_none(name, kind, text):
    text = text.format(name)
    return f"({name} is not None and {text})" if kind.endswith("?") else text
