"""Rotary embedding: the global function that an attention's forward calls, tested on its values and replaced.

The attention's forward gets the same code with that one global replaced, for this instance only.
"""

from dataclasses import dataclass
from functools import partial
from itertools import product

import torch

from fusedops._core.register import operators
from fusedops.ops.rotary import rotary
from fusedops.patch import rebuild
from fusedops.patch.instance import UNSUPPORTED, State, record_fallback
from fusedops.patch.probing import PROBE_DTYPES, agreement, attempt, generator

HINTS = ("rotary", "rope")  # only globals with such a name are called with probes; what they return decides
ANGLES = ("each", "pair", "first half")

_rotary = operators()["rotary"]
_is_compiling = torch.compiler.is_dynamo_compiling


@dataclass(frozen=True)
class RotaryForm:
    """What a rotary function computes.

    Attributes:
        interleaved: Whether the elements of a pair are neighbours.
        angles: What cos holds: a value for "each" element, one for each "pair" (half as wide as what is rotated), or
            one for each pair in its "first half", the other half unused.
        partial: Whether cos may be narrower than the heads; the other elements pass through.
        heads_last: Whether ``unsqueeze_dim=2`` means q and k of shape [B, S, H, D].
        wide_angles: Whether float32 angles leave 16-bit q and k in their dtype.
    """

    interleaved: bool
    angles: str
    partial: bool = False
    heads_last: bool = False
    wide_angles: bool = False

    def spread(self, x):
        """One value for each element."""
        if self.angles == "each":
            return x
        pairs = x if self.angles == "pair" else x[..., : x.shape[-1] // 2]
        return pairs.repeat_interleave(2, -1) if self.interleaved else torch.cat((pairs, pairs), -1)


class RotaryFunction:
    """Called in place of a model's ``apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=1)``.

    Attributes:
        stock: The model's own function, which answers every call that is not of a tested form.
        form: What `stock` was found to compute.
        fallbacks: Number of calls that `stock` answered, by reason.
    """

    __slots__ = ("fallbacks", "form", "stock")

    def __init__(self, stock, form):
        self.stock = stock
        self.form = form
        self.fallbacks = {}

    def __call__(self, q, k, cos, sin, *args, **kwargs):
        form = self.form
        heads_last = False
        if args or kwargs:
            heads_last = form.heads_last and not args and kwargs == {"unsqueeze_dim": 2}
            if not heads_last:
                return self._run_stock("further arguments", q, k, cos, sin, *args, **kwargs)
        try:
            if cos.dtype is not q.dtype and not form.wide_angles:
                raise TypeError(f"torch's result type of {q.dtype} heads and {cos.dtype} angles is the wider one")
            all_cos, all_sin = (cos, sin) if form.angles == "each" else (form.spread(cos), form.spread(sin))
            if not form.partial and all_cos.size(-1) != q.size(-1):
                raise ValueError(f"cos must be as wide as the heads, {q.shape[-1]}, got {all_cos.shape[-1]}")
            run = _rotary.direct(q) if k.dtype is q.dtype else None
            if run is not None:
                return run(q, k, all_cos, all_sin, form.interleaved, 2 if heads_last else 1)
            if heads_last:
                return rotary(q, k, all_cos, all_sin, interleaved=form.interleaved)
            q, k = rotary(q.transpose(1, 2), k.transpose(1, 2), all_cos, all_sin, interleaved=form.interleaved)
            return q.transpose(1, 2), k.transpose(1, 2)
        except UNSUPPORTED as reason:
            return self._run_stock(reason, q, k, cos, sin, **kwargs)

    def _run_stock(self, reason, *args, **kwargs):
        record_fallback(self.fallbacks, getattr(self.stock, "__name__", "the rotary function"), reason, args)
        return self.stock(*args, **kwargs)

    def __reduce__(self):
        """Counts stay behind."""
        return RotaryFunction, (self.stock, self.form)


class RotaryState(State):
    """State of an attention whose rotary function is replaced.

    Attributes:
        call: The stock forward with `name` meaning `rotate`; built anew in a copy or after a pickle.
        owner: The module's class.
        name: The global that is replaced.
        rotate: The RotaryFunction that replaces it.
    """

    __slots__ = ("call", "name", "owner", "rotate")

    def __init__(self, owner, name, rotate):
        super().__init__(rotary_forward)
        self.owner = owner
        self.name = name
        self.rotate = rotate
        self.call = with_rotary(owner, name, rotate)

    def __reduce__(self):
        return _restore_state, (self.owner, self.name, self.rotate, self.slot, self.previous)


def _restore_state(owner, name, rotate, slot, previous):
    state = RotaryState(owner, name, rotate)
    state.slot = slot
    state.previous = previous
    return state


def rotary_forward(self, *args, **kwargs):
    """Forward of an attention whose rotary function is replaced."""
    if _is_compiling():
        return type(self).forward(self, *args, **kwargs)
    return self._fusedops.call(self, *args, **kwargs)


def with_rotary(owner, name, rotate):
    """The forward of a class with another rotary function."""
    return rebuild.rewrap(owner.forward, lambda forward: rebuild.with_global(forward, name, rotate))


def find_rotary(module):
    """(State, text) of a module whose forward calls a rotary function that we compute, a reason, or None."""
    forward = rebuild.innermost(type(module).forward)
    for name in getattr(getattr(forward, "__code__", None), "co_names", ()):
        stock = forward.__globals__.get(name)
        if not callable(stock) or isinstance(stock, type) or not any(hint in name.lower() for hint in HINTS):
            continue
        form = rotary_form(stock)
        if form is None:
            return f"{name} is not a rotary embedding of q and k that we compute"
        try:
            state = RotaryState(type(module), name, RotaryFunction(stock, form))
        except rebuild.CannotRebuildError as reason:
            return str(reason)
        return state, f"rotary({'interleaved=True' if form.interleaved else ''}) in place of {name}"
    return None


def rotary_form(stock):
    """The RotaryForm of a function of (q, k, cos, sin), or None where it computes something else."""
    for interleaved, angles in product((False, True), ANGLES):
        form = RotaryForm(interleaved, angles)
        if _agrees(stock, form):
            return RotaryForm(
                interleaved,
                angles,
                partial=_agrees(stock, form, width=8),
                heads_last=_agrees(stock, form, heads_last=True),
                wide_angles=_agrees(stock, form, wide_angles=True),
            )
    return None


def _agrees(stock, form, width=16, heads_last=False, wide_angles=False):
    """Whether a function rotates the first `width` of 16 elements in this form, in float32 and bfloat16."""
    seeded = generator()
    angles = torch.randn(2, 3, width // 2 if form.angles == "pair" else width, generator=seeded)
    heads = [torch.randn(2, number, 3, 16, generator=seeded) for number in (4, 2)]
    for dtype in PROBE_DTYPES:
        narrow = torch.float32 if wide_angles else dtype
        cos, sin = angles.cos().to(narrow), angles.sin().to(narrow)
        given = [x.to(dtype) for x in heads]
        if heads_last:
            transposed = [x.transpose(1, 2) for x in given]
            out = attempt(partial(stock, unsqueeze_dim=2), *transposed, cos, sin)
        else:
            out = attempt(stock, *given, cos, sin)
        if not isinstance(out, tuple | list) or len(out) != 2:
            return False
        for x, rotated in zip(given, out, strict=True):
            rotated = rotated.transpose(1, 2) if heads_last else rotated
            if all(agreement(rotated, _rotated(x, cos, sin, form, wide)) is None for wide in (dtype, torch.float32)):
                return False
    return True


def _rotated(x, cos, sin, form, wide):
    """The definition, for x of [B, H, S, D], computed in the dtype `wide` and then rounded to x's."""
    cos, sin = form.spread(cos)[:, None].to(wide), form.spread(sin)[:, None].to(wide)
    width = cos.shape[-1]
    first = slice(0, width, 2) if form.interleaved else slice(width // 2)
    second = slice(1, width, 2) if form.interleaved else slice(width // 2, width)
    out = x.to(wide).clone()
    a, b = x[..., first].to(wide), x[..., second].to(wide)
    out[..., first] = a * cos[..., first] - b * sin[..., first]
    out[..., second] = b * cos[..., second] + a * sin[..., second]
    return out.to(x.dtype)
