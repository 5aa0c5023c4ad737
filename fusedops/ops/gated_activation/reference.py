"""The meaning of the gated activations. In float64 this is the truth that every implementation is measured against.

round_to is the dtype that the activation is rounded to, for a truth that is computed in a wider one.
"""

import torch


def silu_mul(gate, up, round_to=None):
    """``out = round(gate * sigmoid(gate)) * up``."""
    return _gated(_silu(_widen(gate)), gate, up, round_to)


def gelu_mul(gate, up, approximate="none", round_to=None):
    """``out = round(gelu(gate)) * up``."""
    return _gated(_gelu(_widen(gate), approximate), gate, up, round_to)


def silu_mul_quantized(gate, up, dtype=torch.int8):
    """Codes of ``silu_mul(gate, up)`` and the scale of each row."""
    out = silu_mul(gate, up).float()
    largest = 127.0 if dtype == torch.int8 else torch.finfo(dtype).max
    scale = (torch.nn.functional.pad(out.abs(), (0, 1)).amax(-1) / largest).clamp(min=2.0**-126)
    codes = out * (1.0 / scale).unsqueeze(-1)
    if dtype == torch.int8:
        codes = torch.where(codes.isnan(), 0.0, codes).round()
    return codes.to(dtype), scale


def silu_mul_backward(grad, gate, up, round_to=None):
    """Gradients of gate and up; the inner rounding passes gate's straight through."""
    return _gradients(_silu, grad, gate, up, round_to)


def gelu_mul_backward(grad, gate, up, approximate="none", round_to=None):
    """Gradients of gate and up; the inner rounding passes gate's straight through."""
    return _gradients(lambda wide: _gelu(wide, approximate), grad, gate, up, round_to)


def _silu(gate):
    return gate * torch.sigmoid(gate)


def _gelu(gate, approximate):
    """gate times a distribution function, in the forms whose lower tail does not cancel."""
    if approximate == "tanh":  # (1 + tanh(u)) / 2 = sigmoid(2 u)
        return gate * torch.sigmoid(2.0 * (2.0 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3))
    return gate * 0.5 * torch.special.erfc(gate * -(0.5**0.5))


def _gated(activated, gate, up, round_to):
    return (_round(activated, round_to or gate.dtype) * _widen(up)).to(gate.dtype)


def _gradients(activation, grad, gate, up, round_to):
    with torch.enable_grad():
        leaf = _widen(gate.detach()).requires_grad_()
        activated = activation(leaf)
        (dgate,) = torch.autograd.grad(activated, leaf, _widen(grad) * _widen(up))
    return dgate.to(gate.dtype), _gated(activated.detach(), gate, grad, round_to)


def _round(activated, dtype):
    return activated.to(dtype).to(activated.dtype)


def _widen(x):
    return x.to(torch.promote_types(x.dtype, torch.float32))
