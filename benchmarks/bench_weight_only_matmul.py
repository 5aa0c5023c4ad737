"""Products with int8, float8 and 4-bit weights against those of the same weight in 16 bits, and other packages'."""

import torch
import torch.nn.functional as F
from _common import Case, compiled, main, peer
from _layouts import Layouts
from torch.nn import Parameter

from fusedops import weight_only_matmul
from fusedops.nn import WeightOnlyLinear
from fusedops.ops.weight_only_matmul.reference import dequantized

GEMLITE = peer("gemlite.helper", "A16W8")
TORCHAO = peer("torchao.quantization", "quantize_")
TORCHAO_INT8 = peer("torchao.quantization", "Int8WeightOnlyConfig")

ROWS = {"cuda": (1, 16, 64, 4096), "cpu": (1, 8, 64)}
# (N, K): Llama 3 8B's down and gate projections on a GPU; on a CPU a square of that width and SmolLM2-135M's gate
SIZES = {"cuda": ((4096, 14336), (14336, 4096)), "cpu": ((4096, 4096), (1536, 576))}
DTYPES = {"cuda": (torch.bfloat16,), "cpu": (torch.bfloat16, torch.float32)}
GOAL = {"cuda": (1.75, 0.88), "cpu": (1.5, None)}  # of 8-bit weights and few rows, beside the 16-bit product
GROUP = 128
LINEAR = "F.linear of the expanded weight"
LARGE = 2**25  # bytes of weights from which the memory's bandwidth is the goal


def stored(kind, N, K, device, dtype):
    """Codes and their scales: in x's dtype, one for each row, or for each group of 128 columns of 4-bit codes."""
    if kind == "int4":
        values = torch.randint(0, 256, (N, K // 2), device=device, dtype=torch.uint8)
        return values, (torch.rand(N, -(-K // GROUP), device=device) / 256 + 1e-3).to(dtype)
    if kind == "int8":
        values = torch.randint(-127, 128, (N, K), device=device, dtype=torch.int8)
    else:
        values = torch.randn(N, K, device=device).mul_(64).to(torch.float8_e4m3fn)
    return values, (torch.rand(N, device=device) / 4096 + 1e-4).to(dtype)


def packed_for_torch(values, scale):
    """4-bit codes in torch's layout of this device, and its tables [groups, N, 2]: (code - 8) * scale + zero."""
    tables = torch.stack((scale, torch.zeros_like(scale)), -1).transpose(0, 1).contiguous()
    if values.is_cuda:
        swapped = (values << 4) | (values >> 4)
        return torch._convert_weight_to_int4pack(swapped, 8), tables
    codes = torch.stack((values & 15, values >> 4), -1).flatten(1).int()
    return torch._convert_weight_to_int4pack_for_cpu(codes, 1), tables


def other_ways(layouts, kind, K, device, dtype):
    """Name to function of (x, values, scale), with the same weights."""

    def dense(values, scale):
        return dequantized(values, scale, None, K, torch.float32).to(dtype)

    found = {LINEAR: layouts.taking(F.linear, dense)}
    if kind == "int8":
        found["torch._weight_int8pack_mm"] = torch._weight_int8pack_mm
    if kind == "int8" and device == "cuda" and GEMLITE:

        def gemlite(values, scale):
            return GEMLITE(device=device).from_weights(weight=values, scales=scale.view(-1, 1), bias=None)

        found["gemlite A16W8"] = layouts.taking(lambda x, layer: layer(x), gemlite)
    if kind == "int8" and device == "cuda" and TORCHAO and TORCHAO_INT8:

        def torchao(values, scale):
            layer = torch.nn.Linear(K, len(values), bias=False, device="meta", dtype=dtype)
            layer.weight = Parameter(dense(values, scale), requires_grad=False)
            TORCHAO(layer, TORCHAO_INT8())
            return layer.weight

        found["torchao int8, compiled"] = layouts.taking(compiled(F.linear), torchao)
    if kind == "int4" and dtype == torch.bfloat16 and K % GROUP == 0:
        name = "_weight_int4pack_mm" + ("_for_cpu" if device == "cpu" else "")

        def packed_mm(x, packed):
            return getattr(torch, name)(x, packed[0], GROUP, packed[1])

        found[f"torch.{name}"] = layouts.taking(packed_mm, packed_for_torch)
    return found


def case(kind, rows, sizes, device, dtype):
    N, K = sizes
    layouts = Layouts()

    def make(seed):
        values, scale = stored(kind, N, K, device, dtype)
        layouts.add(seed, values, scale)
        return torch.randn(rows, K, device=device).to(dtype), values, scale

    goal = (None, None)
    if kind != "int4" and rows <= 64 and N * K >= (LARGE if device == "cuda" else 2**24):
        goal = GOAL[device] if rows <= 32 else (None, GOAL[device][1])
    name = f"{kind} {rows}x{N}x{K}"
    candidates = {"fusedops": weight_only_matmul, **other_ways(layouts, kind, K, device, dtype)}
    return Case("weight_only_matmul", name, dtype, make, candidates, {}, goal=goal, against=(LINEAR,))


def module_case(sizes, device, dtype):
    """One row through the modules: what a call of `WeightOnlyLinear` takes beside one of `torch.nn.Linear`."""
    N, K = sizes
    layouts = Layouts()

    def ours(values, scale):
        layer = WeightOnlyLinear(K, N, bias=False, device="meta", dtype=dtype)
        layer.weight, layer.weight_scale = (Parameter(t, requires_grad=False) for t in (values[None], scale))
        return layer

    def plain(values, scale):
        layer = torch.nn.Linear(K, N, bias=False, device="meta", dtype=dtype)
        layer.weight = Parameter(ours(values, scale).dequantize())
        return layer

    def make(seed):
        values, scale = stored("int8", N, K, device, dtype)
        layouts.add(seed, values, scale)
        return torch.randn(1, K, device=device).to(dtype), values, scale

    candidates = {
        "fusedops": layouts.taking(lambda x, layer: layer(x), ours),
        "nn.Linear": layouts.taking(lambda x, layer: layer(x), plain),
    }
    name = f"int8 1x{N}x{K} as modules"
    return Case("weight_only_matmul", name, dtype, make, candidates, {}, goal=GOAL[device])


def cases(device, quick):
    """Decoding steps of one and several sequences, and a prompt, in every format; and one step through the modules."""
    for dtype in DTYPES[device][: 1 if quick else None]:
        yield module_case(SIZES[device][-1 if quick else 0], device, dtype)
    for dtype in DTYPES[device][: 1 if quick else None]:
        for sizes in SIZES[device][-1:] if quick else SIZES[device]:
            for rows in ROWS[device][:1] if quick else ROWS[device]:
                for kind in ("int8", "fp8", "int4"):
                    yield case(kind, rows, sizes, device, dtype)


if __name__ == "__main__":
    main(cases)
