"""rms_norm, add_rms_norm, add_rms_norm_."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fusedops import add_rms_norm, add_rms_norm_, rms_norm
from fusedops._core import env
from fusedops.ops.rms_norm import reference
from fusedops.testing import assert_accurate, assert_faults_rejected, make_tensor, strategies
from fusedops.testing.faults import argument_faults, option_fault, standard_faults
from fusedops.testing.inputs import huge_stride_rows
from tests.ops.common import (
    DTYPES,
    EMULATED,
    FUSED,
    IMPLEMENTATIONS,
    assert_compiles,
    assert_fake_like_real,
    gradients,
    opcheck,
    using,
)

OPTIONS = st.fixed_dictionaries({
    "eps": st.sampled_from([1e-6, 1e-5, 0.0, 0.5]),
    "weight_offset": st.sampled_from([0.0, 1.0]),
    "rounding": st.sampled_from(["once", "llama"]),
})  # fmt: skip


def truth(x, weight, **options):
    """rms_norm of the stored values in float64."""
    wide = None if weight is None else weight.double()
    return reference.rms_norm(x.double(), wide, round_to=x.dtype, **options)


def truth_residual(x, residual, weight, **options):
    return reference.add_rms_norm(x.double(), residual.double(), weight.double(), round_to=x.dtype, **options)


# ---- accuracy


@pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS, *EMULATED])
@given(
    shape=strategies.row_shapes(6, 300),
    dtype=strategies.dtypes(),
    wide_weight=st.booleans(),
    layout=st.data(),
    magnitude=strategies.magnitudes(),
    options=OPTIONS,
    seed=strategies.seeds(),
)
def test_rms_norm(implementation, shape, dtype, wide_weight, layout, magnitude, options, seed):
    kind = layout.draw(strategies.layouts(len(shape)))
    x = make_tensor(shape, dtype, seed=seed, magnitude=magnitude, layout=kind)
    weight = make_tensor(shape[-1:], torch.float32 if wide_weight else dtype, seed=seed + 1, layout="offset:3")
    with using(implementation):
        out = rms_norm(x, weight, **options)
        bare = rms_norm(x, None, **options)
    assert_accurate(out, truth(x, weight, **options))
    assert_accurate(bare, truth(x, None, **options))


@pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS, *EMULATED])
@given(
    shape=strategies.row_shapes(6, 300),
    dtype=strategies.dtypes(),
    layout=st.data(),
    magnitude=strategies.magnitudes(),
    options=OPTIONS,
    seed=strategies.seeds(),
)
def test_add_rms_norm(implementation, shape, dtype, layout, magnitude, options, seed):
    kinds = [layout.draw(strategies.layouts(len(shape))) for _ in "xr"]
    x = make_tensor(shape, dtype, seed=seed, magnitude=magnitude, layout=kinds[0])
    residual = make_tensor(shape, dtype, seed=seed + 1, layout=kinds[1])
    weight = make_tensor(shape[-1:], dtype, seed=seed + 2)
    in_place = x.clone(), residual.clone()
    with using(implementation):
        out, h = add_rms_norm(x, residual, weight, **options)
        add_rms_norm_(*in_place, weight, **options)
    assert torch.equal(h, x + residual)
    assert_accurate(out, truth_residual(x, residual, weight, **options)[0])
    assert torch.equal(in_place[0], out) and torch.equal(in_place[1], h)


@pytest.mark.parametrize("n", [1, 16384, 16385, 65536])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("implementation", [*FUSED, *EMULATED])
def test_long_rows(implementation, dtype, n):
    """Both sides of the longest row that one program holds, and MAX_N."""
    x, residual, weight = (make_tensor((2, n), dtype, seed=i) for i in range(3))
    weight = weight[0]
    with using(implementation):
        out, h = add_rms_norm(x, residual, weight)
        plain = rms_norm(x, weight)
    assert torch.equal(h, x + residual)
    assert_accurate(out, truth_residual(x, residual, weight, eps=1e-6)[0])
    assert_accurate(plain, truth(x, weight, eps=1e-6))


@pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS, *EMULATED])
@given(
    shape=strategies.row_shapes(6, 200, min_rows=1, min_n=16),
    dtype=strategies.dtypes(),
    layout=st.data(),
    options=OPTIONS,
    seed=strategies.seeds(),
)
def test_gradients(implementation, shape, dtype, layout, options, seed):
    x, residual, grad, grad_h = (
        make_tensor(shape, dtype, seed=seed + i, layout=layout.draw(strategies.layouts(len(shape)))) for i in range(4)
    )
    weight = make_tensor(shape[-1:], dtype, seed=seed + 4)
    with using(implementation):
        found = gradients(lambda *a: rms_norm(*a, **options), (x, weight), grad)
        found_residual = gradients(lambda *a: add_rms_norm(*a, **options), (x, residual, weight), (grad, grad_h))
    doubles = [t.double() for t in (x, residual, weight, grad, grad_h)]
    options = {**options, "rounding": "once"}  # the derivative is that of the formula, without its inner rounding
    expected = gradients(lambda *a: truth(*a, **options), (doubles[0], doubles[2]), doubles[3])
    sums = (x + residual).double()  # the stored sum is what the norm sees, in the truth too

    def residual_truth(x, residual, weight):
        h = x + residual
        h = h + (sums - h).detach()
        return reference.rms_norm(h, weight, round_to=dtype, **options), h

    expected_residual = gradients(residual_truth, doubles[:3], tuple(doubles[3:]))
    for result, wanted, name in zip((*found, *found_residual), (*expected, *expected_residual), "xwxrw", strict=True):
        assert_accurate(result, wanted, name=f"gradient of {name}")


@pytest.mark.parametrize("n", [4096, 4097, 20000])
@pytest.mark.parametrize("implementation", [*FUSED, *EMULATED])
def test_gradients_of_long_rows(implementation, n):
    """Both ways of the backward kernel; more rows than programs, so that partial sums are really joined."""
    x, grad = (make_tensor((11, n), torch.float32, seed=i) for i in range(2))
    weight = make_tensor((n,), torch.float32, seed=2)
    with using(implementation):
        found = gradients(rms_norm, (x, weight), grad)
        again = gradients(rms_norm, (x, weight), grad)
    expected = gradients(lambda *a: truth(*a, eps=1e-6), (x.double(), weight.double()), grad.double())
    for result, repeated, wanted in zip(found, again, expected, strict=True):
        assert_accurate(result, wanted)
        assert torch.equal(result, repeated)


def test_reference_gradcheck():
    x, residual = (make_tensor((3, 5), torch.float64, seed=i).requires_grad_() for i in range(2))
    weight = make_tensor((5,), torch.float64, seed=2).requires_grad_()
    assert torch.autograd.gradcheck(lambda *a: reference.rms_norm(*a, 1e-3, 1.0), (x, weight))
    assert torch.autograd.gradcheck(lambda *a: reference.add_rms_norm(*a, 1e-3), (x, residual, weight))


# ---- properties


@pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS, *EMULATED])
@given(shape=strategies.row_shapes(4, 100, min_rows=1), exponent=st.integers(-8, 8), seed=strategies.seeds())
def test_scaling_by_a_power_of_two_changes_nothing(implementation, shape, exponent, seed):
    x, weight = make_tensor(shape, torch.float32, seed=seed), make_tensor(shape[-1:], torch.float32, seed=seed + 1)
    with using(implementation):
        assert torch.equal(rms_norm(x, weight, 0.0), rms_norm(x * 2.0**exponent, weight, 0.0))


@pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS, *EMULATED])
def test_small_rows_are_divided_by_the_root_of_eps(implementation):
    x, weight = make_tensor((3, 40), torch.float32, seed=0, magnitude=2.0**-40), torch.ones(40)
    with using(implementation):
        torch.testing.assert_close(rms_norm(x, weight, 0.25), x * 2.0, rtol=1e-6, atol=0.0)
        assert torch.equal(rms_norm(torch.zeros(2, 8), torch.ones(8)), torch.zeros(2, 8))


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
    weight = make_tensor(shape[-1:], dtype, seed=seed + 1)
    before = x.clone()
    rows = x.reshape(-1, shape[-1])
    poisoned = torch.cat([torch.full_like(rows[:1], float("nan")), rows, torch.full_like(rows[:1], float("inf"))])
    with using(implementation):
        out = rms_norm(x, weight)
        copied = rms_norm(x.contiguous(), weight)
        alone = rms_norm(rows[-1], weight)
        among = rms_norm(poisoned, weight)
    assert torch.equal(out, copied) and torch.equal(x, before)
    assert torch.equal(out.reshape(rows.shape)[-1], alone)
    assert torch.equal(among[1:-1], out.reshape(rows.shape)) and among[0].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_to_hugging_face_llama_bitwise(dtype):
    """rounding="llama" on the CPU is LlamaRMSNorm, bit by bit."""
    modeling = pytest.importorskip("transformers.models.llama.modeling_llama", reason="transformers is not installed")
    for n in (1, 64, 576, 4096):
        module = modeling.LlamaRMSNorm(n, eps=1e-5).to(dtype)
        module.weight.data.copy_(make_tensor((n,), dtype, seed=1))
        x = make_tensor((2, 5, n), dtype, seed=n, magnitude=4.0)
        assert torch.equal(rms_norm(x, module.weight.detach(), 1e-5, rounding="llama"), module(x).detach())


@pytest.mark.parametrize("implementation", [*FUSED, *EMULATED])
@pytest.mark.parametrize("last_offset", [2**31 - 1, 2**31, 2**31 + 1])
def test_offsets_beyond_int32(implementation, last_offset):
    """B12, B16, B18: triton-lang/triton#832: rows more than 2**31 elements apart."""
    values = make_tensor((2, 48), torch.float16, seed=0)
    far, weight = huge_stride_rows(values, last_offset=last_offset), torch.ones(48, dtype=torch.float16)
    with using(implementation):
        assert torch.equal(rms_norm(far, weight), rms_norm(values, weight))
        add_rms_norm_(values.clone(), far, weight)
        assert torch.equal(far, values + values)


@pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS, *EMULATED])
@pytest.mark.parametrize("shape", [(0, 8), (3, 0, 8), (2, 0), (0,)])
def test_empty(implementation, shape):
    x, weight = torch.empty(shape), torch.ones(shape[-1])
    with using(implementation):
        out, h = add_rms_norm(x, x.clone(), weight)
        assert rms_norm(x, weight).shape == out.shape == h.shape == shape
        grads = gradients(rms_norm, (x, weight), torch.empty(shape))
    assert grads[0].shape == shape and torch.equal(grads[1], torch.zeros_like(weight))


@pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS, *EMULATED])
def test_out(implementation):
    """`out` may be fresh memory, strided memory or x itself."""
    x, weight = make_tensor((3, 20), torch.float32, seed=0), make_tensor((20,), torch.float32, seed=1)
    wide = torch.full((3, 40), 7.0)
    with using(implementation):
        expected = rms_norm(x, weight)
        assert rms_norm(x, weight, out=wide[:, :20]).data_ptr() == wide.data_ptr()
        assert torch.equal(wide[:, :20], expected) and (wide[:, 20:] == 7.0).all()
        rms_norm(x, weight, out=x)
    assert torch.equal(x, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_planted_faults_are_rejected(dtype):
    x, weight = make_tensor((5, 77), dtype, seed=0, magnitude=0.01), make_tensor((77,), dtype, seed=1)

    def correct(x, weight, eps=1e-5, weight_offset=0.0):
        return rms_norm(x, weight, eps, weight_offset=weight_offset)

    def check(candidate):
        assert_accurate(candidate(x, weight, eps=1e-5), truth(x, weight, eps=1e-5))

    faults = standard_faults(correct) + argument_faults(correct, 1, "weight")
    faults += [
        option_fault(correct, "eps dropped", eps=0.0),
        option_fault(correct, "eps of another model", eps=1e-6),
        option_fault(correct, "Gemma's offset", weight_offset=1.0),
    ]
    assert_faults_rejected(check, correct, faults)


# ---- rejects

X, W = torch.ones(4, 8), torch.ones(8)
REJECTS = [
    (lambda: rms_norm([1.0], W), TypeError, "rms_norm: x must be a torch.Tensor, got list"),
    (lambda: rms_norm(X, torch.ones(9)), ValueError, r"rms_norm: weight must have shape \[N\] with N=8, got \[9\]"),
    (lambda: rms_norm(X, torch.ones(1, 8)), ValueError, r"weight must have shape \[N\] with N=8, got \[1, 8\]"),
    (lambda: rms_norm(torch.tensor(1.0), W), ValueError, r"x must have shape \[..., N\], got \[\]"),
    (lambda: rms_norm(X.double(), W), TypeError, "x must be float16, bfloat16 or float32, got float64"),
    (lambda: rms_norm(X.int(), W), TypeError, "x must be float16, bfloat16 or float32, got int32"),
    (lambda: rms_norm(X, W.half()), TypeError, "weight must be float32, got float16"),
    (lambda: rms_norm(X, W.to("meta")), ValueError, "weight must be on cpu, got meta"),
    (lambda: rms_norm(X.t(), torch.ones(4)), ValueError, r"x must have a contiguous last dim.* strides \[1, 8\]"),
    (lambda: rms_norm(X, torch.ones(16)[::2]), ValueError, "weight must have a contiguous last dimension"),
    (lambda: rms_norm(X, W, -1e-6), ValueError, "eps must be finite and at least 0, got -1e-06"),
    (lambda: rms_norm(X, W, float("nan")), ValueError, "eps must be finite and at least 0, got nan"),
    (lambda: rms_norm(X, W, "1"), TypeError, "eps must be a number, got str"),
    (lambda: rms_norm(X, W, rounding="up"), ValueError, "rounding must be one of 'once', 'llama', got 'up'"),
    (lambda: rms_norm(torch.ones(65537), torch.ones(65537)), NotImplementedError, "at most MAX_N = 65536, got 65537"),
    (lambda: rms_norm(X, W, out=torch.ones(4, 9)), ValueError, r"out must have shape \[4, 8\], got \[4, 9\]"),
    (lambda: rms_norm(X, W, out=X.half()), TypeError, "out must be float32, got float16"),
    (lambda: rms_norm(X, W, out=W.expand(4, 8)), ValueError, "out must not overlap itself"),
    (lambda: rms_norm(X[:3], W, out=X[1:]), ValueError, "out must be x itself or memory of its own"),
    (lambda: rms_norm(X, W.clone().requires_grad_(), out=X), RuntimeError, "out must not be given where gradients"),
    (lambda: add_rms_norm(X, X[:3], W), ValueError, r"residual must have shape .* with ...=\[4\], N=8, got \[3"),
    (lambda: add_rms_norm(X, None, W), TypeError, "add_rms_norm: residual must be a torch.Tensor, got NoneType"),
    (lambda: add_rms_norm(X, X.half(), W), TypeError, "residual must be float32, got float16"),
    (lambda: add_rms_norm_(X, X, W), ValueError, "x must not share memory with residual"),
    (lambda: add_rms_norm_(X, W.expand(4, 8), W), ValueError, "residual must not overlap itself"),
    (lambda: add_rms_norm_(X.clone(), X.clone().requires_grad_(), W), RuntimeError, "residual must not require a grad"),
]  # fmt: skip


@pytest.mark.parametrize("call, error, message", REJECTS)
def test_rejects(call, error, message):
    with pytest.raises(error, match=message):
        call()
    assert torch.equal(X, torch.ones(4, 8)) and torch.equal(W, torch.ones(8))


def test_validation_can_be_lowered_to_what_is_undefined():
    with env.override("FUSEDOPS_VALIDATE", "0"), pytest.raises(ValueError, match="weight must have shape"):
        rms_norm(X, torch.ones(9))


# ---- torch


def arguments(dtype=torch.float32, grad=False):
    """Batch > 1, a length that is no multiple of a tile, a transposed view (B56)."""
    x = make_tensor((3, 2, 37), dtype, seed=0).transpose(0, 1).requires_grad_(grad)
    residual = make_tensor((2, 3, 37), dtype, seed=1).requires_grad_(grad)
    weight = make_tensor((37,), dtype, seed=2).requires_grad_(grad)
    return x, residual, weight


@pytest.mark.parametrize("grad", [False, True])
def test_opcheck(grad):
    x, residual, weight = arguments(grad=grad)
    opcheck("rms_norm", x, weight, 1e-6, 0.0, "once")
    opcheck("rms_norm", x, None, 1e-6, 1.0, "llama")
    opcheck("add_rms_norm", x, residual, weight, 1e-6, 0.0, "once")
    x, residual, weight = (t.detach() for t in (x, residual, weight))
    opcheck("rms_norm_out", x, weight, 1e-6, 0.0, "once", torch.empty(2, 3, 37))
    opcheck("add_rms_norm_", x.clone(), residual.clone(), weight, 1e-6, 0.0, "once")
    opcheck("rms_norm_backward", residual, x, weight, 1e-6, 0.0, residual)
    opcheck("rms_norm_backward", residual, x, None, 1e-6, 0.0, None)


@pytest.mark.parametrize("dtype", DTYPES)
def test_fake_strides_are_the_real_ones(dtype):
    x, residual, weight = arguments(dtype)
    assert_fake_like_real("rms_norm", x, weight, 1e-6, 0.0, "llama")
    assert_fake_like_real("add_rms_norm", x, residual, weight, 1e-6, 0.0, "once")
    assert_fake_like_real("rms_norm_backward", x, residual, weight, 1e-6, 0.0, x)
    assert_fake_like_real("rms_norm_backward", x, residual, None, 1e-6, 0.0, None)


def test_torch_compile():
    def function(x, residual, weight):
        out, h = add_rms_norm(x, residual, weight, 1e-5, weight_offset=1.0)
        return rms_norm(out * 2, weight, rounding="llama") + h

    def backward(x, residual, weight):
        return torch.autograd.grad(function(x, residual, weight).square().sum(), (x, residual, weight))

    def in_place(x, residual, weight):
        x, residual = x.clone(), residual.clone()
        add_rms_norm_(x, residual, weight)
        return rms_norm(x, weight, out=torch.empty_like(x)), residual

    other = tuple(torch.randn(*shape) for shape in ((5, 64), (5, 64), (64,)))
    assert_compiles(function, arguments(), other)
    assert_compiles(in_place, arguments(), other, backend="inductor")  # which may write in place again
    found = torch.compile(function, fullgraph=True, dynamic=True)
    leaves = arguments(grad=True)
    grads = torch.autograd.grad(found(*leaves).square().sum(), leaves)
    torch.testing.assert_close(grads, backward(*leaves))


def test_second_derivatives_are_refused():
    x, _, weight = arguments(grad=True)
    (dx,) = torch.autograd.grad(rms_norm(x, weight).sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="rms_norm_backward: the result must not be differentiated"):
        dx.sum().backward()
