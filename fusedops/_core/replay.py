"""Run a call again by its launches alone.

What a call launches follows from what its plan is kept for: the types, shapes and strides of its tensors, and its other
arguments. The second call of a kind is watched; if all that it did was to allocate, to view and to launch, later ones
allocate and launch the same, without the Python between.
"""

import contextlib
import threading

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fusedops._core.launch import ALIGNMENT

_EMPTY = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
_forgetters = []  # functions that drop replays
_held = 0  # blocks in which launches are not those of every day


def on_forget(forget):
    """Have a function called where calls may launch otherwise than they did."""
    _forgetters.append(forget)


def forget():
    """Drop every replay: what a call launches has changed."""
    for drop in _forgetters:
        drop()


@contextlib.contextmanager
def held():
    """For the length of a block replay nothing, in no thread: some configuration is on trial."""
    global _held
    with _lock:
        _held += 1
    forget()
    try:
        yield
    finally:
        with _lock:
            _held -= 1
        forget()


class _Recording(threading.local):
    launches = None  # a list of (launch, grid, tensors, fixed) while this thread watches a call


recording = _Recording()
_lock = threading.Lock()


class _Watch(TorchDispatchMode):
    """Keeps what was allocated; `reason` says what else torch did."""

    def __init__(self):
        super().__init__()
        self.allocated = []
        self.reason = None

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func._overloadpacket.__name__ in _EMPTY and func.namespace == "aten":
            self.allocated.append(result)
        elif not func.is_view:
            self.reason = self.reason or f"torch's {func} ran"
        return result


def record(function, args):
    """(result of the call, function that replays it); None for the second where something stands against it."""
    if _held:
        return function(*args), None
    from triton import knobs

    launched = []
    hook = launched.append
    knobs.runtime.launch_enter_hook.add(hook)
    recording.launches = launches = []
    try:
        with _Watch() as watch:
            result = function(*args)
    finally:
        recording.launches = None
        knobs.runtime.launch_enter_hook.remove(hook)
    if watch.reason is not None or not launches or len(launched) != len(launches):
        return result, None
    return result, _replay(function, args, watch.allocated, launches, result)


def _replay(function, args, allocated, launches, result):
    """The replaying function, or None where a pointer, an alignment or a result is not one that can be made again."""
    places = _Places(args, allocated)
    calls = []
    for launch, grid, tensors, fixed in launches:
        found = [None if tensor is None else places.find(tensor) for tensor in tensors]
        if launch.call is None or any(t is not None and f is None for t, f in zip(tensors, found)):
            return None
        calls.append((launch, grid, found, fixed))
    results = [result] if isinstance(result, torch.Tensor) else list(result or ())
    indices = [next((i for i, made in enumerate(allocated) if _is_all_of(one, made)), None) for one in results]
    if None in indices or not all(places.aligned):
        return None
    source = _Source(function, args, allocated, places, calls)
    return source.compile(indices, isinstance(result, torch.Tensor), result is None)


class _Places:
    """Where pointers lie: in which argument or allocation, and how many bytes behind its start."""

    def __init__(self, args, allocated):
        self.bases = [(f"a{i}", one) for i, one in enumerate(args) if isinstance(one, torch.Tensor)]
        self.bases += [(f"t{i}", one) for i, one in enumerate(allocated)]
        self.used = {}
        self.aligned = []

    def find(self, tensor):
        """(name of the base, bytes), or None."""
        candidates = [one for one in self.bases if one[1] is tensor]
        if not candidates:  # a view of a base
            storage = tensor.untyped_storage().data_ptr()
            candidates = [one for one in self.bases if one[1].untyped_storage().data_ptr() == storage]
        if len(candidates) != 1:  # two arguments that are one, or share memory, need not the next time
            return None
        name, base = candidates[0]
        self.used[name] = True
        self.aligned.append(tensor.data_ptr() % ALIGNMENT == base.data_ptr() % ALIGNMENT == 0)
        return name, tensor.data_ptr() - base.data_ptr()


