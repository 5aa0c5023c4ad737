"""The interface of write_kv_cache and rotary_write_kv_cache: bad arguments, torch's own checks, what explain tells."""

import pytest
import torch

import fusedops
from fusedops import counters, rotary_write_kv_cache, write_kv_cache
from fusedops._core import env
from fusedops.testing import make_tensor
from tests.ops.common import assert_compiles, assert_fake_like_real, opcheck
from tests.ops.test_write_kv_cache import data_of

# ---- rejects

K, V = data_of(4, dim=16)
KC, VC = torch.zeros(3, 8, 2, 16), torch.zeros(3, 8, 2, 16)
K8, V8, SLOTS = KC.to(torch.int8), VC.to(torch.int8), torch.arange(4)
COS = torch.ones(4, 8)
BOTH = torch.zeros(3, 8, 2, 32)
REJECTS = [
    (lambda: write_kv_cache(K, [1], KC, VC, SLOTS), TypeError, "write_kv_cache: v must be a torch.Tensor, got list"),
    (lambda: write_kv_cache(K, V[:3], KC, VC, SLOTS), ValueError, r"v must have shape \[T, Hk, Dv\] with T=4, Hk=2"),
    (lambda: write_kv_cache(K, V, KC[..., :8], VC, SLOTS), ValueError, "k_cache must have shape .* D=16, got"),
    (lambda: write_kv_cache(K, V, KC, VC[:2], SLOTS), ValueError, "v_cache must have shape .* num_pages=3"),
    (lambda: write_kv_cache(K, V, KC, VC, SLOTS[:3]), ValueError, r"slot_mapping must have shape \[T\] with T=4"),
    (lambda: write_kv_cache(K, V, KC, VC, SLOTS.int()), TypeError, "slot_mapping must be int64, got int32"),
    (lambda: write_kv_cache(K, V, KC, VC, SLOTS.to("meta")), ValueError, "slot_mapping must be on cpu, got meta"),
    (lambda: write_kv_cache(K, V.half(), KC, VC, SLOTS), TypeError, "v must be float32, got float16"),
    (lambda: write_kv_cache(K.double(), V, KC, VC, SLOTS), TypeError, "k must be float16, bfloat16 or float32"),
    (lambda: write_kv_cache(K, V, KC.half(), VC.half(), SLOTS), TypeError, "k_cache must be float32, int8 or float8"),
    (lambda: write_kv_cache(K, V, K8, VC, SLOTS), TypeError, "v_cache must be int8, got float32"),
    (lambda: write_kv_cache(K, V, KC.mT.contiguous().mT, VC, SLOTS), ValueError, "k_cache must have a contiguous last"),
    (lambda: write_kv_cache(K, V, KC[:, :7], VC[:, :7], SLOTS), NotImplementedError, "MAX_PAGE = 256, got 7"),
    (lambda: write_kv_cache(K, V, KC[:, :0], VC[:, :0], SLOTS), NotImplementedError, "page_size must be 1 .* got 0"),
    (lambda: write_kv_cache(K, V, *[KC.new_zeros(1, 544, 2, 16) for _ in "kv"], SLOTS), NotImplementedError, "got 544"),
    (lambda: write_kv_cache(*[torch.zeros(1, 1, 1032)] * 2, *[torch.zeros(1, 8, 1, 1032)] * 2, SLOTS[:1]),
     NotImplementedError, "D must be at most MAX_D = 1024, got 1032"),
    (lambda: write_kv_cache(K, V, KC, VC, SLOTS, k_scale=torch.ones(1)), ValueError, "k_scale must be None unless"),
    (lambda: write_kv_cache(K, V, K8, V8, SLOTS, v_scale=torch.ones(3)), ValueError, "v_scale must have shape .* got"),
    (lambda: write_kv_cache(K, V, K8, V8, SLOTS, v_scale=torch.ones(2).half()), TypeError, "v_scale must be float32"),
    (lambda: write_kv_cache(K, V, K8, V8, SLOTS, k_scale=0.5), TypeError, "k_scale must be a torch.Tensor, got float"),
    (lambda: write_kv_cache(K, V, KC[:1].expand(3, 8, 2, 16), VC, SLOTS), ValueError, "k_cache must not overlap"),
    (lambda: write_kv_cache(K, V, KC, KC, SLOTS), ValueError, "v_cache must not be the memory of k_cache"),
    (lambda: write_kv_cache(KC[0, :4], V, KC, VC, SLOTS), ValueError, "k_cache must not share memory with k"),
    (lambda: write_kv_cache(K.clone().requires_grad_(), V, KC, VC, SLOTS), RuntimeError, "k must not require a grad"),
    (lambda: rotary_write_kv_cache(K, K, V, COS[:, :7], COS[:, :7], KC, VC, SLOTS), ValueError, "even last size"),
    (lambda: rotary_write_kv_cache(K, K, V, COS, COS[:3], KC, VC, SLOTS), ValueError, r"sin must have shape \[T, R\]"),
    (lambda: rotary_write_kv_cache(K, K, V, COS.half(), COS, KC, VC, SLOTS), TypeError, "cos must be float32, got"),
    (lambda: rotary_write_kv_cache(K.half(), K, V, COS, COS, KC, VC, SLOTS), TypeError, "k must be float16, got"),
    (lambda: rotary_write_kv_cache(K, K, V, COS, COS, KC, VC, SLOTS, interleaved=1), TypeError, "must be a bool, got"),
]  # fmt: skip


