"""Launch kernels, plainly and by Relauncher, and tell what became of it. Runs without Triton's interpreter.

Usage: python -m tests.data.jit_worker WIDTH allow|forbid ...    a width of 0 launches a kernel that is not ours
"""

import json
import sys

import torch
import triton
import triton.language as tl

import fusedops
from fusedops._core import env
from tests.data.stand_in_driver import standing_in


@triton.jit
def _foreign_kernel(out_ptr):
    tl.store(out_ptr, 1.0)


def launch(width):
    if width == 0:
        _foreign_kernel[(1,)](torch.ones(1))
        return
    fusedops.quantize_int8(torch.ones(2, width, dtype=torch.bfloat16))
    fusedops.quantize_int4(torch.ones(2, width, dtype=torch.bfloat16))


def attempt(width, jit):
    """What a launch compiles, finds, launches, or says."""
    with standing_in("sm_90a") as (launches, compiled, found), env.override("FUSEDOPS_JIT", jit):
        error = None
        try:
            launch(width)
        except RuntimeError as refused:
            error = str(refused)
        return {"launches": launches, "compiled": compiled, "found": found, "error": error}


if __name__ == "__main__":
    with env.override("FUSEDOPS_BACKEND", "triton"):
        print(json.dumps([attempt(int(width), jit) for width, jit in zip(sys.argv[1::2], sys.argv[2::2])]))
