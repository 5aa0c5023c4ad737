"""write_kv_cache, rotary_write_kv_cache."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fusedops import rotary, rotary_write_kv_cache, write_kv_cache
from fusedops.ops.write_kv_cache import reference
from fusedops.testing import assert_accurate, assert_faults_rejected, make_tensor, strategies
from fusedops.testing.faults import Fault
from tests.ops.common import DTYPES, FUSED, IMPLEMENTATIONS, using
from tests.ops.paged_problems import CACHES, FORMATS, FP8, INF, LAYOUTS, NAN, PAGE_SIZES, as_bytes, empty_caches

EVERY_IMPLEMENTATION = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
EVERY_CACHE = pytest.mark.parametrize("cache", CACHES)
MANY = 2 * settings.default.max_examples
KINDS = ("none", "tensor", "head", "token")


class Pool:
    """A cache before anything is written, with a canary page before and after it in the same memory."""

    def __init__(self, k, v, cache, page_size, num_pages=3, layout="apart", kinds=("token", "token")):
        dtype = FORMATS[cache][0] if cache != "same" else k.dtype
        k, v = k.to(dtype), v.to(dtype)
        self.whole = empty_caches(k, v, num_pages + 2, page_size, layout, NAN)
        self.caches = [pool[1:-1] for pool in self.whole]
        shapes = {"tensor": (1,), "head": k.shape[1:2], "token": (num_pages + 2, page_size, k.shape[1])}
        kinds = kinds if cache != "same" else ("none", "none")
        self.whole_scales = [None if kind == "none" else torch.full(shapes[kind], NAN) for kind in kinds]
        self.scales = [s if s is None or s.dim() < 3 else s[1:-1] for s in self.whole_scales]
        for scale in self.scales:
            if scale is not None and scale.dim() < 3:
                scale.copy_(0.01 * torch.arange(1, scale.numel() + 1))

    @property
    def options(self):
        return {"k_scale": self.scales[0], "v_scale": self.scales[1]}

    def bits(self):
        """Everything, as integers."""
        found = [*self.whole, *(s for s in self.whole_scales if s is not None)]
        return [t.view(_INTEGERS[t.dtype]).clone() for t in found]

    def real(self):
        """Keys and values in float64, [slots, heads, elements]."""
        found = []
        for cache, scale in zip(self.caches, self.scales):
            wide = cache.double()
            if scale is not None:
                wide *= scale.double()[..., None] if scale.dim() == 3 else scale.double().reshape(-1, 1)
            found.append(wide.flatten(0, 1))
        return found


_INTEGERS = {
    torch.int8: torch.int8,
    FP8: torch.uint8,
    torch.float32: torch.int32,
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
}


def data_of(num_tokens=7, heads=2, dim=24, value_dim=16, dtype=torch.float32, seed=0, layouts=("contiguous",) * 2):
    shapes = (num_tokens, heads, dim), (num_tokens, heads, value_dim)
    return [make_tensor(shape, dtype, seed=seed + i, layout=layouts[i]) for i, shape in enumerate(shapes)]


def slots_of(num_tokens, num_slots, seed=0):
    """Different slots in any order, and a few that are skipped."""
    slots = torch.randperm(max(num_slots, num_tokens), generator=torch.Generator().manual_seed(seed))[:num_tokens]
    slots[slots >= num_slots] = -1
    slots[2::5] = -1
    return slots


def assert_same_bits(found, wanted):
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@st.composite
def writes(draw, dtype):
    """(k, v, a function that makes the pool, slots)."""
    num_tokens, heads = draw(st.integers(0, 9)), draw(st.sampled_from([1, 2, 5]))
    dim = draw(st.sampled_from([8, 16, 40, 64, 72, 128]))
    value_dim, seed = draw(st.sampled_from([dim, 16])), draw(strategies.seeds())
    layouts = [draw(strategies.layouts(3)) for _ in "kv"]
    k, v = data_of(num_tokens, heads, dim, value_dim, dtype, seed, layouts)
    page_size = draw(st.sampled_from(PAGE_SIZES[:5]))
    place = draw(st.sampled_from(CACHES)), page_size, 3, draw(st.sampled_from(LAYOUTS))
    kinds = [draw(st.sampled_from(KINDS)) for _ in "kv"]
    return k, v, lambda: Pool(k, v, *place, kinds), slots_of(num_tokens, 3 * page_size, seed % 97)


# ---- accuracy


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("implementation", FUSED)
@settings(max_examples=MANY)
@given(data=st.data())
def test_every_bit_is_the_reference_s(implementation, dtype, data):
    """Data, codes, scales and all memory that must not change."""
    k, v, make, slots = data.draw(writes(dtype))
    found, wanted = make(), make()
    with using(implementation):
        write_kv_cache(k, v, *found.caches, slots, **found.options)
    reference.write_kv_cache(k, v, *wanted.caches, slots, *wanted.scales)
    assert_same_bits(found.bits(), wanted.bits())


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("implementation", FUSED)
@given(data=st.data())
def test_rotation_and_write_equal_the_two_calls(implementation, dtype, interleaved, data):
    k, v, make, slots = data.draw(writes(dtype))
    heads, seed = k.shape[1] * data.draw(st.sampled_from([1, 3])), data.draw(strategies.seeds())
    size = data.draw(st.sampled_from([2, 8, k.shape[2]]))
    q = make_tensor((len(k), heads, k.shape[2]), dtype, seed=seed, layout=data.draw(strategies.layouts(3)))
    angles = make_tensor((len(k), size), torch.float32, seed=seed + 1)
    cos, sin = angles.cos().to(data.draw(st.sampled_from([dtype, torch.float32]))), angles.sin()
    sin = sin.to(cos.dtype)
    found, wanted = make(), make()
    with using(implementation):
        out = rotary_write_kv_cache(q, k, v, cos, sin, *found.caches, slots, interleaved=interleaved, **found.options)
        turned, keys = rotary(q[None], k[None], cos[None], sin[None], interleaved=interleaved)
        write_kv_cache(keys[0], v, *wanted.caches, slots, **wanted.options)
    assert torch.equal(out, turned[0]) and out.stride() == torch.empty_like(q).stride()
    assert_same_bits(found.bits(), wanted.bits())
    exact = reference._rotated(q.double(), cos.double(), sin.double(), interleaved)
    assert_accurate(out, exact, zeros=False)  # products may cancel


@EVERY_IMPLEMENTATION
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cache", ["int8", "fp8"])
def test_codes_are_within_half_a_step(implementation, cache, dtype):
    k, v = data_of(40, dtype=dtype, seed=1)
    pool = Pool(k, v, cache, 16)
    with using(implementation):
        write_kv_cache(k, v, *pool.caches, torch.arange(40), **pool.options)
    for real, x, scale in zip(pool.real(), (k, v), pool.scales):
        x, scale = x.double(), scale.flatten(0, 1)[:40, :, None].double()
        step = scale if cache == "int8" else torch.maximum(x.abs() / 8, scale * 2.0**-6)  # 3 bits; denormals: 2**-9
        assert ((real[:40] - x).abs() <= step * (0.5 + 1e-5)).all()
        assert torch.equal(real[:40].sign() * x.sign() < 0, torch.zeros_like(x, dtype=torch.bool))
        assert torch.allclose(real[:40].abs().amax(-1), x.abs().amax(-1), rtol=1e-6)  # the largest code


# ---- properties


@EVERY_IMPLEMENTATION
@EVERY_CACHE
def test_rows_of_zeros(implementation, cache):
    """Codes of 0 and a finite scale above 0; the smallest numbers have one too."""
    k, v = (torch.zeros(3, 2, 16) for _ in "kv")
    k[1] = 1e-44
    pool = Pool(k, v, cache, 8)
    with using(implementation):
        write_kv_cache(k, v, *pool.caches, torch.tensor([0, 5, 9]), **pool.options)
    assert all(not real[[0, 9]].any() for real in pool.real())
    for scale in pool.scales:
        written = torch.ones(3) if scale is None else scale.flatten(0, 1)[[0, 5, 9]]
        assert (written > 0).all() and written.isfinite().all()


@EVERY_IMPLEMENTATION
@pytest.mark.parametrize("cache", ["int8", "fp8"])
def test_given_scales_round_to_even_and_saturate(implementation, cache):
    dtype, largest = FORMATS[cache]
    values = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, 126.5, 127.5, 1e9, -1e9, INF, -INF, NAN, 17.0, 19.0, 0.0, -0.0])
    k = v = values.view(1, 1, -1).clone()
    pool = Pool(k, v, cache, 8, kinds=("tensor", "none"))
    pool.scales[0].fill_(0.5)
    with using(implementation):
        write_kv_cache(k * 0.5, v, *pool.caches, torch.tensor([3]), **pool.options)
    low = -128.0 if cache == "int8" else -largest
    expected = {
        "int8": [0.0, 2, 2, 0, -2, 126, largest, largest, low, largest, low, 0, 17, 19, 0, 0],
        "fp8": [0.5, 1.5, 2.5, -0.5, -1.5, 128, 128, largest, low, largest, low, NAN, 16, 20, 0, 0],
    }[cache]
    for codes in pool.caches:
        torch.testing.assert_close(codes[0, 3, 0].float(), torch.tensor(expected), rtol=0, atol=0, equal_nan=True)


@EVERY_IMPLEMENTATION
@EVERY_CACHE
@pytest.mark.parametrize("bad", [NAN, INF])
def test_a_bad_value_damages_its_own_row_alone(implementation, cache, bad):
    k, v = data_of(5)
    clean, pool = Pool(k, v, cache, 8), Pool(k, v, cache, 8)
    slots = torch.tensor([1, 2, 3, 9, 17])
    with using(implementation):
        write_kv_cache(k, v, *clean.caches, slots, **clean.options)
        k[2, 1, 3] = bad
        write_kv_cache(k, v, *pool.caches, slots, **pool.options)
    found, wanted = pool.real()[0], clean.real()[0]
    assert not found[3, 1].isfinite().all()
    keep = torch.ones(24, 2, dtype=torch.bool)
    keep[3, 1] = False
    torch.testing.assert_close(found[keep], wanted[keep], rtol=0, atol=0, equal_nan=True)


@EVERY_IMPLEMENTATION
@EVERY_CACHE
@pytest.mark.parametrize("page_size", [1, 8, 24])
def test_slots_that_do_not_exist_write_nothing(implementation, cache, page_size):
    """B28, B31: Dao-AILab/flash-attention#638, vllm-project/vllm#49081: past the end other tensors changed."""
    k, v = data_of(9)
    end = 3 * page_size
    slots = torch.tensor([end, end + 31, -1, -2, -page_size, 2**31 - 1, 2**31, 2**63 - 1, -(2**63)])
    pool = Pool(k, v, cache, page_size)
    before = pool.bits()
    with using(implementation):
        write_kv_cache(k, v, *pool.caches, slots, **pool.options)
        rotary_write_kv_cache(k, k, v, *[torch.ones(9, 4)] * 2, *pool.caches, slots, **pool.options)
    assert_same_bits(pool.bits(), before)


