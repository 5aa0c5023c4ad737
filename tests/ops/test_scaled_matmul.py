"""int8_matmul, fp8_matmul: results, identities, what is refused, torch."""

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fusedops
from fusedops import fp8_matmul, int8_matmul
from fusedops._core import env
from fusedops._core.checks import ACTIVATIONS
from fusedops.ops.scaled_matmul import MAX_K_INT8, MAX_SIZE
from fusedops.testing import assert_accurate
from tests.ops.common import (
    DTYPES,
    EVERY_KERNEL,
    FUSED,
    IMPLEMENTATIONS,
    assert_compiles,
    assert_fake_like_real,
    assert_rejected,
    opcheck,
    using,
)
from tests.ops.matmul_problems import FP8, OPERATORS, call_of, calls, codes, scale_of

BOTH = pytest.mark.parametrize("op", OPERATORS)
EVERY_IMPLEMENTATION = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
NAN, INF = float("nan"), float("inf")


# ---- accuracy


@BOTH
@pytest.mark.parametrize("implementation", FUSED)
@given(data=st.data())
def test_accuracy(implementation, op, data):
    call = data.draw(calls(op))
    with using(implementation):
        out = call.run()
    truth = call.truth()
    # Terms cancel, and activations vanish where exp does.
    assert_accurate(out, truth, budget=call.budget(truth), zeros=False)


@BOTH
@EVERY_KERNEL
@pytest.mark.parametrize("rows", [5, 70], ids=["few rows", "tiles"])
def test_small_integers_are_exact(rows, implementation, op):
    """Sums of small integers are exact in every order."""
    scales = torch.tensor([0.5, 2.0, 4.0]), torch.tensor([0.25, 1.0])
    depth = 1104 if rows == 5 else 304  # of few rows two programs share it
    gated = (op == "int8_matmul") == (rows == 5)
    call = call_of(op, rows, 130, depth, magnitude=2.0, bias=torch.float32, residual=True, gated=gated)
    a, b, _, _ = call.args
    a, b = (x.float().round().clamp(-2, 2).to(OPERATORS[op]) for x in (a, b))
    call.args = a, b, scales[0].repeat(rows)[:rows], scales[1].repeat(65)
    call.options |= {name: (4 * call.options[name]).round() for name in ("bias", "residual")}
    call.options["activation"] = "relu"
    with using(implementation):
        assert torch.equal(call.run().double(), call.truth())


@EVERY_IMPLEMENTATION
@pytest.mark.parametrize("rows", [5, 70])
@pytest.mark.parametrize("kinds", [("block", "block"), ("block", "one"), ("row", "block")], ids=str)
def test_blocks_get_their_own_scales(kinds, rows, implementation):
    call = call_of("fp8_matmul", rows, 150, 700, kinds)
    with using(implementation):
        assert_accurate(call.run(), call.truth(), zeros=False)


@BOTH
@EVERY_IMPLEMENTATION
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
def test_every_epilogue_is_exact_where_it_can_be(activation, dtype, implementation, op):
    """At multiples of 128 every activation gives its argument or 0. Of pairs the gates are such, the ups small."""
    call = call_of(op, 3, 18, 40, magnitude=2.0, out_dtype=dtype, bias=dtype, residual=True, activation=activation)
    a, b, _, _ = call.args
    a, b = (x.float().round().clamp(-2, 2).to(OPERATORS[op]) for x in (a, b))
    call.args = a, b, torch.tensor(16.0), torch.full((18,), 8.0)
    call.options["bias"] = (128 * torch.arange(-9, 9)).to(dtype)
    call.options["residual"] = call.options["residual"].round().clamp(-9, 9)
    with using(implementation):
        assert torch.equal(call.run(), call.truth().to(dtype))
        if activation is None:
            return
        call.args = *call.args[:3], torch.tensor([8.0, 1 / 16]).repeat(9)
        call.options |= {"residual": call.options["residual"][:, 9:], "gated": True}
        assert torch.equal(call.run(), call.truth().to(dtype))


@EVERY_KERNEL
@pytest.mark.parametrize("rows", [1, 65], ids=["few rows", "tiles"])
def test_sums_of_int8_are_exact_to_the_last_k(rows, implementation):
    """B39: ModelTC/LightX2V#896, tile-ai/tilelang#2172: sums kept in 8 bits. Here 2**31 itself, which int32 has not."""
    depth = MAX_K_INT8 if rows == 1 else 16384
    a, b = torch.full((rows, depth), -128, dtype=torch.int8), torch.full((3, depth), -128, dtype=torch.int8)
    b[1], b[2] = 127, 1
    one = torch.tensor(1.0)
    with using(implementation):
        out = int8_matmul(a, b, one, one, out_dtype=torch.float32)
    assert torch.equal(out, torch.tensor([16384.0, -16256.0, -128.0]).mul(depth).expand(rows, 3))


