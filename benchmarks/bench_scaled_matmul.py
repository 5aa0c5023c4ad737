"""int8_matmul and fp8_matmul against torch's products, bf16 nn.Linear, torchao and DeepGEMM; codes are made before."""

import functools

import torch
import torch.nn.functional as F
from _common import Case, compiled, main, peer
from _layouts import Layouts

from fusedops import fp8_matmul, int8_matmul, quantize_fp8, quantize_int8

TORCHAO = peer("torchao.kernel", "int_scaled_matmul")
DEEP_GEMM = peer("deep_gemm", "fp8_gemm_nt")
DEEP_GEMM_SCALES = peer("deep_gemm.utils.layout", "get_mn_major_tma_aligned_tensor")
OUT = torch.bfloat16
MIB = 2**20

# (columns, depth) of layers: Llama 3 8B and SmolLM2-135M, the widest first
LAYERS = {"cuda": [(28672, 4096), (4096, 14336), (6144, 4096), (4096, 4096)], "cpu": [(3072, 576), (576, 1536)]}
INT_MM, SCALED_MM, LINEAR = "_int_mm, compiled epilogue", "_scaled_mm", "bf16 linear"
ROWS = {"cuda": [4096, 1, 16, 64, 1024, 8192], "cpu": [1, 64]}


def linear(layouts, bias):
    """F.linear on bfloat16 copies of both operands."""

    def widened(a, b, scale_a, scale_b):
        return real(a, scale_a, 1), real(b, scale_b, 128)

    return layouts.taking(lambda a, copies: F.linear(*copies, bias), widened)


def real(codes, scale, block_rows):
    """The values that codes stand for, in bfloat16."""
    if scale.dim() == 2:
        scale = scale.repeat_interleave(block_rows, 0)[: len(codes)].repeat_interleave(128, 1)[:, : codes.shape[1]]
    elif scale.dim() == 1:
        scale = scale[:, None]
    return (codes.float() * scale).to(OUT)


def pairs_joined(p):
    """silu(gate) * up of columns in which each gate stands before its up."""
    return F.silu(p[:, ::2]) * p[:, 1::2]


def followed(product, gated):
    """The product, and of pairs what follows it, compiled."""
    join = compiled(pairs_joined)
    return (lambda *args: join(product(*args))) if gated else product


def int8_peers(layouts, device, bias, gated):
    """Of integers with scales of rows."""

    def epilogue(acc, scale_a, scale_b):
        p = acc.float() * scale_a[:, None] * scale_b + bias
        return (pairs_joined(p) if gated else p).to(OUT)

    finish = compiled(epilogue)
    peers = {
        INT_MM: lambda a, b, s, t: finish(torch._int_mm(a, b.T), s, t),
        LINEAR: followed(linear(layouts, bias), gated),
    }
    if device == "cuda" and TORCHAO and not gated:
        after = compiled(lambda acc, t: (acc * t + bias).to(OUT))
        peers["torchao"] = lambda a, b, s, t: after(TORCHAO(a, b.T, s[:, None]), t)
    return peers


def fp8_peers(layouts, device, bias, gated):
    """Of float8 with scales of rows."""

    def scaled_mm(a, b, s, t):
        return torch._scaled_mm(a, b.T, scale_a=s[:, None], scale_b=t[None], bias=bias, out_dtype=OUT)

    return {SCALED_MM: followed(scaled_mm, gated), LINEAR: followed(linear(layouts, bias), gated)}


def block_peers(layouts, device):
    """Of float8 with scales of blocks."""

    def scaled_mm(a, b, s, t):
        return torch._scaled_mm(a, b.T, scale_a=s.T.contiguous().T, scale_b=t.T, out_dtype=OUT)

    peers = {SCALED_MM: scaled_mm, LINEAR: linear(layouts, None)}
    if device == "cuda" and DEEP_GEMM and DEEP_GEMM_SCALES:
        peers["deep_gemm"] = layouts.taking(deep_gemm, for_deep_gemm)
    return peers


def deep_gemm(a, operands):
    (_, scale), weight = operands
    out = a.new_empty((len(a), len(weight[0])), dtype=OUT)
    DEEP_GEMM((a, scale), weight, out)
    return out


def for_deep_gemm(a, b, scale_a, scale_b):
    """The scales of a by columns, at aligned addresses; b and its scales as they are."""
    return (a, DEEP_GEMM_SCALES(scale_a)), (b, scale_b)


def goal_of(op, kind, rows, columns, depth):
    """(the goal, the peers that its ratio is to)."""
    if rows >= 1024:
        if op is int8_matmul:
            return (1.3, None), (INT_MM,)
        return ((1.0, None), (SCALED_MM,)) if kind == "rows" else ((0.97, None), ("deep_gemm",))
    if rows <= 64 and columns * depth >= 32 * MIB:
        return (1.75 if rows <= 32 else None, 0.88), (LINEAR,)
    return (None, None), ()


def case_of(op, kind, rows, columns, depth, device, gated=False):
    """One shape. Rows and weights are random, with the spread of activations and of weights."""
    bias, layouts = None if kind == "blocks" else torch.randn(columns, device=device).to(OUT), Layouts()

    def make(seed):
        x, weight = torch.randn(rows, depth, device=device), torch.randn(columns, depth, device=device) / depth**0.5
        if op is int8_matmul:
            made = [quantize_int8(t) for t in (x, weight)]
        elif kind == "rows":
            made = [quantize_fp8(t) for t in (x, weight)]
        else:
            made = [quantize_fp8(x, granularity="block"), quantize_fp8(weight, granularity="block_2d")]
        arguments = *(codes for codes, _ in made), *(scale for _, scale in made)
        layouts.add(seed, *arguments)
        return arguments

    options = {"bias": bias} | ({"activation": "silu", "gated": True} if gated else {})
    peers_of = int8_peers if op is int8_matmul else fp8_peers
    peers = block_peers(layouts, device) if kind == "blocks" else peers_of(layouts, device, bias, gated)
    candidates = {"fusedops": functools.partial(op, **options), **peers}
    goal, against = goal_of(op, kind, rows, columns, depth)
    shape = f"{rows}x{columns}x{depth} {kind}{', pairs' * gated}"
    return Case(op.__name__, shape, OUT, make, candidates, options, goal=goal, against=against)


def cases(device, quick):
    """Every layer for a prompt and for decoding; scales of rows of both operators, and of blocks."""
    layers, all_rows = LAYERS[device], ROWS[device]
    for rows in all_rows[:2] if quick else all_rows:
        for columns, depth in layers[:1] if quick else layers:
            yield case_of(int8_matmul, "rows", rows, columns, depth, device)
            yield case_of(fp8_matmul, "rows", rows, columns, depth, device)
            yield case_of(fp8_matmul, "blocks", rows, columns, depth, device)
        if quick and rows != all_rows[0]:
            continue
        columns, depth = layers[0]
        for op in (int8_matmul, fp8_matmul):  # a gate and an up projection as one weight
            yield case_of(op, "rows", rows, columns, depth, device, gated=True)


if __name__ == "__main__":
    main(cases)
