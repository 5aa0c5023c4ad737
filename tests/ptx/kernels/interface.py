"""Kernels that show how arguments arrive."""

import triton
import triton.language as tl

OFFSET = tl.constexpr(3)


@triton.jit
def arguments_kernel(
    out_ptr, missing_ptr, one, big, flag, scale, half: tl.float16, double: tl.float64, text: tl.constexpr
):
    """Writes each argument as float64."""
    tl.store(out_ptr, 1.0 if missing_ptr is None else 0.0)
    tl.store(out_ptr + 1, one + 0.0)
    tl.store(out_ptr + 2, (big + tl.program_id(0)).to(tl.float64))
    tl.store(out_ptr + 3, flag.to(tl.float64))
    tl.store(out_ptr + 4, scale.to(tl.float64))
    tl.store(out_ptr + 5, half.to(tl.float64))
    tl.store(out_ptr + 6, double)
    tl.store(out_ptr + 7, 1.0 if text == "yes" else 0.0)


@triton.jit
def increment_kernel(x_ptr):
    """One more, in place."""
    x_ptr += tl.program_id(0)
    tl.store(x_ptr, tl.load(x_ptr) + 1)


@triton.jit
def ticket_kernel(counter_ptr, out_ptr):
    """Each program's turn, which the order of programs decides."""
    tl.store(out_ptr + tl.program_id(0), tl.atomic_add(counter_ptr, 1))


@triton.jit
def global_kernel(out_ptr):
    """A global value."""
    tl.store(out_ptr, OFFSET)


@triton.heuristics({"BLOCK": lambda args: triton.next_power_of_2(args["n"])})
@triton.jit
def heuristic_kernel(out_ptr, n, BLOCK: tl.constexpr):
    """The block that a heuristic chose."""
    tl.store(out_ptr, n * 0 + BLOCK)


@triton.jit
def refused_kernel(out_ptr):
    """Triton does not compile it."""
    tl.store(out_ptr, tl.arange(0, 3))


@triton.jit
def grid_kernel(out_ptr, EXTRA: tl.constexpr):
    """Where each program stands."""
    x, y, z = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    at = (z * tl.num_programs(1) + y) * tl.num_programs(0) + x
    tl.store(out_ptr + at, 100 * z + 10 * y + x + EXTRA)
