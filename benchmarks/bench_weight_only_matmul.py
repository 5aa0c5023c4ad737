"""Products with int8, float8 and 4-bit weights against those of the same weight in 16 bits, and other packages'."""

import itertools

import torch
import torch.nn.functional as F
from _common import Case, main, peer
from torch.nn import Parameter

from fusedops import weight_only_matmul
from fusedops.nn import WeightOnlyLinear
from fusedops.ops.weight_only_matmul.reference import dequantized

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


class Peers:
    """Other ways with the same weights, each in the layout that it wants, made beforehand; calls take them in turn."""

    def __init__(self, kind, device, dtype):
        self.kind, self.device, self.dtype = kind, device, dtype
        self.layouts = {}

    def add(self, seed, values, scale, K):
        """The layouts of one weight."""
        made = {"dense": dequantized(values, scale, None, K, torch.float32).to(self.dtype)}
        if self.kind == "int4" and self.dtype == torch.bfloat16 and K % GROUP == 0:
            made["int4"] = packed_for_torch(values, scale)
        gemlite = peer("gemlite.helper", "A16W8") if self.kind == "int8" and self.device == "cuda" else None
        if gemlite is not None:
            made["gemlite"] = gemlite(device=self.device, dtype=self.dtype).from_weights(
                values, None, scale.view(-1, 1)
            )
        self.layouts[seed] = made

    def functions(self):
        """Name to function of (x, values, scale)."""
        found = {LINEAR: self.taking("dense", F.linear)}
        if self.kind == "int8":
            found["torch._weight_int8pack_mm"] = torch._weight_int8pack_mm
            if self.device == "cuda":
                found["gemlite A16W8"] = self.taking("gemlite", lambda x, layer: layer(x))
        if self.kind == "int4":
            name = "_weight_int4pack_mm" + ("_for_cpu" if self.device == "cpu" else "")
            found[f"torch.{name}"] = self.taking(
                "int4", lambda x, packed: getattr(torch, name)(x, packed[0], GROUP, packed[1])
            )
        return found

    def taking(self, layout, function):
        """The function with the next weight's layout as its second argument."""
        calls = itertools.count()

        def call(x, *_):
            return function(x, self.layouts[next(calls) % len(self.layouts)][layout])

        return call


def case(kind, rows, sizes, device, dtype):
    N, K = sizes
    others = Peers(kind, device, dtype)

    def make(seed):
        values, scale = stored(kind, N, K, device, dtype)
        others.add(seed, values, scale, K)
        return torch.randn(rows, K, device=device).to(dtype), values, scale

    goal = (None, None)
    if kind != "int4" and rows <= 64 and N * K >= (LARGE if device == "cuda" else 2**24):
        goal = GOAL[device] if rows <= 32 else (None, GOAL[device][1])
    name, candidates = f"{kind} {rows}x{N}x{K}", {"fusedops": weight_only_matmul, **others.functions()}
    return Case("weight_only_matmul", name, dtype, make, candidates, {}, goal=goal, against=(LINEAR,))


def module_case(sizes, device, dtype):
    """One row through the modules: what a call of `WeightOnlyLinear` takes beside one of `torch.nn.Linear`."""
    N, K = sizes
    others = Peers("int8", device, dtype)

    def make(seed):
        values, scale = stored("int8", N, K, device, dtype)
        layer = WeightOnlyLinear(K, N, bias=False, device="meta", dtype=dtype)
        layer.weight, layer.weight_scale = (Parameter(t, requires_grad=False) for t in (values[None], scale))
        plain = torch.nn.Linear(K, N, bias=False, device="meta", dtype=dtype)
        plain.weight = Parameter(layer.dequantize())
        others.layouts[seed] = {"ours": layer, "plain": plain}
        return torch.randn(1, K, device=device).to(dtype), values, scale

    candidates = {
        "fusedops": others.taking("ours", lambda x, layer: layer(x)),
        "nn.Linear": others.taking("plain", lambda x, layer: layer(x)),
    }
    name = f"int8 1x{N}x{K} as modules"
    return Case("weight_only_matmul", name, dtype, make, candidates, {}, goal=GOAL[device])


def cases(device, quick):
    """Decoding steps of one and several sequences, and a prompt, in every format; and one step through the modules."""
    for dtype in DTYPES[device][: 1 if quick else None]:
        yield module_case(SIZES[device][0], device, dtype)
    for dtype in DTYPES[device][: 1 if quick else None]:
        for sizes in SIZES[device][-1:] if quick else SIZES[device]:
            for rows in ROWS[device][:1] if quick else ROWS[device]:
                for kind in ("int8", "fp8", "int4"):
                    yield case(kind, rows, sizes, device, dtype)


if __name__ == "__main__":
    main(cases)
