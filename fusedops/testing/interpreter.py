"""Repair bfloat16 and float8 in Triton's interpreter.

The interpreter keeps these dtypes as raw integers. As shipped (3.6.0, 3.7.1), it multiplies and compares those
integers, truncates casts to bfloat16, and gets casts to float8 wrong at the edges. ``install`` makes it compute values:

* casts round to nearest even (or towards zero where the kernel says so); casts to float8 saturate, infinities too;
* arithmetic, comparisons and reductions of bfloat16 are done in float32 and rounded once per operation;
* ``tl.dot`` multiplies the exact values in float32;
* NaN padding of descriptors is NaN, and ``tl.maximum``, ``tl.minimum`` and ``tl.clamp`` drop a NaN as the GPU does.

It also makes the interpreter's own work less, which takes two fifths of a small launch's time.

What stays impossible (atomics on bfloat16, arithmetic on float8, the AMD float8 formats) raises NotImplementedError.
Set ``TRITON_INTERPRET=1`` before the first import of triton, then call ``install()`` once.
"""

from __future__ import annotations

from collections.abc import Callable

from fusedops.testing import interpreter_speed
from fusedops.testing.formats import (
    BFLOAT16,
    FLOAT8_E4M3FN,
    FLOAT8_E5M2,
    FLOAT16,
    FLOAT32,
    Format,
    decode,
    encode,
)

_MISSING = object()
_saved: list[tuple[object, str, object]] = []


_NARROW = {"bf16": BFLOAT16, "fp8e4nv": FLOAT8_E4M3FN, "fp8e5": FLOAT8_E5M2}
_NUMPY_FLOATS = {"fp16": FLOAT16, "fp32": FLOAT32}
_UNKNOWN = ("fp8e4b15", "fp8e4b8", "fp8e5b16")

# Operations that only move bits, or that go through a repaired one.
_BITS_ONLY = frozenset(
    "create_load create_store create_masked_load create_masked_store create_tensor_pointer_load "
    "create_tensor_pointer_store create_descriptor_load create_descriptor_store create_descriptor_gather "
    "create_descriptor_scatter create_bitcast create_int_to_ptr create_ptr_to_int create_select create_fabs "
    "create_reshape create_trans create_gather create_addptr create_expand_dims create_broadcast create_cat "
    "create_join create_split create_splat create_unsplat create_make_block_ptr create_advance "
    "create_make_tensor_descriptor".split()
)
_REPAIRED = frozenset(
    "create_fadd create_fsub create_fmul create_fdiv create_frem create_precise_divf create_fma create_dot "
    "create_print create_minimumf create_minnumf create_maximumf create_maxnumf create_clampf create_floor create_ceil "
    "create_sqrt create_precise_sqrt create_exp create_exp2 create_log create_log2 create_sin create_cos "
    "create_si_to_fp create_ui_to_fp create_fp_to_si create_fp_to_ui create_fp_ext create_fp_trunc create_int_cast "
    "create_fp_to_fp".split()
)


def install() -> None:
    """Repair the interpreter of this process; does nothing the second time, or where nothing is wrong.

    Raises:
        ImportError: triton or numpy is not installed.
        RuntimeError: triton was imported without ``TRITON_INTERPRET=1``, or its interpreter is not one that this
            module can repair (the message lists what stays wrong).
    """
    triton_interpreter = _triton_interpreter()
    if _saved or not faults():
        return
    try:
        _replace_all(triton_interpreter)
        remaining = faults()
    except AttributeError as error:
        remaining = [f"this triton has no {error.name}"]
    if remaining:
        uninstall()
        raise RuntimeError(f"interpreter: this triton cannot be repaired: {'; '.join(remaining)}")


def uninstall() -> None:
    """Put the interpreter back as it was before ``install``."""
    while _saved:
        owner, name, original = _saved.pop()
        if original is _MISSING:
            delattr(owner, name)
        else:
            setattr(owner, name, original)


def faults() -> list[str]:
    """Probe the interpreter of this process for the faults that ``install`` repairs.

    Returns:
        What is wrong, one sentence each; empty after ``install``.

    Raises:
        ImportError: triton or numpy is not installed.
        RuntimeError: triton was imported without ``TRITON_INTERPRET=1``.
    """
    probes = _probes(_triton_interpreter())
    return [sentence for sentence, is_right in probes.items() if not _holds(is_right)]


def _triton_interpreter():
    try:
        import triton.language as tl
        import triton.runtime.interpreter as module
    except ImportError as error:
        raise ImportError("fusedops.testing.interpreter needs triton and numpy: pip install triton numpy") from error
    if not isinstance(tl.standard._sum_combine, module.InterpretedFunction):
        raise RuntimeError("interpreter: set TRITON_INTERPRET=1 before triton is imported for the first time")
    return module


def _replace(owner: object, name: str, value: object) -> None:
    _saved.append((owner, name, vars(owner).get(name, _MISSING)))
    setattr(owner, name, value)