@EVERY_IMPLEMENTATION
@EVERY_CACHE
def test_of_duplicate_slots_only_that_slot_is_open(implementation, cache):
    k, v = data_of(6, seed=2)
    slots = torch.tensor([4, 4, 1, 4, 7, 7])
    pool = Pool(k, v, cache, 8)
    with using(implementation):
        write_kv_cache(k, v, *pool.caches, slots, **pool.options)
    choices = []
    for token in ([0, 4], [1, 4], [3, 4], [0, 5], [1, 5], [3, 5]):
        one = Pool(k, v, cache, 8)
        keep = sorted([*token, 2])
        reference.write_kv_cache(k[keep], v[keep], *one.caches, slots[keep], *one.scales)
        choices.append(one.bits())
    others = torch.ones(8, dtype=torch.bool)
    others[[4, 7]] = False
    for found, *wanted in zip(pool.bits(), *choices):
        assert torch.equal(found[1][others], wanted[0][1][others]) and torch.equal(found[2:], wanted[0][2:])
        if cache == "same":
            assert any(torch.equal(found, each) for each in wanted)


@EVERY_IMPLEMENTATION
def test_nan_stays_in_the_slot_it_was_written_to(implementation):
    """B07: huggingface/transformers#46765: padding tokens wrote NaN to a page that others read."""
    k, v = data_of(4)
    k[1:3], v[1:3] = NAN, NAN
    pool = Pool(k, v, "same", 8)
    for cache in pool.caches:
        cache.zero_()
    with using(implementation):
        write_kv_cache(k, v, *pool.caches, torch.tensor([0, -1, -1, 3]))
    assert not any(cache.isnan().any() for cache in pool.caches)


