"""Norms: which formula a module computes, and the forward that computes it with our operators."""

from functools import partial
from itertools import product

import torch
from torch import nn
from torch.nn import Parameter

from fusedops._core.register import operators
from fusedops.ops.layer_norm import add_layer_norm, layer_norm
from fusedops.ops.rms_norm import add_rms_norm, add_rms_norm_quantized, rms_norm, rms_norm_quantized
from fusedops.patch.instance import UNSUPPORTED, State
from fusedops.patch.probing import PROBE_DTYPES, agreement, attempt, detached_copy, generator
from fusedops.patch.rows import QuantizedRows, unchanged, version_of, wanted

MAX_EPS = 0.1  # a larger float attribute of a norm is something else

# (rounding, weight_offset), in the order in which equally good fits are taken
FORMULAS = (("llama", 0.0), ("once", 0.0), ("once", 1.0), ("llama", 1.0))

_rms_norm, _add_rms_norm = operators()["rms_norm"], operators()["add_rms_norm"]
_rms_norm_quantized = operators()["rms_norm_quantized"]
_add_rms_norm_quantized = operators()["add_rms_norm_quantized"]
_is_compiling = torch.compiler.is_dynamo_compiling
_is_grad_enabled = torch.is_grad_enabled


class NormState(State):
    """State of a replaced norm.

    `stash` is (h, version of h, norm of h), left there by the layer that computed both in one pass. It is taken only if
    the norm is then called with this very h, unchanged since; anything in between makes the norm compute again.
    """

    __slots__ = ("eps", "stash")

    def __init__(self, eps):
        super().__init__(norm_forward)
        self.eps = eps
        self.stash = None

    def __getstate__(self):
        """A copy or a pickle carries no activations."""
        slots = {name: getattr(self, name) for cls in type(self).__mro__ for name in getattr(cls, "__slots__", ())}
        return None, {**slots, "stash": None}

    def compute(self, module, x):
        """The norm of x."""
        raise NotImplementedError

    def compute_with_residual(self, module, x, residual):
        """(norm of h, h) with h = x + residual."""
        raise NotImplementedError


class RMSNormState(NormState):
    """State of a replaced RMS norm.

    Attributes:
        weight: Name of its parameter, None where it has none.
        rounding, weight_offset: As in `fusedops.rms_norm`.
        rows: The dtype in which the quantised linears that get its result take it, or None.
        steady: Whether the code that calls it leaves its input alone until its result was used.
    """

    __slots__ = ("rounding", "rows", "steady", "weight", "weight_offset")

    def __init__(self, weight, eps, rounding, weight_offset):
        super().__init__(eps)
        self.weight = weight
        self.rounding = rounding
        self.weight_offset = weight_offset
        self.rows = None
        self.steady = False

    def compute(self, module, x):
        """The norm of x."""
        weight = module._parameters.get(self.weight)
        if type(weight) is not Parameter or weight.dtype is not x.dtype:
            self._check(weight, x)
        if wanted(self, x):
            options = {"weight_offset": self.weight_offset, "rounding": self.rounding}
            run = _rms_norm_quantized.direct(x)
            if run is not None:
                values, scale = run(x, weight, self.eps, *options.values(), self.rows)
            else:
                values, scale = rms_norm_quantized(x, weight, self.eps, dtype=self.rows, **options)
            return QuantizedRows(values, scale, x.dtype, partial(self._late, weight, x, version_of(x)), self)
        return self._ordinary(weight, x)

    def _late(self, weight, x, version):
        return self._ordinary(weight, unchanged(x, version))

    def _ordinary(self, weight, x):
        run = _rms_norm.direct(x)
        if run is not None:
            return run(x, weight, self.eps, self.weight_offset, self.rounding)
        return rms_norm(x, weight, self.eps, weight_offset=self.weight_offset, rounding=self.rounding)

    def compute_with_residual(self, module, x, residual):
        """(norm of h, h) with h = x + residual."""
        weight = module._parameters.get(self.weight)
        if type(weight) is not Parameter or weight.dtype is not x.dtype:
            self._check(weight, x)
        if wanted(self, x) and type(residual) is torch.Tensor:
            options = {"weight_offset": self.weight_offset, "rounding": self.rounding}
            run = _add_rms_norm_quantized.direct(x, residual)
            if run is not None:
                values, scale, h = run(x, residual, weight, self.eps, *options.values(), self.rows)
            else:
                values, scale, h = add_rms_norm_quantized(x, residual, weight, self.eps, dtype=self.rows, **options)
            return QuantizedRows(values, scale, x.dtype, partial(self._late, weight, h, version_of(h)), self), h
        run = _add_rms_norm.direct(x, residual)
        if run is not None:
            return run(x, residual, weight, self.eps, self.weight_offset, self.rounding)
        return add_rms_norm(x, residual, weight, self.eps, weight_offset=self.weight_offset, rounding=self.rounding)

    def _check(self, weight, x):
        """Raise TypeError where the weight is not what was recognised, or the stock result has not x's dtype."""
        if self.weight is None:
            return
        if type(weight) is not Parameter:
            raise TypeError(f"the weight is a {type(weight).__name__}")
        if self.rounding == "llama":
            raise TypeError(f"torch's result type of {x.dtype} data and a {weight.dtype} weight is the wider one")


