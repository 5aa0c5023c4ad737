"""layer_norm, add_layer_norm."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fusedops._core import env
from fusedops._core.register import operators
from fusedops.ops.layer_norm import add_layer_norm, layer_norm, reference
from fusedops.testing import Fault, assert_accurate, assert_faults_rejected, make_tensor, strategies
from fusedops.testing.faults import argument_faults, option_fault, standard_faults
from fusedops.testing.inputs import huge_stride_rows
from tests.ops.common import (
    DTYPES,
    EMULATED,
    FUSED,
    IMPLEMENTATIONS,
    assert_compiles,
    assert_fake_like_real,
    counted_budget,
    gradients,
    opcheck,
    using,
)

EPSILONS = st.sampled_from([1e-5, 1e-6, 0.5])
LONG = [2, 16384, 16385, 65536]  # both sides of the longest row that one program holds, and MAX_N


def truth(x, *parameters_and_eps):
    """layer_norm of the stored values in float64."""
    return reference.layer_norm(*(a.double() if isinstance(a, torch.Tensor) else a for a in (x, *parameters_and_eps)))


def parameters(n, dtype, seed):
    return make_tensor((n,), dtype, seed=seed, layout="offset:3"), make_tensor((n,), dtype, seed=seed + 1)


def check(implementation, out, h, weight, bias, eps):
    """Compare `out` with the truth of rows h.

    The Triton kernel gets the default budget for any mean. The others round the mean, and torch also `x * rstd` and
    `mean * rstd`: each of them costs |mean| / deviation epsilons of float32, which are counted.
    An element may be an exact zero by luck, since h - mean and the bias cancel.
    """
    expected = truth(h, weight, bias, eps)
    budget = None
    if implementation in ("torch", "reference"):
        mean = h.double().mean(-1, keepdim=True)
        rstd = ((h.double() - mean).square().mean(-1, keepdim=True) + eps).rsqrt()
        scale = torch.ones(h.shape[-1]) if weight is None else weight.double().abs()
        budget = counted_budget(out.dtype, 2 * torch.finfo(torch.float32).eps * mean.abs() * rstd * scale, expected)
    return assert_accurate(out, expected, budget=budget, zeros=False)


# ---- accuracy


@pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS, *EMULATED])
@given(
    shape=strategies.row_shapes(6, 300, min_n=2),
    dtype=strategies.dtypes(),
    wide_weight=st.booleans(),
    layout=st.data(),
    magnitude=strategies.magnitudes(),
    eps=EPSILONS,
    seed=strategies.seeds(),
)
def test_layer_norm(implementation, shape, dtype, wide_weight, layout, magnitude, eps, seed):
    kind = layout.draw(strategies.layouts(len(shape)))
    x = make_tensor(shape, dtype, seed=seed, magnitude=magnitude, layout=kind)
    weight, bias = parameters(shape[-1], torch.float32 if wide_weight else dtype, seed + 1)
    for given_parameters in ((weight, bias), (weight, None), (None, bias), (None, None)):
        with using(implementation):
            out = layer_norm(x, *given_parameters, eps)
        check(implementation, out, x, *given_parameters, eps)


@pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS, *EMULATED])
@given(
    shape=strategies.row_shapes(6, 300, min_n=2),
    dtype=strategies.dtypes(),
    has_bias=st.booleans(),
    layout=st.data(),
    magnitude=strategies.magnitudes(),
    eps=EPSILONS,
    seed=strategies.seeds(),
)
def test_add_layer_norm(implementation, shape, dtype, has_bias, layout, magnitude, eps, seed):
    kinds = [layout.draw(strategies.layouts(len(shape))) for _ in "xr"]
    x = make_tensor(shape, dtype, seed=seed, magnitude=magnitude, layout=kinds[0])
    residual = make_tensor(shape, dtype, seed=seed + 1, layout=kinds[1])
    weight, bias = parameters(shape[-1], dtype, seed + 2)
    bias = bias if has_bias else None
    with using(implementation):
        out, h = add_layer_norm(x, residual, weight, bias, eps)
    assert torch.equal(h, x + residual)
    check(implementation, out, h, weight, bias, eps)


@pytest.mark.parametrize("n", LONG)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("implementation", [*FUSED, *EMULATED])
def test_long_rows(implementation, dtype, n):
    x, residual = (make_tensor((2, n), dtype, seed=i) for i in range(2))
    weight, bias = parameters(n, dtype, 2)
    with using(implementation):
        out, h = add_layer_norm(x, residual, weight, bias)
        plain = layer_norm(x, weight, bias)
    assert torch.equal(h, x + residual)
    check(implementation, out, h, weight, bias, 1e-5)
    check(implementation, plain, x, weight, bias, 1e-5)


@pytest.mark.parametrize("n", [3, 100, 4096, 20000, 65536])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("implementation", [*FUSED, *EMULATED])
def test_large_mean(implementation, dtype, n):
    """1000 + noise, and a long row whose first block lies elsewhere than the rest: no variance by E[x^2] - E[x]^2."""
    noise = make_tensor((3, n), dtype, seed=0)
    uneven = noise.clone()
    uneven[:, : n // 16] += 1000
    uneven[:, 0] = -3e4
    for x in (noise + 1000, noise * 0.25 - 1000, uneven):
        with using(implementation):
            out = layer_norm(x, None)
        check(implementation, out, x, None, None, 1e-5)


# ---- properties


@pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS, *EMULATED])
@given(shape=strategies.row_shapes(4, 100, min_rows=1, min_n=2), exponent=st.integers(-8, 8), seed=strategies.seeds())
def test_scaling_by_a_power_of_two_changes_nothing(implementation, shape, exponent, seed):
    x = make_tensor(shape, torch.float32, seed=seed)
    weight, bias = parameters(shape[-1], torch.float32, seed + 1)
    with using(implementation):
        assert torch.equal(layer_norm(x, weight, bias, 0.0), layer_norm(x * 2.0**exponent, weight, bias, 0.0))


@pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS, *EMULATED])
def test_small_rows_are_divided_by_the_root_of_eps(implementation):
    x = make_tensor((3, 40), torch.float32, seed=0, magnitude=2.0**-40)
    x = torch.cat([x, -x], -1)  # of mean zero
    with using(implementation):
        torch.testing.assert_close(layer_norm(x, None, eps=0.25), x * 2.0, rtol=1e-6, atol=2.0**-60)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 3, 100, 20000])
@pytest.mark.parametrize("implementation", [*FUSED, *EMULATED])
def test_equal_elements_give_the_bias(implementation, n, dtype):
    """What rounding leaves of x - mean is at most two epsilons of float32, times 1 / sqrt(eps)."""
    bias = make_tensor((n,), dtype, seed=0)
    for value in (0.0, 0.1, -7.7, 1000.0):
        x = torch.full((2, n), value, dtype=dtype)
        bound = 2 * torch.finfo(torch.float32).eps * abs(value) * 1e-5**-0.5
        with using(implementation):
            torch.testing.assert_close(layer_norm(x, None, bias), bias.expand(2, n), atol=bound, rtol=0.0)


@pytest.mark.parametrize("implementation", [*FUSED, *EMULATED])  # the reference promises values, not bits
@given(
    shape=strategies.row_shapes(6, 150, min_rows=1),
    dtype=strategies.dtypes(),
    layout=st.data(),
    seed=strategies.seeds(),
)
def test_layout_and_neighbours_do_not_matter(implementation, shape, dtype, layout, seed):
    """A strided view, a row alone and a row among NaN rows give the same bits; inputs stay as they were."""
    x = make_tensor(shape, dtype, seed=seed, layout=layout.draw(strategies.layouts(len(shape))))
    weight, bias = parameters(shape[-1], dtype, seed + 1)
    before = x.clone()
    rows = x.reshape(-1, shape[-1])
    poisoned = torch.cat([torch.full_like(rows[:1], float("nan")), rows, torch.full_like(rows[:1], float("inf"))])
    with using(implementation):
        out = layer_norm(x, weight, bias)
        copied = layer_norm(x.contiguous(), weight, bias)
        alone = layer_norm(rows[-1], weight, bias)
        among = layer_norm(poisoned, weight, bias)
    assert torch.equal(out, copied) and torch.equal(x, before)
    assert torch.equal(out.reshape(rows.shape)[-1], alone)
    assert torch.equal(among[1:-1], out.reshape(rows.shape)) and among[0].isnan().all() and among[-1].isnan().all()


@pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS, *EMULATED])
@pytest.mark.parametrize("n, position", [(8, 5), (20000, 3), (20000, 19999)])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_one_element_without_a_value_spoils_its_row_alone(implementation, n, position, value):
    x = make_tensor((2, n), torch.float32, seed=0)
    x[1, position] = value
    with using(implementation):
        out = layer_norm(x, None)
        assert torch.equal(out[0], layer_norm(x[0], None)) and out[1].isnan().all()


@pytest.mark.parametrize("implementation", [*FUSED, *EMULATED])
@pytest.mark.parametrize("last_offset", [2**31 - 1, 2**31, 2**31 + 1])
def test_offsets_beyond_int32(implementation, last_offset):
    """B12, B16, B17: triton-lang/triton#832: rows more than 2**31 elements apart, in either direction."""
    values = make_tensor((2, 48), torch.float16, seed=0)
    far, weight = huge_stride_rows(values, last_offset=last_offset), torch.ones(48, dtype=torch.float16)
    with using(implementation):
        expected, sums = add_layer_norm(values, values, weight)
        out, h = add_layer_norm(values, far, weight)
        grads = operators()["layer_norm_backward"](far, far, weight, weight, 1e-5, far)
        near = operators()["layer_norm_backward"](values, values, weight, weight, 1e-5, values)
        assert torch.equal(layer_norm(values, weight), layer_norm(values, weight, out=far))
    assert torch.equal(out, expected) and torch.equal(h, sums)
    assert all(torch.equal(a, b) for a, b in zip(grads, near, strict=True))


@pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS, *EMULATED])
@pytest.mark.parametrize("shape", [(0, 8), (3, 0, 8), (2, 0), (0,)])
def test_empty(implementation, shape):
    x, weight, bias = torch.empty(shape), torch.ones(shape[-1]), torch.ones(shape[-1])
    with using(implementation):
        out, h = add_layer_norm(x, x.clone(), weight)
        assert layer_norm(x, weight).shape == out.shape == h.shape == shape
        grads = gradients(layer_norm, (x, weight, bias), torch.empty(shape))
    assert grads[0].shape == shape
    assert torch.equal(grads[1], torch.zeros_like(weight)) and torch.equal(grads[2], torch.zeros_like(bias))


@pytest.mark.parametrize("n", [20, 20000])
@pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS, *EMULATED])
def test_out(implementation, n):
    """`out` may be fresh memory, strided memory or x itself."""
    x = make_tensor((3, n), torch.float32, seed=0)
    weight, bias = parameters(n, torch.float32, 1)
    wide = torch.full((3, n + 20), 7.0)
    with using(implementation):
        expected = layer_norm(x, weight, bias)
        assert layer_norm(x, weight, bias, out=wide[:, :n]).data_ptr() == wide.data_ptr()
        assert torch.equal(wide[:, :n], expected) and (wide[:, n:] == 7.0).all()
        layer_norm(x, weight, bias, out=x)
    assert torch.equal(x, expected)


@pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS, *EMULATED])
def test_more_strides_than_two(implementation):
    """A layout that needs three row strides goes through copies and gives the same bits."""
    x = make_tensor((2, 3, 4, 20), torch.float32, seed=0).permute(2, 0, 1, 3)[:, :, ::2]
    weight, bias = parameters(20, torch.float32, 1)
    with using(implementation):
        found = (layer_norm(x, weight, bias), *add_layer_norm(x, x, weight, bias))
        copy = x.contiguous()
        expected = (layer_norm(copy, weight, bias), *add_layer_norm(copy, copy, weight, bias))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def normalise(x, weight, bias, eps=1e-5):
    """The kernel under test, by position."""
    with using("triton"):
        return layer_norm(x, weight, bias, eps)


# In the ways that people write them, in float32: row, its mean and variance, weight, bias, eps.
WRONG_FORMULAS = {
    "one-pass variance": lambda x, m, v, w, b, eps: (x - m) * (square_mean(x) - m * m + eps).rsqrt() * w + b,
    "mean not subtracted": lambda x, m, v, w, b, eps: x * (v + eps).rsqrt() * w + b,
    "mean of a padded row": lambda x, m, v, w, b, eps: (x - m * x.shape[-1] / 128) * (v + eps).rsqrt() * w + b,
    "root mean square": lambda x, m, v, w, b, eps: (x - m) * (square_mean(x) + eps).rsqrt() * w + b,
    "variance over N - 1": lambda x, m, v, w, b, eps: (x - m) * (v * 77 / 76 + eps).rsqrt() * w + b,
    "eps outside the root": lambda x, m, v, w, b, eps: (x - m) / (v.sqrt() + eps) * w + b,
    "bias before weight": lambda x, m, v, w, b, eps: ((x - m) * (v + eps).rsqrt() + b) * w,
}


