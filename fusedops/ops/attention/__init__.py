"""Scaled dot-product attention on contiguous keys, in batches or packed, and the merge of two parts."""

from fusedops._core import checks
from fusedops.ops.attention import _options, _registered
from fusedops.ops.attention._options import (  # noqa: F401 - limits, and what the paged operator checks likewise
    MAX_D,
    arguments,
    check_head_dim,
    check_table,
    check_values,
    takes_head_dim,
)


def attention(
    q, k, v, *, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, sinks=None, alibi_slopes=None,
    mask=None, q_scale=None, k_scale=None, v_scale=None, return_lse=False,
):  # fmt: skip
    """Weigh the values of all visible keys by the softmax of the query's scores with them.

    ``out = softmax(softmax_scale * q @ k.T + bias) @ v``. Query i stands at position ``p = i + Sk - Sq`` among the
    keys: the last query at the last key.

    Args:
        q: ``[B, Sq, H, D]``, float16, bfloat16, float32 or float8_e4m3fn; the last dimension is contiguous, all other
            strides are free: ``[B, H, S, D]`` comes in as ``.transpose(1, 2)``. D is a multiple of 8 up to 256, or 512.
        k: ``[B, Sk, Hk, D]``, q's dtype. Hk divides H: head h reads head ``h // (H // Hk)`` of k and v.
        v: ``[B, Sk, Hk, Dv]``, q's dtype; Dv as D, and may differ from it.
        softmax_scale: Multiplies the scores; None is ``D ** -0.5``.
        causal: A query sees keys up to its own position, ``j <= p``.
        window_size: ``(left, right)``: a query sees ``p - left <= j <= p + right``; -1 is no bound. ``(W - 1, 0)`` is W
            keys, the query's own among them. With `causal`, right is 0.
        softcap: Scores become ``softcap * tanh(score / softcap)``, before ALiBi and mask; 0 leaves them.
        sinks: ``[H]``, q's dtype or float32: one more score for each head that takes a share of the softmax and has no
            value. It is neither scaled nor capped.
        alibi_slopes: ``[H]`` or ``[B, H]``, float32: ``slope * |p - j|`` is subtracted from the score. Not
            differentiable.
        mask: What broadcasts to ``[B, H, Sq, Sk]``: bool, where True may attend, or q's dtype or float32, added to the
            scores, where -inf hides. Any strides; never expanded in memory. Not differentiable.
        q_scale, k_scale, v_scale: ``[B or 1, H]``, ``[B or 1, Hk]``, ``[B or 1, Hk]``, float32, for float8 alone:
            they multiply the stored values to give the real ones.
        return_lse: Return the logarithm of the softmax's denominator too.

    Returns:
        ``[B, Sq, H, Dv]`` of q's dtype (bfloat16 for float8), contiguous; with `return_lse` ``(out, lse)``, where lse
        is ``[B, H, Sq]``, float32, the natural logarithm of ``sum(exp(score))``, with the sink's where there is one.
        Both are differentiable, once. A query that sees no key gives exactly 0 and -inf (with sinks, its sink).

    Raises:
        ValueError: a shape, stride, device or option does not fit.
        TypeError: a dtype or the type of an option is not one of the above.
        NotImplementedError: D or Dv is not a multiple of 8 up to 256 or MAX_D = 512, mask, alibi_slopes or a scale
            requires a gradient, or a float8 tensor does.

    Numerics: products accumulate in float32, the softmax is float32, out is rounded once; on a GPU the weights are
        rounded to q's dtype before they meet the values (float8: to 16 bits). float32 products are not rounded to TF32.
        Tensor cores add float8 products with 13 fraction bits, so that lse may be off by D * 2**-18 of the largest
        score. Gradients add up in float32 in a fixed order. The same call gives the same bits. NaN in k where a query
        may not look changes nothing for that query, bitwise, nor does NaN in v at keys that no query of the sequence
        sees. NaN in v at a key that some query sees may reach the other queries of the same sequence and head: a tile
        multiplies it by 0.
    Runs on: CUDA 8.0 and newer (Triton), float8 8.9 and newer; on sm_90a 64 queries and more without mask and ALiBi by
        a kernel of its own (TMA, WGMMA); elsewhere torch, with memory linear in Sk.
    From: Dao et al., "FlashAttention: Fast and Memory-Efficient Exact Attention with IO-Awareness", 2022,
        https://arxiv.org/abs/2205.14135
    """
    given = q, k, v, sinks, alibi_slopes, mask, q_scale, k_scale, v_scale, softmax_scale, causal, window_size, softcap
    operator = _registered.attention
    done = operator.again(*given) if return_lse else operator.again_first(*given)
    if done is not None:
        return done
    args = _options.of_attention(*given)
    sizes = checks.bind_shapes("attention", q=(q, "B Sq H D"), k=(k, "B Sk Hk D"), v=(v, "B Sk Hk Dv"))
    tables = sinks, alibi_slopes, q_scale, k_scale, v_scale
    _options.check("attention", {"q": q, "k": k, "v": v}, sizes, sizes["B"], *tables, args[9:])
    _options.check_mask("attention", args[5], q, sizes)
    out, lse = operator(*args)
    return (out, lse) if return_lse else out


