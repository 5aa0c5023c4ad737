"""``torch.nn.functional`` with our operators in place; every name that is not replaced is torch's own.

A replaced function takes exactly torch's arguments. Where our operator does not cover a call (float64, say, or rows
that cannot be flattened without a copy), torch's function runs; on CUDA tensors that counts as leaving the fused path
(``FUSEDOPS_FALLBACK``). `kl_distillation_loss` is ours alone: torch has no function of that name.
"""

import math

import torch
import torch.nn.functional as _functional

from fusedops._core import checks, dispatch
from fusedops._core.register import operators
from fusedops.nn.distillation import kl_distillation_loss as kl_distillation_loss
from fusedops.ops.attention import attention as _attention
from fusedops.ops.attention import takes_head_dim
from fusedops.ops.layer_norm import layer_norm as _layer_norm
from fusedops.ops.rms_norm import MAX_N
from fusedops.ops.rms_norm import rms_norm as _rms_norm

_attention_operator = operators()["attention"]


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


def scaled_dot_product_attention(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
):
    """Attend; arguments as ``torch.nn.functional.scaled_dot_product_attention``.

    The first query is aligned with the first key where `is_causal`, as torch does it. A query whose keys are all hidden
    gives 0. On a CPU, where that is torch's kernel too, torch's function runs. Dropout, masks that want a gradient,
    leading dimensions that broadcast, and head dimensions that `fusedops.attention` does not take go to torch's own.
    """
    reason = _attention_not_covered(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    if reason is not None:
        if isinstance(query, torch.Tensor):
            dispatch.leave_fused_path("scaled_dot_product_attention", query, reason)
        return _functional.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    device = query.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        query, key, value = (t.to(dtype) for t in (query, key, value))
        if attn_mask is not None and attn_mask.dtype != torch.bool:
            attn_mask = attn_mask.to(dtype)
    if _is_torchs(query, key, attn_mask) and _attention_operator.direct(query) is not None:
        return _functional.scaled_dot_product_attention(
            query, key, value, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa
        )
    window, (length, num_keys) = (-1, -1), (query.shape[-2], key.shape[-2])
    if is_causal and num_keys > length:  # the keys beyond the last query are hidden from all
        key, value = key[..., :length, :], value[..., :length, :]
    elif is_causal and num_keys < length:
        is_causal, window = False, (-1, length - num_keys)
    out = _attention(
        _positions_first(query), _positions_first(key), _positions_first(value),
        softmax_scale=scale, causal=is_causal, window_size=window, mask=_four_dims(attn_mask),
    ).transpose(1, 2)  # fmt: skip
    return out if query.dim() == 4 else out.reshape(*query.shape[:-1], value.shape[-1])


def _is_torchs(query, key, mask):
    """Whether torch's function on the CPU is as exact as our operator, which runs its kernel, and no slower.

    Of 16 bits that is one float16 query, whose keys need not be made float32. Grouped heads of one query run faster as
    the queries of one head.
    """
    if mask is not None or not query.is_cpu or query.dim() != 4 or torch.compiler.is_dynamo_compiling():
        return False
    one = query.shape[2] == 1
    if query.dtype is torch.float16:
        return one and query.shape[1] == key.shape[1]
    return query.dtype is torch.float32 and (not one or query.shape[1] == key.shape[1])


def _attention_not_covered(query, key, value, mask, dropout_p, is_causal, scale, enable_gqa):
    """Why torch's function must take this call, or None. A wrong call goes to torch too, for torch's own error."""
    for tensor in (query, key, value):
        if not isinstance(tensor, torch.Tensor) or tensor.is_nested or tensor.dim() < 2:
            return "an argument is no tensor of two dimensions or more, or nested"
    if dropout_p:
        return "dropout"
    if query.dtype not in checks.FLOATS or not query.dtype == key.dtype == value.dtype:
        return f"{query.dtype}, {key.dtype} and {value.dtype} are not supported together"
    if not takes_head_dim(query.shape[-1]) or not takes_head_dim(value.shape[-1]):
        return f"head dimensions {query.shape[-1]} and {value.shape[-1]}"
    if not query.device == key.device == value.device or type(is_causal) is not bool:
        return "the arguments do not fit together"
    if not _fit(query.shape, key.shape, value.shape, enable_gqa):
        return "the shapes broadcast or do not fit"
    if mask is None:
        return None
    return _mask_not_covered(mask, query, key, is_causal)


def _fit(query, key, value, enable_gqa):
    """Whether three shapes are those of an attention without broadcasting."""
    if not len(query) == len(key) == len(value) or query[-1] != key[-1] or key[:-1] != value[:-1]:
        return False
    if len(query) == 2:
        return True
    if enable_gqa:
        return query[:-3] == key[:-3] and key[-3] > 0 and query[-3] % key[-3] == 0
    return query[:-2] == key[:-2]


def _mask_not_covered(mask, query, key, is_causal):
    if is_causal or not isinstance(mask, torch.Tensor) or mask.device != query.device:
        return "is_causal beside a mask, or a mask that torch must judge"
    if mask.dtype not in (torch.bool, query.dtype, torch.float32):
        return f"a mask of {mask.dtype} beside {query.dtype}"
    if mask.requires_grad and torch.is_grad_enabled():
        return "a mask that requires a gradient"
    whole = (*query.shape[:-1], key.shape[-2])
    sizes = zip(mask.shape[::-1], whole[::-1])
    if mask.dim() > len(whole) or any(size != 1 and size != wanted for size, wanted in sizes):  # `in` misleads dynamo
        return "a mask that does not broadcast"
    leading = mask.shape[:-3]
    if any(size != 1 for size in leading) and leading != query.shape[:-3]:
        return "a mask that broadcasts over some of the leading dimensions alone"
    return None


def _positions_first(tensor):
    """[..., heads, positions, elements] as [batch, positions, heads, elements]; a copy only where strides force one."""
    if tensor.stride(-1) != 1:
        tensor = tensor.contiguous()
    if tensor.dim() != 4:
        missing = (None,) * (4 - tensor.dim())
        tensor = tensor[missing] if missing else tensor.flatten(0, -4)
    return tensor.transpose(1, 2)


def _four_dims(mask):
    """A mask whose leading dimensions are joined as those of the operands."""
    return mask if mask is None or mask.dim() <= 4 else mask.flatten(0, -4)


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