@pytest.mark.parametrize("depth", [1, 127, 128, 1025, MAX_K_INT8])
def test_sums_of_int8_are_exact_in_torch(depth):
    for x, y in ((-128, -128), (127, 127), (127, -128), (1, -128), (-1, -1)):
        a, b = torch.full((2, depth), x, dtype=torch.int8), torch.full((3, depth), y, dtype=torch.int8)
        with using("torch"):
            out = int8_matmul(a, b, torch.tensor(1.0), torch.tensor(1.0), out_dtype=torch.float32)
        assert torch.equal(out.double(), torch.full((2, 3), float(x * y * depth), dtype=torch.float64))


def test_processors_that_saturate_are_found_out():
    """Without VNNI `torch._int_mm` adds pairs of products in 16 bits: wrong at 127 * 127. We are exact there too."""
    code = """
import torch, fusedops
from fusedops._core.int_mm import int_mm_is_exact
one, worst = torch.tensor(1.0), {}
for x, y in ((127, 127), (127, -128), (-128, -128)):
    a, b = torch.full((5, 1500), x, dtype=torch.int8), torch.full((33, 1500), y, dtype=torch.int8)
    assert (fusedops.int8_matmul(a, b, one, one, out_dtype=torch.float32) == 1500.0 * x * y).all()
a, b = (torch.randint(-128, 128, (n, 700), dtype=torch.int8) for n in (9, 11))
assert torch.equal(fusedops.int8_matmul(a, b, one, one, out_dtype=torch.float32).double(), a.double() @ b.double().T)
print(int_mm_is_exact())
"""
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() in ("True", "False")


@EVERY_KERNEL
def test_every_code_of_float8_has_its_value(implementation):
    """Denormals, the largest, both zeros and NaN, also where bytes become float16 on the way."""
    every = torch.arange(256, dtype=torch.uint8).view(FP8)
    a, b = every[:, None].repeat(1, 16), torch.zeros(1, 16)
    b[0, 5] = 1.0
    a[:, 6:] = a[:1, 6:]  # a NaN stands in one place
    a[:, :5] = a[:1, :5]
    one = torch.tensor(1.0)
    for rows in (slice(64, 128), slice(None)):
        with using(implementation):
            out = fp8_matmul(a[rows], b.to(FP8), one, one, out_dtype=torch.float32)
        assert_accurate(out[:, 0], every[rows].double())
        assert torch.equal(out[:, 0].nan_to_num(7.0), every[rows].float().nan_to_num(7.0))


# ---- properties


