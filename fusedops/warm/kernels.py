"""Which kernels calls launch on a GPU: each once, by all that Triton compiles for."""

from dataclasses import dataclass

import torch

from fusedops._core import cuda
from fusedops._core.binding import bind
from fusedops._core.inspection import record
from fusedops._core.launch import ALIGNMENT
from fusedops.warm import listing


@dataclass(frozen=True)
class Job:
    """A kernel to compile, as plain data for another process.

    Attributes:
        module, name: Where the kernel is.
        signature, constants, attributes, options, capability: As in `binding.Binding`.
    """

    module: str
    name: str
    signature: dict
    constants: dict
    attributes: dict
    options: object
    capability: int


@dataclass(frozen=True)
class CudaJob:
    """A CUDA source to compile for a target, unless its machine code was shipped."""

    source: str
    target: str

    @property
    def name(self):
        """As `listing` keeps it."""
        return f"{listing.CUDA}{self.source}.cu for {self.target}"


def of_calls(calls, device_limits):
    """(jobs, {operator: why it launches nothing}) of (operator, arguments) pairs."""
    jobs, seen, silent = {}, set(), {}
    for operator, args in calls:
        try:
            launches = record(operator, args, device_limits)
        except ValueError as error:  # another implementation takes this call
            silent.setdefault(operator.name, str(error))
            continue
        for launch in launches:
            if isinstance(launch.kernel, cuda.Kernel):
                job = CudaJob(launch.kernel.source, launch.kernel.target)
                jobs.setdefault(job, job)
                continue
            key = _specialised(launch)
            if key in seen:
                continue
            seen.add(key)
            binding = bind(launch.kernel, device_limits.arch, launch.arguments, launch.keywords)
            jobs.setdefault(binding.key(), _job(binding))
    return list(jobs.values()), silent


def _job(binding):
    return Job(
        binding.function.fn.__module__, binding.name, binding.signature, binding.constants, binding.attributes,
        binding.options, binding.capability,
    )  # fmt: skip


def _specialised(launch):
    """All that the machine code can follow from; never coarser than Triton's own rule, which takes longer."""
    constant = {launch.kernel.arg_names[index] for index in launch.kernel.constexprs}
    given = dict(zip(launch.kernel.arg_names, launch.arguments)) | launch.keywords
    return launch.kernel.fn, tuple(
        (name, repr(value) if name in constant else _class(value)) for name, value in sorted(given.items())
    )


def _class(value):
    if isinstance(value, torch.Tensor):
        return value.dtype, value.data_ptr() % ALIGNMENT == 0
    if type(value) is int:
        return value == 1, value % ALIGNMENT == 0, -(2**31) <= value < 2**31, value < 2**63
    return "float" if type(value) is float else repr(value)
