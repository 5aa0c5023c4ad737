"""The options that the attentions share: brought into the form of the registered operators, and checked."""

import math

import torch

from fusedops._core import checks, env
from fusedops.ops.attention._support import NOT_DIFFERENTIABLE

MAX_D = 512  # beyond 256 this size alone: a kernel's tile of it is made for one size
STEP_D = 8  # elements; rows of 16-bit values start at multiples of 16 bytes
WHOLE_D = 256  # every multiple of STEP_D up to here
FP8 = torch.float8_e4m3fn

_NUMBERS = (int, float, torch.SymInt, torch.SymFloat)
_INTEGERS = (int, torch.SymInt)


def arguments(op, q, softmax_scale, causal, window_size, softcap):
    """(softmax_scale, causal, window_left, window_right, softcap) as the registered operators take them."""
    if not isinstance(window_size, (tuple, list)) or len(window_size) != 2:
        raise TypeError(f"{op}: window_size must be a pair (left, right), got {window_size!r}")
    left, right = window_size
    if softmax_scale is None and isinstance(q, torch.Tensor) and q.dim() and q.shape[-1]:
        softmax_scale = q.shape[-1] ** -0.5
    return softmax_scale, causal, left, -1 if causal else right, softcap


def of_attention(q, k, v, sinks, alibi_slopes, mask, q_scale, k_scale, v_scale, softmax_scale, causal, window_size,
                 softcap):  # fmt: skip
    """The registered operator's arguments, of the public function's."""
    options = arguments("attention", q, softmax_scale, causal, window_size, softcap)
    return q, k, v, sinks, alibi_slopes, four_dims(mask), q_scale, k_scale, v_scale, *options


def of_attention_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, sinks, alibi_slopes, mask,
                        q_scale, k_scale, v_scale, softmax_scale, causal, window_size, softcap):  # fmt: skip
    """The registered operator's arguments, of the public function's."""
    options = arguments("attention_varlen", q, softmax_scale, causal, window_size, softcap)
    lengths = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
    return q, k, v, *lengths, sinks, alibi_slopes, mask, q_scale, k_scale, v_scale, *options


def four_dims(mask):
    """A mask with the leading dimensions that it leaves out, each of size 1."""
    if isinstance(mask, torch.Tensor) and mask.dim() < 4:
        return mask[(None,) * (4 - mask.dim())]
    return mask


def check(op, tensors, sizes, batch, sinks, alibi_slopes, q_scale, k_scale, v_scale, options):
    """Check everything but shapes of q, k and v, which are bound in sizes, and the mask."""
    q = tensors["q"]
    _check_dtypes(op, tensors)
    checks.check_rows(op, **tensors)
    heads, kv_heads = sizes["H"], sizes["Hk"]
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"{op}: k must have a number of heads Hk that divides H={heads}, got {kv_heads}")
    for name in ("D", "Dv"):
        check_head_dim(op, name, sizes[name])
    if sinks is not None:
        check_table(op, "sinks", sinks, q, [(heads,)], "[H]", _parameter_dtypes(q))
    if alibi_slopes is not None:
        allowed = [(heads,), (batch, heads)]
        check_table(op, "alibi_slopes", alibi_slopes, q, allowed, "[H] or [B, H]", (torch.float32,))
    for name, scale, side in (("q_scale", q_scale, "H"), ("k_scale", k_scale, "Hk"), ("v_scale", v_scale, "Hk")):
        if scale is None:
            continue
        if q.dtype != FP8:
            raise ValueError(f"{op}: {name} must be None unless q is float8_e4m3fn, got it with {_dtype(q)}")
        allowed = [(batch, sizes[side]), (1, sizes[side])]
        check_table(op, name, scale, q, allowed, f"[B or 1, {side}]", (torch.float32,))
    constants = {"alibi_slopes": alibi_slopes, "q_scale": q_scale, "k_scale": k_scale, "v_scale": v_scale}
    _check_gradients(op, tensors, constants)
    if env.validate():
        check_values(op, *options)


def check_mask(op, mask, q, sizes):
    """Check a mask that `four_dims` has seen."""
    if mask is None:
        return
    whole = [sizes[name] for name in ("B", "H", "Sq", "Sk")]
    if not isinstance(mask, torch.Tensor):
        raise TypeError(f"{op}: mask must be a torch.Tensor, got {type(mask).__name__}")
    if mask.device != q.device:
        raise ValueError(f"{op}: mask must be on {q.device}, got {mask.device}")
    if mask.dtype != torch.bool and mask.dtype not in _parameter_dtypes(q):
        names = " or ".join(["bool", *_names(_parameter_dtypes(q))])
        raise TypeError(f"{op}: mask must be {names}, got {_dtype(mask)}")
    if mask.dim() != 4 or any(size != 1 and size != limit for size, limit in zip(mask.shape, whole)):
        raise ValueError(f"{op}: mask must broadcast to [B, H, Sq, Sk] = {whole}, got {list(mask.shape)}")
    _check_gradients(op, {}, {"mask": mask})