def attention_varlen(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, *, softmax_scale=None, causal=False,
    window_size=(-1, -1), softcap=0.0, sinks=None, alibi_slopes=None, q_scale=None, k_scale=None, v_scale=None,
    return_lse=False,
):  # fmt: skip
    """Attend within each of several sequences that lie packed one after another.

    Sequence b has the queries ``cu_seqlens_q[b] <= i < cu_seqlens_q[b + 1]`` and the keys of ``cu_seqlens_k`` likewise;
    for it the result is that of `attention`. Any length may be zero.

    Args:
        q: ``[Tq, H, D]``, dtype and strides as in `attention`.
        k: ``[Tk, Hk, D]``, q's dtype.
        v: ``[Tk, Hk, Dv]``, q's dtype.
        cu_seqlens_q, cu_seqlens_k: ``[B + 1]``, int32, on q's device: running sums of the lengths, from 0 to Tq and Tk.
        max_seqlen_q, max_seqlen_k: The longest lengths, or more.
        softmax_scale, causal, window_size, softcap, sinks, alibi_slopes, return_lse: As in `attention`.
        q_scale, k_scale, v_scale: As in `attention`, a row for each sequence.

    Returns:
        ``[Tq, H, Dv]`` of q's dtype (bfloat16 for float8), contiguous; with `return_lse` ``(out, lse)`` with lse
        ``[H, Tq]``, float32.

    Raises:
        ValueError: a shape, stride, device or option does not fit; with FUSEDOPS_VALIDATE=2 also cu_seqlens that do not
            rise from 0 to the total, and a max_seqlen that is too small.
        TypeError: a dtype or the type of an option is not one of the above.
        NotImplementedError: as in `attention`.

    Numerics: as `attention`. NaN in one sequence never reaches another.
    Runs on: CUDA 8.0 and newer (Triton), float8 8.9 and newer; elsewhere torch, one sequence after another.
    From: Dao et al., "FlashAttention: Fast and Memory-Efficient Exact Attention with IO-Awareness", 2022,
        https://arxiv.org/abs/2205.14135
    """
    lengths = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
    scales = q_scale, k_scale, v_scale
    given = q, k, v, *lengths, sinks, alibi_slopes, None, *scales, softmax_scale, causal, window_size, softcap
    operator = _registered.attention_varlen
    done = operator.again(*given) if return_lse else operator.again_first(*given)
    if done is not None:
        return done
    args = _options.of_attention_varlen(*given)
    sizes = checks.bind_shapes(
        "attention_varlen", q=(q, "Tq H D"), k=(k, "Tk Hk D"), v=(v, "Tk Hk Dv"), cu_seqlens_q=(cu_seqlens_q, "B+1"),
        cu_seqlens_k=(cu_seqlens_k, "B+1"),
    )  # fmt: skip
    _options.check_lengths("attention_varlen", sizes, *lengths)
    tables = sinks, alibi_slopes, *scales
    _options.check("attention_varlen", {"q": q, "k": k, "v": v}, sizes, sizes["B+1"] - 1, *tables, args[13:])
    out, lse = operator(*args)
    return (out, lse) if return_lse else out


def merge_attention(out_a, lse_a, out_b, lse_b):
    """Join the attentions of the same queries over two disjoint sets of keys.

    ``lse = log(exp(lse_a) + exp(lse_b))``;  ``out = exp(lse_a - lse) * out_a + exp(lse_b - lse) * out_b``

    Args:
        out_a: ``[..., S, H, Dv]``, float16, bfloat16 or float32; the last dimension is contiguous.
        lse_a: ``[..., H, S]``, float32: as `attention` and `attention_varlen` return it. -inf is an empty set, whose
            out is not looked at.
        out_b, lse_b: The same for the other set. At most one of the two may count a sink.

    Returns:
        ``(out, lse)``, contiguous, out of out_a's shape and dtype. Two empty sets give 0 and -inf. Not differentiable.

    Raises:
        ValueError: a shape, stride or device does not fit.
        TypeError: a dtype is not one of the above.

    Numerics: in float32, rounded once.
    Runs on: CUDA 8.0 and newer (Triton); elsewhere torch.
    From: Ye et al., "Cascade Inference", 2024, https://flashinfer.ai/2024/02/02/cascade-inference.html
    """
    args = out_a, lse_a, out_b, lse_b
    done = _registered.merge_attention.again(*args)
    if done is not None:
        return done
    checks.bind_shapes(
        "merge_attention", out_a=(out_a, "... S H Dv"), lse_a=(lse_a, "... H S"), out_b=(out_b, "... S H Dv"),
        lse_b=(lse_b, "... H S"),
    )  # fmt: skip
    checks.check_float("merge_attention", out_a=out_a, out_b=out_b)
    _options.check_lse("merge_attention", lse_a=lse_a, lse_b=lse_b)
    checks.check_rows("merge_attention", out_a=out_a, out_b=out_b)
    return _registered.merge_attention(*args)
