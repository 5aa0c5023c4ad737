"""What a call would do, found by making the call and stopping it at the operator's door."""

import importlib
from contextlib import nullcontext
from dataclasses import asdict, dataclass

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fusedops._core import env
from fusedops._core.device import TARGETS, described
from fusedops._core.device import limits as limits_of
from fusedops._core.register import operators
from fusedops._core.tuning import DEFAULT, observed


@dataclass(frozen=True)
class Explanation:
    """What would run and why.

    Attributes:
        op: Operator.
        backend: Implementation that would run.
        rejected: (implementation, reason) of every one that was tried before it.
        config: The kernel's configuration as text; None where the implementation has none.
        config_source: Where the configuration came from.
        config_key: What a tuned one holds for, by kernel; None where nothing of the configuration can be tuned.
        bytes: Bytes that the call must read and write at least.
        operations: Arithmetic operations of the call.
        bound: The least time that the device's memory allows, as text; None where the bandwidth is not known.
        notes: (name, text) of what else the operator tells of the call.
    """

    op: str
    backend: str
    rejected: tuple
    config: str | None
    config_source: str | None
    config_key: dict | None
    bytes: int | None
    operations: int | None
    bound: str | None
    notes: tuple = ()

    def as_dict(self):
        """The same as plain data, for JSON."""
        return asdict(self)

    def __str__(self):
        lines = [("operator", self.op), ("runs on", self.backend)]
        lines += [("rejected", f"{name}: {reason}") for name, reason in self.rejected]
        if self.config is not None:
            lines.append(("configuration", f"{self.config} ({self.config_source})"))
        for kernel, key in (self.config_key or {}).items():
            lines.append(("key", f"{kernel}: " + " ".join(f"{name}={value}" for name, value in key.items())))
        if self.bytes is not None:
            lines.append(("bytes", f"{self.bytes:,}"))
            lines.append(("operations", f"{self.operations:,}"))
        if self.bound is not None:
            lines.append(("bound", self.bound))
        lines += self.notes
        return "\n".join(f"{name:<14}{value}" for name, value in lines)


class _Reached(Exception):
    def __init__(self, name, args):
        super().__init__(name)
        self.name = name
        self.arguments = args


class _StopAtOperator(TorchDispatchMode):
    """Lets torch's own operators through and stops at the first of ours."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fusedops":
            raise _Reached(func._opname, args)
        return func(*args, **(kwargs or {}))


def explain(op, /, *args, target=None, **kwargs):
    """Tell which implementation a call would use, why not another, and what the call costs at least.

    Nothing is run. Tensors on the ``meta`` device are enough when `target` is given.

    Args:
        op: Name of a public operator, such as ``"rms_norm"``.
        *args, **kwargs: The arguments of the call.
        target: Judge for a named GPU target (``"sm_80"``, ``"sm_90a"``, ...) instead of the tensors' device.

    Returns:
        Explanation; ``print`` it for a table.

    Raises:
        ValueError: `op` or `target` is not a known name, or the operator refuses the arguments.
        RuntimeError: no implementation can run the call.
    """
    import fusedops

    public = sorted(name for name in operators() if hasattr(fusedops, name))
    if op not in public:
        raise ValueError(f"explain: op must be one of {', '.join(public)}, got {op!r}")
    if target is not None and target not in TARGETS:
        raise ValueError(f"explain: target must be one of {', '.join(TARGETS)}, got {target!r}")
    return _explanation(op, *operator_call(getattr(fusedops, op), *args, **kwargs), TARGETS.get(target))


def operator_call(function, *args, **kwargs):
    """The registered Operator that a public call reaches, and the arguments it would get. Nothing is run.

    Raises:
        RuntimeError: the call ends without reaching an operator of ours.
    """
    try:
        with torch.no_grad(), _StopAtOperator():
            function(*args, **kwargs)
    except _Reached as reached:
        registry = operators()
        return registry.get(reached.name) or registry[reached.name.removesuffix("_out")], reached.arguments
    raise RuntimeError(f"explain: {function.__name__} must call an operator of fusedops, the call ended without one")


def derivative_call(function, *args, **kwargs):
    """The registered Operator that differentiating a public call reaches, and its arguments. The call itself is made.

    Raises:
        NotImplementedError: the result has no derivative.
    """
    args = [arg.detach() if isinstance(arg, torch.Tensor) else arg for arg in args]
    args[0].requires_grad_()  # one is enough: a derivative computes all gradients at once
    with torch.enable_grad():
        outputs = differentiable(function, function(*args, **kwargs))
    try:
        with _StopAtOperator():
            torch.autograd.backward(outputs, [torch.randn_like(out) for out in outputs])
    except _Reached as reached:
        return operators()[reached.name], reached.arguments
    raise RuntimeError(f"explain: {function.__name__} must call an operator of fusedops when it is differentiated")


def differentiable(function, outputs):
    """Those of a call's results that have a derivative. NotImplementedError: there are none."""
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    found = [out for out in outputs if isinstance(out, torch.Tensor) and out.requires_grad]
    if not found:
        raise NotImplementedError(f"{function.__name__}: the result has no derivative")
    return found


def _explanation(op, operator, args, limits):
    backend, rejected = operator.select(args, limits)
    config = source = key = None
    describe = getattr(operator.module(backend, args), "config", None)
    device_limits = limits or limits_of(args[0].device)
    if describe is not None:
        with observed() as choices:
            config = str(describe(operator.name, device_limits, *args))
        source = "; ".join(dict.fromkeys(choice.source for choice in choices)) or DEFAULT
        key = {choice.tunable.name: {**choice.key["sizes"], **choice.key["flags"]} for choice in choices} or None
    num_bytes, operations = operator.cost(*args) if operator.cost is not None else (None, None)
    bound = None
    if num_bytes is not None and (limits is not None or args[0].device.type == "cuda") and device_limits.bandwidth:
        micros = num_bytes / device_limits.bandwidth * 1e6
        speed = f"{device_limits.bandwidth / 1e12:.2f} TB/s"
        bound = f"memory, {micros:.2f} us at {speed} ({device_limits.name}, data sheet)"
    if env.backend() != "auto":
        target = f" for {device_limits.arch}" if backend == "emulate" else ""
        rejected = [*rejected, ("others", f"FUSEDOPS_BACKEND={env.backend()}{target}")]
    tell = getattr(importlib.import_module(operator.package), "notes", None)
    with nullcontext() if limits is None else described(limits):
        notes = () if tell is None else tell(*args)
    return Explanation(op, backend, tuple(rejected), config, source, key, num_bytes, operations, bound, notes)
