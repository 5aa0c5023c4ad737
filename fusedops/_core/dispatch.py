"""Which implementation runs: the first that supports the call. Leaving the fused path on a GPU is never silent."""

import importlib
import warnings
from collections import defaultdict

import torch

from fusedops._core import cuda, emulation, env, invariance, jit
from fusedops._core.device import described, too_old, triton_rejection

_CPU_ORDER = ("torch", "reference")
_KERNELS = ("cuda", "triton")
any_autocast = torch._C._is_any_autocast_enabled
_calls = {}  # by (operator, implementation): a list of one number, added to where every tenth of a microsecond counts
_fallbacks = defaultdict(int)


class FallbackWarning(UserWarning):
    """A call on CUDA tensors left the fused path."""


def counters():
    """Calls since the last reset, by (operator, implementation)."""
    return {key: number for key, (number,) in _calls.items() if number}


def counter(op, implementation):
    """The list whose one number counts the calls of an operator by an implementation."""
    return _calls.setdefault((op, implementation), [0])


def fallbacks():
    """Calls on CUDA tensors that left the fused path since the last reset, by (operator, reason)."""
    return dict(_fallbacks)


def reset_counters():
    """Set both counters to zero; a reason that was warned about is warned about again."""
    for count in _calls.values():
        count[0] = 0
    _fallbacks.clear()


