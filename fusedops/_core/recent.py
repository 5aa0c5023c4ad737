"""Recognise calls like the last ones by one look of torch at all tensors, in front of the dictionary of plans.

The look is that of torch's compiler before it runs what it has compiled: class, dispatch keys with what the thread adds
and takes away, dtype, device, sizes, strides, and whether a gradient is wanted. It does not see whether gradients are
recorded, nor the modes that a trace with fake tensors is made of: these are asked for here.
"""

import threading

import torch

from fusedops._core.source import GIVEN, Source

PLACES = 4  # calls that are recognised; a layer of a model calls an operator with few different shapes
_INTERVAL = 16  # calls that were not, of which one takes a place: more shapes than places must not throw each other out

_VALUES = (type(None), bool, int, float, str, torch.dtype)  # nobody can change one that is kept
_is_compiling = torch.compiler.is_dynamo_compiling
_GUARDS = getattr(getattr(getattr(torch._C, "_dynamo", None), "guards", None), "TensorGuards", None)
_num_modes = getattr(torch._C, "_len_torch_dispatch_stack", None)


class Recent:
    """The functions that stand for the last calls of one operator, and the way to them.

    Attributes:
        call: Function of the operator's arguments: what a function of these gives, else what `otherwise` does.
    """

    def __init__(self, num_arguments, otherwise):
        self._missed = 0
        self._lock = threading.Lock()
        lines = [
            "    if is_compiling(): return None",
            "    for function in functions:",
            f"        result = function({GIVEN})",
            "        if result is not None: return result",
            f"    return otherwise(({GIVEN},))",
        ]
        names = {"is_compiling": _is_compiling, "functions": (), "otherwise": otherwise}
        self.call = Source(num_arguments, lines, names).compile("again")
        self._names = self.call.__globals__

    def wants(self, is_new):
        """Whether a call that was not recognised is to be recognised from now on."""
        self._missed += 1
        return is_new or len(self._names["functions"]) < PLACES or self._missed % _INTERVAL == 0

    def keep(self, function, is_valid):
        """Recognise one kind of calls more, if that is still right, and forget the one that was kept first."""
        with self._lock:  # what `clear` has forgotten must not come back, and nothing that it should forget follows it
            kept = self._names["functions"]
            if function not in kept and is_valid():
                self._names["functions"] = (function, *kept)[:PLACES]

    def clear(self):
        """Forget all. What makes functions invalid must come before it."""
        with self._lock:
            self._names["functions"] = ()


def recognising(source, args, count, device_index):
    """The function that runs `source` for arguments like these, and gives None for others; None where none can.

    Args:
        source: What such calls run, of the same parameters.
        args: Arguments that were checked; tensors among them are of a plain class.
        count: The list whose one number counts the calls.
        device_index: The CUDA device that must be the current one, or None.
    """
    given = dict(zip(source.parameters, args, strict=True))
    tensors = {name: value for name, value in given.items() if isinstance(value, torch.Tensor)}
    values = {name: value for name, value in given.items() if name not in tensors}
    guards = _guards(tensors.values())
    if guards is None or _num_modes is None or not all(map(_is_constant, values.values())):
        return None
    names = {"num_modes": _num_modes, "check": guards.check, "count": count}
    differs = [_differs(names, name, value) for name, value in values.items()]
    differs.append("num_modes()")
    if any(tensor.requires_grad for tensor in tensors.values()):
        names["is_grad_enabled"] = torch.is_grad_enabled
        differs.append("is_grad_enabled()")
    if device_index is not None:
        names["current_device"] = _current_device()
        differs.append(f"current_device() != {device_index}")
    differs.append(f"not check({', '.join(tensors)})")
    lines = [f"    if {' or '.join(differs)}: return None", "    count[0] += 1"]
    return source.before(lines, names).compile("recent")


def _guards(tensors):
    """torch's guards for tensors like these; None where this release has others, or one tensor is given twice."""
    tensors = list(tensors)
    try:
        guards = _GUARDS(
            *tensors,
            dynamic_dims_sizes=[list(tensor.shape) for tensor in tensors],
            dynamic_dims_strides=[list(tensor.stride()) for tensor in tensors],
        )
        return guards if guards.check(*tensors) is True else None
    except (TypeError, ValueError, RuntimeError, SystemError, AttributeError):
        return None


def _is_constant(value):
    return all(map(_is_constant, value)) if type(value) is tuple else type(value) in _VALUES


def _differs(names, name, value):
    """The text that tells that an argument is not this value. A tensor in a number's place must not be compared."""
    if value is None or value is True or value is False:
        return f"{name} is not {value}"
    names |= {f"k_{name}": value, f"type_{name}": type(value)}
    kind = f"type({name}) is not type_{name}"
    if type(value) is tuple:
        names[f"types_{name}"] = list(map(type, value))
        kind += f" or [*map(type, {name})] != types_{name}"
    return f"{name} is not k_{name} and ({kind} or {name} != k_{name})"


def _current_device():
    """The function that tells the current CUDA device, known to be in use."""
    return getattr(torch._C, "_cuda_getDevice", torch.cuda.current_device)