class LayerNormState(NormState):
    """State of a replaced torch.nn.LayerNorm."""

    __slots__ = ()

    def _parameters(self, module, x):
        weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
        if type(weight) is not Parameter or not (bias is None or type(bias) is Parameter):
            raise TypeError(f"the weight is a {type(weight).__name__}, the bias a {type(bias).__name__}")
        if weight.dtype != x.dtype or torch.is_autocast_enabled(x.device.type):
            raise TypeError(f"torch chooses the result's dtype for {x.dtype} data and a {weight.dtype} weight")
        return weight, bias

    def compute(self, module, x):
        """The norm of x."""
        return layer_norm(x, *self._parameters(module, x), self.eps)

    def compute_with_residual(self, module, x, residual):
        """(norm of h, h) with h = x + residual."""
        return add_layer_norm(x, residual, *self._parameters(module, x), self.eps)


def norm_forward(self, *args, **kwargs):
    """Forward of a replaced norm."""
    if _is_compiling() or kwargs or len(args) != 1:
        return type(self).forward(self, *args, **kwargs)
    x = args[0]
    state = self._fusedops
    stash = state.stash
    if stash is not None:
        state.stash = None
        h, version, out = stash
        if h is x and not _is_grad_enabled() and (version is None or version == x._version):
            return out
    try:
        return state.compute(self, x)
    except UNSUPPORTED as reason:
        return state.run_stock(self, reason, args, kwargs)


def add_then_norm(residual, x, norm):
    """``residual + x``, and the norm of it in the same pass, left with the norm where the norm is one of ours.

    A norm with a pre-hook gets nothing: the hook may change the sum in place.
    """
    state = norm.__dict__.get("_fusedops")
    if type(x) is not torch.Tensor or not isinstance(state, NormState) or norm._forward_pre_hooks:
        return residual + x
    try:
        out, h = state.compute_with_residual(norm, x, residual)
    except UNSUPPORTED:
        return residual + x
    state.stash = (h, None if h.is_inference() else h._version, out)
    return h


def find_norm(module):
    """(State, text) of a norm that we compute, a reason (str) where it is a norm but not ours, else None."""
    if type(module) is nn.LayerNorm:
        if len(module.normalized_shape) != 1 or module.weight is None:
            return "this LayerNorm has several normalised dimensions or no weight"
        return LayerNormState(module.eps), "layer_norm()"
    parameters = {name: value for name, value in module._parameters.items() if value is not None}
    epsilons = {v for v in vars(module).values() if isinstance(v, float) and 0 <= v <= MAX_EPS}
    if module._modules or module._buffers or len(parameters) > 1 or not epsilons:
        return None
    name, weight = next(iter(parameters.items()), (None, None))
    if weight is not None and weight.dim() != 1:
        return None
    return _match(module, name, weight, epsilons)


def _match(module, name, weight, epsilons):
    """Run the module on probes and compare with each formula, bit for bit where that is possible."""
    size = 64 if weight is None else weight.shape[0]
    scale = None if weight is None else torch.randn(size, generator=generator()) * 0.3 + 0.7
    # 1e-3 makes eps visible; 60 squares to values that a 16-bit sum would lose
    x = torch.randn(2, 3, size, generator=generator()) * torch.tensor([3.0, 1e-3, 60.0])[:, None]
    copy = detached_copy(module)
    copy.__dict__["training"] = False
    outs = {}
    for dtype in PROBE_DTYPES:
        if name is not None:
            copy._parameters[name] = Parameter(scale.to(dtype), requires_grad=False)
        outs[dtype] = attempt(type(module).forward, copy, x.to(dtype))
    if not all(isinstance(out, torch.Tensor) and out.shape == x.shape for out in outs.values()):
        return None
    formulas = FORMULAS if weight is not None else (("once", 0.0),)
    best = None
    for eps, (rounding, offset) in product(sorted(epsilons), formulas):
        distances = [_distance(outs[dtype], x.to(dtype), scale, eps, rounding, offset) for dtype in PROBE_DTYPES]
        if None not in distances and (best is None or sum(distances) < best[0]):
            best = sum(distances), eps, rounding, offset
            if not best[0]:
                break
    if best is None:
        return None if weight is None else "computes none of the RMS norms that we know"
    _, eps, rounding, offset = best
    options = [f"rounding={rounding!r}"] if rounding != "once" else []
    options += [f"weight_offset={offset}"] if offset else []
    options += ["weight=None"] if name is None else []
    return RMSNormState(name, eps, rounding, offset), f"rms_norm({', '.join(options)})"


def _distance(out, x, scale, eps, rounding, offset):
    wide = x.float()
    y = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if rounding == "llama":
        y = y.to(x.dtype)
    if scale is not None:
        weight = scale.to(x.dtype)
        y = (weight.float() + offset) * y if offset else weight * y
    return agreement(out, y.to(x.dtype))
