"""rms_norm and add_rms_norm against torch, torch.compile, Liger and QuACK; those that end in codes against torch."""

import torch
import torch.nn.functional as F
from _common import Case, compiled, main, peer

from fusedops import add_rms_norm, add_rms_norm_quantized, rms_norm, rms_norm_quantized

EPS = 1e-6
LIGER = peer("liger_kernel.transformers.functional", "liger_rms_norm")
LIGER_ADD = peer("liger_kernel.transformers.functional", "liger_fused_add_rms_norm")
QUACK = peer("quack", "rmsnorm")

# (rows, N), the decisive ones first: a batch, one token and a short prompt of models from 576 to 16,384 wide
SHAPES = {
    "cpu": [(1, 576), (64, 576), (1, 4096), (256, 4096)],
    "cuda": [(8192, 4096), (1, 4096), (8192, 16384), (8192, 2048), (16384, 8192), (64, 4096)],
}


def torch_rms_norm(x, weight):
    return F.rms_norm(x, weight.shape, weight, EPS)


def torch_add_rms_norm(x, residual, weight):
    h = x + residual
    return F.rms_norm(h, weight.shape, weight, EPS), h


def torch_quantized(out):
    scale = out.float().abs().amax(-1, keepdim=True) / 127
    return (out * (1 / scale)).round().to(torch.int8), scale.squeeze(-1)


def torch_rms_norm_quantized(x, weight):
    return torch_quantized(torch_rms_norm(x, weight))


def torch_add_rms_norm_quantized(x, residual, weight):
    out, h = torch_add_rms_norm(x, residual, weight)
    return *torch_quantized(out), h


def quantized_cases(shape, dtype, makes, goal):
    """Both operators with int8 output."""
    for name, ours, plain, make in (
        ("rms_norm_quantized", rms_norm_quantized, torch_rms_norm_quantized, makes[0]),
        ("add_rms_norm_quantized", add_rms_norm_quantized, torch_add_rms_norm_quantized, makes[1]),
    ):
        candidates = {"fusedops": ours, "torch": plain, "torch.compile": compiled(plain)}
        yield Case(name, shape, dtype, make, candidates, {}, goal=goal)


def cases(device, quick):
    """Every operator on every shape."""
    for rows, n in SHAPES[device][:2] if quick else SHAPES[device]:
        for dtype in (torch.float32,) if device == "cpu" else (torch.bfloat16,):

            def make(seed, rows=rows, n=n, dtype=dtype):
                return torch.randn(rows, n, device=device, dtype=dtype), torch.randn(n, device=device, dtype=dtype)

            def make_residual(seed, make=make):
                x, weight = make(seed)
                return x, torch.randn_like(x), weight

            candidates = {"fusedops": rms_norm, "torch": torch_rms_norm, "torch.compile": compiled(torch_rms_norm)}
            fused = {
                "fusedops": add_rms_norm,
                "torch": torch_add_rms_norm,
                "torch.compile": compiled(torch_add_rms_norm),
            }
            if device == "cuda" and LIGER:
                candidates["liger"] = lambda x, weight: LIGER(x, weight, EPS)
            if device == "cuda" and QUACK:
                candidates["quack"] = lambda x, weight: QUACK(x, weight, eps=EPS)
                fused["quack"] = lambda x, residual, weight: QUACK(x, weight, residual=residual, eps=EPS, prenorm=True)
            goal = (1.0, 0.97) if rows >= 8192 else (None, None)
            yield Case("rms_norm", f"{rows}x{n}", dtype, make, candidates, {}, goal=goal)
            yield Case("add_rms_norm", f"{rows}x{n}", dtype, make_residual, fused, {}, goal=goal)
            goal = (1.0, 0.88) if rows >= 8192 else (None, None)
            yield from quantized_cases(f"{rows}x{n}", dtype, (make, make_residual), goal)


if __name__ == "__main__":
    main(cases)
