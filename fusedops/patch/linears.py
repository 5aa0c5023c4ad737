"""Which quantised linears get the same input, and which norms they get it from.

A module's own forward runs with stand-ins for its children, which note what they are given. It need not come to an end:
an attention that lacks its mask fails after its projections were called, and that is enough.
"""

import inspect
import re
from collections import Counter
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import Parameter

from fusedops._core.checks import FLOATS
from fusedops.nn import QuantizedLinear, Sparse24Linear
from fusedops.patch.gates import GateState, multiply_silu
from fusedops.patch.joined import Group, LinearState, kind_of, obstacle
from fusedops.patch.norms import RMSNormState
from fusedops.patch.probing import detached_copy

OUTSIDE = ""  # where the input of the module itself comes from


class _StandIn(nn.Module):
    """Notes the tensors that it is given, and returns a new one, of a linear the columns of a wider matrix."""

    def __init__(self, name, width, calls, contiguous):
        super().__init__()
        self.name = name
        self.width = width
        self.calls = calls
        self.more = 0 if contiguous else 8

    def forward(self, *args, **kwargs):
        given = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
        x = given[0]
        out = x.clone() if self.width is None else x.new_ones(*x.shape[:-1], self.width + self.more)[..., : self.width]
        self.calls.append((self.name, [(tensor, tensor._version) for tensor in given], out))
        return out


@dataclass(frozen=True)
class Reading:
    """What the children of a module are given.

    Attributes:
        inputs: {name of a child that is called once: [(source, version)]}, in the order of the calls. A source is
            the name of a child, OUTSIDE, or a number; two tensors with the same source and version are the same.
        contiguous: Whether the forward looks at its children's results in a way that columns of a wider matrix do not
            allow.
        steady: Names of the children whose inputs were the same at the end, which the forward came to.
    """

    inputs: dict
    contiguous: bool
    steady: frozenset

    def given(self, source):
        """Names of the children that get what `source` gives."""
        return [name for name, found in self.inputs.items() if source in (origin for origin, _ in found)]


def read(module, width, contiguous=False):
    """The Reading of a module for an input of this width."""
    calls, stopped = [], None
    copy = detached_copy(module)
    for name, child in module._modules.items():
        if child is not None:
            copy._modules[name] = _StandIn(name, getattr(child, "out_features", None), calls, contiguous)
    x = torch.ones(2, 3, width)
    try:
        arguments = _arguments(type(module).forward, x)
        type(module).forward(copy, *arguments[0], **arguments[1])
    except Exception as error:  # it wanted more than the stand-ins give
        stopped = error
    if not contiguous and "view size is not compatible" in str(stopped):
        return read(module, width, contiguous=True)
    sources = {id(x): OUTSIDE} | {id(out): name for name, _, out in calls}
    times = Counter(name for name, _, _ in calls)
    inputs = {
        name: [(sources.get(id(tensor), id(tensor)), version) for tensor, version in given]
        for name, given, _ in calls
        if times[name] == 1
    }
    kept = [name for name, given, _ in calls if all(tensor._version == version for tensor, version in given)]
    steady = frozenset(() if stopped else kept)
    return Reading(inputs, contiguous, steady)


