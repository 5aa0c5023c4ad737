"""The meaning of prune_24, is_24, compress_24 and decompress_24."""

import torch
import torch.nn.functional as F


def prune_24(weight, scores):
    """The two of each four columns with the largest scores, the lower columns among equal ones; zeros elsewhere."""
    if scores is not None and scores.isnan().any():
        row, column = scores.isnan().nonzero()[0].tolist()
        raise ValueError(f"prune_24: scores must be numbers, got NaN in row {row}, column {column}")
    if scores is None:
        scores = weight.double().abs().nan_to_num(nan=float("inf"), posinf=1e300)
    groups = _groups(scores.double(), float("-inf"))
    best = groups.sort(dim=-1, descending=True, stable=True).indices[..., :2]
    kept = torch.zeros_like(groups, dtype=torch.bool).scatter(-1, best, True).flatten(1)[:, : weight.shape[1]]
    return torch.where(kept, weight.contiguous().view(_bits(weight)), 0).view(weight.dtype)


def is_24(weight):
    """Whether no group has more than two numbers other than zero."""
    return (_groups(weight.double() != 0, False).sum(-1) <= 2).all()


def compress_24(weight):
    """(values, metadata): of each group the numbers other than zero, filled up with the lowest other places."""
    K = weight.shape[1]
    wanted = _groups(weight.double() != 0, False)
    count = wanted.sum(-1)
    if (count > 2).any():
        row, group = (count > 2).nonzero()[0].tolist()
        raise ValueError(
            "compress_24: weight must have at most 2 numbers other than zero in each group of 4 columns, got "
            f"{count[row, group]} in row {row}, group {group} (columns {4 * group} to {min(4 * group + 3, K - 1)})"
        )
    places = wanted.to(torch.uint8).sort(dim=-1, descending=True, stable=True).indices[..., :2].sort(-1).values
    values = _groups(weight.contiguous().view(_bits(weight)), 0).gather(-1, places).flatten(1).view(weight.dtype)
    nibbles = F.pad(places[..., 0] | places[..., 1] << 2, (0, -places.shape[1] % 32), value=0b0100).to(torch.uint8)
    return values, nibbles[:, ::2] | nibbles[:, 1::2] << 4


def decompress_24(values, metadata, in_features):
    """The dense weight: each pair of values at its places of four, zeros elsewhere."""
    N, columns = values.shape
    nibbles = torch.stack((metadata & 15, metadata >> 4), -1).view(N, 2 * metadata.shape[1])[:, : columns // 2]
    places = torch.stack((nibbles & 3, nibbles >> 2), -1).long()
    pairs = values.contiguous().view(_bits(values)).view(N, columns // 2, 2)
    dense = pairs.new_zeros(N, columns // 2, 4).scatter(-1, places, pairs)
    return dense.flatten(1)[:, :in_features].contiguous().view(values.dtype)


def _groups(rows, pad):
    """[N, K] as [N, groups, 4], with columns added up to a multiple of 64."""
    N, K = rows.shape
    groups = -(-K // 64) * 16
    return F.pad(rows, (0, 4 * groups - K), value=pad).view(N, groups, 4)


def _bits(tensor):
    """A dtype of integers as wide as tensor's, which every operator of torch takes."""
    return {1: torch.int8, 2: torch.int16, 4: torch.int32}[tensor.element_size()]
