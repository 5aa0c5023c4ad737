"""What the tests of the attentions share: drawn problems, their truth in float64, and the comparison with it."""

from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import strategies as st

from fusedops import attention, attention_varlen
from fusedops.ops.attention import reference
from fusedops.testing import assert_accurate, make_tensor, strategies
from tests.ops.common import counted_budget

HEAD_DIMS = (8, 16, 40, 64, 72, 80, 96, 104, 128, 192, 256, 512)
LENGTHS = (1, 2, 3, 5, 8, 15, 16, 17, 31, 33, 63, 64, 65, 127, 128, 129)  # both sides of every tile
FEATURES = ("plain", "bounds", "scores", "masks")
TABLES = ("sinks", "alibi_slopes", "mask", "q_scale", "k_scale", "v_scale")

# What the models of today combine, for the properties; two heads.
ALL_OPTIONS = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window_size": (5, 3)},
    "sliding": {"causal": True, "window_size": (6, 0), "sinks": torch.tensor([0.5, -1.0])},
    "gemma": {"causal": True, "window_size": (6, 0), "softcap": 3.0},
    "alibi": {"causal": True, "alibi_slopes": torch.tensor([0.3, 0.05])},
}
EVERY_OPTION = pytest.mark.parametrize("options", ALL_OPTIONS.values(), ids=list(ALL_OPTIONS))


@dataclass
class Problem:
    """The arguments of one call."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    options: dict = field(default_factory=dict)
    lengths: tuple = ()  # cu_seqlens and max_seqlens of a packed call

    def run(self, **changed):
        """(out, lse) of the public function."""
        function = attention_varlen if self.lengths else attention
        return function(self.q, self.k, self.v, *self.lengths, return_lse=True, **{**self.options, **changed})

    @property
    def scale(self):
        """What multiplies the scores."""
        return self.options.get("softmax_scale", self.q.shape[-1] ** -0.5)

    def positional(self, convert=lambda tensor: tensor):
        """The arguments of the registered operator, the tensors converted."""
        options = self.options
        tables = [options.get(name) for name in TABLES]
        tables = [t if t is None or t.dtype == torch.bool else convert(t) for t in tables]
        bounds = options.get("causal", False), *options.get("window_size", (-1, -1)), options.get("softcap", 0.0)
        return *(convert(t) for t in (self.q, self.k, self.v)), *self.lengths, *tables, self.scale, *bounds

    def truth(self):
        """(out, lse) in float64 of the very same numbers."""
        function = reference.attention_varlen if self.lengths else reference.attention
        return function(*self.positional(torch.Tensor.double))

    def check(self, out, lse, name=""):
        """Compare with the truth. An lse may be off by what float32 loses in the products of its scores."""
        truth, lse_truth = self.truth()
        assert_accurate(out, truth, name=f"out {name}", zeros=False)  # weighed values may cancel exactly by luck
        seen = lse_truth > float("-inf")
        assert torch.equal(lse.isneginf(), ~seen) and torch.equal(out.isnan(), truth.isnan())
        rows = seen.mT if lse.dim() == 2 else seen.transpose(1, 2)
        assert not out[~rows].any(), "a row that sees no key must be exactly 0"
        assert_accurate(lse[seen], lse_truth[seen], budget=self.lse_budget(lse_truth[seen]), name=f"lse {name}",
                        zeros=False)  # fmt: skip

    def lse_budget(self, truth):
        """The default, and half an epsilon for each of the largest score's terms by root mean square."""
        if self.q.numel() == 0 or self.k.numel() == 0 or not truth.any():
            return counted_budget(torch.float32, truth[:0], truth)
        sizes = [t.double().norm(dim=-1).nan_to_num(0.0).max() for t in (self.q, self.k)]
        lost = abs(self.scale) * sizes[0] * sizes[1] * torch.finfo(torch.float32).eps
        return counted_budget(torch.float32, lost.expand(truth.shape), truth)


@st.composite
def problems(draw, dtype, features, max_pairs=20000, head_dims=HEAD_DIMS, hot=True):
    """A dense problem: grouped heads, any layout, and the options of some of the features; hot scores on request."""
    batch, kv_heads = draw(st.sampled_from([(1, 1), (1, 2), (2, 1)]))
    group = draw(st.sampled_from([1, 2, 3]))
    num_queries, num_keys = draw(lengths_of_pair(LENGTHS, max_pairs))
    head_dim = draw(st.sampled_from(head_dims))
    value_dim = draw(st.sampled_from([head_dim, head_dim, 16]))
    seed = draw(strategies.seeds())
    heads = kv_heads * group
    q, k, v = (
        make_tensor(shape, dtype, seed=seed + i, magnitude=draw(st.sampled_from(magnitudes if hot else (1.0,))),
                    layout=draw(strategies.layouts(4)))
        for i, (shape, magnitudes) in enumerate((
            ((batch, num_queries, heads, head_dim), (1.0, 2.0**-8, 4.0)),
            ((batch, num_keys, kv_heads, head_dim), (1.0, 4.0)),
            ((batch, num_keys, kv_heads, value_dim), (1.0, 2.0**-6, 2.0**6)),
        ))
    )  # fmt: skip
    options = draw(options_of(features, dtype, (batch, heads, num_queries, num_keys), seed))
    return Problem(q, k, v, options)