def square_mean(x):
    return x.square().mean(-1, keepdim=True)


def wrong_formula(name):
    def wrong(x, weight, bias, eps=1e-5):
        wide = x.float()
        mean = wide.mean(-1, keepdim=True)
        variance = square_mean(wide - mean)
        return WRONG_FORMULAS[name](wide, mean, variance, weight.float(), bias.float(), eps).to(x.dtype)

    return Fault(name, wrong)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_planted_faults_are_rejected(dtype):
    small = make_tensor((5, 77), dtype, seed=0, magnitude=0.01)
    far = make_tensor((5, 77), dtype, seed=1) + 1000
    weight, bias = parameters(77, dtype, 2)

    def assert_right(candidate):
        for x in (small, far):
            check("triton", candidate(x, weight, bias, eps=1e-5), x, weight, bias, 1e-5)

    faults = standard_faults(normalise) + [wrong_formula(name) for name in WRONG_FORMULAS]
    faults += argument_faults(normalise, 1, "weight") + argument_faults(normalise, 2, "bias")
    faults += [option_fault(normalise, f"eps={eps}", eps=eps) for eps in (0.0, 1e-6, 1e-4)]
    assert_faults_rejected(assert_right, normalise, faults, minimum=30)


# ---- rejects

X, W, B = torch.ones(4, 8), torch.ones(8), torch.zeros(8)
REJECTS = [
    (lambda: layer_norm([1.0], W), TypeError, "layer_norm: x must be a torch.Tensor, got list"),
    (lambda: layer_norm(X, torch.ones(9)), ValueError, r"layer_norm: weight must have shape \[N\] with N=8, got \[9\]"),
    (lambda: layer_norm(X, W, torch.ones(1)), ValueError, r"bias must have shape \[N\] with N=8, got \[1\]"),
    (lambda: layer_norm(X, W, 0.0), TypeError, "bias must be a torch.Tensor, got float"),
    (lambda: layer_norm(torch.tensor(1.0), W), ValueError, r"x must have shape \[..., N\], got \[\]"),
    (lambda: layer_norm(X.double(), W), TypeError, "x must be float16, bfloat16 or float32, got float64"),
    (lambda: layer_norm(X, W.half()), TypeError, "layer_norm: weight must be float32, got float16"),
    (lambda: layer_norm(X.half(), W, B.bfloat16()), TypeError, "bias must be float16 or float32, got bfloat16"),
    (lambda: layer_norm(X, W, B.to("meta")), ValueError, "bias must be on cpu, got meta"),
    (lambda: layer_norm(X.t(), torch.ones(4)), ValueError, r"x must have a contiguous last .* strides \[1, 8\]"),
    (lambda: layer_norm(X, W, torch.ones(16)[::2]), ValueError, "bias must have a contiguous last dimension"),
    (lambda: layer_norm(X, W, B, -1e-6), ValueError, "eps must be finite and at least 0, got -1e-06"),
    (lambda: layer_norm(X, W, B, float("inf")), ValueError, "eps must be finite and at least 0, got inf"),
    (lambda: layer_norm(X, W, B, None), TypeError, "eps must be a number, got NoneType"),
    (lambda: layer_norm(torch.ones(65537), None), NotImplementedError, "N must be at most MAX_N = 65536, got 65537"),
    (lambda: layer_norm(X, W, out=torch.ones(4, 9)), ValueError, r"out must have shape \[4, 8\], got \[4, 9\]"),
    (lambda: layer_norm(X, W, out=X.half()), TypeError, "out must be float32, got float16"),
    (lambda: layer_norm(X, W, out=W.expand(4, 8)), ValueError, "out must not overlap itself"),
    (lambda: layer_norm(X[:3], W, out=X[1:]), ValueError, "out must be x itself or memory of its own"),
    (lambda: layer_norm(X[:2, :4], W[:4], out=X[1:3, 2:6]), ValueError, "out must be x itself or memory of its own"),
    (lambda: layer_norm(X, W.clone().requires_grad_(), out=X), RuntimeError, "out must not be given where gradients"),
    (lambda: add_layer_norm(X, None, W), TypeError, "add_layer_norm: residual must be a torch.Tensor, got NoneType"),
    (lambda: add_layer_norm(X, X[:3], W), ValueError, r"residual must have shape .* got \[3, 8\]"),
    (lambda: add_layer_norm(X, X.half(), W), TypeError, "add_layer_norm: residual must be float32, got float16"),
]  # fmt: skip


