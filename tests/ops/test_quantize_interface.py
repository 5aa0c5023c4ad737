"""quantize_int8, quantize_fp8: what they refuse, and how they stand in torch."""

import pytest
import torch

import fusedops
from fusedops import quantize_fp8, quantize_int8
from fusedops._core import env
from fusedops.ops.quantize import GRANULARITIES
from fusedops.testing import make_tensor
from tests.ops.common import assert_compiles, assert_fake_like_real, assert_rejected, opcheck

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
NAN, INF = float("nan"), float("inf")
EVERY_GRANULARITY = pytest.mark.parametrize("granularity", GRANULARITIES)

# ---- rejects

X = torch.ones(3, 4)
REJECTS = [
    (lambda: quantize_int8([1.0]), TypeError, "quantize_int8: x must be a torch.Tensor, got list"),
    (lambda: quantize_int8(X.double()), TypeError, "x must be float16, bfloat16 or float32, got float64"),
    (lambda: quantize_fp8(X.int()), TypeError, "quantize_fp8: x must be float16, bfloat16 or float32, got int32"),
    (lambda: quantize_int8(torch.ones(())), ValueError, r"x must have shape \[..., K\], got \[\]"),
    (lambda: quantize_int8(X[0], granularity="block_2d"), ValueError, r"x must have shape \[..., N, K\], got \[4\]"),
    (lambda: quantize_int8(X, granularity="column"), ValueError, "granularity must be one of 'row', 'tensor', 'block'"),
    (lambda: quantize_fp8(X, granularity=128), ValueError, "quantize_fp8: granularity must be one of .* got 128"),
    (lambda: quantize_fp8(X, dtype=torch.int8), TypeError, "dtype must be float8_e4m3fn or float8_e5m2, got int8"),
    (lambda: quantize_fp8(X, dtype="fp8"), TypeError, "dtype must be float8_e4m3fn or float8_e5m2, got fp8"),
    (lambda: quantize_int8(X, scale=0.5), TypeError, "quantize_int8: scale must be a torch.Tensor, got float"),
    (lambda: quantize_int8(X, scale=torch.ones(4)), ValueError, r"scale must have shape of 'row', .* got \[4\]"),
    (lambda: quantize_int8(X, scale=torch.ones(3, 1)), ValueError, r"scale must have shape .* got \[3, 1\]"),
    (lambda: quantize_fp8(X, granularity="tensor", scale=torch.ones(3)), ValueError, r"of 'tensor', .* got \[3\]"),
    (lambda: quantize_fp8(X, granularity="block", scale=torch.ones(3)), ValueError, r"= \[3, 1\] or .* got \[3\]"),
    (lambda: quantize_fp8(X, granularity="block_2d", scale=torch.ones(3, 1)), ValueError, r"got \[3, 1\]"),
    (lambda: quantize_int8(X, scale=torch.ones(3).half()), TypeError, "scale must be float32, got float16"),
    (lambda: quantize_int8(X, scale=torch.ones(3, device="meta")), ValueError, "scale must be on cpu, got meta"),
]  # fmt: skip


@pytest.mark.parametrize("call, error, message", REJECTS)
def test_rejects(call, error, message):
    assert_rejected(call, error, message)


@EVERY_GRANULARITY
def test_a_last_dimension_with_a_stride_is_refused(granularity):
    """B25: pytorch/FBGEMM#2713: an operand that was not contiguous in the transposed form gave nonsense."""
    for x in (make_tensor((3, 4), torch.float32, seed=0, layout="strided"), X.mT):
        with pytest.raises(ValueError, match="x must have a contiguous last dimension"):
            quantize_fp8(x, granularity=granularity)


@pytest.mark.parametrize("bad", [0.0, -1.0, NAN, INF, -3.4e38, 1e-39])
def test_level_2_reads_the_scales(bad):
    """B36: vllm-project/vllm-omni#5262: a scale that marked "none", -3.4e38, made NaN of all, without an error."""
    scale = torch.tensor([1.0, bad, 1.0])
    with env.override("FUSEDOPS_VALIDATE", "2"):
        with pytest.raises(ValueError, match="quantize_int8: scale must be finite and at least 2\\*\\*-126, got"):
            quantize_int8(X, scale=scale)
        quantize_int8(X, scale=torch.full((), 2.0**-126))


# ---- torch


@EVERY_GRANULARITY
def test_opcheck(granularity):
    x = make_tensor((3, 2, 37), torch.float32, seed=0).transpose(0, 1)
    opcheck("quantize_fp8", x, granularity, E5M2)
    opcheck("quantize_scaled", x, torch.ones(()), granularity, E4M3)
    opcheck("quantize_int8", x, granularity)


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "padded"])
@EVERY_GRANULARITY
def test_fake_strides_are_the_real_ones(granularity, layout):
    x = make_tensor((2, 130 if granularity == "block_2d" else 3, 140), torch.bfloat16, seed=0, layout=layout)
    assert_fake_like_real("quantize_int8", x, granularity)
    assert_fake_like_real("quantize_fp8", x, granularity, E4M3)
    assert_fake_like_real("quantize_scaled", x, torch.ones(()), granularity, E4M3)


def test_torch_compile():
    def function(x):
        values, scale = quantize_int8(x * 2)
        blocks, scales = quantize_fp8(x, granularity="block", scale=None)
        given_scale, _ = quantize_int8(x, scale=scale)
        return values, scale, blocks.float(), scales, given_scale

    assert_compiles(function, (torch.randn(4, 200),), (torch.randn(6, 300),))


def test_the_result_has_no_derivative():
    _, scale = quantize_int8(X.clone().requires_grad_())
    with pytest.raises(NotImplementedError, match="quantize_int8: the result must not be differentiated"):
        scale.sum().backward()


def test_cost_counts_every_byte():
    assert fusedops.explain("quantize_int8", X).bytes == 12 * 5 + 3 * 4
    assert fusedops.explain("quantize_fp8", X.half(), granularity="tensor").bytes == 12 * 5 + 4
    assert fusedops.explain("quantize_int8", X, scale=torch.ones(3)).bytes == 12 * 5 + 3 * 4
