"""Activations of a matmul's result by torch's own operators; `_core/tl.py` says the same for kernels."""

import torch.nn.functional as F


def activate_(x, activation):
    """x after one of `checks.ACTIVATIONS` or None; x is changed where torch can work in place."""
    if activation == "relu":
        return F.relu(x, inplace=True)
    if activation == "silu":
        return F.silu(x, inplace=True)
    if activation is not None:
        return F.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")
    return x


def gate_pairs(x, activation):
    """``activation(gate) * up`` of rows in which each gate stands before its up."""
    gate, up = x.unflatten(-1, (-1, 2)).unbind(-1)
    return activate_(gate.contiguous(), activation).mul_(up)
