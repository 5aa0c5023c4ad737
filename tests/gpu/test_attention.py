"""Attention on a GPU: every head size, option, length and layout against float64 on the device."""

import re

import pytest
import torch

from fusedops import attention, attention_varlen, explain, merge_attention
from fusedops._core import env
from fusedops.testing import Budget, assert_accurate
from fusedops.testing.inputs import huge_stride_rows
from tests.gpu.common import DEVICE, needs_gpu, randn, sized, truth
from tests.ops.common import using

pytestmark = pytest.mark.gpu

BF16, FP16, FP32, FP8 = torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn
NOT_FP8 = "needs float8 products, compute capability 8.9 or newer"
needs_fp8 = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9), reason=NOT_FP8
)


def qkv(batch, lengths, heads, dims, dtype=BF16, seed=0):
    """q, k, v of (Sq, Sk), (H, Hk) and (D, Dv), laid out as a model has them: heads outside."""
    (num_queries, num_keys), (num_heads, kv_heads), (dim, dim_v) = lengths, heads, dims
    shapes = (num_heads, num_queries, dim), (kv_heads, num_keys, dim), (kv_heads, num_keys, dim_v)
    return tuple(randn(batch, *s, dtype=dtype, seed=seed + i).transpose(1, 2) for i, s in enumerate(shapes))


def lse_budget(q):
    """Of float32; but tensor cores add 32 products of 8-bit numbers at a time, and keep 13 fraction bits of their sum.

    D / 32 additions may each lose 2**-13 of the largest: 32 * D float32 epsilons at most, a quarter of that on average.
    """
    return Budget(rms=8 * q.shape[-1], peak=32 * q.shape[-1]) if q.dtype == FP8 else None


def check(function, *args, by="triton", **options):
    """Compare out and lse with float64, and two calls with each other, bit by bit."""
    with using(by):
        out, lse = function(*args, return_lse=True, **options)
        again = function(*args, return_lse=True, **options)
    wanted_out, wanted_lse = truth(function, *args, **options)
    assert_accurate(out, wanted_out, name="out", zeros=False)
    assert_accurate(lse, wanted_lse, name="lse", zeros=False, budget=lse_budget(args[0]))
    assert torch.equal(out, again[0]) and torch.equal(lse, again[1])
    hidden = (wanted_lse == float("-inf")).mT[..., None]
    assert not out.masked_fill(~hidden, 0).any()
    return out


# ---- every head size and dtype


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    "dims", [(d, d) for d in (40, 64, 72, 80, 96, 104, 128, 192, 256, 512)] + [(192, 128), (64, 256)], ids=str
)
def test_head_sizes(dims, causal):
    check(attention, *qkv(2, sized((385, 515), (3, 37)), (4, 2), dims), causal=causal)


@pytest.mark.parametrize("dim", [64, 80, 128, 256])
@pytest.mark.parametrize("dtype", [FP16, FP32])
def test_dtypes(dtype, dim):
    check(attention, *qkv(2, sized((257, 300), (3, 37)), (4, 2), (dim, dim), dtype), causal=True)


@needs_fp8
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_float8(dim, scaled):
    tensors = qkv(2, sized((385, 515), (3, 37)), (4, 2), (dim, dim), FP8)
    scales = {f"{name}_scale": randn(2, 4 if name == "q" else 2, dtype=FP32).abs() + 0.5 for name in "qkv"}
    check(attention, *tensors, causal=True, **(scales if scaled else {}))


@needs_fp8
def test_float8_does_not_lose_accuracy_with_length():
    """The budget is that of 500 keys: sums kept in fewer bits than float32 grow with the length."""
    check(attention, *qkv(1, sized((64, 131072), (2, 300)), (2, 1), (128, 128), FP8))


# ---- every option