def lengths_of_pair(lengths, max_pairs):
    """Queries and keys: equal, as many as there are, one query, more queries than keys, none."""
    some = st.sampled_from(lengths)
    pairs = st.one_of(
        some.map(lambda n: (n, n)), st.tuples(some, some), some.map(lambda n: (1, n)), st.sampled_from([(0, 5), (5, 0)])
    )
    return pairs.filter(lambda pair: pair[0] * pair[1] <= max_pairs)


@st.composite
def options_of(draw, features, dtype, sizes, seed):
    """Options of the named features; each is there half of the time."""
    batch, heads, num_queries, num_keys = sizes
    options = {}

    def wanted(feature):
        return feature in features and draw(st.booleans())

    bound = st.sampled_from([-1, 0, 1, 2, 15, 16, 17, max(num_keys - 1, 0), num_keys, num_keys + 1])
    if wanted("bounds"):
        options["causal"] = True
    if wanted("bounds"):
        options["window_size"] = (draw(bound), draw(bound))
    if wanted("scores"):
        options["softcap"] = draw(st.sampled_from([0.5, 5.0, 50.0]))
    if wanted("scores"):
        options["softmax_scale"] = draw(st.sampled_from([0.02, 0.3, -0.1, 0.0]))
    if wanted("scores"):
        sink_dtype = draw(st.sampled_from([torch.float32, dtype]))
        options["sinks"] = make_tensor((heads,), sink_dtype, seed=seed + 3, magnitude=3.0)
    if wanted("scores"):
        rows = draw(st.sampled_from([(heads,), (batch, heads)]))
        options["alibi_slopes"] = make_tensor(rows, torch.float32, seed=seed + 4, magnitude=0.1)
    if wanted("masks"):
        shape = [draw(st.sampled_from([1, size])) for size in sizes]
        shape = shape[draw(st.integers(0, 3)) :] if shape[0] == shape[1] == 1 else shape
        visible = make_tensor(shape, torch.float32, seed=seed + 5) > draw(st.sampled_from([-1.0, 0.0, 1.0]))
        kind = draw(st.sampled_from([torch.bool, torch.float32, dtype]))
        layout = draw(strategies.layouts(len(shape)).filter(lambda name: name != "expanded"))
        values = make_tensor(shape, torch.float32 if kind == torch.bool else kind, seed=seed + 6, layout=layout)
        options["mask"] = visible if kind == torch.bool else values.masked_fill_(~visible, float("-inf"))
    return options


@st.composite
def packed_problems(draw, dtype, max_length=40):
    """A packed problem of up to four sequences, some of them without queries or keys."""
    sizes = st.one_of(st.sampled_from([0, 1, 16, 17]), st.integers(0, max_length))
    lengths = draw(st.lists(st.tuples(sizes, sizes), min_size=0, max_size=4))
    kv_heads, group = draw(st.sampled_from([(1, 1), (1, 3), (2, 1)]))
    head_dim = draw(st.sampled_from([8, 40, 64, 72]))
    value_dim = draw(st.sampled_from([head_dim, 16]))
    seed = draw(strategies.seeds())
    total_q, total_k = (sum(pair[side] for pair in lengths) for side in (0, 1))
    q, k, v = (
        make_tensor(shape, dtype, seed=seed + i, layout=draw(strategies.layouts(3)))
        for i, shape in enumerate((
            (total_q, kv_heads * group, head_dim), (total_k, kv_heads, head_dim), (total_k, kv_heads, value_dim),
        ))
    )  # fmt: skip
    options = draw(options_of(("bounds", "scores"), dtype, (len(lengths), kv_heads * group, 1, 17), seed))
    return Problem(q, k, v, options, packed_lengths(lengths))


def packed_lengths(pairs):
    """cu_seqlens_q, cu_seqlens_k, max_seqlen_q and max_seqlen_k of (queries, keys) pairs."""
    sides = [[pair[side] for pair in pairs] for side in (0, 1)]
    starts = [torch.tensor([0, *side], dtype=torch.int32).cumsum(0, dtype=torch.int32) for side in sides]
    return *starts, *(max(side, default=0) for side in sides)


def qkv(batch, num_queries, num_keys, heads=2, kv_heads=1, head_dim=16, dtype=torch.float32, seed=0, value_dim=None):
    """Plain seeded operands."""
    shapes = ((batch, num_queries, heads, head_dim), (batch, num_keys, kv_heads, head_dim),
              (batch, num_keys, kv_heads, value_dim or head_dim))  # fmt: skip
    return tuple(make_tensor(shape, dtype, seed=seed + i) for i, shape in enumerate(shapes))
