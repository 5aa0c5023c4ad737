"""Gated MLPs: which children play gate, up and down, and the forwards that multiply with our operators.

Names and classes do not matter. The children with weights are replaced by recorders in a copy of the module, its own
forward runs, and what the last child was given tells what the module computes.
"""

from functools import partial
from itertools import permutations

import torch
from torch.nn import functional as F

from fusedops._core.register import operators
from fusedops.ops.gated_activation import gelu_mul, silu_mul, silu_mul_quantized
from fusedops.patch.instance import UNSUPPORTED, State
from fusedops.patch.probing import PROBE_DTYPES, Recorder, agreement, attempt, detached_copy, generator
from fusedops.patch.rows import QuantizedRows, unchanged, version_of, wanted

BUDGETS = 2  # an activation spelled out, such as x * sigmoid(x), also rounds its factors
GATE_METHOD = "_apply_gate"  # transformers' packed experts call it between their two grouped products

_silu_mul, _gelu_mul = operators()["silu_mul"], operators()["gelu_mul"]
_silu_mul_quantized = operators()["silu_mul_quantized"]
_is_compiling = torch.compiler.is_dynamo_compiling


def multiply_silu(gate, up):
    """``silu(gate) * up``."""
    run = _silu_mul.direct(gate, up)
    return silu_mul(gate, up) if run is None else run(gate, up)


def multiply_gelu(gate, up, approximate="none"):
    """``gelu(gate) * up``."""
    run = _gelu_mul.direct(gate, up)
    return gelu_mul(gate, up, approximate=approximate) if run is None else run(gate, up, approximate)


# torch's activation, our function that multiplies it with up, and how the report calls it
ACTIVATIONS = (
    (F.silu, multiply_silu, "silu_mul"),
    (F.gelu, multiply_gelu, "gelu_mul"),
    (partial(F.gelu, approximate="tanh"), partial(multiply_gelu, approximate="tanh"), "gelu_mul(approximate='tanh')"),
)


class GateState(State):
    """State of a replaced gated MLP.

    Attributes:
        multiply: Our operator, ``multiply(gate, up)``.
        gate, up, down: Names of the children; `up` is None where `gate` gives both, one after the other.
        gate_first: Whether the gate is the first half of a packed projection.
        rows: The dtype in which `down` takes quantised rows, or None.
    """

    __slots__ = ("down", "gate", "gate_first", "multiply", "rows", "up")
    steady = True  # gate and up go from their projections to the product and nowhere else

    def __init__(self, function, multiply, gate=None, up=None, down=None, gate_first=True, slot="forward"):
        super().__init__(function, slot)
        self.multiply = multiply
        self.gate = gate
        self.up = up
        self.down = down
        self.gate_first = gate_first
        self.rows = None

    def product(self, gate, up):
        """What `down` gets: the product, or its quantised rows."""
        if not wanted(self, gate):
            return self.multiply(gate, up)
        run = _silu_mul_quantized.direct(gate, up)
        values, scale = (silu_mul_quantized if run is None else run)(gate, up, dtype=self.rows)
        late = partial(self._late, gate, version_of(gate), up, version_of(up))
        return QuantizedRows(values, scale, gate.dtype, late, self)

    def _late(self, gate, gate_version, up, up_version):
        return self.multiply(unchanged(gate, gate_version), unchanged(up, up_version))


def gated_forward(self, *args, **kwargs):
    """Forward of an MLP with separate gate and up projections."""
    if _is_compiling() or kwargs or len(args) != 1:
        return type(self).forward(self, *args, **kwargs)
    x = args[0]
    state = self._fusedops
    children = self._modules
    gate, up = children[state.gate](x), children[state.up](x)
    try:
        product = state.product(gate, up)
    except UNSUPPORTED as reason:
        return state.run_stock(self, reason, args, kwargs)
    return children[state.down](product)


def packed_forward(self, *args, **kwargs):
    """Forward of an MLP whose gate and up come from one projection."""
    if _is_compiling() or kwargs or len(args) != 1:
        return type(self).forward(self, *args, **kwargs)
    state = self._fusedops
    children = self._modules
    try:
        product = _multiply_halves(state, children[state.gate](args[0]))
    except UNSUPPORTED as reason:
        return state.run_stock(self, reason, args, kwargs)
    return children[state.down](product)


def apply_gate(self, *args, **kwargs):
    """``_apply_gate`` of packed experts."""
    if _is_compiling() or kwargs or len(args) != 1:
        return type(self)._apply_gate(self, *args, **kwargs)
    state = self._fusedops
    try:
        return _multiply_halves(state, args[0])
    except UNSUPPORTED as reason:
        return state.run_stock(self, reason, args, kwargs)


def _multiply_halves(state, packed):
    first, second = packed.chunk(2, dim=-1)
    return state.product(first, second) if state.gate_first else state.product(second, first)


