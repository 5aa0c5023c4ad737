"""Each kernel as it is compiled for sm_80 and sm_90a, in every order of its threads: no report, and the same bits."""

import pytest
import torch

import fusedops
from fusedops.ops.compress_24 import reference as compression
from fusedops.ops.weight_only_matmul import reference
from fusedops.testing import Budget, assert_accurate, make_tensor, ptx
from tests.ops.common import EMULATED, using
from tests.ops.matmul_problems import call_of
from tests.ops.test_rotary import angles
from tests.ops.weight_problems import weight_of

pytestmark = pytest.mark.emulated

DTYPE = torch.bfloat16


def leaf(*shape, seed=0):
    return make_tensor(shape, DTYPE, seed=seed).requires_grad_()


def heads(length, count, seed, dim=64):
    return leaf(1, length, count, dim, seed=seed)


def attend(queries, keys, **options):
    """Two query heads for one of the keys."""
    q, k, v = heads(queries, 2, 0), heads(keys, 1, 1), heads(keys, 1, 2)
    return fusedops.attention(q, k, v, **options), (q, k, v)


def norm(function, *more):
    x, weight = leaf(3, 300), leaf(300, seed=1)
    return function(x, weight, *more), (x, weight)


def gate(function, **options):
    a, b = leaf(3, 300), leaf(3, 300, seed=1)
    return function(a, b, **options), (a, b)


def rotate():
    q, k = heads(5, 4, 0), heads(5, 2, 1)
    return torch.cat(fusedops.rotary(q, k, *angles(5, 64, DTYPE)), 2), (q, k)


def merge():
    outs, lses = zip(*(attend(5, 20 + i, return_lse=True)[0] for i in range(2)))
    with torch.no_grad():
        return fusedops.merge_attention(outs[0], lses[0], outs[1], lses[1])[0], ()


def packed():
    q, k, v = (make_tensor((70, 2, 64), DTYPE, seed=i) for i in range(3))
    starts = torch.tensor([0, 33, 70], dtype=torch.int32)
    return fusedops.attention_varlen(q, k, v, starts, starts, 37, 37, causal=True), ()


def cache(pages=12, size=8):
    return make_tensor((2, pages, size, 2, 64), DTYPE, seed=5).unbind(0)


def paged(queries, length, **options):
    """Two sequences with their pages in any order."""
    table = torch.randperm(12, generator=torch.Generator().manual_seed(0)).int().view(2, 6)
    starts = torch.tensor([0, queries, 2 * queries], dtype=torch.int32)
    lengths = torch.tensor([length, queries], dtype=torch.int32)
    q = make_tensor((2 * queries, 4, 64), DTYPE, seed=0)
    batch = {"cu_seqlens_q": starts, "max_seqlen_q": queries} if queries > 1 else {}
    return fusedops.paged_attention(q, *cache(), table, lengths, **batch, **options), ()


def write(function, *tables, **scales):
    """Five tokens, of which one is skipped."""
    k, v, q = (make_tensor((5, 2, 64), DTYPE, seed=i) for i in range(3))
    k_cache, v_cache = cache()
    if scales:
        k_cache, v_cache = (torch.zeros(x.shape, dtype=torch.int8) for x in (k_cache, v_cache))
    slots = torch.tensor([3, 95, -1, 0, 17])
    function(*((q,) if tables else ()), k, v, *tables, k_cache, v_cache, slots, **scales)
    return torch.stack([k_cache.float(), v_cache.float()]), ()


def scales():
    return {name: torch.zeros(12, 8, 2) for name in ("k_scale", "v_scale")}


def quantize(function, shape=(3, 300), tensors=1, **options):
    """Codes, then the scales, of as many tensors."""
    rows = [make_tensor(shape, DTYPE, seed=i) for i in range(tensors)]
    codes, scale, *_ = function(*rows, **options)
    return torch.cat([codes.float().flatten(), scale.flatten()]), ()


def multiply(op, kind, *sizes, gated=False):
    """With bias, activation and residual; a ring of tiles goes round at four programs."""
    call = call_of(op, *sizes, (kind, kind), 0, DTYPE, DTYPE, "silu", True, gated=gated)
    return call.run(), ()