class Selector:
    """Finds the implementation for each call of one operator."""

    def __init__(self, name, package, implementations, fake, row_arguments=(), in_place=False):
        self.name = name
        self.row_arguments = row_arguments  # places of the arguments that torch's composition is to have row by row
        self.in_place = in_place
        self.package = package
        self.implementations = implementations
        self._kernels = [name for name in implementations if name in _KERNELS]
        self.fake = fake
        self.has_kernels = bool(self._kernels)
        self._loaded = {}

    def leaves_fused_path(self, implementation, tensor):
        """Whether an implementation that was not asked for by name takes a call that a kernel was meant to take."""
        on_gpu = self.has_kernels and tensor.device.type == "cuda"
        return on_gpu and implementation in _CPU_ORDER and env.backend() == "auto"

    def run(self, *args, out=None):
        """Run the operator by the implementation that `select` names."""
        return self.run_selected(args, out, *self.select(args))

    def run_selected(self, args, out, implementation, rejected):
        """Run the operator by what `select` gave, with the tensors' device as the current one."""
        device = args[0].device
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                return self._run(args, out, implementation, rejected)
        return self._run(args, out, implementation, rejected)

    def run_into(self, *args):
        """Run the operator with its last argument as the output; nothing is returned."""
        self.run(*args[:-1], out=args[-1])

    def _run(self, args, out, implementation, rejected):
        if self.leaves_fused_path(implementation, args[0]):
            reason = "; ".join(f"{name}: {why}" for name, why in rejected) or "no fused implementation exists"
            leave_fused_path(self.name, args[0], reason, implementation)
        counter(self.name, implementation)[0] += 1
        if implementation in _CPU_ORDER and any_autocast() and not args[0].is_meta:
            with torch.autocast(args[0].device.type, enabled=False):  # it would round products meant in float32
                return self._run_function(args, out, implementation)
        return self._run_function(args, out, implementation)

    def _run_function(self, args, out, implementation):
        function = self._load(implementation)[0]
        if invariance.enabled() and implementation in _CPU_ORDER:
            if implementation == "reference":
                invariance.refuse(self.name, "the reference makes rows together")
            if self.row_arguments and args[self.row_arguments[0]].numel():
                return self._run_row_by_row(function, args, out)
        if implementation == "reference":
            return self._run_reference(function, args, out)
        return function(*args) if out is None else function(*args, out=out)

    def _run_row_by_row(self, function, args, out):
        """torch's own operators compute a row in ways that depend on how many there are."""
        outputs, changed = invariance.row_by_row(function, self.row_arguments, args)
        if self.in_place:
            for place, rows in changed.items():
                args[place].copy_(rows.view(args[place].shape))
            return None
        places = self.fake(*args) if out is None else out
        if not isinstance(places, tuple):
            return places.copy_(outputs[0].view(places.shape))
        return tuple(place.copy_(rows.view(place.shape)) for place, rows in zip(places, outputs, strict=True))

    def _run_reference(self, function, args, out):
        """The reference says what the values are; where they go is `out`, or what the fake implementation promises."""
        values = function(*args)
        places = self.fake(*args) if out is None else out
        if isinstance(values, tuple):
            return tuple(place.copy_(value) for place, value in zip(places, values, strict=True))
        return None if values is None else places.copy_(values)

    def select(self, args, limits=None):
        """(implementation, rejected): the first that can run, and (name, reason) of each that was tried before it.

        Args:
            args: The operator's arguments.
            limits: Judge for this device instead of the arguments' own; nothing can be run then.

        Raises:
            RuntimeError: no implementation can run.
        """
        forced = env.backend()
        if not self.has_kernels and forced not in _CPU_ORDER:
            forced = "auto"  # to ask for kernels is to ask for those that there are
        on_gpu = limits is not None or args[0].device.type == "cuda"
        if forced != "auto":
            order = (forced,)
        else:
            order = self.implementations if on_gpu else _CPU_ORDER
        rejected = []
        for implementation in order:
            reason = self._rejection(implementation, args, limits)
            if reason is None:
                return implementation, rejected
            rejected.append((implementation, reason))
        reasons = "; ".join(f"{implementation}: {reason}" for implementation, reason in rejected)
        raise RuntimeError(f"{self.name}: no implementation can run here ({reasons})")

    def _rejection(self, implementation, args, limits):
        if implementation not in self.implementations and not (implementation == "emulate" and self._kernels):
            return "this operator has no such implementation"
        if implementation == "emulate" and limits is None:
            reason = emulation.rejection(args[0].device)
            if reason is not None:
                return reason
        if implementation in _KERNELS:
            rejection = triton_rejection if implementation == "triton" else cuda.rejection
            reason = rejection(args[0].device) if limits is None else too_old(limits)
            if reason is not None:
                return reason
        supports = self._load(implementation)[1]
        if supports is None:
            return None
        if limits is None:
            return supports(*args)
        with described(limits):
            return supports(*args)

    def entry(self, implementation):
        """The function of an implementation, and the list that counts its calls."""
        return self._load(implementation)[0], counter(self.name, implementation)

    def _load(self, implementation):
        """(function, supports) of an implementation, imported at its first use."""
        loaded = self._loaded.get(implementation)
        if loaded is None:
            if implementation == "emulate":
                loaded = emulation.emulated(self._run_first_kernel), self._kernels_rejection
            else:
                module = self.module(implementation)
                if implementation == "triton":
                    jit.watch()
                loaded = getattr(module, self.name), getattr(module, "supports", None)
            self._loaded[implementation] = loaded
        return loaded

    def _kernel_of(self, args):
        """(the first kind of kernel that supports a call or None, why the others before it do not)."""
        rejected = []
        for kind in self._kernels:
            supports = self._load(kind)[1]
            reason = None if supports is None else supports(*args)
            if reason is None:
                return kind, rejected
            rejected.append(reason if len(self._kernels) == 1 else f"{kind}: {reason}")
        return None, rejected

    def kernel_kind(self, args):
        """The first kind of kernel that supports a call, or None."""
        return self._kernel_of(args)[0]

    def _kernels_rejection(self, *args):
        kind, rejected = self._kernel_of(args)
        return None if kind is not None else "; ".join(rejected)

    def _run_first_kernel(self, *args, **kwargs):
        return self._load(self.kernel_kind(args))[0](*args, **kwargs)

    def module(self, implementation, args=None):
        """The module that holds an implementation; of an emulated one the kernels that would take a call, if given."""
        if implementation == "emulate":
            found = None if args is None else self.kernel_kind(args)
            implementation = found or self._kernels[-1]
        name = implementation if implementation == "reference" else f"_{implementation}"
        return importlib.import_module(f"{self.package}.{name}")


def leave_fused_path(op, tensor, reason, implementation="torch"):
    """Apply the fallback policy to a call that another implementation than a fused kernel will run.

    Raises:
        RuntimeError: the call is on CUDA tensors and the policy is "raise".
    """
    if tensor.device.type != "cuda" or torch.compiler.is_compiling():
        return
    key = (op, reason)
    seen = key in _fallbacks
    _fallbacks[key] += 1
    message = f"{op}: runs on the {implementation} implementation instead of a fused kernel ({reason})"
    apply_fallback_policy(message, seen, stacklevel=4)


def apply_fallback_policy(message, seen, stacklevel):
    """Do what FUSEDOPS_FALLBACK says: raise, warn where this was not seen before, or nothing.

    Raises:
        RuntimeError: the policy is "raise".
    """
    policy = env.fallback()
    if policy == "raise":
        raise RuntimeError(message)
    if policy == "warn" and not seen:
        warnings.warn(message, FallbackWarning, stacklevel=stacklevel)
