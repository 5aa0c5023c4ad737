"""What the kernels of a call are made of, for any GPU without having one.

The call is made on tensors without memory. Its launches are recorded, not made; compiled for the target; and read.
"""

import contextlib
import math
from dataclasses import asdict, dataclass

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fusedops._core import cubin, cuda, env, roofline, sass
from fusedops._core.binding import bind
from fusedops._core.cuda import machine_code
from fusedops._core.device import TARGETS, described
from fusedops._core.device import limits as limits_of
from fusedops._core.diversion import diverted
from fusedops._core.explain import differentiable
from fusedops._core.inspection_table import lines
from fusedops._core.launch import ALIGNMENT
from fusedops._core.numbers import ceil_div
from fusedops._core.occupancy import WARP, Occupancy, occupancy
from fusedops._core.register import operators
from fusedops._core.tuning import forced, observed

DEFAULT_TARGET = "sm_90a"  # where no GPU is at hand


@dataclass(frozen=True)
class Launch:
    """One launch as a launcher asked for it."""

    kernel: object
    grid: object
    arguments: tuple
    keywords: dict


@dataclass(frozen=True)
class KernelInspection:
    """One launch of a call, compiled.

    Attributes:
        kernel: The kernel's name.
        grid: Programs in x, y and z.
        report: What its machine code needs and contains.
        occupancy: What a multiprocessor of the target holds of it.
        origin: Where the machine code is from.
    """

    kernel: str
    grid: tuple
    report: cubin.CubinReport
    occupancy: Occupancy
    origin: str

    @property
    def programs(self):
        """Programs of the launch."""
        x, y, z = self.grid
        return x * y * z

    @property
    def main_loop(self):
        """The loop that does most, as in `sass.main_loop`."""
        return sass.main_loop(self.report.loops)

    def as_dict(self):
        """The same as plain data, for JSON."""
        return {
            "kernel": self.kernel, "grid": list(self.grid), "report": self.report.as_dict(),
            "main_loop": self.main_loop, "occupancy": self.occupancy.as_dict(), "origin": self.origin,
        }  # fmt: skip


@dataclass(frozen=True)
class Inspection:
    """The kernels of a call on a device.

    Attributes:
        op: Operator.
        device: The GPU's name.
        arch: Its architecture with suffix, such as ``"sm_90a"``.
        configs: The configuration of each operator that the call reaches, as text.
        kernels: A KernelInspection for each launch, in order.
        bytes: Bytes that the call must read and write at least; None where the operator does not say.
        operations: Arithmetic operations of the call.
        bound: roofline.Bound; None where bytes or the device's data sheet are not known.
        bound_missing: Why there is no bound, or None.
    """

    op: str
    device: str
    arch: str
    configs: tuple
    kernels: tuple
    bytes: int | None
    operations: int | None
    bound: roofline.Bound | None
    bound_missing: str | None

    @property
    def main(self):
        """The kernel that does most: of several the one that multiplies tiles most often, then loads most."""
        return main_kernel(self.kernels)

    def as_dict(self):
        """The same as plain data, for JSON."""
        plain = {name: value for name, value in asdict(self).items() if name not in ("kernels", "bound")}
        return plain | {
            "kernels": [kernel.as_dict() for kernel in self.kernels],
            "bound": None if self.bound is None else self.bound.as_dict(),
        }

    def __str__(self):
        return "\n".join(lines([self]))