@pytest.mark.parametrize("call, error, message", REJECTS)
def test_rejects(call, error, message):
    with pytest.raises(error, match=message):
        call()
    assert not counters() and not KC.any() and not VC.any(), "something ran before the checks had passed"


@pytest.mark.parametrize("slot", [24, -2, 2**40])
def test_level_2_reads_the_slots(slot):
    slots = torch.tensor([0, 1, slot, -1])
    with env.override("FUSEDOPS_VALIDATE", "2"):
        with pytest.raises(ValueError, match=f"slot_mapping must hold -1 or slots from 0 to 23, got {slot}"):
            write_kv_cache(K, V, KC.clone(), VC.clone(), slots)
        with pytest.raises(ValueError, match="k_scale must be finite and above 0"):
            write_kv_cache(K, V, K8.clone(), V8.clone(), SLOTS, k_scale=torch.tensor(0.0))
        write_kv_cache(K, V, KC.clone(), VC.clone(), SLOTS)


# ---- torch


def test_opcheck():
    for caches, scales in (((KC, VC), (None, None)), ((K8, V8), (torch.ones(3, 8, 2), torch.ones(2)))):
        caches = [cache.clone() for cache in caches]
        opcheck("write_kv_cache", K, V, *caches, SLOTS, *scales)
        opcheck("rotary_write_kv_cache", K, K, V, COS, COS, *caches, SLOTS, False, *scales)


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "padded", "sliced"])
def test_fake_strides_are_the_real_ones(layout):
    q = make_tensor((4, 6, 16), torch.float32, seed=0, layout=layout)
    caches = KC.clone(), VC.clone()
    assert_fake_like_real("rotary_write_kv_cache", q, K, V, COS, COS, *caches, SLOTS, True, None, None)


def test_torch_compile():
    def function(k, v, cos, slots):
        both = k.new_zeros(3, 2, 8, 2, 16)
        turned = rotary_write_kv_cache(k * 2, k, v, cos, cos, both[:, 0], both[:, 1], slots)
        write_kv_cache(turned, v, both[:, 0], both[:, 1], slots + 8)
        return turned, both + 1

    def arguments(number):
        k, v = data_of(number, dim=16, seed=number)
        return k, v, torch.ones(number, 8), torch.arange(number)

    assert_compiles(function, arguments(4), arguments(6), backend="inductor")  # which may write in place again


def test_cost_counts_every_byte():
    told = fusedops.explain("write_kv_cache", K, V, K8, V8, SLOTS, k_scale=torch.ones(3, 8, 2))
    assert told.bytes == 2 * K.numel() * 5 + 8 * 4 + 4 * 8