SQ, SK = sized((300, 333), (5, 41))
OPTIONS = {
    "window": {"window_size": (40, 17)},
    "causal window": {"causal": True, "window_size": (127, 0)},
    "window of one": {"window_size": (0, 0)},
    "softcap": {"causal": True, "softcap": 5.0},
    "scale": {"softmax_scale": 0.3},
    "negative scale": {"softmax_scale": -0.3},
    "sinks": {"causal": True, "sinks": (8,)},
    "sinks in a window": {"window_size": (9, 0), "sinks": (8,)},
    "alibi": {"causal": True, "alibi_slopes": (8,)},
    "alibi of each sequence": {"alibi_slopes": (2, 8)},
    "bool mask": {"mask": (2, 1, SQ, SK)},
    "bool padding mask": {"mask": (2, 1, 1, SK)},
    "bool mask of each head": {"mask": (1, 8, SQ, SK), "causal": True},
    "additive mask": {"mask": (2, 1, SQ, SK)},
    "additive mask of each head": {"mask": (8, SQ, SK), "causal": True},
    "everything": {
        "causal": True, "window_size": (63, 0), "softcap": 8.0, "sinks": (8,), "alibi_slopes": (2, 8),
        "mask": (2, 1, SQ, SK),
    },
}  # fmt: skip


def with_tensors(options, name, dtype=BF16):
    """The options with tensors in place of shapes. Masks hide a third of the pairs, and the first query's row."""
    options = dict(options)
    for index, key in enumerate(("sinks", "alibi_slopes", "mask")):
        if key not in options:
            continue
        values = randn(*options[key], dtype=FP32 if key == "alibi_slopes" else dtype, seed=90 + index)
        if key == "alibi_slopes":
            values = values.abs() / 8
        elif key == "mask":
            hidden = values > 0.4
            if values.shape[-2] > 1:
                hidden[..., 0, :] = True
            values = ~hidden if name.startswith("bool") else values.masked_fill(hidden, float("-inf"))
        options[key] = values
    return options


@pytest.mark.parametrize(
    "name,dim", [(name, 128) for name in OPTIONS] + [(name, 64) for name in ("causal window", "sinks", "everything")]
)
def test_options(name, dim):
    check(attention, *qkv(2, (SQ, SK), (8, 2), (dim, dim)), **with_tensors(OPTIONS[name], name))


@pytest.mark.parametrize("lengths", sized([(1, 1), (515, 130), (64, 64), (129, 1), (128, 4096)], [(1, 1), (7, 3)]))
@pytest.mark.parametrize("heads", [(8, 8), (8, 1), (12, 4)])
def test_lengths_and_groups(lengths, heads):
    """More queries than keys: under the causal rule the first ones see nothing."""
    check(attention, *qkv(1, lengths, heads, (128, 128)), causal=True)


# ---- packed sequences

PACKED_HEADS = (0, 8), (1, 2), (1, 2)  # (side of the lengths, heads) of q, k and v
VARLEN = sized(([0, 5, 130, 0, 1, 257], [3, 5, 64, 7, 0, 300]), ([0, 2, 5, 1], [3, 2, 0, 9]))


def packed(lengths=VARLEN, dim=128, dtype=BF16):
    """q, k, v and what says where the sequences begin, of (lengths of queries, of keys)."""
    totals = [sum(side) for side in lengths]
    starts = [torch.tensor([0, *side], device=DEVICE).cumsum(0).int() for side in lengths]
    q, k, v = (
        randn(totals[side], heads, dim, dtype=dtype, seed=seed) for seed, (side, heads) in enumerate(PACKED_HEADS)
    )
    return (q, k, v, *starts, *(max(side) for side in lengths))


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"causal": True, "window_size": (31, 0), "sinks": (8,)}])
@pytest.mark.parametrize("dim", [64, 128])
def test_packed_sequences(options, dim):
    check(attention_varlen, *packed(dim=dim), **with_tensors(options, "varlen"))


def test_packed_sequences_do_not_see_each_other():
    q, k, v, *lengths = packed()
    with using("triton"):
        clean = attention_varlen(q, k, v, *lengths)
        k, v = k.clone(), v.clone()
        k[-VARLEN[1][-1] :], v[-VARLEN[1][-1] :] = float("nan"), float("nan")
        spoiled = attention_varlen(q, k, v, *lengths)
    others = q.shape[0] - VARLEN[0][-1]
    assert torch.equal(clean[:others], spoiled[:others]) and spoiled[others:].isnan().all()


# ---- decode and split keys

DECODE = [((1, sized(8195, 600)), {}), ((4, sized(8195, 600)), {"causal": True}), ((1, sized(70001, 700)), {})]


@pytest.mark.parametrize("lengths,options", DECODE)
@pytest.mark.parametrize("dim", [64, 128])
def test_decode_with_split_keys(lengths, options, dim):
    tensors = qkv(sized(2, 1), lengths, (8, 2), (dim, dim))
    with using("triton"):
        attention(*tensors, **options)
    assert int(re.search(r"num_splits=(\d+)", configuration(tensors, options))[1]) > 1
    check(attention, *tensors, sinks=randn(8), **options)


