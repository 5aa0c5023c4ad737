"""prune_24, compress_24 and decompress_24 against torch's usual compositions, eager and compiled."""

import torch
from _common import Case, compiled, main

from fusedops import compress_24, decompress_24, prune_24

# (N, K) of weights whose rows need no padding, the decisive ones first
SHAPES = {
    "cpu": [(1536, 512), (4096, 4096)],
    "cuda": [(14336, 4096), (4096, 4096), (4096, 14336)],
}
DTYPES = {"cpu": (torch.bfloat16, torch.float32, torch.int8), "cuda": (torch.bfloat16, torch.int8)}


def pruned(weight):
    """The two largest of each four by topk."""
    groups = weight.unflatten(1, (-1, 4))
    best = groups.abs().topk(2, -1).indices
    return torch.zeros_like(groups).scatter_(-1, best, groups.gather(-1, best)).flatten(1)


def compressed(weight):
    """The places of what is not zero by a stable sort, the values by gather."""
    groups = weight.unflatten(1, (-1, 4))
    places = (groups == 0).to(torch.uint8).sort(dim=-1, stable=True).indices[..., :2].sort(-1).values
    nibbles = (places[..., 0] | places[..., 1] << 2).to(torch.uint8)
    return groups.gather(-1, places).flatten(1), nibbles[:, ::2] | nibbles[:, 1::2] << 4


def decompressed(values, metadata):
    """Pairs scattered to their places."""
    nibbles = torch.stack((metadata & 15, metadata >> 4), -1).flatten(1)
    places = torch.stack((nibbles & 3, nibbles >> 2), -1).long()
    pairs = values.unflatten(1, (-1, 2))
    return pairs.new_zeros(*nibbles.shape, 4).scatter_(-1, places, pairs).flatten(1)


def lost(case, arguments, out):
    """The part of the elements that do not come back, or that a pruned weight should not have."""
    if case.op == "prune_24":
        return float((out != pruned(arguments[0])).double().mean())
    if case.op == "compress_24":
        return float((decompress_24(*out) != arguments[0]).double().mean())
    return float((out != decompressed(*arguments)).double().mean())


def drawn(n, k, dtype, device):
    """Weights without equal numbers in a group, of which topk would take either."""
    order = torch.rand(n, k // 4, 4, device=device).argsort(-1)
    return (order * 30 + torch.randint(1, 30, order.shape, device=device)).flatten(1).to(dtype)


def cases(device, quick):
    """Weights of models."""
    for dtype in DTYPES[device][:1] if quick else DTYPES[device]:
        for n, k in SHAPES[device][:1] if quick else SHAPES[device]:

            def dense(seed, n=n, k=k, dtype=dtype):
                return (drawn(n, k, dtype, device),)

            def sparse(seed, dense=dense):
                return (prune_24(*dense(seed)),)

            def stored(seed, sparse=sparse):
                return compress_24(*sparse(seed))

            ways = (
                ("prune_24", dense, prune_24, pruned),
                ("compress_24", sparse, compress_24, compressed),
                ("decompress_24", stored, decompress_24, decompressed),
            )
            for op, make, ours, plain in ways:
                candidates = {"fusedops": ours, "torch": plain, "torch.compile": compiled(plain)}
                yield Case(op, f"{n}x{k}", dtype, make, candidates, {}, check=lost)


if __name__ == "__main__":
    main(cases)