@EVERY_IMPLEMENTATION
def test_empty(implementation):
    k, v = data_of(0)
    pool = Pool(k, v, "int8", 8)
    before = pool.bits()
    with using(implementation):
        write_kv_cache(k, v, *pool.caches, torch.zeros(0, dtype=torch.int64), **pool.options)
    assert_same_bits(pool.bits(), before)


def test_planted_faults_are_rejected():
    """Wrong writes of every kind that kernels have had; the check is the one of the accuracy test."""
    k, v = data_of(11, seed=3)
    slots = slots_of(11, 24)

    def wrong(change=lambda *args: args, after=lambda pool: None):
        def write(pool):
            args = change(k, v, *pool.caches, slots, *pool.scales)
            reference.write_kv_cache(*args)
            after(pool)

        return write

    def check(write):
        for cache in ("same", "int8", "fp8"):
            found, wanted = Pool(k, v, cache, 8), Pool(k, v, cache, 8)
            write(found)
            reference.write_kv_cache(k, v, *wanted.caches, slots, *wanted.scales)
            assert_same_bits(found.bits(), wanted.bits())

    def correct(pool):
        write_kv_cache(k, v, *pool.caches, slots, **pool.options)

    def edit(index, value):
        return lambda pool: as_bytes(pool.whole[index]).view(-1).__setitem__(value, 1)

    changes = {
        "k and v swapped": lambda k, v, *rest: (v.repeat(1, 1, 2)[..., :24], k[..., :16], *rest),
        "keys negated": lambda k, *rest: (-k, *rest), "values negated": lambda k, v, *rest: (k, -v, *rest),
        "keys one percent larger": lambda k, *rest: (k * 1.01, *rest),
        "last element lost": lambda k, *rest: (torch.cat((k[..., :-1], k[..., :1]), -1), *rest),
        "tokens in another order": lambda k, v, *rest: (k.flip(0), v.flip(0), *rest),
        "heads swapped": lambda k, *rest: (k.flip(1), *rest),
        "last token lost": lambda k, v, kc, vc, s, *rest: (k[:-1], v[:-1], kc, vc, s[:-1], *rest),
        "first token lost": lambda k, v, kc, vc, s, *rest: (k[1:], v[1:], kc, vc, s[1:], *rest),
        "one slot further": lambda k, v, kc, vc, s, *rest: (k, v, kc, vc, torch.where(s < 0, s, (s + 1) % 24), *rest),
        "skipped tokens go to slot 0": lambda k, v, kc, vc, s, *rest: (k, v, kc, vc, s.clamp(min=0), *rest),
        "rounded to 16 bits": lambda k, *rest: (k.bfloat16().float(), *rest),
        "nothing written": lambda k, v, kc, vc, s, *rest: (k, v, kc, vc, torch.full_like(s, -1), *rest),
        "keys alone written": lambda k, v, kc, vc, s, *rest: (k, v, kc, vc.clone(), s, *rest),
        "slots taken backwards": lambda k, v, kc, vc, s, *rest: (k, v, kc, vc, s.flip(0), *rest),
    }  # fmt: skip
    faults = [Fault(name, wrong(change)) for name, change in changes.items()]
    faults += [
        Fault("the page before changed", wrong(after=edit(0, 0))),
        Fault("the page after", wrong(after=edit(1, -1))),
    ]
    assert_faults_rejected(check, correct, faults)