def configuration(tensors, options):
    """What the Triton implementation would run."""
    with env.override("FUSEDOPS_BACKEND", "triton"):
        return explain("attention", *tensors, **options).config


def test_decode_in_a_window():
    check(attention, *qkv(3, (1, sized(5000, 200)), (8, 2), (128, 128)), causal=True, window_size=(sized(4095, 63), 0))


def test_two_halves_merge_to_the_whole():
    q, k, v = qkv(2, (3, sized(4096, 64)), (8, 2), (128, 128), FP32)
    half = k.shape[1] // 2
    with using("triton"):
        parts = [attention(q, k[:, s], v[:, s], return_lse=True) for s in (slice(half), slice(half, None))]
        out, lse = merge_attention(*parts[0], *parts[1])
    wanted_out, wanted_lse = truth(attention, q, k, v)
    assert_accurate(out, wanted_out, zeros=False)
    assert_accurate(lse, wanted_lse, zeros=False)


# ---- long sequences and large memory


@pytest.mark.parametrize("length", sized([32767, 32768, 32769, 131072], [127, 129]))
def test_long_sequences(length):
    """B11: facebookresearch/xformers#719, positions in 16 bits. Rows at the start, in the middle and at the end."""
    q, k, v = qkv(1, (length, length), (2, 1), (64, 64))
    with using("triton"):
        out = attention(q, k, v, causal=True)
    for first in (0, length // 2, length - 8):
        end = first + 8
        wanted = truth(attention, q[:, first:end], k[:, :end], v[:, :end], causal=True)[0]
        assert_accurate(out[:, first:end], wanted, name=f"rows from {first}", zeros=False)


@needs_gpu
@pytest.mark.parametrize("far", ["q", "k", "v"])
def test_elements_more_than_two_to_the_31_apart(far):
    """B12: triton-lang/triton#832."""
    tensors = dict(zip("qkv", qkv(2, (33, 65), (2, 2), (128, 128)), strict=True))
    value = tensors[far].contiguous()
    tensors[far] = huge_stride_rows(value.flatten(1), device=DEVICE).unflatten(1, value.shape[1:])
    check(attention, *tensors.values(), causal=True)


@needs_gpu
def test_output_of_more_than_two_to_the_31_elements():
    q = randn(1, 1, 64, 128).expand(1, 2**18 + 3, 64, 128)
    k, v = randn(1, 33, 8, 128, seed=1), randn(1, 33, 8, 128, seed=2)
    with using("triton"):
        out = attention(q, k, v)
    wanted = truth(attention, q[:, :1], k, v)[0]
    for row in (0, 2**17 + 1, 2**18 + 2):
        assert_accurate(out[:, row : row + 1], wanted, name=f"row {row}", zeros=False)


# ---- what is hidden does not exist


@pytest.mark.parametrize("hider", ["mask", "window"])
def test_nan_at_hidden_keys_changes_nothing(hider):
    num_queries, num_keys = sized((65, 300), (3, 41))
    q, k, v = (t.contiguous() for t in qkv(2, (num_queries, num_keys), (8, 2), (128, 128)))
    hidden = torch.zeros(num_keys, dtype=torch.bool, device=DEVICE)
    if hider == "mask":
        hidden[num_keys // 2 :] = True
        options = {"mask": (~hidden)[None, None, None]}
    else:
        hidden[: num_keys - num_queries - 10] = True
        options = {"causal": True, "window_size": (10, 0)}
    with using("triton"):
        clean = attention(q, k, v, **options)
        k[:, hidden], v[:, hidden] = float("nan"), float("nan")
        spoiled = attention(q, k, v, **options)
    assert torch.equal(clean, spoiled)


def test_nan_in_a_key_reaches_only_the_queries_that_see_it():
    q, k, v = (t.contiguous() for t in qkv(1, sized((200, 200), (7, 7)), (8, 2), (128, 128)))
    with using("triton"):
        clean = attention(q, k, v, causal=True)
        k[:, -1] = float("nan")
        spoiled = attention(q, k, v, causal=True)
    assert torch.equal(clean[:, :-1], spoiled[:, :-1]) and spoiled[:, -1].isnan().all()
