"""The registered operators behind the public functions: schemas, outputs, gradients, costs."""

import torch

from fusedops._core.register import register
from fusedops.ops.attention import _options

PACKAGE = __name__.rpartition(".")[0]
IMPLEMENTATIONS = ("triton", "torch", "reference")
_OPTIONS = (
    "Tensor? sinks, Tensor? alibi_slopes, Tensor? mask, Tensor? q_scale, Tensor? k_scale, Tensor? v_scale, "
    "float softmax_scale, bool causal, int window_left, int window_right, float softcap"
)
_LENGTHS = "Tensor cu_seqlens_q, Tensor cu_seqlens_k, int max_seqlen_q, int max_seqlen_k"
_QKV = "Tensor q, Tensor k, Tensor v"
_GRADS = "Tensor grad_out, Tensor? grad_lse"
_NUM_OPTIONS = 11


def _fake(q, k, v, *rest):
    dtype = torch.bfloat16 if q.element_size() == 1 else q.dtype
    lse = q.new_empty((*q.shape[:-3], q.shape[-2], q.shape[-3]), dtype=torch.float32)
    return q.new_empty((*q.shape[:-1], v.shape[-1]), dtype=dtype), lse


def _fake_backward(grad_out, grad_lse, q, k, v, *rest):
    sinks = rest[-_NUM_OPTIONS]
    grads = (t.new_empty(t.shape) for t in (q, k, v))
    return *grads, q.new_empty(0) if sinks is None else sinks.new_empty(sinks.shape)


def _fake_merge(out_a, lse_a, out_b, lse_b):
    return out_a.new_empty(out_a.shape), lse_a.new_empty(lse_a.shape)


def _setup(ctx, inputs, output):
    ctx.save_for_backward(*output, *(value for value in inputs if isinstance(value, torch.Tensor)))
    ctx.inputs = [None if isinstance(value, torch.Tensor) else (value,) for value in inputs]
    ctx.set_materialize_grads(False)


def _gradients(operator, ctx, grad_out, grad_lse):
    """Gradients of all inputs; those of q, k, v and sinks are given, the rest have none."""
    out, lse, *tensors = ctx.saved_tensors
    left = iter(tensors)
    q, k, v, *rest = [next(left) if value is None else value[0] for value in ctx.inputs]
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    dq, dk, dv, dsinks = operator(grad_out, grad_lse, q, k, v, out, lse, *rest)
    between = [None] * (len(rest) - _NUM_OPTIONS)
    return dq, dk, dv, *between, None if rest[-_NUM_OPTIONS] is None else dsinks, *[None] * (_NUM_OPTIONS - 1)


def _backward(ctx, grad_out, grad_lse):
    return _gradients(attention_backward, ctx, grad_out, grad_lse)


def _backward_varlen(ctx, grad_out, grad_lse):
    return _gradients(attention_varlen_backward, ctx, grad_out, grad_lse)


def _seen_pairs(num_queries, num_keys, causal, left, right):
    """How many pairs of a query and a key causal and window leave."""

    def up_to(bound):
        """Pairs with ``j <= p + bound``: a sum of ``clamp(i + shift, 0, num_keys)`` over the queries."""
        shift = num_keys - num_queries + bound + 1
        first = min(max(1 - shift, 0), num_queries)  # the first query that sees a key
        full = min(max(num_keys - shift, first), num_queries)  # the first that sees all
        growing = full - first
        return growing * (first + shift) + growing * (growing - 1) // 2 + (num_queries - full) * num_keys

    right = 0 if causal else right
    seen = num_queries * num_keys if right < 0 else up_to(right)
    return seen if left < 0 else max(seen - up_to(-left - 1), 0)


def _cost(q, k, v, sinks, alibi_slopes, mask, q_scale, k_scale, v_scale, softmax_scale, causal, left, right, softcap):
    batch, num_queries, heads, head_dim = q.shape
    pairs = batch * heads * _seen_pairs(num_queries, k.shape[1], causal, left, right)
    return _bytes(q, k, v, sinks, alibi_slopes, mask) + _out_bytes(q, v), 2 * pairs * (head_dim + v.shape[-1])


