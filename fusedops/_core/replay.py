"""Run a call again by its launches alone.

What a call launches follows from what its plan is kept for: the types, shapes and strides of its tensors, and its other
arguments. The second call of a kind is watched; if all that it did was to allocate, to view and to launch, later ones
allocate and launch the same, without the Python between.
"""

import contextlib
import threading
from dataclasses import dataclass

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fusedops._core.launch import ALIGNMENT
from fusedops._core.numbers import ceil_div
from fusedops._core.source import GIVEN, Source

_EMPTY = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
_APART = 512  # bytes; parts of an allocation start where torch's allocator of CUDA memory would let them start
# what torch's own compiled code allocates with: half the time, on the current device, seen by no mode
_ALLOCATORS = {
    kind: getattr(getattr(torch._C._dynamo, "guards", None), f"_empty_strided_{kind}", None) for kind in ("cpu", "cuda")
}
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
    """(result of the call, Replay of it); None for the second where something stands against it."""
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
    """The Replay, or None where a pointer, an alignment or a result is not one that can be made again."""
    places = _Places(args, allocated)
    calls = []
    for launch, grid, tensors, fixed in launches:
        found = [None if tensor is None else places.find(tensor) for tensor in tensors]
        if launch.call is None or any(t is not None and f is None for t, f in zip(tensors, found)):
            return None
        calls.append((launch, grid, found, fixed))
    is_single = isinstance(result, torch.Tensor)
    results = [result] if is_single else list(result or ())
    indices = [next((i for i, made in enumerate(allocated) if _is_all_of(one, made)), None) for one in results]
    if not indices or None in indices or not all(places.aligned):
        return None
    whole = _Text(function, args, allocated, indices, places, calls)
    first = whole if is_single else _Text(function, args, allocated, indices[:1], places, calls)
    results = [f"t{index}" for index in indices]
    return Replay(whole.source(results[0] if is_single else f"({', '.join(results)},)"), first.source(results[0]))


@dataclass(frozen=True)
class Replay:
    """What replays a call.

    Attributes:
        whole: The Source of the function that gives what the call gives.
        first: The one of a function that gives the first of several results, and has let the others go.
    """

    whole: Source
    first: Source


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


