"""The meaning of int8_matmul and fp8_matmul: everything in float64, rounded once."""

import torch
import torch.nn.functional as F

BLOCK = 128
ACTIVATIONS = {
    None: lambda x: x,
    "relu": F.relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


def int8_matmul(a, b, scale_a, scale_b, bias, out_dtype, activation, residual, gated=False):
    """``activation((a * scale_a) @ (b * scale_b).T + bias) + residual``; of float64 scales the result is float64.

    With gated, even columns are activated and multiplied by the odd ones, and the residual follows.
    """
    out = _scaled(a, scale_a, 1) @ _scaled(b, scale_b, BLOCK).T
    if bias is not None:
        out = out + bias.double()
    if gated:
        out = ACTIVATIONS[activation](out[:, ::2]) * out[:, 1::2]
    else:
        out = ACTIVATIONS[activation](out)
    if residual is not None:
        out = out + residual.double()
    return out if scale_a.dtype == torch.float64 else out.to(out_dtype)


def _scaled(x, scale, block_rows):
    """The real values: one scale for all, one for each row, or one for each block of block_rows rows by 128."""
    scale = scale.double()
    if scale.dim() == 1 and scale.numel() != 1:
        scale = scale[:, None]
    if scale.dim() == 2 and scale.shape != (len(x), 1):
        scale = scale.repeat_interleave(block_rows, 0)[: len(x)].repeat_interleave(BLOCK, 1)[:, : x.shape[1]]
    return x.double() * scale


fp8_matmul = int8_matmul