class _Source:
    """The text of a replaying function: no loop and no lookup is left in it."""

    def __init__(self, function, args, allocated, places, calls):
        self.names = {"function": function, "empty_strided": torch.empty_strided, "empty_like": torch.empty_like}
        self.parameters = [f"a{i}" for i in range(len(args))]
        self.lines = []
        self._guard(calls)
        self._allocate(args, allocated)
        self._point(places)
        self._launch(calls)

    def _guard(self, calls):
        """Profilers hear of launches in the ordinary way."""
        hooks = [hook for hook in calls[0][0].hooks if hook is not None]
        self.names |= {f"hook{number}": hook for number, hook in enumerate(hooks)}
        self._otherwise(" or ".join(f"hook{number}.calls" for number in range(len(hooks))))

    def _otherwise(self, condition):
        if condition:
            self.lines.append(f"    if {condition}: return function({', '.join(self.parameters)})")

    def _allocate(self, args, allocated):
        for number, made in enumerate(allocated):
            like = next((f"a{i}" for i, arg in enumerate(args) if _makes(arg, made)), None)
            if like is not None:
                self.lines.append(f"    t{number} = empty_like({like})")
                continue
            self.names |= {f"dtype{number}": made.dtype, f"device{number}": made.device}
            self.lines.append(
                f"    t{number} = empty_strided({tuple(made.shape)}, {made.stride()}, "
                f"dtype=dtype{number}, device=device{number})"
            )

    def _point(self, places):
        pointers = [f"p_{name}" for name in places.used]
        self.lines += [f"    p_{name} = {name}.data_ptr()" for name in places.used]
        given = [pointer for pointer in pointers if pointer.startswith("p_a")]  # torch aligns what it allocates
        self._otherwise(f"({' | '.join(given)}) & {ALIGNMENT - 1}" if given else "")

    def _launch(self, calls):
        self.names["stream_of"] = torch._C._cuda_getCurrentRawStream
        self.lines.append(f"    stream = stream_of({calls[0][0].device_index})")
        for number, (launch, grid, found, fixed) in enumerate(calls):
            pointers = [_address(*place) if place is not None else "0" for place in found]
            args = [*pointers, *(self._named(f"c{number}_{i}", value) for i, value in enumerate(fixed))]
            start = [*map(str, grid), "stream", *(self._named(f"h{number}_{i}", v) for i, v in enumerate(launch.head))]
            rest = args if launch.spread else [f"({', '.join(args)},)"]
            self.names[f"call{number}"] = launch.call
            self.lines.append(f"    call{number}({', '.join([*start, *rest])})")

    def _named(self, name, value):
        """The text of a value: itself where that is exact, else the name under which the function finds it."""
        if value is None or type(value) in (bool, int):
            return repr(value)
        self.names[name] = value
        return name

    def compile(self, indices, single, nothing):
        """The function."""
        made = ", ".join(f"t{index}" for index in indices)
        self.lines.append("    return " + ("None" if nothing else made if single else f"({made},)"))
        text = "\n".join([f"def replay({', '.join(self.parameters)}):", *self.lines])
        exec(text, self.names)  # as dataclasses and named tuples are made
        return self.names["replay"]


def _address(name, offset):
    return f"p_{name} + {offset}" if offset else f"p_{name}"


def _is_all_of(one, made):
    """Whether a result is what was allocated, of which a mode may have seen another object."""
    return one.data_ptr() == made.data_ptr() and _same_layout(one, made)


def _makes(arg, made):
    """Whether ``empty_like(arg)`` makes it: dense, so that strides are kept."""
    return isinstance(arg, torch.Tensor) and arg.is_contiguous() and _same_layout(arg, made)


def _same_layout(one, other):
    return (one.dtype, one.shape, one.stride(), one.device) == (other.dtype, other.shape, other.stride(), other.device)
