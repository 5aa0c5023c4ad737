"""Gated activations by torch's own operators, in the order of operations of a model's MLP: equal bits."""

import torch
import torch.nn.functional as F

from fusedops._core import codes

_silu_backward = torch.ops.aten.silu_backward
_gelu_backward = torch.ops.aten.gelu_backward


def silu_mul(gate, up, out=None):
    """``F.silu(gate) * up``."""
    return _gated(F.silu(gate), up, out)


def gelu_mul(gate, up, approximate, out=None):
    """``F.gelu(gate, approximate=approximate) * up``."""
    return _gated(F.gelu(gate, approximate=approximate), up, out)


def silu_mul_quantized(gate, up, dtype):
    """The product, then its codes."""
    return codes.quantized_rows(silu_mul(gate, up), dtype)


def silu_mul_backward(grad, gate, up):
    """``dgate = grad * up * silu'(gate)``, ``dup = grad * silu(gate)``, each rounded once."""
    return _silu_backward(*_wide(grad, gate, up)).to(gate.dtype).contiguous(), _gated(F.silu(gate), grad, None)


def gelu_mul_backward(grad, gate, up, approximate):
    """``dgate = grad * up * gelu'(gate)``, ``dup = grad * gelu(gate)``, each rounded once."""
    dgate = _gelu_backward(*_wide(grad, gate, up), approximate=approximate).to(gate.dtype)
    return dgate.contiguous(), _gated(F.gelu(gate, approximate=approximate), grad, None)


def _gated(activated, up, out):
    """The product, in the activation's own memory where no `out` is given."""
    return activated.mul_(up).contiguous() if out is None else torch.mul(activated, up, out=out)


def _wide(grad, gate, up):
    return grad.float() * up.float(), gate.float()
