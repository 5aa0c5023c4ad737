"""The meaning of sparse_matmul: everything in float64, rounded once."""

import torch
import torch.nn.functional as F

ACTIVATIONS = {
    None: lambda x: x,
    "relu": F.relu,
    "silu": F.silu,
    "gelu": lambda x: x * 0.5 * torch.special.erfc(x * -(0.5**0.5)),  # 1 + erf, whose lower tail does not cancel so
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


def sparse_matmul(a, values, metadata, scale_a, scale_b, bias, out_dtype, activation):
    """``activation((a @ weight.T) * scale_a * scale_b + bias)``; of float64 operands the result is float64."""
    out = a.double() @ decompressed(values, metadata, a.shape[1]).T
    if scale_a is not None:
        out = out * scale_a.double().reshape(-1, 1)
    if scale_b is not None:
        out = out * scale_b.double()
    if bias is not None:
        out = out + bias.double()
    out = ACTIVATIONS[activation](out)
    is_truth = any(x is not None and x.dtype == torch.float64 for x in (a, scale_a, scale_b))
    return out if is_truth else out.to(out_dtype)


def decompressed(values, metadata, K):
    """The weight [N, K] in float64: each pair of values at the places that four bits name, zeros elsewhere."""
    N, columns = values.shape
    nibbles = torch.stack((metadata & 15, metadata >> 4), -1).flatten(1)[:, : columns // 2]
    places = torch.stack((nibbles & 3, nibbles >> 2), -1).long()
    pairs = values.double().view(N, columns // 2, 2)
    return pairs.new_zeros(N, columns // 2, 4).scatter(-1, places, pairs).flatten(1)[:, :K]
