"""Call operators again and again on a stub driver; print whether later calls launched what an ordinary one does.

One JSON line per operator: the third call is found in the dictionary of plans, the fourth is recognised before it.
Pointers are compared by what they point to: an argument, or memory of the call's own.
"""

import json
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parents[2] / "benchmarks")]

from host import stub_gpu  # noqa: E402 - found by the line above

stub_gpu.restart()

import torch  # noqa: E402 - in the process that has the stub

import fusedops  # noqa: E402
from fusedops._core import relaunch  # noqa: E402
from fusedops._core.register import operators  # noqa: E402

seen = []


def tapped(compiled, original=relaunch._c_function):
    """Triton's C function with a listener before it."""
    call, head, spread, passed = original(compiled)

    def launch(*given):
        seen.append((given[: 4 + len(head)], given[4 + len(head) :] if spread else given[-1]))
        return call(*given)

    return launch, head, spread, passed


def described(tensors):
    """The launches that were seen, with pointers to arguments by name; forgets them."""
    starts = {tensor.data_ptr(): number for number, tensor in enumerate(tensors)}
    found = []
    for head, args in seen:
        named = [f"argument {starts[a]}" if type(a) is int and a in starts else a for a in args]
        found.append((repr(head), ["memory" if type(a) is int and a > 1 << 40 else a for a in named]))
    seen.clear()
    return found


def calls():
    """(operator, function, tensors)."""
    x, residual, weight = torch.randn(5, 256), torch.randn(5, 256), torch.randn(256)
    q, k, v = (torch.randn(2, length, heads, 64) for length, heads in ((3, 4), (40, 2), (40, 2)))
    k3, cos, sin = torch.randn(2, 3, 2, 64), torch.randn(1, 3, 64), torch.randn(1, 3, 64)
    caches, table = [torch.randn(12, 16, 2, 64) for _ in "kv"], torch.arange(12, dtype=torch.int32).view(2, 6)
    lengths, one = torch.tensor([40, 90], dtype=torch.int32), torch.randn(2, 4, 64)
    a, b = (torch.randint(-9, 9, (rows, 256), dtype=torch.int8) for rows in (5, 64))
    scales = torch.ones(5), torch.ones(64)
    yield "rms_norm", lambda: fusedops.rms_norm(x, weight), (x, weight)
    yield "add_rms_norm", lambda: fusedops.add_rms_norm(x, residual, weight), (x, residual, weight)
    yield "rms_norm_quantized", lambda: fusedops.rms_norm_quantized(x, weight), (x, weight)
    yield "silu_mul", lambda: fusedops.silu_mul(x, residual), (x, residual)
    yield "rotary", lambda: fusedops.rotary(q, k3, cos, sin), (q, k3, cos, sin)
    yield "attention", lambda: fusedops.attention(q, k, v, causal=True), (q, k, v)
    yield "paged_attention", lambda: fusedops.paged_attention(one, *caches, table, lengths), (one, *caches, table)
    long, lengths_long = table.repeat(1, 8), lengths * 8
    yield "paged_attention", lambda: fusedops.paged_attention(one, *caches, long, lengths_long), (one, *caches, long)
    yield (
        "paged_attention",
        lambda: fusedops.paged_attention(one, *caches, long, lengths_long, return_lse=True),
        (one, *caches, long),
    )
    yield "int8_matmul", lambda: fusedops.int8_matmul(a, b, *scales, out_dtype=torch.float32), (a, b, *scales)
    yield "weight_only_matmul", lambda: fusedops.weight_only_matmul(x, b, scales[1]), (x, b)


with stub_gpu.in_place(), torch.no_grad():
    relaunch._c_function = tapped
    for op, function, tensors in calls():
        function()  # compiles
        function()  # is watched
        seen.clear()
        found = []
        for _ in range(2):
            function()
            found.append(described(tensors))
        operator = operators()[op]
        replayed = any(plan.run.__name__ == "replay" for plan in operator._plans.values())
        operator._recall = None  # would raise
        recognised = bool(function() is not None and described(tensors) == found[1])
        del operator._recall
        operator._forget()
        function()
        ordinary = described(tensors)
        same = found == [ordinary, ordinary] and ordinary != []
        print(json.dumps({"op": op, "same": same, "replayed": replayed, "recognised": recognised}), flush=True)
