"""int8_matmul and fp8_matmul against torch's products, bf16 nn.Linear, torchao and DeepGEMM; codes are made before."""

import torch
import torch.nn.functional as F
from _common import Case, compiled, main, peer

from fusedops import fp8_matmul, int8_matmul, quantize_fp8, quantize_int8

TORCHAO = peer("torchao.kernel", "int_scaled_matmul")
DEEP_GEMM = peer("deep_gemm", "fp8_gemm_nt")
OUT = torch.bfloat16
MIB = 2**20

# (columns, depth) of layers: Llama 3 8B and SmolLM2-135M, the widest first
LAYERS = {"cuda": [(28672, 4096), (4096, 14336), (6144, 4096), (4096, 4096)], "cpu": [(3072, 576), (576, 1536)]}
ROWS = {"cuda": [4096, 1, 16, 64, 1024, 8192], "cpu": [1, 64]}


class Widened:
    """F.linear on bfloat16 copies, made once for each set of operands."""

    def __init__(self, bias):
        self.bias, self.copies = bias, {}

    def __call__(self, a, b, scale_a, scale_b):
        key = a.data_ptr(), b.data_ptr()
        if key not in self.copies:
            self.copies[key] = real(a, scale_a, 1), real(b, scale_b, 128)
        return F.linear(*self.copies[key], self.bias)


def real(codes, scale, block_rows):
    """The values that codes stand for, in bfloat16."""
    if scale.dim() == 2:
        scale = scale.repeat_interleave(block_rows, 0)[: len(codes)].repeat_interleave(128, 1)[:, : codes.shape[1]]
    elif scale.dim() == 1:
        scale = scale[:, None]
    return (codes.float() * scale).to(OUT)


def int8_peers(device, bias):
    """Of integers with scales of rows."""

    def epilogue(acc, scale_a, scale_b):
        return (acc.float() * scale_a[:, None] * scale_b + bias).to(OUT)

    finish = compiled(epilogue)
    peers = {
        "_int_mm, compiled epilogue": lambda a, b, s, t: finish(torch._int_mm(a, b.T), s, t),
        "bf16 linear": Widened(bias),
    }
    if device == "cuda" and TORCHAO:
        after = compiled(lambda acc, t: (acc * t + bias).to(OUT))
        peers["torchao"] = lambda a, b, s, t: after(TORCHAO(a, b.T, s[:, None]), t)
    return peers


def fp8_peers(device, bias):
    """Of float8 with scales of rows."""

    def scaled_mm(a, b, s, t):
        return torch._scaled_mm(a, b.T, scale_a=s[:, None], scale_b=t[None], bias=bias, out_dtype=OUT)

    return {"_scaled_mm": scaled_mm, "bf16 linear": Widened(bias)}


def block_peers(device):
    """Of float8 with scales of blocks."""

    def scaled_mm(a, b, s, t):
        return torch._scaled_mm(a, b.T, scale_a=s.T.contiguous().T, scale_b=t.T, out_dtype=OUT)

    def deep_gemm(a, b, s, t):
        out = a.new_empty((len(a), len(b)), dtype=OUT)
        DEEP_GEMM((a, s), (b, t), out)
        return out

    peers = {"_scaled_mm": scaled_mm, "bf16 linear": Widened(None)}
    return peers | {"deep_gemm": deep_gemm} if device == "cuda" and DEEP_GEMM else peers


def case_of(op, kind, rows, columns, depth, device):
    """One shape. Rows and weights are random, with the spread of activations and of weights."""
    bias = None if kind == "blocks" else torch.randn(columns, device=device).to(OUT)

    def make(seed):
        x, weight = torch.randn(rows, depth, device=device), torch.randn(columns, depth, device=device) / depth**0.5
        if op is int8_matmul:
            made = [quantize_int8(t) for t in (x, weight)]
        elif kind == "rows":
            made = [quantize_fp8(t) for t in (x, weight)]
        else:
            made = [quantize_fp8(x, granularity="block"), quantize_fp8(weight, granularity="block_2d")]
        return *(codes for codes, _ in made), *(scale for _, scale in made)

    def ours(a, b, s, t):
        return op(a, b, s, t, bias=bias)

    peers = int8_peers(device, bias) if op is int8_matmul else fp8_peers(device, bias)
    peers = block_peers(device) if kind == "blocks" else peers
    if rows >= 1024:
        goal = {"int8": (1.3, None), "rows": (1.0, None), "blocks": (0.97, None)}["int8" if op is int8_matmul else kind]
    else:
        goal = (None, 0.88) if rows <= 64 and columns * depth >= 32 * MIB else (None, None)
    shape = f"{rows}x{columns}x{depth} {kind}"
    return Case(op.__name__, shape, OUT, make, {"fusedops": ours, **peers}, {"bias": bias}, goal=goal)


def cases(device, quick):
    """Every layer for a prompt and for decoding; scales of rows of both operators, and of blocks."""
    layers, all_rows = LAYERS[device], ROWS[device]
    for rows in all_rows[:2] if quick else all_rows:
        for columns, depth in layers[:1] if quick else layers:
            yield case_of(int8_matmul, "rows", rows, columns, depth, device)
            yield case_of(fp8_matmul, "rows", rows, columns, depth, device)
            yield case_of(fp8_matmul, "blocks", rows, columns, depth, device)


if __name__ == "__main__":
    main(cases)