@BOTH
@pytest.mark.parametrize("implementation", FUSED)
@settings(max_examples=settings.default.max_examples // 3)
@given(data=st.data())
def test_strides_change_nothing(implementation, op, data):
    """B25: pytorch/FBGEMM#2713: nonsense where b was laid out in another way. Memory between the rows holds NaN."""
    call = data.draw(calls(op))
    plain = [x.contiguous() for x in call.args]
    options = {name: x.contiguous() if isinstance(x, torch.Tensor) else x for name, x in call.options.items()}
    before = [x.clone() for x in call.args]
    with using(implementation):
        assert torch.equal(call.run(), getattr(fusedops, op)(*plain, **options))
    for x, kept in zip(call.args, before, strict=True):
        assert torch.equal(*(t.view(torch.uint8) if t.dtype == FP8 else t for t in (x, kept)))


@BOTH
@EVERY_IMPLEMENTATION
@pytest.mark.parametrize("kind", ["one", "row", "block"])
def test_doubling_a_scale_doubles_the_result(kind, implementation, op):
    if kind == "block" and op == "int8_matmul":
        return
    call = call_of(op, kinds=(kind, kind))
    a, b, scale_a, scale_b = call.args
    with using(implementation):
        once, function = call.run(), getattr(fusedops, op)
        for args in ((a, b, 2 * scale_a, scale_b), (a, b, scale_a, 2 * scale_b)):
            assert torch.equal(function(*args, **call.options), 2 * once)


@EVERY_KERNEL
@pytest.mark.parametrize("rows", [40, 200], ids=["few rows", "tiles"])
def test_a_row_does_not_depend_on_its_batch(rows, implementation):
    """B52, B53: vllm-project/vllm#53257, #51902: kernels were repeatable, but not when other rows stood beside."""
    least = 1 if rows == 40 else 65
    call = call_of("fp8_matmul", rows, 70, 1104, bias=torch.float32, residual=True, activation="silu")
    with using(implementation):
        whole, again = call.run(), call.run()
        few = call.rows(slice(30, 30 + least)).run()
    assert torch.equal(whole, again) and torch.equal(whole[30 : 30 + least], few)


@EVERY_IMPLEMENTATION
def test_rows_of_int8_never_depend_on_their_batch(implementation):
    call = call_of("int8_matmul", 70, 40, 700, bias=torch.float32, activation="gelu", residual=True)
    with using(implementation):
        whole = call.run()
        for chosen in (slice(0, 1), slice(5, 40), slice(2, 69)):
            torch.testing.assert_close(call.rows(chosen).run(), whole[chosen], rtol=0, atol=0)


@EVERY_IMPLEMENTATION
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("rows", [4, 66])
def test_a_bad_value_damages_its_own_row_alone(rows, bad, implementation):
    call = call_of("fp8_matmul", rows, kinds=("block", "block"), residual=True)
    a, b, scale_a, scale_b = call.args
    with using(implementation):
        clean = call.run()
        if bad != bad:
            a.view(torch.uint8)[2, 299] = 0x7F
        else:
            scale_a[2, 2] = bad
        found = call.run()
    assert not found[2].isfinite().any()
    keep = torch.arange(rows) != 2
    assert torch.equal(found[keep], clean[keep])


@BOTH
@EVERY_IMPLEMENTATION
def test_empty(implementation, op):
    call = call_of(op, 0, residual=True)
    with using(implementation):
        out = call.run()
    assert out.shape == (0, 70) and out.dtype == torch.float32


# ---- rejects

A, B, ONE = torch.ones(3, 40, dtype=torch.int8), torch.ones(5, 40, dtype=torch.int8), torch.tensor(1.0)
FA, FB = A.float().to(FP8), B.float().to(FP8)


def int8(a=A, b=B, scale_a=ONE, scale_b=ONE, **options):
    return lambda: int8_matmul(a, b, scale_a, scale_b, **options)


def fp8(a=FA, b=FB, scale_a=ONE, scale_b=ONE, **options):
    return lambda: fp8_matmul(a, b, scale_a, scale_b, **options)


def meta(*shape, dtype=torch.int8):
    return torch.empty(shape, dtype=dtype, device="meta")


ONE_META = meta(dtype=torch.float32)
REJECTS = [
    (int8(a=[1]), TypeError, "int8_matmul: a must be a torch.Tensor, got list"),
    (int8(a=A[0]), ValueError, r"int8_matmul: a must have shape \[M, K\], got \[40\]"),
    (int8(b=B[:, :39]), ValueError, r"b must have shape \[N, K\] with K=40, got \[5, 39\]"),
    (int8(b=B.to("meta")), ValueError, "b must be on cpu, got meta"),
    (int8(a=FA), TypeError, "a must be int8, got float8_e4m3fn"),
    (int8(b=B.to(torch.uint8)), TypeError, "b must be int8, got uint8"),
    (fp8(a=A), TypeError, "fp8_matmul: a must be float8_e4m3fn, got int8"),
    (fp8(b=FB.to(torch.float8_e5m2)), TypeError, "b must be float8_e4m3fn, got float8_e5m2"),
    (int8(out_dtype=torch.int32), TypeError, "out_dtype must be float16, bfloat16 or float32, got int32"),
    (int8(out_dtype="bfloat16"), TypeError, "out_dtype must be float16, bfloat16 or float32, got bfloat16"),
    (int8(b=B.T.contiguous().T), ValueError, "b must have a contiguous last dimension"),
    (fp8(a=FA.T.contiguous().T), ValueError, "a must have a contiguous last dimension"),
    (int8(a=A[:, :0], b=B[:, :0]), ValueError, "K must be at least 1, got 0"),
    (int8(b=B[:0]), ValueError, "N must be at least 1, got 0"),
    (int8(scale_a=1.0), TypeError, "scale_a must be a torch.Tensor, got float"),
    (int8(scale_a=ONE.half()), TypeError, "scale_a must be float32, got float16"),
    (int8(scale_b=ONE.to("meta")), ValueError, "scale_b must be on cpu, got meta"),
    (int8(scale_a=torch.ones(5)), ValueError, r"scale_a must have shape \[\], \[1\] or \[M\] = .*\[3\], got \[5\]"),
    (int8(scale_a=torch.ones(3, 1)), ValueError, r"scale_a must have shape .* got \[3, 1\]"),
    (int8(scale_b=torch.ones(1, 1)), ValueError, r"scale_b must have shape .* got \[1, 1\]"),
    (fp8(scale_a=torch.ones(3, 2)), ValueError, r"\[M\] or \[M, ceil\(K / 128\)\] = .*\[3, 1\], got \[3, 2\]"),
    (fp8(scale_b=torch.ones(5, 1)), ValueError, r"\[ceil\(N / 128\), ceil\(K / 128\)\] = .*, got \[5, 1\]"),
    (int8(bias=torch.ones(3)), ValueError, r"bias must have shape \[N\] with N=5, got \[3\]"),
    (int8(bias=torch.ones(5).half()), TypeError, "bias must be bfloat16 or float32, got float16"),
    (int8(residual=torch.ones(3, 5)), TypeError, "residual must be bfloat16, got float32"),
    (int8(residual=torch.ones(5, 3)), ValueError, r"residual must have shape \[M, N\] with M=3, N=5"),
    (int8(residual=torch.ones(5, 3).bfloat16().T), ValueError, "residual must have a contiguous last dimension"),
    (int8(activation="swish"), ValueError, "activation must be one of None, 'silu', .*, got 'swish'"),
    (int8(meta(1, MAX_K_INT8 + 1), meta(1, MAX_K_INT8 + 1), ONE_META, ONE_META), NotImplementedError,
     "int8_matmul: K must be at most MAX_K_INT8 = 131072, got 131073"),
    (int8(meta(MAX_SIZE + 1, 1), meta(1, 1), ONE_META, ONE_META), NotImplementedError, "M must be at most MAX_SIZE"),
    (int8(meta(1, 1), meta(2**40, 1), ONE_META, ONE_META), NotImplementedError, "N must be at most MAX_SIZE"),
]  # fmt: skip


@pytest.mark.parametrize("call, error, message", REJECTS)
def test_rejects(call, error, message):
    """B19: vllm-project/vllm-gguf-plugin#127: a size of 64 bits narrowed to 32; B59: turboderp-org/exllamav3#310: sizes
    of 0. They are told before anything is launched, and so are scales of shapes that fit nothing."""
    assert_rejected(call, error, message)


@pytest.mark.parametrize("bad", [0.0, -1.0, NAN, INF, -3.4e38])
def test_level_2_reads_the_scales(bad):
    """B36: vllm-project/vllm-omni#5262: a sentinel of -3.4e38 for a scale that was never computed gave NaN."""
    scale = torch.ones(3)
    scale[1] = bad
    blocks = torch.full((1, 1), bad)
    with env.override("FUSEDOPS_VALIDATE", "2"):
        with pytest.raises(ValueError, match="int8_matmul: scale_a must be finite and above 0, got"):
            int8_matmul(A, B, scale, ONE)
        with pytest.raises(ValueError, match="fp8_matmul: scale_b must be finite and above 0, got"):
            fp8_matmul(FA, FB, ONE, blocks)
        int8_matmul(A, B, ONE, ONE)


# ---- torch


@BOTH
def test_opcheck(op):
    call = call_of(op, 3, 5, 40, bias=torch.float32, residual=True)
    args = *call.args, call.options["bias"], torch.float32, "gelu", call.options["residual"], False
    opcheck(op, *args)


@BOTH
@pytest.mark.parametrize("layout", ["contiguous", "padded", "sliced", "expanded"])
def test_fake_strides_are_the_real_ones(layout, op):
    a, b = codes((4, 33), OPERATORS[op], 0, layout=layout), codes((6, 33), OPERATORS[op], 1, layout=layout)
    scales = scale_of("row", 4, 1, 33, 0), scale_of("one", 6, 128, 33, 1)
    assert_fake_like_real(op, a, b, *scales, None, torch.float16, None, None, False)


@BOTH
def test_torch_compile(op):
    def function(a, b, scale_a, scale_b, residual):
        return getattr(fusedops, op)(a, b, scale_a, scale_b * 2, out_dtype=residual.dtype, residual=residual) + 1

    variants = [call_of(op, rows, 24, 130, residual=True) for rows in (4, 6)]
    assert_compiles(function, *((*call.args, call.options["residual"]) for call in variants))


def test_a_gradient_is_refused():
    with pytest.raises(NotImplementedError, match="int8_matmul: the result must not be differentiated"):
        int8_matmul(A, B, ONE.clone().requires_grad_(), ONE, out_dtype=torch.float32).sum().backward()


def test_cost_counts_every_byte():
    told = fusedops.explain("int8_matmul", A, B, ONE, torch.ones(5), bias=torch.ones(5))
    assert told.bytes == 3 * 40 + 5 * 40 + 4 + 20 + 20 + 2 * 15 and told.operations == 2 * 3 * 5 * 40