def _arguments(forward, x):
    """(positional, by keyword): x, and None for whatever else has no default."""
    required = [p for p in inspect.signature(forward).parameters.values() if p.default is p.empty][1:]
    positional = [p for p in required if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return [x, *[None] * (len(positional) - 1)], {p.name: None for p in required if p.kind is p.KEYWORD_ONLY}


def shared_inputs(module):
    """[(names of quantised linears that get the same tensor, contiguous)] of a module's children."""
    linears = {name: child for name, child in module._modules.items() if isinstance(child, QuantizedLinear)}
    found = []
    for width in dict.fromkeys(linear.in_features for linear in linears.values()):
        fitting = [name for name, linear in linears.items() if linear.in_features == width]
        if len(fitting) < 2:
            continue
        reading = read(module, width)
        groups = {}
        for name, given in reading.inputs.items():
            if name in fitting and len(given) == 1:
                groups.setdefault(given[0], []).append(name)
        found += [(names, reading.contiguous) for names in groups.values() if len(names) > 1]
    return found


def takers(module, norm):
    """``({path from `module`: linear}, steady)``: the linears that get a norm's result; none where others get it too.

    Args:
        module: What calls the norm, and hands its result to a linear or to a module with linears.
        norm: Name of the norm.

    Returns:
        Also whether the norm's input stays as it is until the module is through.
    """
    width = next((p.shape[0] for p in module._modules[norm].parameters()), None)
    if width is None or not any(_linears_near(child) for child in module._modules.values()):
        return {}, False
    found, reading = {}, read(module, width)
    for name in reading.given(norm):
        child = module._modules[name]
        if isinstance(child, QuantizedLinear):
            found[name] = child
            continue
        inner = read(child, width).given(OUTSIDE)
        if not inner or not all(isinstance(child._modules[part], QuantizedLinear) for part in inner):
            return {}, False
        found |= {f"{name}.{part}": child._modules[part] for part in inner}
    return found, norm in reading.steady


def _linears_near(child):
    if isinstance(child, nn.ModuleList | nn.ModuleDict):
        return False
    return isinstance(child, QuantizedLinear) or any(
        isinstance(part, QuantizedLinear) for part in (child._modules.values() if child is not None else ())
    )


def by_kind(names, module):
    """Lists of the names of linears that are quantised alike."""
    groups = []
    for name in names:
        alike = (group for group in groups if kind_of(module._modules[group[0]]) == kind_of(module._modules[name]))
        group = next(alike, None)
        if group is None:
            groups.append([name])
        else:
            group.append(name)
    return groups


def rows_dtype(linear):
    """The dtype in which a linear takes rows that are quantised already, or None."""
    if not isinstance(linear, QuantizedLinear) or not hasattr(linear, "forward_quantized"):
        return None
    if linear.weight.dtype in FLOATS:  # a sparse one, whose values are no codes
        return None
    by_rows = not linear.options.get("static_input") and linear.options.get("granularity", "row") == "row"
    return linear.weight.dtype if by_rows else None


def operator_of(linear):
    """Name of the operator that multiplies with a linear's weight."""
    if isinstance(linear, Sparse24Linear):
        return "sparse_matmul"
    if not hasattr(linear, "forward_quantized"):
        return "weight_only_matmul"
    return "int8_matmul" if linear.weight.dtype is torch.int8 else "fp8_matmul"


def unfit(linear, shared):
    """Why a quantised or sparse linear is left alone, or None.

    Args:
        linear: A QuantizedLinear.
        shared: Addresses of the parameters that stand in several modules.
    """
    if "_hf_hook" in linear.__dict__:
        return f"accelerate's {type(linear._hf_hook).__name__} may move its parameters"
    if any(buffer is not None for buffer in linear._buffers.values()):
        return "it keeps a dense copy of its weight"
    if linear._forward_hooks or linear._forward_pre_hooks:
        return "it has hooks"
    parameters = [p for p in linear._parameters.values() if p is not None]
    if "weight" not in linear._parameters or any(type(p) is not Parameter for p in parameters):
        return "its weight is no ordinary parameter"
    if any(p.data_ptr() in shared for p in parameters if not p.is_meta):
        return "it shares a parameter with another module"
    return None


def shared_parameters(model):
    """Addresses of the parameters that stand in several places of a model."""
    parameters = (p for module in model.modules() for p in module._parameters.values())
    addresses = Counter(p.data_ptr() for p in parameters if type(p) is Parameter and not p.is_meta and p.numel())
    return {address for address, number in addresses.items() if number > 1}


class Fusion:
    """Adds to a Plan: groups of linears that get the same input, and the norms and gates that quantise it for them.

    Args:
        plan: A Plan with its norms and gated MLPs.
    """

    def __init__(self, plan):
        self._plan = plan
        self._modules = dict(plan.model.named_modules())
        self._shared = ()
        self._states = {}

    def add_all(self):
        """Find everything; the model is not touched."""
        if not any(isinstance(module, QuantizedLinear) for module in self._modules.values()):
            return
        self._shared = shared_parameters(self._plan.model)
        for path, module in self._modules.items():
            for names, contiguous in shared_inputs(module):
                for alike in by_kind(self._fit(path, module, names), module):
                    if len(alike) > 1:
                        self._join(path, module, alike, contiguous)
        for replacement in list(self._plan.replacements):
            path, state = replacement.row.path, replacement.state
            if isinstance(state, RMSNormState) and path:
                above, _, name = path.rpartition(".")
                linears, state.steady = takers(self._modules[above], name)
                self._feed(replacement, above, linears)
            elif isinstance(state, GateState) and state.multiply is multiply_silu and state.down:
                self._feed(replacement, path, {state.down: replacement.module._modules[state.down]})

    def _fit(self, path, module, names):
        """Those of some linears that nothing stands against; the others become skipped rows."""
        fitting = []
        for name in names:
            place, linear = _joined_path(path, name), module._modules[name]
            reason = unfit(linear, self._shared) or self._plan.obstacle(place, linear, LinearState(None, 0))
            if reason is None:
                fitting.append(name)
            else:
                self._plan.add(place, linear, "linear", reason)
        return fitting

    def _join(self, path, module, names, contiguous):
        members = [module._modules[name] for name in names]
        reason = obstacle(members)
        group = Group(members, contiguous)
        text = f"{operator_of(members[0])} of {', '.join(names)} in one"
        for index, (name, linear) in enumerate(zip(names, members, strict=True)):
            if reason is None:
                self._add(_joined_path(path, name), linear, LinearState(group, index), text)
            else:
                self._plan.add(_joined_path(path, name), linear, "linear", reason)

    def _add(self, path, linear, state, text):
        self._states[linear] = state
        self._plan.add(path, linear, "linear", (state, text))

    def _feed(self, replacement, above, linears):
        """Let a norm or gate quantise its result, where quantised linears, and they alone, take it."""
        dtypes = {rows_dtype(linear) for linear in linears.values()}
        if len(dtypes) != 1 or None in dtypes:
            return
        alone = {name: linear for name, linear in linears.items() if linear not in self._states}
        for name, linear in alone.items():
            path = _joined_path(above, name)
            if unfit(linear, self._shared) or self._plan.obstacle(path, linear, LinearState(None, 0)):
                return
        for name, linear in alone.items():
            text = f"{operator_of(linear)} of rows that come quantised"
            self._add(_joined_path(above, name), linear, LinearState(Group([linear]), 0), text)
        replacement.state.rows = dtypes.pop()
        operator, rest = re.match(r"(\w+)(.*)", replacement.row.replacement).groups()
        self._plan.reword(replacement, f"{operator}_quantized{rest} for {', '.join(linears)}")


def _joined_path(path, name):
    return f"{path}.{name}" if path else name
