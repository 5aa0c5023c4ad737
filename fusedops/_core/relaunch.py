"""Launch a compiled kernel again without Triton's examination of its arguments, which may take longer than the call."""

import torch

from fusedops._core import replay
from fusedops._core.launch import ALIGNMENT

MAX_KEPT = 4096  # compiled kernels by the arguments they were first launched with


class Relauncher:
    """Launches one kernel. All that Triton compiles for is its key: dtypes, alignments, numbers, constants, device."""

    def __init__(self, kernel):
        self._kernel = kernel
        self._compiled = {}

    def __call__(self, grid, tensors, numbers, constants, num_warps, num_stages=1, **options):
        """Launch on (x, y, z) programs; tensors (or None), numbers and constants stand in the parameters' order."""
        described = [None if t is None else (t.dtype, t.data_ptr() % ALIGNMENT == 0) for t in tensors]
        fixed = (*numbers, *constants.values())
        key = (*described, *fixed, num_warps, num_stages, *options.values(), tensors[0].device)
        launch = self._compiled.get(key)
        if launch is None:
            launch = self._first(grid, tensors, numbers, constants, num_warps, num_stages, options)
            if launch is None:  # the interpreter compiles nothing
                return
            if len(self._compiled) >= MAX_KEPT:
                self._compiled.clear()
            self._compiled[key] = launch
        else:
            launch(grid, tensors, fixed)
        if replay.recording.launches is not None:
            replay.recording.launches.append((launch, grid, tensors, fixed))

    def _first(self, grid, tensors, numbers, constants, num_warps, num_stages, options):
        assert tuple(constants) == tuple(self._kernel.arg_names[-len(constants) :])
        compiled = self._kernel[grid](
            *tensors, *numbers, **constants, num_warps=num_warps, num_stages=num_stages, **options
        )
        return None if compiled is None else Launch(compiled, tensors[0].device.index)


class Launch:
    """Launches one compiled kernel.

    Attributes:
        compiled: Triton's own object.
        call, head, spread, passed: The C function behind it; what it wants between the stream and the kernel's
            arguments; whether these stand one by one; and the places of those that it is given, None for all. `call` is
            None for a release of Triton that is not known.
        device_index: The device whose current stream it is launched on.
    """

    __slots__ = ("call", "compiled", "device_index", "head", "hooks", "passed", "spread")

    def __init__(self, compiled, device_index):
        from triton import knobs  # known to be there: it has compiled a kernel

        self.compiled = compiled
        self.device_index = 0 if device_index is None else device_index
        self.hooks = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
        self.call, self.head, self.spread, self.passed = _c_function(compiled)

    def __call__(self, grid, tensors, fixed):
        """Launch on a grid, with tensors (or None) and the values behind them."""
        if self.call is None or self.hooked():
            self.compiled[grid](*tensors, *fixed)
            return
        # addresses, since of a tensor the C function asks its address by its name, and the driver where that lies
        args = (*[0 if t is None else t.data_ptr() for t in tensors], *fixed)
        if self.passed is not None:
            args = tuple([args[i] for i in self.passed])
        stream = current_stream(self.device_index)
        if self.spread:
            self.call(*grid, stream, *self.head, *args)
        else:
            self.call(*grid, stream, *self.head, args)

    def hooked(self):
        """Whether somebody wants to hear of each launch, such as a profiler."""
        return any(hook is not None and hook.calls for hook in self.hooks)


def current_stream(device_index):
    """The address of the current stream of a device."""
    return torch._C._cuda_getCurrentRawStream(device_index)


def _c_function(compiled):
    """(function, what stands between stream and arguments, whether these stand one by one, which of them are passed).

    (None, (), False, None) where they are not known.
    """
    run = getattr(compiled, "run", None)
    known = ("launch", "global_scratch_size", "profile_scratch_size", "launch_cooperative_grid", "launch_pdl")
    if not all(hasattr(run, name) for name in known) or run.global_scratch_size or run.profile_scratch_size:
        return None, (), False, None
    start = compiled.function, run.launch_cooperative_grid, run.launch_pdl
    nothing = (None, None, None)  # metadata of this launch, and the hooks that would be given it
    scratch = (None, None)
    if hasattr(run, "kernel_signature"):
        passed, annotations = _at_run_time(compiled, run.arg_annotations)
        head = *start, compiled.packed_metadata, *nothing, *scratch, annotations, run.kernel_signature
        return run.launch, head, False, passed
    return run.launch, (*start, *scratch, compiled.packed_metadata, *nothing), True, None


def _at_run_time(compiled, annotations):
    """Places and annotations of the arguments that the machine code has; all where an argument is made of several.

    The C function would look at the others, which are constants, and leave them out.
    """
    kinds = list(compiled.src.signature.values())
    is_plain = all(isinstance(kind, str) and not kind.startswith("tensordesc") for kind in kinds)
    if not is_plain or len(kinds) != len(annotations):
        return None, annotations
    passed = [place for place, kind in enumerate(kinds) if kind != "constexpr"]
    return passed, [annotations[place] for place in passed]