def _replace_all(module) -> None:
    import numpy as np
    import triton.language as tl

    builder = module.InterpreterBuilder
    for name in ("binary_op", "unary_op", "ternary_op"):
        _replace(builder, name, _in_float32(getattr(builder, name)))
    _replace(builder, "cast_impl", lambda self, src, dst_type: _cast(src, dst_type))
    _replace(builder, "create_fp_to_fp", _fp_to_fp)
    _replace(builder, "create_fma", _in_float32(builder.create_fma))
    _replace(builder, "create_dot", _dot(builder.create_dot))
    _replace(builder, "create_print", _print(builder.create_print))
    _replace(builder, "get_bf16", lambda self, value: _handle(encode(np.array([value]), BFLOAT16), tl.bfloat16))
    _replace(builder, "create_maxnumf", lambda self, lhs, rhs: self.binary_op(lhs, rhs, np.fmax))
    _replace(builder, "create_minnumf", lambda self, lhs, rhs: self.binary_op(lhs, rhs, np.fmin))
    _replace(builder, "create_clampf", _clampf(builder.create_clampf))
    _replace(builder, "create_descriptor_load", _descriptor_load(builder.create_descriptor_load))
    _replace(builder, "create_tensor_pointer_load", _pointer_load(builder.create_tensor_pointer_load))
    for operations, general in ((module.ReduceOps, "generic_reduce"), (module.ScanOps, "generic_scan")):
        _replace(operations, "apply_impl", _reduction(operations.apply_impl, general))
    if hasattr(module, "_LangPatchScope"):
        _replace(module, "_patch_lang", interpreter_speed.patch_once(module))
    _replace(module, "_get_np_dtype", interpreter_speed.known_dtypes(module._get_np_dtype))
    described = interpreter_speed.known_shapes(tl.block_type.__init__, tl.tensor.__init__)
    _replace(tl.block_type, "__init__", described[0])
    _replace(tl.tensor, "__init__", described[1])
    compares = tuple(name for name in vars(builder) if name.startswith("create_fcmp"))
    for name in [name for name in vars(builder) if name.startswith("create_")]:
        if name not in _BITS_ONLY and name not in _REPAIRED and name not in compares:
            _replace(builder, name, _refuse_narrow(name, getattr(builder, name)))


def _format_of(handle: object) -> Format | None:
    """The narrow format of a handle; a comparison's result carries its operands' dtype but holds booleans."""
    numpy_dtype = getattr(getattr(handle, "data", None), "dtype", None)
    if numpy_dtype is None or numpy_dtype.char not in "BH":  # uint8, uint16
        return None
    name = handle.dtype.scalar.name
    if name in _UNKNOWN:
        raise NotImplementedError(f"interpreter: arithmetic on {name} is not supported")
    return _NARROW.get(name)


def _handle(data, dtype):
    from triton.runtime.interpreter import TensorHandle

    return TensorHandle(data, dtype)


def _wide(handle):
    """The handle in float32 where it is of a narrow format, else itself."""
    import triton.language as tl

    source = _format_of(handle)
    return handle if source is None else _handle(decode(handle.data, source), tl.float32)


def _in_float32(original: Callable) -> Callable:
    """Compute an elementwise operation of bfloat16 handles in float32 and round the result once."""
    import numpy as np
    import triton.language as tl

    def repaired(self, *arguments):
        formats = [_format_of(argument) for argument in arguments]
        if not any(formats) or any(argument is np.where for argument in arguments):
            return original(self, *arguments)
        if any(known not in (None, BFLOAT16) for known in formats):
            raise NotImplementedError("interpreter: arithmetic on float8 does not exist; cast to float32 first")
        result = original(self, *(_wide(argument) for argument in arguments))
        if result.data.dtype == np.bool_:
            return _handle(result.data, tl.int1)
        return _handle(encode(result.data, BFLOAT16), tl.bfloat16)

    return repaired


def _cast(src, dst_type, toward_zero: bool = False):
    import numpy as np
    from triton.runtime.interpreter import _get_np_dtype

    target_type = dst_type.scalar
    if target_type.name in _UNKNOWN:
        raise NotImplementedError(f"interpreter: casts to {target_type.name} are not supported")
    source = _format_of(src)
    values = src.data if source is None else decode(src.data, source)
    target = _NARROW.get(target_type.name)
    if target is None and toward_zero:
        target = _NUMPY_FLOATS[target_type.name]
    with np.errstate(all="ignore"):
        if target is not None:
            return _handle(encode(values, target, toward_zero).view(_get_np_dtype(dst_type)), target_type)
        return _handle(values.astype(_get_np_dtype(dst_type)), target_type)


def _fp_to_fp(self, src, dst_type, rounding_mode):
    from triton._C.libtriton import ir

    return _cast(src, dst_type, toward_zero=rounding_mode == ir.ROUNDING_MODE.RTZ)


def _dot(original: Callable) -> Callable:
    def repaired(self, a, b, *rest):
        return original(self, _wide(a), _wide(b), *rest)

    return repaired


