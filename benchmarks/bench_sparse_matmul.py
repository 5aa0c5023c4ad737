"""sparse_matmul against the best searched dense product of its dtype, torch's cuSPARSELt products and torchao."""

import functools

import torch
import torch.nn.functional as F
from _common import Case, compiled, main, peer
from _layouts import Layouts

from fusedops import compress_24, decompress_24, fp8_matmul, int8_matmul, prune_24, sparse_matmul

OUT = torch.bfloat16
FP8 = torch.float8_e4m3fn
# (N, K) of Llama 3 8B's projections, and of SmolLM2-135M's; rows of decoding steps and of prompts
LAYERS = {"cuda": [(14336, 4096), (4096, 14336), (4096, 4096), (6144, 4096)], "cpu": [(1536, 576), (576, 1536)]}
ROWS = {"cuda": [1, 4096, 64, 2048, 8192, 4, 16, 32, 128, 256, 512, 1024], "cpu": [1, 64, 4, 16, 256]}
DTYPES = {"cuda": (torch.bfloat16, torch.int8, FP8), "cpu": (torch.float32, torch.bfloat16, torch.int8)}
TORCHAO_COMPRESS = peer("torchao.ops", "to_sparse_semi_structured_cutlass_sm9x_f8")
TORCHAO = peer("torchao.ops", "rowwise_scaled_linear_sparse_cutlass_f8f8")
SPARSE = ("_cslt_sparse_mm", "SparseSemiStructuredTensor", "torchao")


def dense_ways(layouts, K, dtype, s, t):
    """Name to function of (a, values, metadata): the dense product, with scales s and t of rows."""

    def rows(values, metadata):
        return decompress_24(values, metadata, in_features=K)

    def columns(values, metadata):
        return rows(values, metadata).T.contiguous()

    if dtype == torch.int8:
        finish = compiled(lambda acc: (acc.float() * s[:, None] * t).to(OUT))
        return {
            "_int_mm": layouts.taking(lambda a, w: finish(torch._int_mm(a, w.T)), rows),
            "_int_mm, weight by columns": layouts.taking(lambda a, w: finish(torch._int_mm(a, w)), columns),
            "int8_matmul": layouts.taking(lambda a, w: int8_matmul(a, w, s, t), rows),
        }
    if dtype == FP8:

        def scaled_mm(a, w, fast):
            return torch._scaled_mm(a, w.T, s[:, None], t[None], out_dtype=OUT, use_fast_accum=fast)

        return {
            "_scaled_mm": layouts.taking(functools.partial(scaled_mm, fast=False), rows),
            "_scaled_mm, fast sums": layouts.taking(functools.partial(scaled_mm, fast=True), rows),
            "fp8_matmul": layouts.taking(lambda a, w: fp8_matmul(a, w, s, t), rows),
        }
    return {
        "F.linear": layouts.taking(F.linear, rows),
        "matmul, weight by columns": layouts.taking(torch.matmul, columns),
        "matmul, transposed": layouts.taking(lambda a, w: torch.matmul(w, a.T).T, rows),
    }


def sparse_ways(layouts, K, dtype, s, t):
    """Other sparse products, on a GPU; what this machine does not have says why when it is tried."""

    def made_by(make):
        return lambda values, metadata: make(decompress_24(values, metadata, in_features=K))

    if dtype == FP8:
        if TORCHAO is None or TORCHAO_COMPRESS is None:
            return {}
        return {"torchao": layouts.taking(lambda a, w: TORCHAO(a, s, *w, t, out_dtype=OUT), made_by(TORCHAO_COMPRESS))}

    def cusparselt(a, w):
        if dtype == torch.int8:
            return (torch._cslt_sparse_mm(w, a.T, out_dtype=OUT).T.float() * s[:, None] * t).to(OUT)
        return torch._cslt_sparse_mm(w, a.T).T

    found = {"_cslt_sparse_mm": layouts.taking(cusparselt, made_by(torch._cslt_compress))}
    if dtype == OUT:
        made = made_by(torch.sparse.to_sparse_semi_structured)
        found["SparseSemiStructuredTensor"] = layouts.taking(F.linear, made)
    return found


def goal_of(device, rows):
    """How many times as fast as the best dense way."""
    if device != "cuda" or 64 < rows < 2048:
        return None, None
    return (1.5 if rows <= 64 else 1.35), None


def case(rows, sizes, dtype, device):
    N, K = sizes
    layouts, options = Layouts(), {}
    s, t = torch.rand(rows, device=device) / 64, torch.rand(N, device=device) / 64
    if dtype.itemsize == 1:
        options = {"scale_a": s, "scale_b": t}

    def make(seed):
        a, weight = torch.randn(rows, K, device=device), torch.randn(N, K, device=device)
        if dtype == torch.int8:
            a, weight = ((x * 32).clamp(-127, 127).round() for x in (a, weight))
        values, metadata = compress_24(prune_24(weight.to(dtype)))
        layouts.add(seed, values, metadata)
        return a.to(dtype), values, metadata

    dense = dense_ways(layouts, K, dtype, s, t)
    others = sparse_ways(layouts, K, dtype, s, t) if device == "cuda" else {}
    candidates = {"fusedops": functools.partial(sparse_matmul, **options), **dense, **others}
    shape = f"{rows}x{N}x{K}"
    return Case(
        "sparse_matmul", shape, dtype, make, candidates, options, goal=goal_of(device, rows), against=tuple(dense)
    )


def cases(device, quick):
    """The decisive shapes first: one row, and a prompt."""
    for rows in ROWS[device][:2] if quick else ROWS[device]:
        for sizes in LAYERS[device][:1] if quick else LAYERS[device]:
            for dtype in DTYPES[device][: 1 if quick and device == "cpu" else None]:
                yield case(rows, sizes, dtype, device)


if __name__ == "__main__":
    main(cases)
