"""silu_mul, with codes as its result too, and gelu_mul against torch, torch.compile, Liger, FlashInfer."""

import functools

import torch
import torch.nn.functional as F
from _common import Case, compiled, main, peer
from _layouts import Layouts

from fusedops import gelu_mul, silu_mul, silu_mul_quantized

LIGER_SILU = peer("liger_kernel.transformers.functional", "liger_swiglu")
LIGER_GELU = peer("liger_kernel.transformers.functional", "liger_geglu")
FLASHINFER = peer("flashinfer", "silu_and_mul")  # of halves of one buffer

# (rows, N), the decisive ones first, of the MLPs of SmolLM2-135M, Llama 3 8B and 70B
SHAPES = {
    "cpu": [(1, 1536), (64, 1536), (1, 14336), (64, 14336)],
    "cuda": [(8192, 14336), (1, 14336), (8192, 28672), (8192, 1536), (64, 14336)],
}


def torch_silu_mul(gate, up):
    return F.silu(gate) * up


def torch_gelu_mul(gate, up):
    return F.gelu(gate, approximate="tanh") * up


def torch_silu_mul_quantized(gate, up):
    out = torch_silu_mul(gate, up)
    scale = out.float().abs().amax(-1, keepdim=True) / 127
    return (out * (1 / scale)).round().to(torch.int8), scale.squeeze(-1)


def flashinfer(gate, both):
    return FLASHINFER(both)


OPERATORS = (
    ("silu_mul", silu_mul, torch_silu_mul, LIGER_SILU, {}),
    ("gelu_mul", functools.partial(gelu_mul, approximate="tanh"), torch_gelu_mul, LIGER_GELU, {"approximate": "tanh"}),
    ("silu_mul_quantized", silu_mul_quantized, torch_silu_mul_quantized, None, {}),
)


def cases(device, quick):
    """Every operator on every shape; SiLU also on halves of one buffer, as fused projections give them."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    for rows, n in SHAPES[device][:2] if quick else SHAPES[device]:

        def make(seed, rows=rows, n=n):
            return tuple(torch.randn(rows, n, device=device, dtype=dtype) for _ in range(2))

        layouts = Layouts()

        def make_packed(seed, rows=rows, n=n, layouts=layouts):
            both = torch.randn(rows, 2 * n, device=device, dtype=dtype)
            layouts.add(seed, both)
            return both.chunk(2, -1)

        for name, ours, plain, liger, options in OPERATORS:
            candidates = {"fusedops": ours, "torch": plain, "torch.compile": compiled(plain)}
            if device == "cuda" and liger:
                candidates["liger"] = liger
            yield Case(name, f"{rows}x{n}", dtype, make, candidates, options)
            if name == "silu_mul":
                if device == "cuda" and FLASHINFER:
                    candidates = {**candidates, "flashinfer": layouts.taking(flashinfer, torch.clone)}
                yield Case(name, f"{rows}x{n} packed", dtype, make_packed, candidates, options)


if __name__ == "__main__":
    main(cases)