def _cost_varlen(q, k, v, starts_q, starts_k, max_q, max_k, sinks, alibi_slopes, mask, q_scale, k_scale, v_scale,
                 softmax_scale, causal, left, right, softcap):  # fmt: skip
    """As if all sequences had the mean length: their own lengths lie in device memory."""
    batch = max(starts_q.shape[0] - 1, 1)
    pairs = batch * q.shape[1] * _seen_pairs(q.shape[0] // batch, k.shape[0] // batch, causal, left, right)
    moved = _bytes(q, k, v, starts_q, starts_k, sinks, alibi_slopes) + _out_bytes(q, v)
    return moved, 2 * pairs * (q.shape[-1] + v.shape[-1])


def _cost_merge(out_a, lse_a, out_b, lse_b):
    return _bytes(out_a, lse_a, out_b, lse_b, out_a, lse_a), 3 * out_a.numel()


def _bytes(*tensors):
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)


def _out_bytes(q, v):
    """Of out and lse."""
    rows = q.numel() // max(q.shape[-1], 1)
    return rows * (v.shape[-1] * max(q.element_size(), 2) + 4)


def _example(shape, dtype, device):
    """shape is [B, S, H, D]; k and v have as many heads and positions as q."""
    return tuple(torch.randn(shape, device=device).to(dtype) for _ in "qkv"), {"causal": True}


def _example_varlen(shape, dtype, device):
    """shape is [B, S, H, D]: B sequences of S positions."""
    batch, length, heads, head_dim = shape
    starts = torch.arange(batch + 1, dtype=torch.int32, device=device) * length
    packed = tuple(torch.randn(batch * length, heads, head_dim, device=device).to(dtype) for _ in "qkv")
    return (*packed, starts, starts, length, length), {"causal": True}


def _example_merge(shape, dtype, device):
    """shape is [..., S, H, Dv]."""
    *leading, length, heads, _ = shape
    outs = [torch.randn(shape, device=device).to(dtype) for _ in "ab"]
    lses = [torch.randn(*leading, heads, length, device=device) for _ in "ab"]
    return (outs[0], lses[0], outs[1], lses[1]), {}


attention = register(
    f"attention({_QKV}, {_OPTIONS}) -> (Tensor, Tensor)",
    package=PACKAGE,
    implementations=IMPLEMENTATIONS,
    fake=_fake,
    setup_context=_setup,
    backward=_backward,
    cost=_cost,
    example=_example,
    arguments=_options.of_attention,
)
attention_backward = register(
    f"attention_backward({_GRADS}, {_QKV}, Tensor out, Tensor lse, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor)",
    package=PACKAGE,
    implementations=IMPLEMENTATIONS,
    fake=_fake_backward,
)
attention_varlen = register(
    f"attention_varlen({_QKV}, {_LENGTHS}, {_OPTIONS}) -> (Tensor, Tensor)",
    package=PACKAGE,
    implementations=IMPLEMENTATIONS,
    fake=_fake,
    setup_context=_setup,
    backward=_backward_varlen,
    cost=_cost_varlen,
    example=_example_varlen,
    arguments=_options.of_attention_varlen,
)
attention_varlen_backward = register(
    f"attention_varlen_backward({_GRADS}, {_QKV}, Tensor out, Tensor lse, {_LENGTHS}, {_OPTIONS})"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    package=PACKAGE,
    implementations=IMPLEMENTATIONS,
    fake=_fake_backward,
)
merge_attention = register(
    "merge_attention(Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b) -> (Tensor, Tensor)",
    package=PACKAGE,
    implementations=IMPLEMENTATIONS,
    fake=_fake_merge,
    cost=_cost_merge,
    example=_example_merge,
)
