"""Every operator for arrays of other libraries: CuPy's, or whatever else speaks DLPack, in and out without a copy.

``fusedops.interop.rms_norm(x, weight)`` is `fusedops.rms_norm` for arrays. Results are arrays of the first argument's
library. On a GPU the operator runs on the stream that CuPy has as its current one, so what stands before and after it
in that stream is in order with it.
"""

import contextlib
import functools
import sys

import torch

import fusedops
from fusedops._core.register import operators

_CUDA = 2  # kDLCUDA, of DLDeviceType


def wrap(function):
    """`function` for arrays: every argument with ``__dlpack__`` becomes a tensor of the same memory, results go back.

    Args:
        function: Takes and returns tensors, alone, in tuples or in lists.

    Returns:
        A function of the same arguments. Tensors among them are left as they are; without any array, the results are
        tensors. Results that share the memory of an argument (operators in place) are arrays of that memory.

    Raises:
        TypeError: arguments are arrays of several libraries, or the library cannot hold a result, as NumPy and CuPy
            cannot hold bfloat16 or float8.
        ValueError: arrays lie on several devices.
    """

    @functools.wraps(function)
    def on_arrays(*args, **kwargs):
        arrays = [value for value in _leaves((args, tuple(kwargs.values()))) if _is_array(value)]
        if not arrays:
            return function(*args, **kwargs)
        library = _library(arrays, function.__name__)
        device = _device(arrays, function.__name__)
        with _stream(library, device):
            tensors = _mapped((args, kwargs), lambda value: torch.from_dlpack(value) if _is_array(value) else value)
            out = function(*tensors[0], **tensors[1])
            return _mapped(out, lambda value: _back(library, value, function.__name__))

    return on_arrays


@functools.cache
def __getattr__(name):
    if name not in _names():
        raise AttributeError(f"interop: name must be one of {', '.join(_names())}, got {name!r}")
    return wrap(getattr(fusedops, name))


def __dir__():
    return sorted([*globals(), *_names()])


def _names():
    """Public functions that are operators, those without kernels of ours too."""
    return sorted(name for name in operators() if hasattr(fusedops, name))


def _is_array(value):
    return hasattr(value, "__dlpack__") and not isinstance(value, torch.Tensor)


def _leaves(value):
    if isinstance(value, (tuple, list)):
        for inner in value:
            yield from _leaves(inner)
    else:
        yield value


def _mapped(value, change):
    if isinstance(value, dict):
        return {name: _mapped(inner, change) for name, inner in value.items()}
    if isinstance(value, (tuple, list)):
        changed = [_mapped(inner, change) for inner in value]
        return type(value)(*changed) if hasattr(value, "_fields") else type(value)(changed)
    return change(value)


def _library(arrays, name):
    """The package of the arrays, which must take DLPack."""
    found = sorted({_package_of(type(array)) for array in arrays})
    if len(found) != 1:
        raise TypeError(f"{name}: arrays must be of one library, got {' and '.join(found)}")
    library = sys.modules[found[0]]
    if not hasattr(library, "from_dlpack"):
        raise TypeError(f"{name}: the library of arrays must have from_dlpack, got {found[0]}")
    return library


def _package_of(kind):
    """The package that defines an array's type or what it derives from, and takes DLPack; else that of the type."""
    packages = [base.__module__.partition(".")[0] for base in kind.__mro__]
    return next((name for name in packages if hasattr(sys.modules.get(name), "from_dlpack")), packages[0])


def _device(arrays, name):
    devices = {tuple(map(int, array.__dlpack_device__())) for array in arrays}
    if len(devices) != 1:
        raise ValueError(f"{name}: arrays must lie on one device, got {sorted(devices)}")
    return devices.pop()


def _stream(library, device):
    """A block in which torch's current stream is that of the arrays' library."""
    kind, index = device
    if kind != _CUDA:
        return contextlib.nullcontext()
    stream = _current_stream(library)
    return torch.cuda.stream(torch.cuda.ExternalStream(stream, device=index)) if stream else _on_device(index)


@contextlib.contextmanager
def _on_device(index):
    """The default stream of CuPy is that of torch: CUDA's legacy one."""
    with torch.cuda.device(index), torch.cuda.stream(torch.cuda.default_stream(index)):
        yield


def _current_stream(library):
    """The address of the library's current stream; 0 for CUDA's default one, or where the library has no streams."""
    cuda = getattr(library, "cuda", None)
    stream = getattr(cuda, "get_current_stream", None)
    return int(stream().ptr) if stream is not None else 0


def _back(library, value, name):
    if not isinstance(value, torch.Tensor):
        return value
    try:
        return library.from_dlpack(value.detach())
    except (BufferError, RuntimeError, TypeError) as error:
        raise TypeError(f"{name}: {library.__name__} has no arrays of {value.dtype} ({error})") from error
