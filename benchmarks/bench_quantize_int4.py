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
    codes = (groups / scale + zero).round().clamp(0, 15)
    return codes, (groups - (codes - zero) * scale).abs().amax(-1, keepdim=True)


def plain(weight):
    """The best of three grids for each group of columns, in float32."""
    groups = weight.unflatten(1, (-1, GROUP))
    low, high = groups.amin(-1, keepdim=True).clamp(max=0), groups.amax(-1, keepdim=True).clamp(min=0)
    even, eighths = (high - low) / 15, torch.maximum(high, -low) / 8
    scale, zero = even, (-low / even).round()
    codes, error = grid(groups, scale, zero)
    between = torch.where((groups != 0).all(-1, keepdim=True), (-low / even * 16).round() / 16, zero)
    for other_scale, other_zero in ((eighths, torch.where(-low >= high, 8.0, 7.0)), (even, between)):
        other_codes, other_error = grid(groups, other_scale, other_zero)
        better = other_error < error
        scale, zero = torch.where(better, other_scale, scale), torch.where(better, other_zero, zero)
        codes, error = torch.where(better, other_codes, codes), torch.where(better, other_error, error)
    codes = codes.flatten(1).to(torch.uint8)
    return codes[:, ::2] | (codes[:, 1::2] << 4), scale.squeeze(-1), (zero * 16).squeeze(-1).to(torch.uint8)


def cases(device, quick):
    """Weights of models, in float32 so that the scale is what the formula says."""
    for n, k in SHAPES[device][:1] if quick else SHAPES[device]:

        def make(seed, n=n, k=k):
            return (torch.randn(n, k, device=device),)

        candidates = {"fusedops": quantize_int4, "torch": plain, "torch.compile": compiled(plain)}
        yield Case("quantize_int4", f"{n}x{k} groups of {GROUP}", torch.float32, make, candidates, {})


if __name__ == "__main__":
    main(cases)