@pytest.mark.parametrize("call, error, message", REJECTS)
def test_rejects(call, error, message):
    with pytest.raises(error, match=message):
        call()
    assert torch.equal(X, torch.ones(4, 8)) and torch.equal(W, torch.ones(8)) and torch.equal(B, torch.zeros(8))


def test_validation_can_be_lowered_to_what_is_undefined():
    with env.override("FUSEDOPS_VALIDATE", "0"), pytest.raises(ValueError, match="weight must have shape"):
        layer_norm(X, torch.ones(9))


# ---- torch


def arguments(dtype=torch.float32, grad=False):
    """Batch > 1, a length that is no multiple of a tile, a transposed view (B56)."""
    x = make_tensor((3, 2, 37), dtype, seed=0).transpose(0, 1).requires_grad_(grad)
    residual = make_tensor((2, 3, 37), dtype, seed=1).requires_grad_(grad)
    weight, bias = (make_tensor((37,), dtype, seed=i).requires_grad_(grad) for i in (2, 3))
    return x, residual, weight, bias


@pytest.mark.parametrize("grad", [False, True])
def test_opcheck(grad):
    x, residual, weight, bias = arguments(grad=grad)
    opcheck("layer_norm", x, weight, bias, 1e-5)
    opcheck("layer_norm", x, None, None, 1e-5)
    opcheck("add_layer_norm", x, residual, weight, bias, 1e-5)
    x, residual, weight, bias = (t.detach() for t in (x, residual, weight, bias))
    opcheck("layer_norm_out", x, weight, bias, 1e-5, torch.empty(2, 3, 37))
    opcheck("layer_norm_backward", residual, x, weight, bias, 1e-5, residual)
    opcheck("layer_norm_backward", residual, x, None, None, 1e-5, None)


@pytest.mark.parametrize("dtype", DTYPES)
def test_fake_strides_are_the_real_ones(dtype):
    x, residual, weight, bias = arguments(dtype)
    assert_fake_like_real("layer_norm", x, weight, bias, 1e-5)
    assert_fake_like_real("layer_norm", x, weight.float(), None, 1e-5)
    assert_fake_like_real("add_layer_norm", x, residual, weight, bias, 1e-5)
    assert_fake_like_real("layer_norm_backward", x, residual, weight, bias, 1e-5, x)
    assert_fake_like_real("layer_norm_backward", x, residual, None, None, 1e-5, None)


def test_torch_compile():
    def function(x, residual, weight, bias):
        out, h = add_layer_norm(x, residual, weight, bias)
        return layer_norm(out * 2, weight, None, 1e-6) + h

    def into(x, residual, weight, bias):
        return layer_norm(x + residual, weight, bias, out=torch.empty(x.shape))

    other = tuple(torch.randn(*shape) for shape in ((5, 64), (5, 64), (64,), (64,)))
    assert_compiles(function, arguments(), other)
    assert_compiles(into, arguments(), other)
    found = torch.compile(function, fullgraph=True, dynamic=True)
    leaves = arguments(grad=True)
    grads = torch.autograd.grad(found(*leaves).square().sum(), leaves)
    torch.testing.assert_close(grads, torch.autograd.grad(function(*leaves).square().sum(), leaves))


def test_second_derivatives_are_refused():
    x, _, weight, bias = arguments(grad=True)
    (dx,) = torch.autograd.grad(layer_norm(x, weight, bias).sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="layer_norm_backward: the result must not be differentiated"):
        dx.sum().backward()
