"""Quantised linears that get the same input: stored as one matrix and multiplied as one, without the model's knowing.

The codes and scales of the linears of a group lie one behind the other in memory, and each linear's parameters, the
same objects as before, look at their part of it. The first linear that is called computes the product of all; the
others, called with the very tensor, unchanged since, pick up their columns. Whatever else happens, a linear computes.
"""

import contextlib

import torch
from torch.nn import Parameter

from fusedops._core.register import watched
from fusedops.nn._linear import autocast_dtype
from fusedops.patch.instance import State, record_fallback
from fusedops.patch.rows import QuantizedRows, version_of

MAX_WASTED = 8  # products in a row of which a part was left lying, before the linears are computed apart
MAX_JOINS = 4  # times that the parameters may be found elsewhere, as after ``model.to(...)``

_all_on_meta = False
_is_grad_enabled = torch.is_grad_enabled
_any_autocast = torch._C._is_any_autocast_enabled


class Group:
    """Quantised linears that get the same input; a single one where it only takes its input quantised.

    Attributes:
        members: The linears.
        contiguous: Whether the model looks at a result in a way that columns of a wider matrix do not allow.
        apart: Why each computes for itself, or "".
    """

    def __init__(self, members, contiguous=False):
        self.members = members
        self.contiguous = contiguous
        self.apart = ""
        self._forget()

    def _forget(self):
        self._whole = None
        self._sizes = None
        self._states = None  # of the members' parameters, as they lie together
        self._product = None
        self._moved = False  # whether parameters were given a place among the others
        self._joins = self._wasted = 0

    def __getstate__(self):
        """A copy or a pickle has its parameters apart, and joins them when it is first called."""
        return {name: getattr(self, name) for name in ("members", "contiguous", "apart")}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._forget()

    def compute(self, index, x):
        """The result of a linear, with those of the others laid aside; None where it must compute alone.

        Args:
            index: Of the linear in `members`.
            x: Its input; not `QuantizedRows` that were read.
        """
        mode = autocast_dtype(x) if _any_autocast() else None
        product, self._product = self._product, None
        if product is not None:
            if product.fits(index, x, mode, self.members):
                return self._take(product, index)
            self._wasted += 1
            if self._wasted > MAX_WASTED:
                self._apart("its neighbours get other inputs")
        if self.apart or not self._joined():
            return None
        whole = self._whole
        if type(x) is QuantizedRows:
            out = whole.forward_quantized(x.values, x.scale, x.dtype)
        else:
            out = type(whole).forward(whole, x)
        if len(self.members) == 1:
            return out
        return self._take(_Product(x, mode, out.split(self._sizes, -1), self._states), index)

    def _take(self, product, index):
        """The result of a linear, which is not kept; those of the others are."""
        out, product.parts[index] = product.parts[index], None
        product.left -= 1
        if product.left:
            self._product = product
        else:
            self._wasted = 0
        return out.contiguous() if self.contiguous else out

    def join(self):
        """Bring the parameters together in memory."""
        members = self.members
        first = members[0]
        if len(members) == 1:
            self._whole = first
            return
        reason = obstacle(members)
        if reason is not None:
            self._apart(reason)
            return
        self._sizes = [member.out_features for member in members]
        size, bias = sum(self._sizes), first.bias is not None
        whole = type(first)(first.in_features, size, bias, "meta", first.dtype, **first.options)
        with torch.no_grad(), torch.inference_mode(False):
            for name, dim in _dims(first).items():
                parts = [member._parameters[name] for member in members]
                joined = torch.cat([part.detach() for part in parts], dim) if dim is not None else parts[0].detach()
                whole._parameters[name] = Parameter(joined, requires_grad=False)
                if dim is not None:
                    self._moved = True
                    for part, place in zip(parts, joined.split([p.shape[dim] for p in parts], dim), strict=True):
                        part.data = _own(place)
        self._whole, self._states = whole.train(first.training), [_state(member) for member in members]

    def separate(self, module):
        """Give a linear memory of its own again; the others compute apart from then on."""
        if self._moved:
            for name, dim in _dims(module).items():
                if dim is not None:
                    parameter = module._parameters[name]
                    parameter.data = parameter.data.clone()
        self._apart("one of its neighbours was restored")

    def _joined(self):
        """Whether the parameters lie together; brings them together where they do not yet, or not any more."""
        if len(self.members) == 1:
            self._whole = self.members[0]
            return True
        states = [_state(member) for member in self.members]
        if states == self._states:
            return True
        if self._states is not None and [*map(_places, states)] == [*map(_places, self._states)]:
            self._states = states  # new values in the same places
            reason = obstacle(self.members)
            if reason is not None:
                self._apart(reason)
            return not self.apart
        self._joins += 1
        if self._joins > MAX_JOINS:
            self._apart("its parameters change their place again and again")
        else:
            self.join()
        return not self.apart

    def _apart(self, reason):
        self.apart = reason
        self._whole = self._product = None


