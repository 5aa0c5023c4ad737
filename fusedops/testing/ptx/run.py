"""Launch a kernel on CPU tensors as its own GPU would run it, under one schedule or many."""

from __future__ import annotations

from pathlib import Path

import torch

from fusedops._core.binding import bind
from fusedops.testing.ptx.compiler import compile_kernel
from fusedops.testing.ptx.module import Fault, load, span
from fusedops.testing.ptx.schedules import named
from fusedops.testing.ptx.tensors import Parameters, aligned_memory, flatten


def run(kernel, grid, *arguments, target="sm_90a", schedules="all", checks="all", read_only=(), **keywords) -> None:
    """Run a kernel in place, compiled as for a GPU and executed instruction by instruction.

    ``kernel[grid](*arguments, **keywords)`` becomes ``ptx.run(kernel, grid, *arguments, **keywords)``. Under several
    schedules each starts from the same memory, and all must leave the same bits.

    Args:
        kernel: A ``@triton.jit`` or ``@gluon.jit`` function, or PTX: its text, or the path of a ``.ptx`` file.
        grid: One to three numbers, or for a jitted function a callable of its arguments by name.
        arguments: As in a launch: CPU tensors, numbers, tensor descriptors, tuples. Those of PTX are the kernel's
            parameters, as `Module.launch` takes them.
        target: Such as ``"sm_80"`` or ``"sm_90a"``; PTX is written for one.
        schedules: ``"all"``, the name of one in ``SCHEDULES``, a `Schedule`, or several of these.
        checks: ``"all"``, or names of checks in ``CHECKS``.
        read_only: Names (of a jitted function's parameters) or indices of arguments that must not be written.
        keywords: Compile-time parameters and options of a launch (``num_warps``, ``num_stages``, ``num_ctas``,
            ``maxnreg``). For PTX: ``kernel_name`` if there are several, ``block`` and ``cluster`` if the text does
            not say, ``shared`` for the bytes of dynamic shared memory.

    Raises:
        Fault: the kernel did something wrong, or schedules disagree; the message says what, where, who and when.
        CompileError: Triton refused the kernel.
        TypeError, ValueError: the call does not fit the kernel.
    """
    if _is_ptx(kernel):
        launch = _ptx_launch(kernel, grid, arguments, read_only, **keywords)
    else:
        launch = _triton_launch(kernel, grid, target, arguments, read_only, keywords)
    if launch is not None:
        _run_all(*launch, named(schedules), checks)


def _is_ptx(kernel) -> bool:
    return isinstance(kernel, (str, Path))


def _ptx_launch(kernel, grid, arguments, read_only, kernel_name=None, block=None, shared=0, cluster=None):
    text = str(kernel)
    module = load(text if ".entry" in text else Path(text).read_text())
    if kernel_name is None:
        if len(module.kernels) != 1:
            raise ValueError(f"ptx: kernel_name must be one of {', '.join(module.kernels)}")
        (kernel_name,) = module.kernels
    entry = module.kernels.get(kernel_name)
    if entry is None:
        raise ValueError(f"ptx: kernel_name must be one of {', '.join(module.kernels)}, got {kernel_name!r}")
    block = block or entry.required_threads
    if block is None:
        raise ValueError(f"ptx: block must be given, since the PTX of {kernel_name} does not say it")
    parameters = Parameters()
    for index, value in enumerate(arguments):
        name = entry.parameters[index].name if index < len(entry.parameters) else ""
        parameters.add(name, torch.from_numpy(value) if hasattr(value, "__array_interface__") else value, index)
    launch = {
        "kernel": kernel_name,
        "grid": _numbers(grid),
        "block": block,
        "cluster": cluster or entry.required_cluster or (1, 1, 1),
        "shared": shared,
        **parameters.launch(_indices(read_only, [one.name for one in entry.parameters])),
    }
    return module, launch, parameters.tensors()


