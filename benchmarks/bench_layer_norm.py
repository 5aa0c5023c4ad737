"""layer_norm and add_layer_norm against torch, torch.compile and Liger."""

import torch
import torch.nn.functional as F
from _common import Case, compiled, main, peer

from fusedops import add_layer_norm, layer_norm

EPS = 1e-5
LIGER = peer("liger_kernel.transformers.functional", "liger_layer_norm")

# (rows, N), the decisive ones first: a batch, one token and a prompt of models from GPT-2 (768) to 16,384 wide
SHAPES = {
    "cpu": [(1, 768), (64, 768), (1, 4096), (256, 4096)],
    "cuda": [(8192, 4096), (1, 4096), (8192, 16384), (8192, 1024), (16384, 8192), (64, 4096)],
}


def torch_layer_norm(x, weight, bias):
    return F.layer_norm(x, weight.shape, weight, bias, EPS)


def torch_add_layer_norm(x, residual, weight, bias):
    h = x + residual
    return F.layer_norm(h, weight.shape, weight, bias, EPS), h


def cases(device, quick):
    """Both operators on every shape."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    for rows, n in SHAPES[device][:2] if quick else SHAPES[device]:

        def make(seed, rows=rows, n=n):
            weight, bias = (torch.randn(n, device=device, dtype=dtype) for _ in range(2))
            return torch.randn(rows, n, device=device, dtype=dtype), weight, bias

        def make_residual(seed, make=make):
            x, weight, bias = make(seed)
            return x, torch.randn_like(x), weight, bias

        candidates = {"fusedops": layer_norm, "torch": torch_layer_norm, "torch.compile": compiled(torch_layer_norm)}
        fused = {
            "fusedops": add_layer_norm,
            "torch": torch_add_layer_norm,
            "torch.compile": compiled(torch_add_layer_norm),
        }
        if device == "cuda" and LIGER:
            candidates["liger"] = lambda x, weight, bias: LIGER(x, weight, bias, EPS)
        yield Case("layer_norm", f"{rows}x{n}", dtype, make, candidates, {})
        yield Case("add_layer_norm", f"{rows}x{n}", dtype, make_residual, fused, {})


if __name__ == "__main__":
    main(cases)
