"""Checks of public arguments: one shape specification instead of hand-written comparisons.

Every message reads `<op>: <argument> must <rule>, got <value>`. Nothing is allocated before all have passed.
"""

import torch

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")  # of a matmul's result


def bind_shapes(op, **tensors):
    """Check tensors against shape specifications that share names, and return the sizes bound to the names.

    Args:
        op: Operator name for the messages.
        **tensors: ``name=(tensor, spec)``. A spec is names and integers parted by spaces, such as ``"B Sq H D"``;
            a leading ``...`` stands for any number of dimensions, the same ones wherever it appears; with a ``?`` at
            the end the tensor may be None.

    Returns:
        dict from each name (and ``"..."``, if used) to its size (a tuple for ``"..."``).

    Raises:
        TypeError: an argument is not a tensor.
        ValueError: a shape does not fit, or a tensor is on another device than the first.
    """
    sizes = {}
    device = None
    for name, (tensor, spec) in tensors.items():
        if spec[-1] == "?":
            if tensor is None:
                continue
            spec = spec[:-1]
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{op}: {name} must be a torch.Tensor, got {type(tensor).__name__}")
        if device is None:
            device = tensor.device
        elif tensor.device != device:
            raise ValueError(f"{op}: {name} must be on {device}, got {tensor.device}")
        if not _fits(tensor.shape, spec.split(), sizes):
            raise ValueError(_shape_message(op, name, tensor, spec, sizes))
    return sizes


def _fits(shape, dims, sizes):
    """Whether shape fits dims, given and extending the sizes already bound."""
    if dims[0] == "...":
        dims = dims[1:]
        lead = len(shape) - len(dims)
        if lead < 0 or sizes.setdefault("...", shape[:lead]) != shape[:lead]:
            return False
        shape = shape[lead:]
    if len(shape) != len(dims):
        return False
    fresh = {}
    for size, dim in zip(shape, dims):
        bound = int(dim) if dim.isdigit() else sizes.get(dim, fresh.setdefault(dim, size))
        if bound != size:
            return False
    for dim in fresh:
        sizes.setdefault(dim, fresh[dim])
    return True


def _shape_message(op, name, tensor, spec, sizes):
    dims = spec.split()
    known = [f"{d}={list(sizes[d]) if d == '...' else sizes[d]}" for d in dict.fromkeys(dims) if d in sizes]
    where = f" with {', '.join(known)}" if known else ""
    return f"{op}: {name} must have shape [{', '.join(dims)}]{where}, got {list(tensor.shape)}"


def check_float(op, **tensors):
    """Raise TypeError where a tensor is not float16, bfloat16 or float32, or differs from the first in dtype."""
    first = None
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if first is None:
            first = tensor.dtype
            if first not in FLOATS:
                raise TypeError(f"{op}: {name} must be float16, bfloat16 or float32, got {_dtype(first)}")
        elif tensor.dtype != first:
            raise TypeError(f"{op}: {name} must be {_dtype(first)}, got {_dtype(tensor.dtype)}")


def check_parameter(op, x, **tensors):
    """Raise TypeError where a parameter is neither of x's dtype nor float32 (kept wide beside 16-bit data)."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype != x.dtype and tensor.dtype != torch.float32:
            wide = "" if x.dtype == torch.float32 else " or float32"
            raise TypeError(f"{op}: {name} must be {_dtype(x.dtype)}{wide}, got {_dtype(tensor.dtype)}")


def check_rows(op, **tensors):
    """Raise ValueError where the last dimension of a tensor is not contiguous."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            raise ValueError(
                f"{op}: {name} must have a contiguous last dimension (stride 1), got strides {list(tensor.stride())}"
            )


def check_out(op, out, like, **inputs):
    """Check an `out` argument: shape, dtype and device of `like`, and either an input itself or memory of its own.

    `out` may be exactly one of the inputs (same memory, same strides); a partial overlap raises ValueError.
    """
    if not isinstance(out, torch.Tensor):
        raise TypeError(f"{op}: out must be a torch.Tensor, got {type(out).__name__}")
    if out.dtype != like.dtype:
        raise TypeError(f"{op}: out must be {_dtype(like.dtype)}, got {_dtype(out.dtype)}")
    if out.shape != like.shape:
        raise ValueError(f"{op}: out must have shape {list(like.shape)}, got {list(out.shape)}")
    if out.device != like.device:
        raise ValueError(f"{op}: out must be on {like.device}, got {out.device}")
    check_rows(op, out=out)
    if torch.compiler.is_compiling():
        return
    check_writable(op, out=out)
    for name, tensor in inputs.items():
        if tensor is not None and overlaps(out, tensor) and not same_memory(out, tensor):
            raise ValueError(f"{op}: out must be {name} itself or memory of its own, got a partial overlap with {name}")


