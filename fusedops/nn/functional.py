"""``torch.nn.functional`` with our operators in place; every name that is not replaced is torch's own.

A replaced function takes exactly torch's arguments. Where our operator does not cover a call (float64, say, or rows
that cannot be flattened without a copy), torch's function runs; on CUDA tensors that counts as leaving the fused path
(``FUSEDOPS_FALLBACK``).
"""

import math

import torch
import torch.nn.functional as _functional

from fusedops._core import checks, dispatch
from fusedops.ops.layer_norm import layer_norm as _layer_norm
from fusedops.ops.rms_norm import MAX_N
from fusedops.ops.rms_norm import rms_norm as _rms_norm


def rms_norm(input, normalized_shape, weight=None, eps=None):
    """Normalise by the root mean square over the last dimensions; arguments as ``torch.nn.functional.rms_norm``."""
    return scaled_rms_norm(input, normalized_shape, weight, eps, 0.0, "once")


def scaled_rms_norm(input, normalized_shape, weight, eps, weight_offset, rounding):
    """As `rms_norm`, with the two options of `fusedops.rms_norm`; these have no torch function to fall back to."""
    shape = tuple(normalized_shape)
    reason = _not_covered(input, shape, weight)
    if reason is None:
        if eps is None:
            eps = torch.finfo(torch.float32).eps  # of the dtype that torch computes in, whatever its documentation says
        rows, weight = _flat(input, shape), _flat(weight, shape)
        return _rms_norm(rows, weight, eps, weight_offset=weight_offset, rounding=rounding).view(input.shape)
    if weight_offset or rounding != "once":
        raise NotImplementedError(f"rms_norm: weight_offset and rounding must be left at their defaults here: {reason}")
    dispatch.leave_fused_path("rms_norm", input, reason)
    return _functional.rms_norm(input, shape, weight, eps)


def layer_norm(input, normalized_shape, weight=None, bias=None, eps=1e-5):
    """Normalise to mean zero and variance one; arguments as ``torch.nn.functional.layer_norm``."""
    shape = tuple(normalized_shape)
    reason = _not_covered(input, shape, weight, bias)
    if reason is None:
        rows, weight, bias = _flat(input, shape), _flat(weight, shape), _flat(bias, shape)
        return _layer_norm(rows, weight, bias, eps).view(input.shape)
    dispatch.leave_fused_path("layer_norm", input, reason)
    return _functional.layer_norm(input, shape, weight, bias, eps)


def _not_covered(input, shape, *parameters):
    """Why torch's function must take this call, or None. A wrong call goes to torch too, for torch's own error."""
    if not isinstance(input, torch.Tensor) or input.shape[input.dim() - len(shape) :] != shape or not shape:
        return "the shapes do not fit"
    if input.dtype not in checks.FLOATS:
        return f"{input.dtype} is not supported"
    if math.prod(shape) > MAX_N:
        return f"rows of {math.prod(shape)} elements, at most {MAX_N} are supported"
    for parameter in parameters:
        if parameter is not None and (parameter.shape != shape or parameter.dtype != input.dtype):
            return "a parameter has another shape or dtype"
    return None


def _flat(tensor, shape):
    """The tensor with its normalised dimensions joined and contiguous; a copy only where its strides force one."""
    if tensor is None:
        return None
    if len(shape) > 1:
        tensor = tensor.reshape(*tensor.shape[: tensor.dim() - len(shape)], math.prod(shape))
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def __getattr__(name):
    return getattr(_functional, name)


def __dir__():
    return sorted({*dir(_functional), *globals()})
