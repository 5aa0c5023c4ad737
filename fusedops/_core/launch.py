"""How a launch is described without tensors."""

from dataclasses import dataclass

ALIGNMENT = 16  # bytes; Triton compiles for pointers that are multiples of it, or not


@dataclass(frozen=True)
class KernelExample:
    """One launch without tensors: enough to compile the kernel for any target.

    Attributes:
        kernel: The ``@triton.jit`` or ``@gluon.jit`` function.
        types: Run-time parameters in order, name to Triton type (``"*bf16"``, ``"i64"``, ``"fp32"``).
        constants: Compile-time parameters, and integers that Triton would specialise to 1.
        divisible: Run-time parameters that are multiples of 16.
        num_warps, num_stages: Launch options.
        max_registers: Launch option ``maxnreg``: registers of a thread, where the kernel shares them out itself.
        wide_access: The rows allow 16-byte global accesses, so the machine code must have them.
    """

    kernel: object
    types: dict
    constants: dict
    divisible: tuple = ()
    num_warps: int = 4
    num_stages: int = 1
    max_registers: int | None = None
    wide_access: bool = True