def find_gate(module):
    """(State, text) of a gated MLP or packed experts, a reason (str) where it is close but not ours, else None."""
    if hasattr(type(module), GATE_METHOD):
        return _find_experts(module)
    return _find_mlp(module)


def _find_mlp(module):
    projections = [name for name, child in module._modules.items() if _is_projection(child)]
    others = [child for child in module._modules.values() if child is not None and not _is_projection(child)]
    if len(projections) not in (2, 3) or module._parameters or module._buffers:
        return None
    if any(True for child in others for _ in (*child.parameters(), *child.buffers())):
        return None
    found = None
    for training in (False, True):
        probes = [_probe(module, projections, dtype, training) for dtype in PROBE_DTYPES]
        if None in probes:
            return None
        reading = _best([_readings(*probe) for probe in probes])
        if reading is None:
            if found:
                return "its forward does something else in training"
            return "does not compute down(silu(gate) * up) or down(gelu(gate) * up)"
        found = reading
    activation, gate, up, down, gate_first = found
    operator, text = ACTIVATIONS[activation][1:]
    names = ", ".join((gate, up) if up else (f"{gate} halves",))
    function = gated_forward if up else packed_forward
    return GateState(function, operator, gate, up, down, gate_first), f"{text} of {names}"


def _is_projection(child):
    return all(isinstance(getattr(child, name, None), int) for name in ("in_features", "out_features"))


def _probe(module, projections, dtype, training):
    """(answers by child, the last child, what it was given), or None where the forward does not take the probe."""
    seeded = generator()
    widths = {name: module._modules[name].out_features for name in projections}
    x = torch.randn(2, 3, module._modules[projections[0]].in_features, generator=seeded).to(dtype)
    copy = detached_copy(module)
    copy.__dict__["training"] = training
    for name, child in copy._modules.items():
        if child is not None and name not in projections:
            copy._modules[name] = detached_copy(child)
            copy._modules[name].__dict__["training"] = training
    recorders = {}
    for name, width in widths.items():
        values = torch.randn(2, 3, width, generator=seeded) * torch.tensor([0.5, 4.0, 30.0])[:, None]
        recorders[name] = copy._modules[name] = Recorder(values.to(dtype))
    out = attempt(type(module).forward, copy, x)
    last = [name for name, recorder in recorders.items() if recorder.answer is out]
    if len(last) != 1 or any(len(recorder.inputs) != 1 for recorder in recorders.values()):
        return None
    down = last[0]
    if any(recorder.inputs[0] is not x for name, recorder in recorders.items() if name != down):
        return None
    answers = {name: recorder.answer for name, recorder in recorders.items() if name != down}
    return answers, down, recorders[down].inputs[0]


def _readings(answers, down, given):
    """{(activation, gate, up, down, gate_first): distance}: what explains the input of the last child; one if exact."""
    found = {}
    if len(answers) == 1:
        name, packed = next(iter(answers.items()))
        first, second = packed.chunk(2, dim=-1)
        options = [(name, None, first, second, True), (name, None, second, first, False)]
    else:
        options = [(gate, up, answers[gate], answers[up], True) for gate, up in permutations(answers)]
    for gate_name, up_name, gate, up, gate_first in options:
        for index, activation in enumerate(ACTIVATIONS):
            expected = activation[0](gate) * up if gate.shape == up.shape else None
            distance = None if expected is None else agreement(given, expected, BUDGETS)
            if distance == 0:
                return {(index, gate_name, up_name, down, gate_first): 0.0}
            if distance is not None:
                found[index, gate_name, up_name, down, gate_first] = distance
    return found


def _best(readings):
    """The reading that explains every probe, with the smallest distance; None where there is none."""
    shared = set.intersection(*map(set, readings))
    return min(shared, key=lambda reading: (sum(probe[reading] for probe in readings), str(reading)), default=None)


def _find_experts(module):
    method = getattr(type(module), GATE_METHOD)
    implementation = getattr(getattr(module, "config", None), "_experts_implementation", None)
    if implementation in (None, "eager"):
        return f"experts run {implementation or 'an unknown'} code that does not call {GATE_METHOD}; see grouped_mm"
    readings = []
    for dtype in PROBE_DTYPES:
        packed = (torch.randn(6, 64, generator=generator()) * 8).to(dtype)
        given = attempt(method, detached_copy(module), packed)
        readings.append(_readings({"": packed}, None, given))
    best = _best(readings)
    if best is None:
        return "the experts' gate is neither silu(gate) * up nor gelu(gate) * up"
    activation, gate_first = best[0], best[-1]
    operator, text = ACTIVATIONS[activation][1:]
    return GateState(apply_gate, operator, gate_first=gate_first, slot=GATE_METHOD), f"{text} in {GATE_METHOD}"
