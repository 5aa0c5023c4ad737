"""prune_24, is_24, compress_24 and decompress_24 by torch's own operators, for CPU and CUDA tensors alike.

They work on the bits of a weight as integers, which torch takes for every dtype, and on some rows at a time, so that
their copies stay small.
"""

import functools
import itertools

import torch
import torch.nn.functional as F

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
MAGNITUDE = {1: 0x7F, 2: 0x7FFF, 4: 0x7FFFFFFF}  # bits without the sign: in order of absolute values, NaN last
CHUNK = 2**22  # elements of a weight that are worked on at once
TOO_MANY = 255  # in the table of places: more than two numbers other than zero
PAD = 0b0100  # the places 0 and 1
ROW = 64  # columns whose values are the unit of a row's length


def prune_24(weight, scores):
    """Each element's place in the order of its group is counted, from the six comparisons of two."""
    if scores is not None:
        _check_scores(scores)
    (N, K), bits = weight.shape, _bits(weight)
    out = bits.new_empty(N, K)
    for rows in _chunks(N, K):
        ranked = _magnitudes(weight, bits[rows]) if scores is None else scores[rows]
        pad = -1 if scores is None else float("-inf")
        ahead = _ahead(F.pad(ranked, (0, -K % 4), value=pad).unflatten(1, (-1, 4)))
        torch.mul(bits[rows], (ahead < 2).flatten(1)[:, :K], out=out[rows])
    return out.view(weight.dtype)


def is_24(weight):
    """Counted in chunks, and asked once."""
    N, K = weight.shape
    bits, most = _bits(weight), []
    for rows in _chunks(N, K):
        most.append(F.pad(_nonzero(weight, bits[rows]), (0, -K % 4)).unflatten(1, (-1, 4)).sum(-1).amax())
    return torch.stack(most).amax() <= 2 if most else torch.ones((), dtype=torch.bool, device=weight.device)


def compress_24(weight):
    """The pattern of zeros of a group is four bits, for which a table has the two places."""
    (N, K), bits = weight.shape, _bits(weight)
    groups = -(-K // ROW) * ROW // 4
    values = bits.new_empty(N, 2 * groups)
    metadata = torch.full((N, -(-groups // 32) * 16), PAD | PAD << 4, dtype=torch.uint8, device=weight.device)
    table = _places_of_patterns().to(weight.device)
    for rows in _chunks(N, K):
        part = F.pad(bits[rows], (0, 4 * groups - K)).unflatten(1, (groups, 4))
        a, b, c, d = F.pad(_nonzero(weight, bits[rows]), (0, 4 * groups - K)).unflatten(1, (groups, 4)).unbind(-1)
        pattern = a + b * 2 + c * 4 + d * 8
        nibbles = table[pattern.int()]
        _check_pattern(nibbles, pattern, rows.start, K)
        places = torch.stack((nibbles & 3, nibbles >> 2), -1).long()
        torch.gather(part, -1, places, out=values[rows].unflatten(1, (groups, 2)))
        metadata[rows, : groups // 2] = nibbles[:, ::2] | nibbles[:, 1::2] << 4
    return values.view(weight.dtype), metadata


def decompress_24(values, metadata, in_features):
    """Pairs of values to their places of four; no bits of metadata name another one."""
    (N, columns), bits = values.shape, _bits(values)
    out = bits.new_empty(N, in_features)
    for rows in _chunks(N, 2 * columns):
        nibbles = torch.stack((metadata[rows] & 15, metadata[rows] >> 4), -1).flatten(1)[:, : columns // 2]
        places = torch.stack((nibbles & 3, nibbles >> 2), -1).long()
        pairs = bits[rows].unflatten(1, (-1, 2))
        dense = pairs.new_zeros(*nibbles.shape, 4).scatter_(-1, places, pairs)
        out[rows] = dense.flatten(1)[:, :in_features]
    return out.view(values.dtype)


@functools.cache
def _places_of_patterns():
    """For each pattern of four bits, which are set for numbers other than zero, the metadata of its two places."""
    table = []
    for pattern in range(16):
        wanted = [place for place in range(4) if pattern >> place & 1]
        others = [place for place in range(4) if place not in wanted]
        first, second = sorted((wanted + others)[:2])
        table.append(first | second << 2 if len(wanted) <= 2 else TOO_MANY)
    return torch.tensor(table, dtype=torch.uint8, device="cpu")  # whatever the default device is


def _chunks(N, K):
    """Slices of so many rows as are worked on at once; none where there is nothing."""
    step = max(CHUNK // max(K, 1), 1)
    return [slice(first, min(first + step, N)) for first in range(0, N if K else 0, step)]


def _bits(tensor):
    """A tensor of any strides as integers of its width."""
    return tensor.view(BITS[tensor.element_size()])


def _magnitudes(weight, bits):
    """Integers in the order of absolute values."""
    if weight.dtype == torch.int8:
        return bits.view(torch.int8).to(torch.int16).abs_()
    wide = bits.to(torch.int16) if bits.dtype == torch.uint8 else bits
    return wide & MAGNITUDE[bits.element_size()]


def _nonzero(weight, bits):
    """1 where an element is not zero; the sign of a zero does not count, of int8 every bit does."""
    significant = bits if weight.dtype == torch.int8 else bits & MAGNITUDE[bits.element_size()]
    return (significant != 0).to(torch.uint8)


def _ahead(groups):
    """For each of four how many stand before it: the larger ones, and equal ones in lower places."""
    places = groups.unbind(-1)
    ahead = [torch.zeros_like(places[0], dtype=torch.uint8) for _ in places]
    for low, high in itertools.combinations(range(4), 2):
        overtakes = places[high] > places[low]
        ahead[low] += overtakes
        ahead[high] += ~overtakes
    return torch.stack(ahead, -1)


def _check_scores(scores):
    wrong = scores.isnan()
    if bool(wrong.any()):
        row, column = divmod(int(wrong.flatten().to(torch.uint8).argmax()), scores.shape[1])
        raise ValueError(f"prune_24: scores must be numbers, got NaN in row {row}, column {column}")


def _check_pattern(nibbles, pattern, first_row, K):
    wrong = nibbles == TOO_MANY
    if bool(wrong.any()):
        row, group = divmod(int(wrong.flatten().to(torch.uint8).argmax()), wrong.shape[1])
        count = int(pattern[row, group]).bit_count()
        raise ValueError(
            "compress_24: weight must have at most 2 numbers other than zero in each group of 4 columns, got "
            f"{count} in row {first_row + row}, group {group} (columns {4 * group} to {min(4 * group + 3, K - 1)})"
        )
