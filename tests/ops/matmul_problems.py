"""Calls of int8_matmul and fp8_matmul: operands in any layout, scales of every granularity, every epilogue."""

from dataclasses import dataclass, field

import torch
from hypothesis import strategies as st

import fusedops
from fusedops._core.checks import ACTIVATIONS
from fusedops.ops.scaled_matmul import reference
from fusedops.testing import make_tensor, strategies
from tests.ops.common import DTYPES, counted_budget

FP8 = torch.float8_e4m3fn
OPERATORS = {"int8_matmul": torch.int8, "fp8_matmul": FP8}
GRANULARITIES = {"int8_matmul": ("one", "row"), "fp8_matmul": ("one", "row", "block")}


def codes(shape, dtype, seed, magnitude=100.0, layout="contiguous"):
    return make_tensor(shape, dtype, seed=seed, magnitude=magnitude, layout=layout)


def scale_of(kind, rows, block_rows, depth, seed):
    """Scales between 0.5 and 1.5; blocks lie in memory as a transposed view."""
    blocks = -(-depth // 128)
    shape = {"one": (), "row": (rows,), "block": (blocks, -(-rows // block_rows))}[kind]
    scale = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) + 0.5
    return scale.T if kind == "block" else scale


@dataclass
class Call:
    """A call of one of the two."""

    op: str
    args: tuple
    options: dict = field(default_factory=dict)

    def run(self, function=None, **changes):
        return (function or getattr(fusedops, self.op))(*self.args, **{**self.options, **changes})

    def truth(self):
        """In float64 from the same operands."""
        a, b, *scales = self.args
        full = {"bias": None, "out_dtype": torch.bfloat16, "activation": None, "residual": None, "gated": False}
        full |= self.options
        return reference.int8_matmul(a, b, *(scale.double() for scale in scales), *full.values())

    def budget(self, truth):
        """The default, and what float32's 1 + erf or tanh loses of 1: all there is, where results are few numbers."""
        if self.options["activation"] not in ("gelu", "gelu_tanh") or not truth.any():
            return None
        product = Call(self.op, self.args, {**self.options, "activation": None, "residual": None, "gated": False})
        size = product.truth().abs()
        lost = size[:, ::2] * size[:, 1::2] if self.options.get("gated") else size
        return counted_budget(self.options["out_dtype"], lost * torch.finfo(torch.float32).eps, truth)

    def rows(self, chosen):
        """The same call on some rows of a."""
        a, b, scale_a, scale_b = self.args
        options = dict(self.options)
        if options.get("residual") is not None:
            options["residual"] = options["residual"][chosen]
        return Call(self.op, (a[chosen], b, scale_a if scale_a.dim() == 0 else scale_a[chosen], scale_b), options)


def call_of(
    op, rows=5, columns=70, depth=300, kinds=("row", "row"), seed=0, out_dtype=torch.float32, bias=None,
    activation=None, residual=False, layouts=("contiguous",) * 3, magnitude=100.0, gated=False,
):  # fmt: skip
    """A seeded call. bias is None or its dtype; magnitude that of the codes. Gated pairs are about 1, so that theirs
    is a product in the range of every dtype."""
    dtype = OPERATORS[op]
    a = codes((rows, depth), dtype, seed, magnitude, layouts[0])
    b = codes((columns, depth), dtype, seed + 1, magnitude, layouts[1])
    scales = scale_of(kinds[0], rows, 1, depth, seed), scale_of(kinds[1], columns, 128, depth, seed + 1)
    # Both are as large as a product, so that nothing of them is lost in its last bits.
    size = depth**0.5 * magnitude**2
    options = {"out_dtype": out_dtype, "activation": activation}
    if gated:
        options["gated"] = True
        scales, size = (scales[0] / size, scales[1]), 1.0
    if bias is not None:
        options["bias"] = make_tensor((columns,), torch.float32, seed=seed + 2, magnitude=min(size, 1e4)).to(bias)
    if residual:
        options["residual"] = make_tensor(
            (rows, columns // (1 + gated)), out_dtype, seed=seed + 3, magnitude=min(size, 1e4), layout=layouts[2]
        )
    return Call(op, (a, b, *scales), options)


@st.composite
def calls(draw, op):
    """Sizes on both sides of tiles, blocks and vectors."""
    layouts = [draw(strategies.layouts(2)) for _ in range(3)]
    out_dtype = draw(st.sampled_from(DTYPES))
    gated = draw(st.booleans())
    return call_of(
        op,
        draw(st.sampled_from([0, 1, 2, 7, 16, 33, 64, 65, 70])),
        draw(st.sampled_from([2, 14, 64, 66, 130] if gated else [1, 7, 16, 64, 65, 129])),
        draw(st.sampled_from([1, 15, 16, 100, 128, 129, 256, 1040])),
        [draw(st.sampled_from(GRANULARITIES[op])) for _ in "ab"],
        draw(strategies.seeds()),
        out_dtype,
        draw(st.sampled_from([None, out_dtype, torch.float32])),
        draw(st.sampled_from(ACTIVATIONS if gated else [None, *ACTIVATIONS])),
        draw(st.booleans()),
        layouts,
        draw(st.sampled_from([1.0, 3.0])) if out_dtype == torch.float16 else draw(st.sampled_from([1.0, 100.0])),
        gated,
    )