def inspect(op, /, *args, target=None, backward=False, config=None, **kwargs):
    """Tell which kernels a call launches on a GPU and what they are made of. No GPU is needed, and nothing is run.

    Each launch is compiled for the target and its machine code read: registers, stack, spills, shared memory,
    instructions in all and in an iteration of the main loop, and how many programs a multiprocessor holds. What was
    compiled once is kept under the cache directory, by a hash of the sources. Of CUDA kernels the machine code is read
    that was shipped; else it is made of the PTX that was, or by nvcc.

    Args:
        op: Name of a public operator, such as ``"rms_norm"``.
        *args, **kwargs: The arguments of the call. Tensors on the ``meta`` device are enough.
        target: A named GPU (``"sm_80"``, ``"sm_90a"``, ...). None: the GPU at hand, without one ``"sm_90a"``.
        backward: Inspect what differentiating the call launches instead.
        config: Parameters of the kernel's configuration to take other values than the call would give them, by name,
            such as ``{"block_m": 64, "num_warps": 4}``.

    Returns:
        Inspection; ``print`` it for a table.

    Raises:
        ValueError: `op` or `target` is not a known name, the operator refuses the arguments, no kernel is launched, or
            `config` is none that the kernel takes and the device holds.
        NotImplementedError: `backward`, and the operator has no derivative.
        RuntimeError: triton was imported with TRITON_INTERPRET=1 and a kernel is Triton's; a kernel cannot be compiled.
    """
    import fusedops

    if op not in fusedops.OPERATORS:
        raise ValueError(f"inspect: op must be one of {', '.join(fusedops.OPERATORS)}, got {op!r}")
    device_limits = limits_named(target)
    calls = operator_calls(getattr(fusedops, op), args, kwargs, backward)
    with _configured(calls, device_limits, config):
        recorded = [record(operator, arguments, device_limits) for operator, arguments in calls]
        configs = tuple(config_of(operator, arguments, device_limits) for operator, arguments in calls)
    kernels = [_inspected(launch, device_limits) for launches in recorded for launch in launches]
    if not kernels:
        raise ValueError(f"inspect: {op} must launch a kernel, the call launches none (is a tensor empty?)")
    silent = [operator.name for operator, _ in calls if operator.cost is None]
    num_bytes = operations = bound = None
    missing = f"{', '.join(silent)} does not say what it moves" if silent else roofline.rejection(device_limits)
    if not silent:
        costs = [operator.cost(*arguments) for operator, arguments in calls]
        num_bytes, operations = (sum(column) for column in zip(*costs))
    if missing is None:
        main = main_kernel(kernels)
        bound = roofline.bound(device_limits, num_bytes, operations, main.report, main.programs, main.occupancy)
    return Inspection(
        op, device_limits.name, device_limits.arch, configs, tuple(kernels), num_bytes, operations, bound, missing
    )


def limits_named(target):
    """The limits of a named target, of the GPU at hand, or of DEFAULT_TARGET."""
    if target is None:
        return limits_of(torch.device("cuda")) if torch.cuda.is_available() else TARGETS[DEFAULT_TARGET]
    if target not in TARGETS:
        raise ValueError(f"inspect: target must be one of {', '.join(TARGETS)}, got {target!r}")
    return TARGETS[target]


