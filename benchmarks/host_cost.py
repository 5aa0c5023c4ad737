"""What a call costs on the host, from the public function to the driver, without a GPU.

The driver is a stub that runs nothing, and tensors lie in the CPU's memory. All are timed in one process, in
alternating rounds: ours, the same kernel by Triton's ``kernel[grid]``, the same behind ``torch.library.custom_op``, and
Liger and QuACK where they can be imported. What a call costs without the checks of level 1, and how much of it is more
than its allocations and launches, stand beside it.

    python benchmarks/host_cost.py [--json FILE] [--quick]
"""

import argparse
import contextlib
import ctypes
import statistics
import sys
import time
from pathlib import Path

from _rows import environment, write
from host import stub_gpu

ROUNDS, CALLS = 31, 400
UNIT = "empty_like"  # what all are compared with: torch's cheapest way to make an output
GRID = "kernel[grid] of rms_norm"
LEVEL_0 = ", level 0"  # ends the names of calls without checks of values
ALONE = ", launches alone"  # ends those of calls without the look that recognises them
SHORT, LONG = "paged_attention, 8 x 100 keys", "paged_attention, 8 x 1000 keys"  # one launch; two: split
GOALS = {"rms_norm": 4.0, SHORT: 6.0, LONG: 6.0}  # times UNIT, at most


def calls(torch):
    """name -> function without arguments, of what is measured; and name -> reason of what cannot be."""
    import fusedops
    from fusedops._core import rows
    from fusedops._core.register import operators
    from fusedops.ops.rms_norm import _triton as rms

    x, weight = torch.randn(1, 4096), torch.randn(4096)
    up, out, tile = torch.randn(1, 4096), torch.empty_like(x), rows.default(4096)

    def launch(x, weight, out):
        rms._rms_norm_kernel[(1,)](
            x, None, weight, out, None, 4096, 0, 0, 0, 4096, 0, 0, 0, 1, 4096, 1, 1e-6, 0.0,
            HAS_RESIDUAL=False, HAS_WEIGHT=True, ROUND_FIRST=False, ONE_BLOCK=True,
            BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, num_warps=tile.num_warps,
        )  # fmt: skip

    @torch.library.custom_op("host_cost::rms_norm", mutates_args=())
    def custom(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(x)
        launch(x, weight, out)
        return out

    q, k, v = (torch.randn(1, length, heads, 128) for length, heads in ((1, 32), (100, 8), (100, 8)))
    short, long = _decoding(torch, 100), _decoding(torch, 1000)
    found = {
        UNIT: lambda: torch.empty_like(x),
        "rms_norm": lambda: fusedops.rms_norm(x, weight),
        GRID: lambda: launch(x, weight, out),
        "custom_op of rms_norm": lambda: custom(x, weight),
        "silu_mul": lambda: fusedops.silu_mul(x, up),
        "attention, 100 keys": lambda: fusedops.attention(q, k, v, causal=True),
        SHORT: lambda: fusedops.paged_attention(*short),
        LONG: lambda: fusedops.paged_attention(*long),
        "cuda.Kernel.launch, 16 arguments": _cuda_launch(torch),
    }
    found |= {name + LEVEL_0: found[name] for name in GOALS}
    found["rms_norm" + ALONE] = _launches(operators()["rms_norm"], fusedops.rms_norm, (x, weight))
    for name, tensors in ((SHORT, short), (LONG, long)):
        found[name + ALONE] = _launches(operators()["paged_attention"], fusedops.paged_attention, tensors)
    missing = {}
    for name, make in (("liger rms_norm", _liger), ("quack rms_norm", _quack)):
        try:
            found[name] = make(x, weight)
            found[name]()
        except Exception as error:  # a peer that is absent, or wants a true GPU, is left out and named
            found.pop(name, None)
            missing[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    return found, missing


def _decoding(torch, length):
    """The tensors of a step of decoding: eight sequences, 32 heads of 128, 8 of keys."""
    pages = -(-length // 16)
    caches = [torch.randn(8 * pages, 16, 8, 128) for _ in "kv"]
    table = torch.arange(8 * pages, dtype=torch.int32).view(8, pages)
    return torch.randn(8, 32, 128), *caches, table, torch.full((8,), length, dtype=torch.int32)


def _launches(operator, function, tensors):
    """What repeats the allocations and launches of a call, and looks at nothing."""
    for _ in range(2):
        function(*tensors)
    source = list(operator._plans.values())[-1]._replay.first
    repeat, others = source.compile("repeat"), [None] * (len(source.parameters) - len(tensors))
    return lambda: repeat(*tensors, *others)


def _cuda_launch(torch):
    """A launch of a kernel that is not Triton's, with the arguments of a sparse product."""
    from fusedops._core import cuda

    kernel = cuda.load("sparse_matmul", "fusedops_sparse_matmul_mma_bf16_128x128", "sm_100")  # of which PTX is shipped
    tensors, number = [torch.zeros(8) for _ in range(4)], ctypes.c_int32(1)
    arguments = *tensors, None, None, None, ctypes.c_int64(64), *[number] * 8
    device = torch.device("cuda", 0)
    return lambda: kernel.launch((64, 1, 1), (256, 1, 1), arguments, shared=100_000, device=device)


def _liger(x, weight):
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    return lambda: LigerRMSNormFunction.apply(x, weight, 1e-6, 0.0, "llama", False)


def _quack(x, weight):
    from quack import rmsnorm

    return lambda: rmsnorm(x, weight)


def medians(functions, rounds, count):
    """name -> (median, least, largest) seconds of this thread for one call, over alternating rounds."""
    from fusedops._core import env

    seconds = {name: [] for name in functions}
    for number in range(rounds):
        for name in list(functions)[:: -1 if number % 2 else 1]:
            function = functions[name]
            without = env.override("FUSEDOPS_VALIDATE", "0") if name.endswith(LEVEL_0) else contextlib.nullcontext()
            with without:
                for _ in range(4):  # compiled, watched, replayed, and recognised
                    function()
                start = time.thread_time()
                for _ in range(count):
                    function()
                seconds[name].append((time.thread_time() - start) / count)
    return {name: (statistics.median(values), min(values), max(values)) for name, values in seconds.items()}


def main():
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows to a file")
    parser.add_argument("--quick", action="store_true", help="few rounds, for a test")
    args = parser.parse_args()
    stub_gpu.restart()
    import torch

    torch.set_num_threads(1)
    with stub_gpu.in_place(), torch.no_grad():
        functions, missing = calls(torch)
        found = medians(functions, *((3, 20) if args.quick else (ROUNDS, CALLS)))
    print(f"{'':<48}{'us':>8}{'of ' + UNIT:>16}{'goal':>8}{'of kernel[grid]':>18}")
    for name, (seconds, _, _) in found.items():
        unit, grid = (seconds / found[other][0] for other in (UNIT, GRID))
        print(f"{name:<48}{seconds * 1e6:>8.2f}{unit:>16.2f}{GOALS.get(name, ''):>8}{grid:>18.2f}")
    for name, reason in missing.items():
        print(f"{name:<48}left out: {reason}")
    if args.json:
        where = environment("cpu")
        write(args.json, [
            {"op": name, "timed": "host", "seconds": seconds, "low": low, "high": high, "environment": where}
            for name, (seconds, low, high) in found.items()
        ])  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
