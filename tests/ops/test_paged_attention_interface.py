"""paged_attention: what it refuses, and torch's own checks."""

import pytest
import torch

from fusedops import counters, explain, paged_attention
from fusedops._core import env
from fusedops._core.register import operators
from fusedops.testing import make_tensor
from tests.ops.common import DTYPES, assert_compiles, assert_fake_like_real, opcheck, using
from tests.ops.paged_problems import FP8, packed_bits, problem

Q, KC, VC = torch.randn(2, 4, 16), torch.randn(3, 8, 2, 16), torch.randn(3, 8, 2, 16)
TABLE, LENS = torch.tensor([[0, 1], [2, 9]], dtype=torch.int32), torch.tensor([9, 8], dtype=torch.int32)
STARTS = torch.tensor([0, 1, 2], dtype=torch.int32)
BASE = (Q, KC, VC, TABLE, LENS)
K8, V8 = KC.to(FP8), VC.to(FP8)


def call(*changed, **options):
    """A good call with some of its first arguments replaced."""
    return paged_attention(*changed, *BASE[len(changed) :], **options)


REJECTS = [
    (lambda: call([1]), TypeError, "paged_attention: q must be a torch.Tensor, got list"),
    (lambda: call(Q[0]), ValueError, r"q must have shape \[T, H, D\], got \[4, 16\]"),
    (lambda: call(Q, KC[..., :8]), ValueError, "k_cache must have shape .* with D=16, got"),
    (lambda: call(Q, KC, VC[:2]), ValueError, "v_cache must have shape .* num_pages=3"),
    (lambda: call(Q, KC, VC[:, :, :1]), ValueError, "v_cache must have shape .* Hk=2"),
    (lambda: call(Q, KC, VC, TABLE[:1]), ValueError, r"cache_seqlens must have shape \[B\] with B=1, got \[2\]"),
    (lambda: call(Q, KC, VC, TABLE.long()), TypeError, "block_table must be int32, got int64"),
    (lambda: call(Q, KC, VC, TABLE, LENS.long()), TypeError, "cache_seqlens must be int32, got int64"),
    (lambda: call(Q, KC, VC, TABLE, LENS.to("meta")), ValueError, "cache_seqlens must be on cpu, got meta"),
    (lambda: call(Q, KC, VC, TABLE.mT.contiguous().mT), ValueError, "block_table must have a contiguous last"),
    (lambda: call(Q[:1]), ValueError, "q must have one row for each of B=2 sequences without cu_seqlens_q, got 1"),
    (lambda: call(Q.double()), TypeError, "q must be float16, bfloat16 or float32, got float64"),
    (lambda: call(Q.half()), TypeError, "k_cache must be float16, int8 or float8_e4m3fn, got float32"),
    (lambda: call(Q, KC, VC.half()), TypeError, "v_cache must be float32, got float16"),
    (lambda: call(Q[:, :3]), ValueError, "k_cache must have a number of heads Hk that divides H=3, got 2"),
    (lambda: call(Q[..., ::2], KC[..., :8], VC), ValueError, "q must have a contiguous last dimension"),
    (lambda: call(Q, KC[:, :4], VC[:, :4]), NotImplementedError, "page_size must be 1 or a multiple of 8"),
    (lambda: call(Q[..., :12], KC[..., :12], VC), NotImplementedError, "D must be a multiple of 8 up to 256, or"),
    (lambda: call(Q, KC, VC[..., :4]), NotImplementedError, "Dv must be a multiple of 8 .* got 4"),
    (lambda: call(cu_seqlens_q=STARTS), TypeError, "max_seqlen_q must be an integer with cu_seqlens_q, got NoneType"),
    (lambda: call(cu_seqlens_q=STARTS, max_seqlen_q=-1), ValueError, "max_seqlen_q must be at least 0, got -1"),
    (lambda: call(cu_seqlens_q=STARTS[:2], max_seqlen_q=1), ValueError, r"cu_seqlens_q must have shape \[B \+ 1\]"),
    (lambda: call(cu_seqlens_q=STARTS.long(), max_seqlen_q=1), TypeError, "cu_seqlens_q must be int32, got int64"),
    (lambda: call(softmax_scale="1"), TypeError, "softmax_scale must be a number, got str"),
    (lambda: call(softcap=-1.0), ValueError, "softcap must be finite and at least 0"),
    (lambda: call(causal=1), TypeError, "causal must be a bool, got int"),
    (lambda: call(window_size=(-2, 0)), ValueError, "window_size must hold -1"),
    (lambda: call(sinks=torch.ones(2)), ValueError, r"sinks must have shape \[H\] = \[4\], got \[2\]"),
    (lambda: call(alibi_slopes=torch.ones(3, 4)), ValueError, "alibi_slopes must have shape"),
    (lambda: call(k_scale=torch.ones(2)), ValueError, "k_scale must be None unless the cache is int8 or float8"),
    (lambda: call(Q, K8, V8, k_scale=torch.ones(3)), ValueError, r"k_scale must have shape \[\], \[1\], \[Hk\] or"),
    (lambda: call(Q, K8, V8, v_scale=torch.ones(3, 8, 2).half()), TypeError, "v_scale must be float32, got float16"),
    (lambda: call(tree_mask=torch.ones(2, 2, dtype=torch.int32)), ValueError, "tree_mask must have shape .* got"),
    (lambda: call(tree_mask=torch.ones(2, 1)), TypeError, "tree_mask must be int32, got float32"),
    (lambda: call(num_splits=0), ValueError, "num_splits must be from 1 to 128, got 0"),
    (lambda: call(num_splits=True), TypeError, "num_splits must be an integer or None, got bool"),
    (lambda: call(Q.clone().requires_grad_()), NotImplementedError, "q must not require a gradient"),
]  # fmt: skip


