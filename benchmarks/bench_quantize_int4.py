"""quantize_int4 against torch's composition of the same formula, eager and compiled."""

import torch
from _common import Case, compiled, main

from fusedops import quantize_int4

GROUP = 32

# (N, K) of weights, the decisive ones first
SHAPES = {
    "cpu": [(1536, 576), (4096, 4096)],
    "cuda": [(4096, 4096), (14336, 4096), (4096, 14336)],
}


def grid(groups, scale, zero):
    """Codes on one grid, and the largest error of each group."""
    codes = ((groups / scale).round() + zero).clamp(0, 15)
    return codes, (groups - (codes - zero) * scale).abs().amax(-1, keepdim=True)


def plain(weight):
    """The better of two grids for each group of columns, in float32."""
    groups = weight.unflatten(1, (-1, GROUP))
    low, high = groups.amin(-1, keepdim=True).clamp(max=0), groups.amax(-1, keepdim=True).clamp(min=0)
    even, eighths = (high - low) / 15, torch.maximum(high, -low) / 8
    even_zero, eighths_zero = (-low / even).round(), torch.where(-low >= high, 8.0, 7.0)
    (codes, error), (other, other_error) = grid(groups, even, even_zero), grid(groups, eighths, eighths_zero)
    better = other_error < error
    codes = torch.where(better, other, codes).flatten(1).to(torch.uint8)
    scale, zero = torch.where(better, eighths, even), torch.where(better, eighths_zero, even_zero)
    return codes[:, ::2] | (codes[:, 1::2] << 4), scale.squeeze(-1), zero.squeeze(-1).to(torch.uint8)


def cases(device, quick):
    """Weights of models, in float32 so that the scale is what the formula says."""
    for n, k in SHAPES[device][:1] if quick else SHAPES[device]:

        def make(seed, n=n, k=k):
            return (torch.randn(n, k, device=device),)

        candidates = {"fusedops": quantize_int4, "torch": plain, "torch.compile": compiled(plain)}
        yield Case("quantize_int4", f"{n}x{k} groups of {GROUP}", torch.float32, make, candidates, {})


if __name__ == "__main__":
    main(cases)
