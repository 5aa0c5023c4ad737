"""Run compiled Triton and CUDA kernels (PTX) on the CPU: instruction by instruction, in many orders, with checks.

It works on anybody's kernel and needs no GPU and no driver, only a C++ compiler. `run` takes a Triton or Gluon function
or PTX, and CPU tensors; `diverted` makes ``kernel[grid](...)`` do the same wherever it stands in a block of code.
`load` and `Module.launch` are the level below.
"""

from fusedops.testing.ptx.build import missing
from fusedops.testing.ptx.compiler import CompileError
from fusedops.testing.ptx.launches import diverted
from fusedops.testing.ptx.module import CHECKS, Fault, Module, instructions, load
from fusedops.testing.ptx.run import run
from fusedops.testing.ptx.schedules import SCHEDULES, Schedule
from fusedops.testing.ptx.tensors import encode_tiled

__all__ = [
    "CHECKS",
    "CompileError",
    "Fault",
    "Module",
    "SCHEDULES",
    "Schedule",
    "diverted",
    "encode_tiled",
    "instructions",
    "load",
    "missing",
    "run",
]
