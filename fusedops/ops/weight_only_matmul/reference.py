"""The meaning of weight_only_matmul. In float64 this is the truth that every implementation is measured against."""

import torch

GROUPS = (32, 64, 128)
BLOCK = 128
ZERO_STEPS = 16  # of a code, that zeros are counted in


def weight_only_matmul(x, values, scale, zero, bias, residual, activation, gated=False):
    """``out = activation(x @ weight.T + bias) + residual``, rounded once; the weight is `dequantized`.

    With gated, even columns are activated and multiplied by the odd ones, and the residual follows.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    out = wide @ dequantized(values, scale, zero, x.shape[-1], wide.dtype).T
    if bias is not None:
        out = out + bias.to(wide.dtype)
    out = activated(out[..., ::2], activation) * out[..., 1::2] if gated else activated(out, activation)
    if residual is not None:
        out = out + residual.to(wide.dtype)
    return out.to(x.dtype)


def activated(x, activation):
    """The activation by its name, None being none."""
    if activation == "silu":
        return x * torch.sigmoid(x)
    if activation == "gelu":
        return x * 0.5 * torch.special.erfc(x * -(0.5**0.5))  # 1 + erf, in the form whose lower tail does not cancel
    if activation == "gelu_tanh":  # (1 + tanh(u)) / 2 = sigmoid(2 u)
        return x * torch.sigmoid(2.0 * (2.0 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))
    return x.clamp(min=0) if activation == "relu" else x


def dequantized(values, scale, zero, K, dtype):
    """The weight [N, K]: ``values * scale``; of packed 4-bit codes ``(code - zero / 16) * scale``, zero None is 128."""
    N = values.shape[0]
    if values.dtype == torch.uint8:
        codes = torch.stack((values & 15, values >> 4), -1).flatten(1)[:, :K].to(dtype)
        codes = codes - (8 if zero is None else _spread(zero.to(dtype) / ZERO_STEPS, N, K))
    else:
        codes = values.to(dtype)
    return codes * _spread(scale.to(dtype), N, K)


def _spread(table, N, K):
    """One number for each element of [N, K], from one for all, for each row, each group of a row, or each block."""
    if table.dim() < 2:
        return table.reshape(-1, 1)
    rows, columns = table.shape
    if rows != N:
        table = table.repeat_interleave(BLOCK, 0)[:N]
        group = BLOCK
    else:
        group = next(size for size in GROUPS if -(-K // size) == columns)
    return table.repeat_interleave(group, 1)[:, :K]
