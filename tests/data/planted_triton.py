"""Kernels with planted faults of code generation, in the form of an operator's ``_triton.py``."""

import triton
import triton.language as tl

from fusedops._core.launch import KernelExample


@triton.jit
def _good_kernel(x_ptr, out_ptr, N, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + offs, tl.load(x_ptr + offs, mask=offs < N), mask=offs < N)


@triton.jit
def _scalar_access_kernel(x_ptr, out_ptr, N, BLOCK: tl.constexpr):
    """Misses the 16-byte accesses because nothing says that N is a multiple of 16."""
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + offs, tl.load(x_ptr + offs, mask=offs < N), mask=offs < N)


@triton.jit
def _spilling_kernel(x_ptr, out_ptr, N, BLOCK: tl.constexpr):
    """Carries more sums through a loop than a warp has registers."""
    offs = tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, N, BLOCK):
        acc = acc * 1.5 + tl.load(x_ptr + start + offs).to(tl.float32)
    tl.store(out_ptr + offs, acc.to(out_ptr.dtype.element_ty))


@triton.jit
def _broken_kernel(x_ptr, out_ptr, N, BLOCK: tl.constexpr):
    """Does not compile: a block's length must be a power of two."""
    offs = tl.arange(0, BLOCK)
    tl.store(out_ptr + offs, tl.load(x_ptr + offs))


@triton.jit
def _forgotten_kernel(x_ptr, out_ptr, N, BLOCK: tl.constexpr):
    """Has no example."""
    offs = tl.arange(0, BLOCK)
    tl.store(out_ptr + offs, tl.load(x_ptr + offs))


def examples(dtype, target):
    """One example per fault, and one without."""
    types = {"x_ptr": f"*{dtype}", "out_ptr": f"*{dtype}", "N": "i32"}
    return [
        KernelExample(_good_kernel, types, {"BLOCK": 1024}, divisible=("x_ptr", "out_ptr", "N")),
        KernelExample(_scalar_access_kernel, types, {"BLOCK": 1024}, divisible=("x_ptr", "out_ptr")),
        KernelExample(_spilling_kernel, types, {"BLOCK": 8192}, divisible=("x_ptr", "out_ptr", "N"), num_warps=1),
        KernelExample(_broken_kernel, types, {"BLOCK": 1000}, divisible=("x_ptr", "out_ptr")),
    ]
