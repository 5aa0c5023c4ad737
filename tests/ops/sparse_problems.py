"""Calls of sparse_matmul: weights with every pattern of zeros, operands in any layout, every epilogue."""

from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st

import fusedops
from fusedops._core.checks import ACTIVATIONS
from fusedops.ops.sparse_matmul import reference
from fusedops.testing import make_tensor, strategies
from tests.ops.common import DTYPES, EMULATED, counted_budget

FP8 = torch.float8_e4m3fn
CODES = (torch.int8, FP8)
EVERY_DTYPE = (*DTYPES, *CODES)
IS_DEEP = settings.default.max_examples > 25


def ways(few, many):
    """(rows, implementation) of a test with both kinds of kernels: compiled ones of few rows in the deep run alone."""
    plain = [(rows, name) for rows in (few, many) for name in ("torch", "triton", "reference")]
    compiled = [pytest.param(many, *way.values, marks=way.marks) for way in EMULATED]
    return plain + compiled + [pytest.param(few, *way.values, marks=way.marks) for way in EMULATED if IS_DEEP]


def masked(weight, seed=0, kept=2):
    """The weight with so many of each four columns or, one in ten, fewer, at drawn places: every pattern appears."""
    N, K = weight.shape
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(N, -(-K // 4), 4, generator=generator).argsort(-1).flatten(1)[:, :K]
    keep = (order < kept) & (torch.rand(N, K, generator=generator) > 0.1)
    return torch.where(keep, weight.double(), 0.0).to(weight.dtype)


def integers(shape, dtype, seed, largest=2):
    drawn = torch.randint(-largest, largest + 1, shape, generator=torch.Generator().manual_seed(seed))
    return drawn.to(dtype)


def misplaced(tensor, elements):
    """The same contiguous tensor, so many elements into its memory."""
    memory = tensor.new_empty(tensor.numel() + elements)[elements:].view(tensor.shape)
    return memory.copy_(tensor)


@dataclass
class Call:
    """A call, and the weight [N, K] that it is meant to multiply with."""

    a: torch.Tensor
    weight: torch.Tensor
    options: dict = field(default_factory=dict)
    offset: int = 0

    def __post_init__(self):
        values, metadata = fusedops.compress_24(self.weight)
        self.args = self.a, misplaced(values, self.offset), misplaced(metadata, self.offset)
        fusedops.reset_counters()

    def run(self, function=fusedops.sparse_matmul, **changes):
        return function(*self.args, **{**self.options, **changes})

    def truth(self, **changes):
        """In float64 from the same operands, and from the weight as it was before it was compressed."""
        options = {**self.options, **changes}
        out = self.a.double() @ self.weight.double().T
        scale_a, scale_b, bias = (options.get(name) for name in ("scale_a", "scale_b", "bias"))
        if scale_a is not None:
            one = scale_a.numel() == 1
            out = out * (scale_a.double().squeeze() if one else scale_a.double().view(*self.a.shape[:-1], 1))
        out = out if scale_b is None else out * scale_b.double()
        out = out if bias is None else out + bias.double()
        return reference.ACTIVATIONS[options.get("activation")](out)

    def out_dtype(self):
        return self.options.get("out_dtype") or (torch.bfloat16 if self.a.dtype in CODES else self.a.dtype)

    def budget(self, truth):
        """The default, and what float32's 1 + erf or tanh loses of 1: all there is, where results are few numbers."""
        if self.options.get("activation") not in ("gelu", "gelu_tanh") or not truth.any():
            return None
        lost = self.truth(activation=None).abs() * torch.finfo(torch.float32).eps
        return counted_budget(self.out_dtype(), lost, truth)


def call_of(
    dtype, rows=5, columns=70, depth=300, seed=0, out_dtype=None, bias=None, activation=None, scales=("row", "row"),
    layout="contiguous", offset=0,
):  # fmt: skip
    """A seeded call with results of about 1. rows may be a shape; bias is None or its dtype."""
    leading = rows if isinstance(rows, tuple) else (rows,)
    codes = dtype in CODES
    size = 100.0 if codes else 1.0
    a = make_tensor((*leading, depth), dtype, seed=seed, magnitude=size, layout=layout)
    weight = masked(make_tensor((columns, depth), dtype, seed=seed + 1, magnitude=size), seed)
    options = {"activation": activation}
    if out_dtype is not None:
        options["out_dtype"] = out_dtype
    if codes:
        step = depth**0.5 * size**2
        draw = torch.Generator().manual_seed(seed)
        shapes = {"one": [(), (1,)], "row": [leading, (columns,)]}
        for number, (name, kind) in enumerate(zip(("scale_a", "scale_b"), scales)):
            if kind is not None:
                scale = torch.rand(shapes[kind][number], generator=draw) + 0.5
                options[name] = scale / step if name == "scale_a" or scales[0] is None else scale
    if bias is not None:
        options["bias"] = make_tensor((columns,), torch.float32, seed=seed + 2).to(bias)
    return Call(a, weight, options, offset)


@st.composite
def calls(draw, choices=EVERY_DTYPE):
    """Sizes on both sides of groups, vectors, tiles and rows of metadata."""
    dtype = draw(st.sampled_from(choices))
    rows = draw(st.sampled_from([1, 0, 2, 7, 16, 33, 64, 65, 70, (2, 3), (3, 1, 2)]))
    dims = 1 + (len(rows) if isinstance(rows, tuple) else 1)
    out_dtype = draw(st.sampled_from(DTYPES)) if dtype in CODES else dtype
    scales = st.sampled_from(["row", "one", None])
    activation = draw(st.sampled_from([None, *ACTIVATIONS]))
    kinds = draw(st.tuples(scales, scales)) if dtype in CODES else (None, None)
    if kinds == (None, None) and dtype in CODES and out_dtype == torch.float16:
        kinds = ("one", None)  # the sums themselves leave float16
    return call_of(
        dtype,
        rows,
        draw(st.sampled_from([1, 7, 16, 64, 65, 129])),
        draw(st.sampled_from([1, 2, 3, 4, 15, 16, 63, 64, 65, 100, 127, 128, 129, 200, 256, 1040])),
        draw(strategies.seeds()),
        draw(st.sampled_from([None, out_dtype])) if dtype not in CODES else out_dtype,
        draw(st.sampled_from([None, out_dtype, torch.float32])),
        activation,
        kinds,
        draw(strategies.layouts(dims)),
        draw(st.sampled_from([0, 0, 1, 3, 8])),
    )