@pytest.mark.parametrize("change, error, message", REJECTS)
def test_rejects(change, error, message):
    with pytest.raises(error, match=message):
        change()
    assert not counters(), "something ran before the checks had passed"


DEVICE_VALUES = [
    ({"table": [[0, 3], [2, 9]]}, "block_table must hold page ids from 0 to 2 where tokens are, got 3"),
    ({"table": [[-1, 1], [2, 9]]}, "block_table must hold .* got -1"),
    ({"lengths": [17, 8]}, r"cache_seqlens must be from 0 to 16, as block_table holds, got \[17, 8\]"),
    ({"lengths": [9, -1]}, "cache_seqlens must be from 0 to 16"),
    ({"starts": [0, 2, 1]}, "cu_seqlens_q must rise from 0 to 2"),
    ({"starts": [0, 1, 1]}, "cu_seqlens_q must rise from 0 to 2"),
    ({"starts": [0, 0, 2]}, "max_seqlen_q must be at least the longest length 2, got 1"),
]


@pytest.mark.parametrize("change, message", DEVICE_VALUES)
def test_level_2_reads_what_lies_on_the_device(change, message):
    def tensor(name, usual):
        return torch.tensor(change[name], dtype=torch.int32) if name in change else usual

    with env.override("FUSEDOPS_VALIDATE", "2"):
        for _ in range(2):  # also where a call of the same signature has passed
            with pytest.raises(ValueError, match=message):
                call(Q, KC, VC, tensor("table", TABLE), tensor("lengths", LENS), cu_seqlens_q=tensor("starts", STARTS),
                     max_seqlen_q=1)  # fmt: skip
            call(cu_seqlens_q=STARTS, max_seqlen_q=1)


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
def test_level_2_reads_the_scales(scale):
    with env.override("FUSEDOPS_VALIDATE", "2"), pytest.raises(ValueError, match="v_scale must be finite and above 0"):
        call(Q, K8, V8, v_scale=torch.tensor([1.0, scale]))


# ---- torch


def arguments(dtype=torch.float32, cache="same", **options):
    """Positional arguments of the registered operator."""
    found = problem([(2, 9), (1, 17)], dtype, heads=4, kv_heads=2, seed=1, cache=cache, **options)
    args, kwargs = found.call(page_size=8, filling=0.0)
    names = "cu_seqlens_q", "max_seqlen_q", "sinks", "alibi_slopes", "k_scale", "v_scale", "tree_mask"
    bounds = kwargs.get("window_size", (-1, -1))
    return (*args, *map(kwargs.get, names), 0.25, True, *bounds, 0.0, None)