def check_writable(op, **tensors):
    """Raise ValueError where two elements of a tensor that will be written share one address (an expanded view)."""
    if torch.compiler.is_compiling():
        return
    for name, tensor in tensors.items():
        if tensor.is_contiguous() or tensor.numel() == 0:
            continue
        reach = 1
        for stride, size in sorted((s, n) for s, n in zip(tensor.stride(), tensor.shape) if n > 1):
            if stride < reach:
                raise ValueError(
                    f"{op}: {name} must not overlap itself, got shape {list(tensor.shape)} "
                    f"with strides {list(tensor.stride())}"
                )
            reach = stride * (size - 1) + reach


def check_apart(op, **tensors):
    """Raise ValueError where two of the tensors share memory."""
    if torch.compiler.is_compiling():
        return
    items = [(name, tensor) for name, tensor in tensors.items() if tensor is not None]
    for i, (name, tensor) in enumerate(items):
        for other, against in items[i + 1 :]:
            if overlaps(tensor, against):
                raise ValueError(f"{op}: {name} must not share memory with {other}, got overlapping tensors")


def check_no_grad(op, **tensors):
    """Raise RuntimeError where gradients are recorded for a tensor of an operator that works in place."""
    if torch.is_grad_enabled():
        for name, tensor in tensors.items():
            if tensor is not None and tensor.requires_grad:
                raise RuntimeError(f"{op}: {name} must not require a gradient: it is changed in place")


def same_memory(a, b):
    """Whether two tensors are the same elements at the same addresses in the same order."""
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride() and a.dtype == b.dtype


def overlaps(a, b):
    """Whether two tensors may share an address; exact for views with equal strides, such as halves of packed rows."""
    if a.numel() == 0 or b.numel() == 0 or a.device != b.device or a.is_meta:
        return False
    (a_low, a_high), (b_low, b_high) = _span(a), _span(b)
    if not (a_low < b_high and b_low < a_high):
        return False
    return not _interleaved(a, b)


def _interleaved(a, b):
    """Whether equal strides keep two row-wise tensors in separate columns of one buffer."""
    if a.stride() != b.stride() or a.element_size() != b.element_size() or a.stride(-1) != 1:
        return False
    outer = [stride for stride, size in zip(a.stride()[:-1], a.shape[:-1]) if size > 1]
    pitch = min(outer, default=0)
    if pitch == 0 or any(stride % pitch for stride in outer):
        return False
    distance, rest = divmod(abs(a.data_ptr() - b.data_ptr()), a.element_size())
    first, second = (a, b) if a.data_ptr() <= b.data_ptr() else (b, a)
    gap = distance % pitch
    return rest == 0 and first.shape[-1] <= gap and gap + second.shape[-1] <= pitch


def _span(tensor):
    """First and past-the-last byte address that a tensor can touch."""
    reach = sum(stride * (size - 1) for stride, size in zip(tensor.stride(), tensor.shape))
    low = tensor.data_ptr()
    return low, low + (reach + 1) * tensor.element_size()


def check_choice(op, name, value, choices):
    """Raise ValueError where a string argument is not one of the choices."""
    if value not in choices:
        raise ValueError(f"{op}: {name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_activation(op, activation):
    """Raise ValueError where the activation of a matmul's result is neither None nor one of ACTIVATIONS."""
    check_choice(op, "activation", activation, (None, *ACTIVATIONS))


def check_gated(op, gated, activation, size, residual):
    """Raise where a matmul's weight of `size` rows is no pairs of gate and up, though `gated` says so.

    That takes an activation, and a residual of half as many columns.
    """
    if not isinstance(gated, bool):
        raise TypeError(f"{op}: gated must be a bool, got {type(gated).__name__}")
    if not gated:
        return
    if activation is None:
        check_choice(op, "activation of gated pairs", activation, ACTIVATIONS)
    if size % 2:
        raise ValueError(f"{op}: N must be even where gated=True, got {size}")
    if residual is not None and 2 * residual.shape[-1] != size:
        got = list(residual.shape)
        raise ValueError(f"{op}: residual must have N / 2 columns where gated=True, N={size}, got {got}")


def check_scale_values(op, name, scale):
    """Raise ValueError where a scale is not finite and above 0; it reads the tensor, so it is for level 2 alone."""
    bad = ~(scale.isfinite() & (scale > 0))
    if bool(bad.any()):
        raise ValueError(f"{op}: {name} must be finite and above 0, got {scale[bad][0].item()}")


def check_dtype(op, dtype, choices):
    """Raise TypeError where the dtype of a result is not one of the choices."""
    if dtype not in choices:
        known = " or ".join(map(_dtype, choices))
        raise TypeError(f"{op}: dtype must be {known}, got {_dtype(dtype)}")


def check_eps(op, eps):
    """Raise where eps is not a finite number that is at least zero."""
    if not isinstance(eps, (int, float)) or isinstance(eps, bool):
        raise TypeError(f"{op}: eps must be a number, got {type(eps).__name__}")
    if not 0.0 <= eps < float("inf"):
        raise ValueError(f"{op}: eps must be finite and at least 0, got {eps}")


def _dtype(dtype):
    return str(dtype).removeprefix("torch.")