class _Recorder(TorchDispatchMode):
    """Notes every operator of ours; on tensors without memory the fake implementations give the results."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fusedops":
            self.calls.append((func._opname, args))
        return func(*args, **(kwargs or {}))


def operator_calls(function, args, kwargs, backward=False):
    """(Operator, arguments) of every operator that a public call reaches, or that its derivative does."""
    args = [_without_memory(arg) for arg in args]
    kwargs = {name: _without_memory(arg) for name, arg in kwargs.items()}
    if backward:  # one is enough: a derivative computes all gradients at once
        args[0].requires_grad_()
    with torch.set_grad_enabled(backward), _Recorder() as recorder:
        outputs = function(*args, **kwargs)
        if backward:
            recorder.calls.clear()
            outputs = differentiable(function, outputs)
            torch.autograd.backward(outputs, [torch.empty_like(out) for out in outputs])
    registry = operators()
    return [(registry.get(name) or registry[name.removesuffix("_out")], found) for name, found in recorder.calls]


def _without_memory(arg):
    """A tensor like this one on the meta device: shape, strides, dtype, and whether its address is aligned."""
    if not isinstance(arg, torch.Tensor):
        return arg
    if arg.device.type != "meta":
        offset = arg.data_ptr() % ALIGNMENT // arg.element_size()
        reach = sum((size - 1) * stride for size, stride in zip(arg.shape, arg.stride()) if size)
        room = torch.empty(offset + reach + 1, dtype=arg.dtype, device="meta")
        arg = room.as_strided(arg.shape, arg.stride(), offset)
    return arg.detach()


_KINDS = {"cuda": "CUDA", "triton": "Triton"}


def record(operator, args, device_limits):
    """The launches that an operator makes on a device.

    Raises:
        ValueError: another implementation than kernels of ours runs there; the message has the reasons.
    """
    implementation, rejected = _implementation(operator, args, device_limits)
    if implementation not in _KINDS:
        reasons = "; ".join(f"{name}: {why}" for name, why in rejected) or f"FUSEDOPS_BACKEND={env.backend()}"
        kinds = " or ".join(_KINDS[name] for name in operator.implementations if name in _KINDS) or "own"
        raise ValueError(
            f"inspect: {operator.name} must run on its {kinds} kernels, on {device_limits.name} it runs on "
            f"{implementation} ({reasons})"
        )
    launches = []

    def note(kernel, grid, arguments, keywords):
        launches.append(Launch(kernel, grid, arguments, keywords))

    function = operator.launcher(implementation)
    with torch.no_grad(), described(device_limits), diverted(note):
        function(*args)
    return launches


def _implementation(operator, args, device_limits):
    """(what runs a call on a device, why not what is tried before it); of the emulator the kind of its kernels."""
    implementation, rejected = operator.select(args, device_limits)
    if implementation == "emulate":
        with described(device_limits):
            implementation = operator.kernel_kind(args)
    return implementation, rejected


def config_of(operator, args, device_limits):
    """An operator's name and the configuration of a call as text."""
    describe = getattr(operator.module(_implementation(operator, args, device_limits)[0]), "config", None)
    if describe is None or operator.example is None:  # of a derivative the launcher alone knows it
        return operator.name
    return f"{operator.name} {describe(operator.name, device_limits, *args)}"


def _configured(calls, device_limits, values):
    """A block in which the kernel of these calls that has such parameters takes these values."""
    if not values:
        return contextlib.nullcontext()
    with observed() as choices:
        for operator, arguments in calls:
            record(operator, arguments, device_limits)
    for choice in choices:
        if values.keys() <= choice.tunable.space.keys():
            tunable = choice.tunable
            whole = tunable.values(choice.config) | dict(values)
            config = tunable.from_values(whole, choice.fields, device_limits)
            if config is None:
                legal = "; ".join(f"{name} of {', '.join(map(str, of))}" for name, of in tunable.space.items())
                raise ValueError(
                    f"inspect: config must be one that {device_limits.name} holds and the kernel takes ({legal}), got "
                    f"{_as_text(whole)}"
                )
            return forced(tunable, config)
    known = "; ".join(dict.fromkeys(", ".join(choice.tunable.space) for choice in choices)) or "none for this call"
    raise ValueError(f"inspect: config must name parameters of the kernel ({known}), got {_as_text(values)}")


def _as_text(values):
    return ", ".join(f"{name}={value}" for name, value in values.items())


def _inspected(launch, device_limits):
    grid = launch.grid
    if isinstance(launch.kernel, cuda.Kernel):
        num_warps = ceil_div(math.prod(launch.keywords["block"]), WARP)
        found, origin = machine_code.report_of(launch.kernel, num_warps, launch.keywords["shared"])
    else:
        binding = bind(launch.kernel, device_limits.arch, launch.arguments, launch.keywords)
        grid = grid(binding.values) if callable(grid) else grid
        found = cubin.kept(binding.key(), lambda: cubin.read(cubin.compile_bound(binding)))
        origin = "compiled by Triton"
    held = occupancy(device_limits.capability, found.num_warps, found.registers, found.shared_bytes)
    return KernelInspection(found.kernel, (*grid, 1, 1)[:3], found, held, origin)


def main_kernel(kernels):
    """Of launches the one that multiplies tiles most often, then has most programs; of equals the first."""
    return max(kernels, key=lambda kernel: (sum(sass.matrix(kernel.report.instructions).values()), kernel.programs))