class _Text:
    """The text of a replaying function: no loop and no lookup is left in it.

    `returned` are places in `allocated`. All other allocations are parts of one, which is gone when the function ends.
    """

    def __init__(self, function, args, allocated, returned, places, calls):
        self.names = {"function": function, "empty_like": torch.empty_like, "empty_strided": torch.empty_strided}
        self.num_parameters = len(args)
        self.lines = []
        self._inner = set()  # names of allocations in the common one
        self._guard(calls)
        self._allocate(args, allocated, set(returned))
        self._allocate_common({number: made for number, made in enumerate(allocated) if number not in returned}, places)
        self._point(places)
        self._launch(calls)

    def source(self, returned):
        """The function as a Source; `returned` is an expression."""
        return Source(self.num_parameters, [*self.lines, f"    return {returned}"], self.names)

    def _guard(self, calls):
        """Profilers hear of launches in the ordinary way; and torch fills memory where it was told to."""
        hooks = [hook for hook in calls[0][0].hooks if hook is not None]
        self.names |= {f"hook{number}": hook for number, hook in enumerate(hooks)}
        self.names |= {"is_deterministic": torch._C._get_deterministic_algorithms, "memory": torch.utils.deterministic}
        unusual = [f"hook{number}.calls" for number in range(len(hooks))]
        self._otherwise(" or ".join([*unusual, "is_deterministic() and memory.fill_uninitialized_memory"]))

    def _otherwise(self, condition):
        if condition:
            self.lines.append(f"    if {condition}: return function({GIVEN})")

    def _allocate(self, args, allocated, returned):
        for number in sorted(returned):
            made = allocated[number]
            like = next((f"a{i}" for i, arg in enumerate(args) if _makes(arg, made)), None)
            if like is not None and _ALLOCATORS.get(made.device.type) is None:
                self.lines.append(f"    t{number} = empty_like({like})")
            else:
                self._make(f"t{number}", tuple(made.shape), made.stride(), made.dtype, made.device)

    def _make(self, name, shape, strides, dtype, device):
        """The statement that allocates: on the current device, which is the tensors', by the shortest way there is."""
        self.names[f"dtype_{name}"] = dtype
        allocate = _ALLOCATORS.get(device.type)
        if allocate is None:
            self.names[f"device_{name}"] = device
            options = f"dtype=dtype_{name}, device=device_{name}"
            self.lines.append(f"    {name} = empty_strided({shape}, {strides}, {options})")
        else:
            self.names["allocate"] = allocate
            self.lines.append(f"    {name} = allocate({shape}, {strides}, dtype_{name})")

    def _allocate_common(self, allocated, places):
        """One allocation for all that is neither returned nor unused."""
        size, pointers = 0, []
        for number, made in allocated.items():
            if f"t{number}" in places.used:
                num_bytes = made.untyped_storage().nbytes()
                self._inner.add(f"t{number}")
                start = f"p_common + {size}" if size else "p_common"
                pointers.append(f"    p_t{number} = {start if num_bytes else 0}")
                size += ceil_div(num_bytes, _APART) * _APART
                device = made.device
        if size:
            self._make("common", (size,), (1,), torch.uint8, device)
            self.lines.append("    p_common = common.data_ptr()")
        self.lines += pointers

    def _point(self, places):
        own = [name for name in places.used if name not in self._inner]
        self.lines += [f"    p_{name} = {name}.data_ptr()" for name in own]
        given = [f"p_{name}" for name in own if name.startswith("a")]  # torch aligns what it allocates
        self._otherwise(f"({' | '.join(given)}) & {ALIGNMENT - 1}" if given else "")

    def _launch(self, calls):
        self.names["stream_of"] = torch._C._cuda_getCurrentRawStream
        self.lines.append(f"    stream = stream_of({calls[0][0].device_index})")
        for number, (launch, grid, found, fixed) in enumerate(calls):
            passed = range(len(found) + len(fixed)) if launch.passed is None else launch.passed
            pointers = [self._address(found[place]) for place in passed if place < len(found)]
            values = [fixed[place - len(found)] for place in passed if place >= len(found)]
            start = [*map(str, grid), "stream", *(self._named(f"h{number}_{i}", v) for i, v in enumerate(launch.head))]
            if launch.spread:
                rest = [*pointers, *(self._named(f"c{number}_{i}", value) for i, value in enumerate(values))]
            else:  # a tuple joined to another is made in half the time
                self.names[f"c{number}"] = tuple(values)
                rest = [f"({', '.join(pointers)},) + c{number}"]
            self.names[f"call{number}"] = launch.call
            self.lines.append(f"    call{number}({', '.join([*start, *rest])})")

    def _address(self, place):
        if place is None:
            return "0"
        name, offset = place
        return f"p_{name} + {offset}" if offset else f"p_{name}"

    def _named(self, name, value):
        """The text of a value: itself where that is exact, else the name under which the function finds it."""
        if value is None or type(value) in (bool, int):
            return repr(value)
        self.names[name] = value
        return name


def _is_all_of(one, made):
    """Whether a result is what was allocated, of which a mode may have seen another object."""
    return one.data_ptr() == made.data_ptr() and _same_layout(one, made)


def _makes(arg, made):
    """Whether ``empty_like(arg)`` makes it: dense, so that strides are kept."""
    return isinstance(arg, torch.Tensor) and arg.is_contiguous() and _same_layout(arg, made)


def _same_layout(one, other):
    return (one.dtype, one.shape, one.stride(), one.device) == (other.dtype, other.shape, other.stride(), other.device)
