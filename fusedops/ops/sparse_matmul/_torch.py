"""sparse_matmul by torch's own operators, with some rows of the weight decompressed at a time."""

import torch

from fusedops._core.activations import activate_

CHUNK = 2**18  # elements of the weight that are float32 at once: they stay in a core's cache


def sparse_matmul(a, values, metadata, scale_a, scale_b, bias, out_dtype, activation):
    """The product in float32, then what is fused behind it."""
    K, N = a.shape[1], values.shape[0]
    wide = a.float()
    acc = wide.new_empty(a.shape[0], N)
    step = max(CHUNK // K, 1)
    for first in range(0, N, step):
        rows = slice(first, min(first + step, N))
        torch.mm(wide, _decompressed(values[rows], metadata[rows], K).t(), out=acc[:, rows])
    if scale_a is not None:
        acc *= scale_a.reshape(-1, 1)
    if scale_b is not None:
        acc *= scale_b
    if bias is not None:
        acc += bias
    return activate_(acc, activation).to(out_dtype)


def _decompressed(values, metadata, K):
    """Some rows of the weight as float32."""
    N, columns = values.shape
    nibbles = torch.stack((metadata & 15, metadata >> 4), -1).flatten(1)[:, : columns // 2]
    places = torch.stack((nibbles & 3, nibbles >> 2), -1).long()
    pairs = values.float().view(N, columns // 2, 2)
    return pairs.new_zeros(N, columns // 2, 4).scatter_(-1, places, pairs).flatten(1)[:, :K]
