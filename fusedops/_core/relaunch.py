"""Launch a compiled kernel again without Triton's examination of its arguments, which may take longer than the call."""

ALIGNMENT = 16  # bytes; Triton compiles for pointers that are multiples of it, or not
MAX_KEPT = 4096  # compiled kernels by the arguments they were first launched with


class Relauncher:
    """Launches one kernel. All that Triton compiles for is its key: dtypes, alignments, numbers, constants, device."""

    def __init__(self, kernel):
        self._kernel = kernel
        self._compiled = {}

    def __call__(self, grid, tensors, numbers, constants, num_warps, num_stages=1):
        """Launch on (x, y, z) programs; tensors (or None), numbers and constants stand in the parameters' order."""
        described = [None if t is None else (t.dtype, t.data_ptr() % ALIGNMENT == 0) for t in tensors]
        key = (*described, *numbers, *constants.values(), num_warps, num_stages, tensors[0].device)
        compiled = self._compiled.get(key)
        if compiled is not None:
            compiled[grid](*tensors, *numbers, *constants.values())
            return
        assert tuple(constants) == tuple(self._kernel.arg_names[-len(constants) :])
        compiled = self._kernel[grid](*tensors, *numbers, **constants, num_warps=num_warps, num_stages=num_stages)
        if compiled is None:  # the interpreter compiles nothing
            return
        if len(self._compiled) >= MAX_KEPT:
            self._compiled.clear()
        self._compiled[key] = compiled
