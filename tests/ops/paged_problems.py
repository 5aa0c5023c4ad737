"""What the tests of paged attention share: drawn problems, their pages among hostile ones, and the truth in float64."""

from dataclasses import dataclass, field

import torch
from hypothesis import strategies as st

from fusedops import paged_attention
from fusedops.ops.paged_attention import reference
from fusedops.testing import assert_accurate, make_tensor, strategies
from tests.ops.common import counted_budget

INF, NAN = float("inf"), float("nan")
FP8 = torch.float8_e4m3fn
PAGE_SIZES = (1, 8, 16, 24, 32, 64, 128, 256)
CACHES = ("same", "int8", "fp8")
LAYOUTS = ("apart", "one buffer", "heads outside")
LARGEST_ID = 2**31 - 1
FORMATS = {"int8": (torch.int8, 127.0), "fp8": (FP8, 448.0)}


@dataclass
class PagedProblem:
    """Sequences of (new tokens, all tokens), their stored keys and values one after another, and the options."""

    q: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    lengths: list
    options: dict = field(default_factory=dict)
    k_scale: torch.Tensor | None = None  # [], [1], [Hk], or one for each key and head
    v_scale: torch.Tensor | None = None

    @property
    def is_decode(self):
        return all(num_queries == 1 for num_queries, _ in self.lengths)

    @property
    def starts(self):
        """cu_seqlens_q."""
        counts = [0, *(num_queries for num_queries, _ in self.lengths)]
        return torch.tensor(counts, dtype=torch.int32).cumsum(0, dtype=torch.int32)

    def call(self, page_size=16, seed=0, layout="apart", spare=2, varlen=None, filling=NAN):
        """(args, kwargs) of the public function, with pages in a drawn order and `filling` wherever no token lies."""
        counts = [-(-num_keys // page_size) for _, num_keys in self.lengths]
        num_pages = sum(counts) + spare
        order = torch.randperm(num_pages, generator=torch.Generator().manual_seed(seed)).tolist()
        width = max(counts, default=0) + spare
        table = LARGEST_ID - torch.arange(len(counts) * width).view(len(counts), width)
        caches = empty_caches(self.keys, self.values, num_pages, page_size, layout, filling)
        scales = [pooled(scale, num_pages, page_size) for scale in (self.k_scale, self.v_scale)]
        first = 0
        for b, (_, num_keys) in enumerate(self.lengths):
            pages = torch.tensor([order.pop() for _ in range(counts[b])], dtype=torch.int64)
            table[b, : counts[b]] = pages
            token = torch.arange(num_keys)
            places = pages[token // page_size], token % page_size
            rows = slice(first, first + num_keys)
            for pool, stored in zip((*caches, *scales), (self.keys, self.values, self.k_scale, self.v_scale)):
                if stored is not None and stored.dim() > 1:
                    as_bytes(pool)[places] = as_bytes(stored)[rows]
            first += num_keys
        seqlens = torch.tensor([num_keys for _, num_keys in self.lengths], dtype=torch.int32)
        kwargs = {**self.options, "k_scale": scales[0], "v_scale": scales[1]}
        if not self.is_decode if varlen is None else varlen:
            longest = max((num_queries for num_queries, _ in self.lengths), default=0)
            kwargs |= {"cu_seqlens_q": self.starts, "max_seqlen_q": longest}
        return (self.q, *caches, table.to(torch.int32), seqlens), kwargs

    def run(self, page_size=16, seed=0, layout="apart", spare=2, varlen=None, filling=NAN, **changed):
        """(out, lse) of the public function."""
        args, kwargs = self.call(page_size, seed, layout, spare, varlen, filling)
        return paged_attention(*args, return_lse=True, **{**kwargs, **changed})

    def truth(self):
        """(out, lse) in float64 of the very same numbers."""
        args, kwargs = self.call(varlen=True)
        return truth_of(args, kwargs)

    def check(self, out, lse, name=""):
        """Compare with the truth, as the tests of attention do."""
        wanted, wanted_lse = self.truth()
        assert_accurate(out, wanted, name=f"out {name}", zeros=False)  # weighed values may cancel exactly by luck
        seen = wanted_lse > -INF
        assert torch.equal(lse.isneginf(), ~seen) and torch.equal(out.isnan(), wanted.isnan())
        assert not out[~seen.mT].any(), "a row that sees no key must be exactly 0"
        assert_accurate(lse[seen], wanted_lse[seen], budget=self.lse_budget(wanted_lse[seen]), name=f"lse {name}",
                        zeros=False)  # fmt: skip

    def lse_budget(self, truth):
        """The default, and half an epsilon for each of the largest score's terms by root mean square."""
        if self.q.numel() == 0 or self.keys.numel() == 0 or not truth.any():
            return counted_budget(torch.float32, truth[:0], truth)
        keys = self.keys.double() * (1.0 if self.k_scale is None else self.k_scale.double().nan_to_num(0.0).max())
        scale = self.options.get("softmax_scale", self.q.shape[-1] ** -0.5)
        sizes = [t.double().norm(dim=-1).nan_to_num(0.0).max() for t in (self.q, keys)]
        lost = abs(scale) * sizes[0] * sizes[1] * torch.finfo(torch.float32).eps
        return counted_budget(torch.float32, lost.expand(truth.shape), truth)


def truth_of(args, kwargs):
    """The reference in float64 on the arguments of a public call."""
    q, k_cache, v_cache, table, seqlens = args
    names = ("sinks", "alibi_slopes", "k_scale", "v_scale")
    sinks, slopes, k_scale, v_scale = (t if t is None else t.double() for t in map(kwargs.get, names))
    scale = kwargs.get("softmax_scale", q.shape[-1] ** -0.5)
    left, right = kwargs.get("window_size", (-1, -1))
    return reference.paged_attention(
        q.double(), k_cache.double(), v_cache.double(), table, seqlens, kwargs.get("cu_seqlens_q"),
        kwargs.get("max_seqlen_q", 1), sinks, slopes, k_scale, v_scale, kwargs.get("tree_mask"), scale,
        kwargs.get("causal", True), left, right, kwargs.get("softcap", 0.0),
    )  # fmt: skip


def as_bytes(tensor):
    """float8 as the bytes that it is: torch does not assign it at places."""
    return tensor.view(torch.uint8) if tensor.dtype == FP8 else tensor


def filled(shape, dtype, filling):
    """A pool in which nothing has been written: NaN, or the smallest code."""
    if dtype == torch.int8:
        return torch.full(shape, -128, dtype=dtype)
    return torch.full(shape, filling, dtype=torch.float32).to(dtype)


def empty_caches(keys, values, num_pages, page_size, layout, filling):
    """k_cache and v_cache: of their own, both in one buffer, or with the heads outside of the tokens."""
    heads, dims = keys.shape[1], (keys.shape[2], values.shape[2])
    if layout == "one buffer" and dims[0] == dims[1]:
        both = filled((num_pages, 2, page_size, heads, dims[0]), keys.dtype, filling)
        return both[:, 0], both[:, 1]
    if layout == "heads outside":
        pools = [filled((num_pages, heads, page_size, dim), keys.dtype, filling) for dim in dims]
        return [pool.transpose(1, 2) for pool in pools]
    return [filled((num_pages, page_size, heads, dim), keys.dtype, filling) for dim in dims]


def pooled(scale, num_pages, page_size):
    """The scales as the operator takes them; those of keys and heads lie beside the pages, NaN where nothing is."""
    if scale is None or scale.dim() < 2:
        return scale
    return torch.full((num_pages, page_size, scale.shape[1]), NAN)


def stored(values, cache, kind):
    """(values as a cache holds them, their scale) of a kind: "none", "tensor", "head", "token"."""
    if cache == "same":
        return values, None
    dtype, largest = FORMATS[cache]
    wide = values.float()
    if kind == "none":
        scale, codes = None, wide * 8.0
    elif kind == "token":
        scale = (wide.abs().amax(-1) / largest).clamp(min=2.0**-126)
        codes = wide / scale[..., None]
    else:
        number = wide.shape[1] if kind == "head" else 1
        scale = torch.arange(1, number + 1) * (wide.abs().max() / largest if wide.numel() else torch.tensor(1.0))
        codes = wide / scale[:, None]
        scale = scale[0] if kind == "tensor" else scale
    codes = codes.clamp(-largest, largest)
    return (codes.round() if dtype == torch.int8 else codes).to(dtype), scale


def problem(lengths, dtype=torch.float32, heads=2, kv_heads=1, head_dim=16, seed=0, value_dim=None, cache="same",
            kinds=("token", "token"), **options):  # fmt: skip
    """Seeded operands."""
    total, new = (sum(pair[side] for pair in lengths) for side in (1, 0))
    q = make_tensor((new, heads, head_dim), dtype, seed=seed)
    keys, k_scale = stored(make_tensor((total, kv_heads, head_dim), dtype, seed=seed + 1), cache, kinds[0])
    values = make_tensor((total, kv_heads, value_dim or head_dim), dtype, seed=seed + 2)
    values, v_scale = stored(values, cache, kinds[1])
    return PagedProblem(q, keys, values, lengths, options, k_scale, v_scale)


def packed_bits(allowed, longest=None):
    """A tree mask of [T, longest] bool as words."""
    words = -(-(longest or allowed.shape[1]) // 32)
    wide = torch.zeros(allowed.shape[0], words * 32, dtype=torch.int64)
    wide[:, : allowed.shape[1]] = allowed.long()
    packed = (wide.unflatten(1, (words, 32)) << torch.arange(32)).sum(-1)
    return torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32)


@st.composite
def paged_problems(draw, dtype, cache="same", max_keys=130, max_queries=40):
    """A problem of up to four sequences, and how its pages lie."""
    some = st.one_of(st.sampled_from([1, 2, 15, 16, 17, 31, 33, 64, 65, 128, 129]), st.integers(0, max_keys))
    keys = some.filter(lambda n: n <= max_keys)
    news = st.just(1) if draw(st.booleans()) else st.one_of(st.sampled_from([1, 1, 2, 5]), st.integers(0, max_queries))
    lengths = draw(st.lists(st.tuples(news, keys), min_size=0, max_size=4))
    kv_heads, group = draw(st.sampled_from([(1, 1), (1, 3), (2, 2), (1, 8)]))
    head_dim = draw(st.sampled_from([8, 16, 40, 64, 72]))
    kinds = draw(st.tuples(*[st.sampled_from(["none", "tensor", "head", "token"])] * 2))
    seed, total = draw(strategies.seeds()), sum(num_queries for num_queries, _ in lengths)
    value_dim = draw(st.sampled_from([None, 16]))
    found = problem(lengths, dtype, kv_heads * group, kv_heads, head_dim, seed, value_dim, cache, kinds)
    found.q = make_tensor(found.q.shape, dtype, seed=seed, layout=draw(strategies.layouts(3)))
    found.options = draw(options_of(dtype, len(lengths), kv_heads * group, seed))
    if draw(st.integers(0, 3)) == 0:
        longest = max((num_queries for num_queries, _ in lengths), default=0)
        allowed = make_tensor((total, longest), torch.float32, seed=seed + 7) > -0.5
        found.options["tree_mask"] = packed_bits(allowed)
    place = {
        "page_size": draw(st.sampled_from(PAGE_SIZES)), "seed": draw(st.integers(0, 99)),
        "layout": draw(st.sampled_from(LAYOUTS)),
        "varlen": True if "tree_mask" in found.options or not found.is_decode else draw(st.booleans()),
    }  # fmt: skip
    return found, place


@st.composite
def options_of(draw, dtype, batch, heads, seed):
    """Options, each of them there one time in four."""

    def wanted():
        return draw(st.integers(0, 3)) == 0

    options, bound = {}, st.sampled_from([-1, 0, 1, 2, 15, 16, 17, 40, 200])
    if wanted():
        options["causal"] = False
    if wanted():
        options["window_size"] = (draw(bound), draw(bound))
    if wanted():
        options["softcap"] = draw(st.sampled_from([0.5, 5.0, 50.0]))
    if wanted():
        options["softmax_scale"] = draw(st.sampled_from([0.02, 0.3, -0.1, 0.0]))
    if wanted():
        options["sinks"] = make_tensor((heads,), draw(st.sampled_from([torch.float32, dtype])), seed=seed + 3)
    if wanted():
        rows = draw(st.sampled_from([(heads,), (batch, heads)]))
        options["alibi_slopes"] = make_tensor(rows, torch.float32, seed=seed + 4, magnitude=0.1)
    return options