def weigh(rows, kind, columns=600, gated=False):
    """By weights of 40 rows; few rows of x and long ones of the weight are summed in parts."""
    values, scale, zero = weight_of(kind, 40, columns, group=64)
    shapes = (rows, columns), (40,), (rows, 40 // (1 + gated))
    x, bias, residual = (make_tensor(shape, DTYPE, seed=1) for shape in shapes)
    options = {"zero": zero, "bias": bias, "residual": residual, "activation": "silu", "gated": gated}
    return fusedops.weight_only_matmul(x, values, scale, **options), ()


def sparse(rows, dtype=DTYPE, columns=1100):
    """By compressed weights of 40 rows; few rows of a and long ones of the weight are summed in parts."""
    a, weight = (make_tensor((n, columns), torch.float32, seed=n) for n in (rows, 40))
    a, weight = ((t * 8).round().clamp(-127, 127).to(dtype) for t in (a, weight))
    options = {"bias": make_tensor((40,), torch.float32, seed=1), "activation": "silu"}
    if dtype.itemsize == 1:
        options |= {"scale_a": torch.rand(rows) / 64, "scale_b": torch.rand(40) / 64}
    return fusedops.sparse_matmul(a, *compression.compress_24(compression.prune_24(weight, None)), **options), ()


def four_bits():
    return reference.dequantized(*fusedops.quantize_int4(leaf(4, 100).detach()), 100, DTYPE), ()


CALLS = {
    "rms_norm": lambda: norm(fusedops.rms_norm),
    "layer_norm": lambda: norm(fusedops.layer_norm, torch.zeros(300, dtype=DTYPE)),
    "silu_mul": lambda: gate(fusedops.silu_mul),
    "gelu_mul": lambda: gate(fusedops.gelu_mul, approximate="tanh"),
    "rotary": rotate,
    "attention": lambda: attend(70, 150, causal=True),
    "attention, many options": lambda: attend(33, 40, window_size=(20, 3), softcap=5.0, sinks=torch.zeros(2)),
    "attention with a mask": lambda: attend(20, 40, mask=torch.rand(1, 2, 20, 40) > 0.3),
    "attention of one query over many keys": lambda: attend(1, 600),
    "merge_attention": merge,
    "attention_varlen": packed,
    "paged_attention, a decoding step": lambda: paged(1, 41),
    "paged_attention, a chunk": lambda: paged(7, 41),
    "paged_attention, splits": lambda: paged(1, 41, num_splits=3),
    "write_kv_cache": lambda: write(fusedops.write_kv_cache),
    "write_kv_cache, quantised": lambda: write(fusedops.write_kv_cache, **scales()),
    "quantize_int8": lambda: quantize(fusedops.quantize_int8),
    "quantize_int8, one scale": lambda: quantize(fusedops.quantize_int8, (30, 2000), granularity="tensor"),
    "quantize_fp8, blocks": lambda: quantize(fusedops.quantize_fp8, granularity="block"),
    "quantize_fp8, blocks of rows": lambda: quantize(fusedops.quantize_fp8, (140, 130), granularity="block_2d"),
    "rms_norm_quantized": lambda: quantize(fusedops.rms_norm_quantized, weight=None),
    "add_rms_norm_quantized, long rows": lambda: quantize(
        fusedops.add_rms_norm_quantized, (2, 16400), 2, weight=None, dtype=torch.float8_e4m3fn
    ),
    "silu_mul_quantized": lambda: quantize(fusedops.silu_mul_quantized, tensors=2),
    "int8_matmul, few rows, pairs": lambda: multiply("int8_matmul", "row", 5, 70, 1040, gated=True),
    "int8_matmul, tiles": lambda: multiply("int8_matmul", "row", 150, 300, 656),
    "fp8_matmul, few rows": lambda: multiply("fp8_matmul", "block", 5, 70, 1040),
    "fp8_matmul, few rows, pairs": lambda: multiply("fp8_matmul", "block", 5, 70, 400, gated=True),
    "fp8_matmul, tiles, pairs": lambda: multiply("fp8_matmul", "block", 150, 300, 912, gated=True),
    "weight_only_matmul, one row": lambda: weigh(1, "int8 row", 1100),
    "weight_only_matmul, float8, pairs": lambda: weigh(17, "fp8 block", 200, gated=True),
    "weight_only_matmul, 4 bits, pairs": lambda: weigh(3, "int4 group", gated=True),
    "weight_only_matmul, many rows": lambda: weigh(70, "int8 row", 130),
    "sparse_matmul, one row": lambda: sparse(1),
    "sparse_matmul, many rows": lambda: sparse(70, columns=200),
    "sparse_matmul, integers": lambda: sparse(3, torch.int8),
    "sparse_matmul, float8": lambda: sparse(17, torch.float8_e4m3fn, 200),
    "quantize_int4": four_bits,
    "rotary_write_kv_cache": lambda: write(fusedops.rotary_write_kv_cache, *(t[0] for t in angles(5, 64, DTYPE))),
}


def results(call):
    """Outputs, and gradients where there is a backward pass."""
    torch.manual_seed(0)
    out, inputs = call()
    grads = torch.autograd.grad(out, inputs, torch.ones_like(out)) if inputs else ()
    return [tensor.detach() for tensor in (out, *grads)]


@pytest.mark.parametrize("implementation", EMULATED)
@pytest.mark.parametrize("name", CALLS)
def test_every_schedule_gives_the_same_bits(name, implementation):
    """And these are what torch computes, within what both may round; in one of the two, terms may cancel wholly."""
    with ptx.diverted(schedules="all"), using(implementation):
        found = results(CALLS[name])
    with using("torch"):
        expected = results(CALLS[name])
    one = Budget.for_dtype(DTYPE)
    both = Budget(rms=2 * one.rms, peak=2 * one.peak)
    for got, wanted in zip(found, expected, strict=True):
        assert wanted.count_nonzero() > 0
        assert_accurate(got.to(DTYPE), wanted.double(), budget=both, zeros=False)