def _print(original: Callable) -> Callable:
    def repaired(self, prefix, as_hex, values, is_signed):
        return original(self, prefix, as_hex, values if as_hex else [_wide(value) for value in values], is_signed)

    return repaired


def _clampf(original: Callable) -> Callable:
    def repaired(self, value, low, high, propagate_nans):
        from triton._C.libtriton import ir

        if propagate_nans == ir.PROPAGATE_NAN.ALL:
            return original(self, value, low, high, propagate_nans)
        return self.create_minnumf(self.create_maxnumf(value, low), high)

    return repaired


def _nan_padded_load(self, ptrs, masks, padding):
    """Load with NaN outside, or None where the pointers or the padding are not of that kind."""
    import numpy as np
    from triton._C.libtriton import ir

    element = ptrs.get_element_ty()
    target = _NARROW.get(element.name)
    if target is None or padding != ir.PADDING_OPTION.PAD_NAN:
        return None
    outside = _handle(np.full(ptrs.data.shape, target.nan_code, dtype=f"uint{target.bits}"), element)
    return self.create_masked_load(ptrs, masks, outside, None, None, False)


def _descriptor_load(original: Callable) -> Callable:
    def repaired(self, descriptor, indices, *rest, **kwargs):
        ptrs, masks = descriptor.materialize_pointers(indices)
        loaded = _nan_padded_load(self, ptrs, masks, descriptor.padding)
        return original(self, descriptor, indices, *rest, **kwargs) if loaded is None else loaded

    return repaired


def _pointer_load(original: Callable) -> Callable:
    def repaired(self, block_ptr, boundary_check, padding, *rest):
        ptrs, masks = block_ptr.materialize_pointers(boundary_check)
        loaded = _nan_padded_load(self, ptrs, masks, padding)
        return original(self, block_ptr, boundary_check, padding, *rest) if loaded is None else loaded

    return repaired


def _reduction(original: Callable, general: str) -> Callable:
    """Reduce bfloat16 one element at a time through the combine function, whose operations are repaired."""

    def repaired(self, operands):
        if any(_format_of(operand.handle) for operand in operands):
            return getattr(self, general)(operands)
        return original(self, operands)

    return repaired


def _refuse_narrow(name: str, original: Callable) -> Callable:
    def repaired(self, *arguments, **kwargs):
        if any(_format_of(argument) for argument in (*arguments, *kwargs.values())):
            raise NotImplementedError(f"interpreter: {name} on bfloat16 or float8 cannot be repaired; use float32")
        return original(self, *arguments, **kwargs)

    return repaired


def _holds(probe: Callable[[], bool]) -> bool:
    """Whether a probe answers yes; an interpreter that raises on it does not hold."""
    try:
        return bool(probe())
    except (AttributeError, NotImplementedError, TypeError, ValueError):
        return False


def _probes(module) -> dict[str, Callable[[], bool]]:
    """What may be wrong, each with a small calculation that tells whether it is right."""
    import numpy as np
    import triton.language as tl
    from triton._C.libtriton import ir

    builder = module.interpreter_builder

    def fp32(*values):
        return _handle(np.array(values, dtype=np.float32), tl.float32)

    def bf16(*values):
        return _handle(encode(np.array(values), BFLOAT16), tl.bfloat16)

    def gives(handle, *expected) -> bool:
        return np.array_equal(handle.data.ravel(), np.array(expected))

    def to_float8(*values):
        return builder.create_fp_to_fp(fp32(*values), tl.float8e4nv, ir.ROUNDING_MODE.RTNE)

    return {
        "casts to bfloat16 do not round to nearest even": lambda: gives(
            builder.create_fp_trunc(fp32(1.00390625, 1.01171875, 3.4e38), tl.bfloat16), 0x3F80, 0x3F82, 0x7F80
        ),
        "integers become bfloat16 bit by bit": lambda: gives(
            builder.create_si_to_fp(_handle(np.array([3], dtype=np.int32), tl.int32), tl.bfloat16), 0x4040
        ),
        "bfloat16 numbers are added as integers": lambda: gives(builder.create_fadd(bf16(1.5), bf16(2.25)), 0x4070),
        "bfloat16 numbers are compared as integers": lambda: gives(
            builder.create_fcmpOLT(bf16(-2.0, -1.0), bf16(1.0, -2.0)), True, False
        ),
        "tl.dot multiplies bfloat16 as integers": lambda: gives(
            builder.create_dot(bf16([1.5]), bf16([2.0]), fp32([0.0]), None, 0), 3.0
        ),
        "casts to float8 neither round nor saturate as they should": lambda: gives(
            to_float8(17.0, 19.0, 465.0, 1e-9, np.inf), 0x58, 0x5A, 0x7E, 0, 0x7E
        ),
        "bfloat16 constants cannot be made": lambda: gives(builder.get_bf16(1.0), 0x3F80),
        "tl.maximum keeps a NaN": lambda: gives(builder.create_maxnumf(fp32(np.nan), fp32(1.0)), 1.0),
    }