def check_lengths(op, sizes, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k):
    """Check what says where the packed sequences begin."""
    if sizes["B+1"] < 1:
        raise ValueError(f"{op}: cu_seqlens_q must have at least one element, got none")
    for side, cu_seqlens, max_seqlen in (("q", cu_seqlens_q, max_seqlen_q), ("k", cu_seqlens_k, max_seqlen_k)):
        if cu_seqlens.dtype != torch.int32:
            raise TypeError(f"{op}: cu_seqlens_{side} must be int32, got {_dtype(cu_seqlens)}")
        checks.check_rows(op, **{f"cu_seqlens_{side}": cu_seqlens})
        if not isinstance(max_seqlen, _INTEGERS) or isinstance(max_seqlen, bool):
            raise TypeError(f"{op}: max_seqlen_{side} must be an integer, got {type(max_seqlen).__name__}")
        if env.validate() and max_seqlen < 0:
            raise ValueError(f"{op}: max_seqlen_{side} must be at least 0, got {max_seqlen}")
        if env.validate() == 2 and not torch.compiler.is_compiling() and not cu_seqlens.is_meta:
            _check_starts(op, side, cu_seqlens.tolist(), max_seqlen, sizes[f"T{side}"])


def check_lse(op, **tensors):
    """Raise TypeError where a logsumexp is not float32."""
    for name, tensor in tensors.items():
        if tensor.dtype != torch.float32:
            raise TypeError(f"{op}: {name} must be float32, got {_dtype(tensor)}")


def _check_starts(op, side, starts, max_seqlen, total):
    """What only the values in device memory tell; reading them waits for the device."""
    lengths = [end - start for start, end in zip(starts, starts[1:])]
    if starts[0] != 0 or starts[-1] != total or min(lengths, default=0) < 0:
        raise ValueError(f"{op}: cu_seqlens_{side} must rise from 0 to {total}, got {starts}")
    if max(lengths, default=0) > max_seqlen:
        longest = max(lengths)
        raise ValueError(f"{op}: max_seqlen_{side} must be at least the longest length {longest}, got {max_seqlen}")


def _check_dtypes(op, tensors):
    first = next(iter(tensors.values()))
    for name, tensor in tensors.items():
        if tensor is first and first.dtype not in (*checks.FLOATS, FP8):
            raise TypeError(f"{op}: {name} must be float16, bfloat16, float32 or float8_e4m3fn, got {_dtype(tensor)}")
        if tensor.dtype != first.dtype:
            raise TypeError(f"{op}: {name} must be {_dtype(first)}, got {_dtype(tensor)}")


def takes_head_dim(size):
    """Whether heads may have this many elements."""
    return size == MAX_D or (size % STEP_D == 0 and 0 < size <= WHOLE_D)


def check_head_dim(op, name, size):
    if not takes_head_dim(size):
        raise NotImplementedError(
            f"{op}: {name} must be a multiple of {STEP_D} up to {WHOLE_D}, or MAX_D = {MAX_D}, got {size}"
        )


def check_table(op, name, tensor, q, shapes, described, dtypes):
    """Check one small tensor beside q."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{op}: {name} must be a torch.Tensor, got {type(tensor).__name__}")
    if tensor.device != q.device:
        raise ValueError(f"{op}: {name} must be on {q.device}, got {tensor.device}")
    if not any(tuple(tensor.shape) == shape for shape in shapes):
        known = " or ".join(str(list(shape)) for shape in dict.fromkeys(shapes))
        raise ValueError(f"{op}: {name} must have shape {described} = {known}, got {list(tensor.shape)}")
    if tensor.dtype not in dtypes:
        raise TypeError(f"{op}: {name} must be {' or '.join(_names(dtypes))}, got {_dtype(tensor)}")


def _check_gradients(op, tensors, constants):
    if not torch.is_grad_enabled():
        return
    for name, tensor in constants.items():
        if name in NOT_DIFFERENTIABLE and tensor is not None and tensor.requires_grad:
            raise NotImplementedError(f"{op}: {name} must not require a gradient, this operator has none for it")
    for name, tensor in tensors.items():
        if tensor.requires_grad and _dtype(tensor) in NOT_DIFFERENTIABLE:
            raise NotImplementedError(f"{op}: {name} must not require a gradient in {_dtype(tensor)}, which has none")


def check_values(op, softmax_scale, causal, window_left, window_right, softcap):
    for name, value in (("softmax_scale", softmax_scale), ("softcap", softcap)):
        if not isinstance(value, _NUMBERS) or isinstance(value, bool):
            raise TypeError(f"{op}: {name} must be a number, got {type(value).__name__}")
    if not -math.inf < softmax_scale < math.inf:
        raise ValueError(f"{op}: softmax_scale must be finite, got {softmax_scale}")
    if not 0.0 <= softcap < math.inf:
        raise ValueError(f"{op}: softcap must be finite and at least 0 (0 is none), got {softcap}")
    if not isinstance(causal, bool):
        raise TypeError(f"{op}: causal must be a bool, got {type(causal).__name__}")
    for value in (window_left, window_right):
        if not isinstance(value, _INTEGERS) or isinstance(value, bool):
            raise TypeError(f"{op}: window_size must hold integers, got {type(value).__name__}")
        if value < -1:
            raise ValueError(f"{op}: window_size must hold -1 (no bound) or sizes from 0, got {value}")


def _parameter_dtypes(q):
    """q's dtype (of the output, where q is fp8) and float32."""
    return (torch.bfloat16 if q.dtype == FP8 else q.dtype), torch.float32


def _dtype(tensor):
    return str(tensor.dtype).removeprefix("torch.")


def _names(dtypes):
    return list(dict.fromkeys(str(dtype).removeprefix("torch.") for dtype in dtypes))