def _triton_launch(kernel, grid, target, arguments, read_only, keywords):
    binding = bind(kernel, target, arguments, keywords)
    grid = _numbers(grid(binding.values) if callable(grid) else grid)
    if 0 in grid:
        return None
    compiled = compile_kernel(binding)
    module, metadata = load(compiled.ptx), compiled.metadata
    parameters = flatten(binding, metadata)
    blocks, ctas = grid[0] * grid[1] * grid[2], metadata["num_ctas"]
    for kind in ("global_scratch", "profile_scratch"):
        count = blocks * ctas * (metadata.get(f"{kind}_size") or 0)
        memory = aligned_memory(count, metadata.get(f"{kind}_align") or 1) if count else None
        parameters.add(kind, memory, -1)
    launch = {
        "kernel": metadata["name"],
        "grid": (grid[0] * ctas, grid[1], grid[2]),
        "block": module.kernels[metadata["name"]].required_threads,
        "cluster": (ctas, 1, 1),
        "shared": metadata["shared"],
        **parameters.launch(_indices(read_only, list(binding.signature))),
    }
    return module, launch, parameters.tensors()


def _numbers(grid) -> tuple[int, int, int]:
    grid = tuple(int(number) for number in ((grid,) if isinstance(grid, int) else grid))
    if not 1 <= len(grid) <= 3 or min(grid) < 0:
        raise ValueError(f"ptx: grid must be one to three numbers, got {grid}")
    return grid + (1,) * (3 - len(grid))


def _indices(chosen, names: list) -> set[int]:
    unknown = [one for one in chosen if isinstance(one, str) and one not in names]
    if unknown:
        raise ValueError(f"ptx: read_only must name parameters of the kernel, got {', '.join(unknown)}")
    return {names.index(one) if isinstance(one, str) else one for one in chosen}


def _run_all(module, launch: dict, tensors: list, schedules: dict, checks) -> None:
    """Run under every schedule from the same memory, and compare what they leave behind."""
    tensors = [(name, tensor, memory_of(tensor)) for name, tensor in tensors]
    before = [view.clone() for _, _, view in tensors] if len(schedules) > 1 else []
    first, results = None, []
    for name, schedule in schedules.items():
        for (_, _, view), saved in zip(tensors, before):
            view.copy_(saved)
        try:
            module.launch(**launch, schedule=schedule, checks=checks)
        except Fault as fault:
            raise Fault(f"{fault}\n  schedule: {name}") from None
        if first is None:
            first, results = name, [view.clone() for _, _, view in tensors] if before else []
            continue
        for (label, tensor, view), result in zip(tensors, results):
            if label not in ("global_scratch", "profile_scratch") and not torch.equal(view, result):
                raise Fault(_difference(launch["kernel"], label, tensor, result, first, name))


def memory_of(tensor: torch.Tensor) -> torch.Tensor:
    """All bytes that a tensor's view spans, those between its rows too."""
    if tensor.numel() == 0:
        return torch.empty(0, dtype=torch.uint8)
    begin, end = span(tensor)
    storage = tensor.untyped_storage()
    return torch.empty(0, dtype=torch.uint8).set_(storage, begin - storage.data_ptr(), (end - begin,))


def _difference(kernel: str, label: str, tensor: torch.Tensor, expected, first: str, name: str) -> str:
    """Say where a tensor differs from the bytes that another schedule left."""
    offset = int((memory_of(tensor) != expected).nonzero()[0])
    before = torch.empty(0, dtype=tensor.dtype).set_(expected.untyped_storage(), 0, tensor.shape, tensor.stride())
    different = (_bits(tensor) != _bits(before)).any(-1).nonzero()
    where = f"byte {offset} of {label}, which is no element of it"
    if len(different):
        index = tuple(different[0].tolist())
        where = (
            f"{label}[{', '.join(map(str, index))}] is {tensor[index].item()!r} and was {before[index].item()!r}"
            f" ({len(different)} elements differ)"
        )
    return f"{kernel}: the result depends on the order of events: {where}\n  schedules: {name}, before {first}"


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """Bytes of each element, in a new last dimension."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).reshape(*tensor.shape, tensor.element_size())