ALL = {
    "plain": {},
    "sinks": {"sinks": torch.ones(4), "window_size": (5, 0)},
    "tree": {"tree_mask": packed_bits(torch.ones(3, 2, dtype=torch.bool))},
    "int8": {"cache": "int8"},
}


@pytest.mark.parametrize("name", ALL)
def test_opcheck(name):
    opcheck("paged_attention", *arguments(**ALL[name]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "padded", "sliced"])
def test_fake_strides_are_the_real_ones(dtype, layout):
    _, *rest = arguments(dtype)
    assert_fake_like_real("paged_attention", make_tensor((3, 4, 16), dtype, seed=0, layout=layout), *rest)
    assert_fake_like_real("paged_attention", *arguments(dtype, cache="int8"))


def test_torch_compile():
    def function(q, k_cache, v_cache, table, lengths, starts):
        decode = paged_attention(q * 2, k_cache, v_cache, table, lengths, return_lse=True)
        longest = q.shape[0]
        return *decode, paged_attention(q, k_cache, v_cache, table[:1], lengths[:1], cu_seqlens_q=starts,
                                        max_seqlen_q=longest, window_size=(5, 0))  # fmt: skip

    def variant(batch, pages):
        table = torch.arange(batch * pages, dtype=torch.int32).view(batch, pages)
        caches = [make_tensor((batch * pages, 8, 2, 16), torch.float32, seed=seed) for seed in (1, 2)]
        q = make_tensor((batch, 4, 16), torch.float32, seed=3)
        lengths = torch.full((batch,), 8 * pages - 3, dtype=torch.int32)
        return q, *caches, table, lengths, torch.tensor([0, batch], dtype=torch.int32)

    assert_compiles(function, variant(2, 3), variant(5, 4))


def test_no_derivative():
    args = arguments()
    out, _ = torch.ops.fusedops.paged_attention.default(args[0].clone().requires_grad_(), *args[1:])
    with pytest.raises(NotImplementedError, match="paged_attention: the result must not be differentiated"):
        out.sum().backward()


def test_a_second_call_of_the_same_shapes_takes_the_short_way():
    """Other lengths and pages are other values, not another signature."""
    first, second = problem([(1, 9), (1, 17)], seed=2), problem([(1, 20), (1, 9)], seed=3)
    args, _ = first.call(page_size=8)
    first.check(*paged_attention(*args, return_lse=True))
    caches, table = second.call(page_size=8)[0][1:3], second.call(page_size=8)[0][3]
    assert args[3].shape == table.shape and args[1].shape == caches[0].shape
    second.check(*paged_attention(second.q, *caches, table, second.call()[0][4], return_lse=True))
    assert counters()["paged_attention", "torch"] == 2


def test_explain_tells_tile_and_splits():
    q = torch.empty(4, 32, 128, dtype=torch.bfloat16, device="meta")
    cache = torch.empty(512, 16, 8, 128, dtype=torch.bfloat16, device="meta")
    table, lengths = (torch.empty(shape, dtype=torch.int32, device="meta") for shape in ((4, 128), (4,)))
    told = explain("paged_attention", q, cache, cache, table, lengths, target="sm_90a")
    assert told.backend == "triton" and "block_m=16" in told.config and "splits='auto'" in told.config
    assert told.bytes == 2 * 512 * 16 * 8 * 128 * 2 + 4 * 512 + 4 * 32 * (256 * 2 + 4)
    one = explain("paged_attention", q, cache, cache, table, lengths, num_splits=1, target="sm_90a")
    assert "splits='none'" in one.config


def test_the_reference_is_reached_by_name():
    found = problem([(1, 9)], seed=4)
    with using("reference"):
        found.check(*found.run())
    assert set(operators()["paged_attention"].implementations) == {"triton", "torch", "reference"}