class _Product:
    """The results of a group for one input, each to be taken once."""

    __slots__ = ("left", "mode", "parts", "states", "version", "x")

    def __init__(self, x, mode, parts, states):
        self.x = x
        self.mode = mode
        self.version = version_of(x)
        self.parts = list(parts)
        self.left = len(self.parts)
        self.states = states

    def fits(self, index, x, mode, members):
        """Whether the result of a linear for x is here: the same tensor and the same parameters, unchanged since.

        An inference tensor does not tell whether it was changed in place. The module's own code does not change it
        between two linears, that was tried; a hook of one of them may.
        """
        if x is not self.x or mode is not self.mode or self.parts[index] is None or version_of(x) != self.version:
            return False
        if self.version is None and any(member._forward_pre_hooks or member._forward_hooks for member in members):
            return False
        return self.states[index] == _state(members[index])


class LinearState(State):
    """State of a replaced quantised linear: its group, and its place there."""

    __slots__ = ("group", "index")

    def __init__(self, group, index):
        super().__init__(joined_forward)
        self.group = group
        self.index = index

    def install(self, module):
        """Set the attributes; the last of a group brings the parameters together."""
        super().install(module)
        if self.index == len(self.group.members) - 1:
            self.group.join()

    def restore(self, module):
        """Put back the forward, and the parameters into memory of their own."""
        super().restore(module)
        self.group.separate(module)


def joined_forward(self, *args, **kwargs):
    """Forward of a quantised linear that shares its input with others, or takes it quantised."""
    if watched() or _is_grad_enabled() or kwargs or len(args) != 1:
        return type(self).forward(self, *args, **kwargs)
    x = args[0]
    if type(x) is QuantizedRows and (x.made is not None or (_any_autocast() and autocast_dtype(x))):
        x = x.read()
    state = self._fusedops
    out = state.group.compute(state.index, x)
    if out is not None:
        return out
    record_fallback(state.fallbacks, type(self).__name__, state.group.apart, args)
    return type(self).forward(self, x)


def obstacle(members):
    """Why linears cannot be joined, or None."""
    first = members[0]
    if any(kind_of(member) != kind_of(first) for member in members):
        return "it and its neighbours are not quantised alike"
    for name, dim in _dims(first).items():
        parts = [member._parameters[name] for member in members]
        is_meta = any(part.is_meta for part in parts)
        if any(type(part) is not Parameter or part.is_inference() for part in parts) or (is_meta and not _all_on_meta):
            return f"its {name} is no ordinary parameter"
        if dim is None and not is_meta and not all(torch.equal(part, parts[0]) for part in parts):
            return f"it and its neighbours have different values of {name}"
        if dim == 0 and any(part.shape[0] != member.out_features for part, member in zip(parts, members, strict=True)):
            if any(member.out_features % 128 for member in members[:-1]):
                return "blocks of 128 rows that share a scale would not stay together"
    return None


@contextlib.contextmanager
def all_on_meta():
    """Inside, a model is patched of which nobody will load anything: its linears are joined as a loaded one's are."""
    global _all_on_meta
    _all_on_meta = True
    try:
        yield
    finally:
        _all_on_meta = False


def kind_of(member):
    """What linears must have in common."""
    parameters = {name: (p.dtype, p.device) for name, p in member._parameters.items() if p is not None}
    return type(member), member.in_features, member.dtype, member.options, parameters


def _dims(member):
    """{name: the dimension along which parameters are joined, None for one that is shared}."""
    present = {name: p for name, p in member._parameters.items() if p is not None}
    return {name: 1 if name == "weight" else 0 if p.dim() else None for name, p in present.items()}


def _own(part):
    """The same memory as a tensor that is no view, where torch can: a pickle then holds this part alone."""
    if part.device.type not in ("cpu", "cuda"):
        return part
    if part.dtype.itemsize == 1:
        return torch.from_dlpack(part.view(torch.uint8)).view(part.dtype)
    return torch.from_dlpack(part)


def _state(member):
    parameters = [p for p in member._parameters.values() if p is not None]
    try:
        return [(id(p), p.data_ptr(), p._version) for p in parameters]
    except RuntimeError:  # inference tensors, put there since: they have no version
        return [(id(p), p.data_ptr(), None) for p in parameters]


def _places(state):
    return [place for *place, _ in state]
