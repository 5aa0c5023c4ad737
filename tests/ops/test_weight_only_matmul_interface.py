"""weight_only_matmul: planted faults, what is refused, and torch's own machinery."""

import pytest
import torch

import fusedops
from fusedops import weight_only_matmul
from fusedops._core import env
from fusedops.ops.weight_only_matmul import reference
from fusedops.testing import Fault, assert_accurate, assert_faults_rejected, make_tensor
from tests.ops.common import assert_compiles, assert_fake_like_real, assert_rejected, opcheck
from tests.ops.weight_problems import INF, NAN, truth_of, weight_of


def test_planted_faults_are_rejected():
    """In float32, on 4-bit groups, float8 blocks and int8 rows at once."""
    M, N, K = 3, 150, 300
    x, bias = make_tensor((M, K), torch.float32, seed=1), make_tensor((N,), torch.float32, seed=2)
    residual = make_tensor((M, N), torch.float32, seed=3)
    weights = [weight_of(kind, N, K, 64, seed=4) for kind in ("int4 group", "fp8 block", "int8 row")]

    def check(candidate):
        for values, scale, zero in weights:
            out = candidate(x, values, scale, zero, bias, residual, "silu")
            assert_accurate(out, truth_of(x, values, scale, zero, bias, "silu", residual))

    def correct(x, values, scale, zero, bias, residual, activation):
        return weight_only_matmul(
            x, values, scale, zero=zero, bias=bias, residual=residual, activation=activation
        )  # fmt: skip

    def changed(**changes):
        def wrong(*args):
            names = ("x", "values", "scale", "zero", "bias", "residual", "activation")
            given = dict(zip(names, args))
            given |= {name: change(given[name]) for name, change in changes.items() if given[name] is not None}
            return correct(*given.values())

        return wrong

    def only_int4(change):
        return lambda values: change(values) if values.dtype == torch.uint8 else values

    def rolled(table):
        return table.roll(1, -1)

    def lossy(x, values, scale, zero, bias, residual, activation):
        weight = reference.dequantized(values, scale, zero, K, torch.float32).bfloat16().float()
        out = torch.nn.functional.silu(x @ weight.T + bias)
        return out + residual

    def residual_first(x, values, scale, zero, bias, residual, activation):
        return torch.nn.functional.silu(truth_of(x, values, scale, zero, bias) + residual).float()

    def without(table, place):
        return table.clone().index_fill_(-1, torch.tensor(place), 0)

    faults = {
        "nibbles swapped": changed(values=only_int4(lambda v: (v << 4) | (v >> 4))),
        "signed 4-bit codes": changed(values=only_int4(lambda v: v ^ 0x88)),
        "only the lower halves": changed(values=only_int4(lambda v: v & 15)),
        "zero ignored": changed(zero=torch.zeros_like), "zero one more": changed(zero=lambda z: z + 1),
        "zero in whole codes": changed(zero=lambda z: z // 16 * 16), "zero of the group before": changed(zero=rolled),
        "zero always 8": changed(zero=lambda z: torch.full_like(z, 128)),
        "scale of the group or row before": changed(scale=rolled),
        "scale one percent more": changed(scale=lambda s: s * 1.01),
        "scale one percent less": changed(scale=lambda s: s * 0.99),
        "scale in bfloat16": changed(scale=lambda s: s.bfloat16().float()),
        "last group or row dropped": changed(scale=lambda s: without(s, [s.shape[-1] - 1])),
        "rows of the weight shifted": changed(values=lambda v: v.view(torch.uint8).roll(1, 0).view(v.dtype)),
        "last column dropped": changed(x=lambda x: without(x, [K - 1])),
        "columns shifted": changed(x=rolled), "x in bfloat16": changed(x=lambda x: x.bfloat16().float()),
        "bias twice": changed(bias=lambda b: b * 2), "no bias": changed(bias=torch.zeros_like),
        "no residual": changed(residual=torch.zeros_like), "residual before the activation": residual_first,
        "another activation": changed(activation=lambda a: "gelu"), "no activation": changed(activation=lambda a: None),
        "weights rounded": lossy,
    }  # fmt: skip
    assert_faults_rejected(check, correct, [Fault(name, wrong) for name, wrong in faults.items()])


# ---- rejects

X = torch.ones(2, 100)
V8, V4 = torch.ones(6, 100, dtype=torch.int8), torch.ones(6, 50, dtype=torch.uint8)
S1, S4 = torch.ones(6), torch.ones(6, 4)
Z4 = torch.zeros(6, 4, dtype=torch.uint8)
LONG = torch.empty(1, 2**30 + 1, device="meta", dtype=torch.int8)
ONE = torch.ones(1, device="meta")
REJECTS = [
    (lambda: weight_only_matmul([1], V8, S1), TypeError, "weight_only_matmul: x must be a torch.Tensor, got list"),
    (lambda: weight_only_matmul(X, V8, 0.5), TypeError, "scale must be a torch.Tensor, got float"),
    (lambda: weight_only_matmul(X, V8.to("meta"), S1), ValueError, "values must be on cpu, got meta"),
    (lambda: weight_only_matmul(X, V8, S1.to("meta")), ValueError, "scale must be on cpu, got meta"),
    (lambda: weight_only_matmul(X.double(), V8, S1), TypeError, "x must be float16, bfloat16 or float32, got float64"),
    (lambda: weight_only_matmul(X, V8.float(), S1), TypeError, "values must be int8, float8_e4m3fn or uint8"),
    (lambda: weight_only_matmul(X, V8[0], S1), ValueError, r"values must have shape \[N, columns\], got \[100\]"),
    (lambda: weight_only_matmul(X[:, :99], V8, S1), ValueError, r"values must have shape \[N, K\] with K=99, got"),
    (lambda: weight_only_matmul(X, V8.view(torch.uint8), S4), ValueError, r"\[N, ceil\(K / 2\)\] with K=100, got"),
    (lambda: weight_only_matmul(X[:, :98], V4, S4), ValueError, r"\[N, ceil\(K / 2\)\] with K=98, got \[6, 50\]"),
    (lambda: weight_only_matmul(X[:, :0], V8[:, :0], S1), ValueError, "at least one row and one column, got N=6, K=0"),
    (lambda: weight_only_matmul(X, V8[:0], S1[:0]), ValueError, "at least one row and one column, got N=0, K=100"),
    (lambda: weight_only_matmul(X, V8, S1[:5]), ValueError, r"scale must have shape .* got \[5\]"),
    (lambda: weight_only_matmul(X, V8, torch.ones(6, 3)), ValueError, r"scale must have shape .* got \[6, 3\]"),
    (lambda: weight_only_matmul(X, V8, torch.ones(6, 9)), ValueError, r"scale must have shape .* got \[6, 9\]"),
    (lambda: weight_only_matmul(X, V8, torch.ones(6, 0)), ValueError, r"scale must have shape .* got \[6, 0\]"),
    (lambda: weight_only_matmul(X, V8, torch.ones(2, 1)), ValueError, r"scale must have shape .* got \[2, 1\]"),
    (lambda: weight_only_matmul(X, V4, S1), ValueError, r"scale must have shape \[N, ceil\(K / 32, 64 or 128\)\] = "),
    (lambda: weight_only_matmul(X, V8, S1.double()), TypeError, "scale must be float32, got float64"),
    (lambda: weight_only_matmul(X.half(), V8, S1.bfloat16()), TypeError, "scale must be float16 or float32, got bf"),
    (lambda: weight_only_matmul(X, V8, S4, zero=Z4), ValueError, "zero must be None unless values hold 4-bit codes"),
    (lambda: weight_only_matmul(X, V4, S4, zero=Z4[:, :2]), ValueError, r"zero must have shape of scale = \[6, 4\]"),
    (lambda: weight_only_matmul(X, V4, S4, zero=S4), TypeError, "zero must be uint8, got float32"),
    (lambda: weight_only_matmul(X, V8, S1, bias=S1[:5]), ValueError, r"bias must have shape \[N\] with N=6, got"),
    (lambda: weight_only_matmul(X, V8, S1, bias=S1.half()), TypeError, "bias must be float32, got float16"),
    (lambda: weight_only_matmul(X, V8, S1, residual=S1), ValueError, "residual must have shape"),
    (lambda: weight_only_matmul(X, V8, S1, residual=X[:, :6].half()), TypeError, "residual must be float32, got"),
    (lambda: weight_only_matmul(X, V8, S1, activation="tanh"), ValueError, "activation must be one of None, 'silu'"),
    (lambda: weight_only_matmul(LONG.half(), LONG, ONE), NotImplementedError, "K must be at most MAX_SIZE = 10737"),
    (lambda: weight_only_matmul(ONE[None], LONG.T, ONE), NotImplementedError, "N must be at most .* got 1073741825"),
    (lambda: weight_only_matmul(LONG.T.half(), ONE[None].char(), ONE), NotImplementedError, "the rows of x must"),
    (lambda: weight_only_matmul(X.T.contiguous().T, V8, S1), ValueError, "x must have a contiguous last dimension"),
]  # fmt: skip


@pytest.mark.parametrize("call, error, message", REJECTS)
def test_rejects(call, error, message):
    """B59: turboderp-org/exllamav3#310: shapes of a checkpoint were an index, unchecked."""
    assert_rejected(call, error, message)


@pytest.mark.parametrize("bad", [0.0, -1.0, NAN, INF])
def test_level_2_reads_the_scales(bad):
    """B36: vllm-project/vllm-omni#5262: a sentinel among the scales gave NaN without an error."""
    scale = S1.clone()
    weight_only_matmul(X, V8, scale)
    scale[2] = bad
    with env.override("FUSEDOPS_VALIDATE", "2"), pytest.raises(ValueError, match="scale must be finite and above 0"):
        weight_only_matmul(X, V8, scale)


def test_no_derivative():
    x = X.clone().requires_grad_()
    with pytest.raises(NotImplementedError, match="weight_only_matmul: the result must not be differentiated"):
        weight_only_matmul(x, V8, S1).sum().backward()


# ---- torch


def test_opcheck():
    residual = torch.ones(2, 6)
    opcheck("weight_only_matmul", X, V8, S1, None, S1, residual, "silu", False)
    opcheck("weight_only_matmul", X.bfloat16(), V4, S4, Z4, None, None, None, False)


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "padded"])
def test_fake_strides_are_the_real_ones(layout):
    x = make_tensor((2, 3, 100), torch.float32, seed=0, layout=layout)
    assert_fake_like_real("weight_only_matmul", x, V8, S1, None, None, None, None, False)


def test_torch_compile():
    def function(x, values, scale, zero):
        return weight_only_matmul(x, values, scale, zero=zero, bias=x[0, :6], activation="silu")

    assert_compiles(function, (X, V4, S4, Z4), (torch.randn(5, 100), V4, S4, Z4))


def test_cost_counts_every_byte():
    told = fusedops.explain("weight_only_matmul", X, V4, S4, zero=Z4, bias=S1, residual=torch.ones(2, 6))
    assert told.bytes == 2 * 100 * 4 + 300 + 24 * 4 + 24 + 6 * 4 + 2 * 2 * 6 * 4
    assert told.operations == 2 * 2 * 6 * 100
