"""silu_mul, gelu_mul."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from fusedops._core.register import operators
from fusedops.ops.gated_activation import gelu_mul, reference, silu_mul
from fusedops.testing import Fault, assert_accurate, assert_faults_rejected, make_tensor, strategies
from fusedops.testing.faults import argument_faults, standard_faults
from fusedops.testing.inputs import huge_stride_rows, special_values
from tests.ops.common import (
    DTYPES,
    EMULATED,
    EVERY_KERNEL,
    FUSED,
    IMPLEMENTATIONS,
    counted_budget,
    using,
)

ACTIVATIONS = ("silu", "gelu", "gelu_tanh")
# Below these gates float32 may give a zero where the truth has none: exp overflows, or 1 + erf and 1 + tanh vanish.
ZERO_BELOW = {"silu": -80.0, "gelu": -5.0, "gelu_tanh": -4.5}


def gated(activation, gate, up, out=None):
    """The public function of an activation."""
    if activation == "silu":
        return silu_mul(gate, up, out=out)
    return gelu_mul(gate, up, approximate="tanh" if activation == "gelu_tanh" else "none", out=out)


def composition(activation, gate, up):
    """What a model writes."""
    if activation == "silu":
        return F.silu(gate) * up
    return F.gelu(gate, approximate="tanh" if activation == "gelu_tanh" else "none") * up


def call(activation, suffix, *tensors, **options):
    """The reference's function of an activation in float64, with the roundings of the tensors' dtype."""
    extra = () if activation == "silu" else ("tanh" if activation == "gelu_tanh" else "none",)
    function = getattr(reference, f"{activation[:4]}_mul{suffix}")
    return function(*(t.double() for t in tensors), *extra, round_to=tensors[0].dtype)


def check(activation, out, gate, up, expected, name="out"):
    """Within the default budget; GELU's 1 + erf and 1 + tanh also lose an epsilon of float32 of gate * up."""
    lost = torch.finfo(torch.float32).eps * gate.double() * up.double()
    budget = None if activation == "silu" else counted_budget(out.dtype, lost, expected)
    zeros = bool((gate > ZERO_BELOW[activation]).all())
    return assert_accurate(out, expected, budget=budget, name=name, zeros=zeros)


def halves(shape, dtype, **options):
    """gate and up as a packed projection gives them: two views of one buffer."""
    packed = make_tensor((*shape[:-1], 2 * shape[-1]), dtype, **options)
    return packed[..., : shape[-1]], packed[..., shape[-1] :]


@st.composite
def operands(draw, dtypes=DTYPES, **sizes):
    """gate and up: dtype, shape, layouts, magnitude and seed drawn."""
    shape, dtype = draw(strategies.row_shapes(6, 300, **sizes)), draw(strategies.dtypes(dtypes))
    seed, magnitude = draw(strategies.seeds()), draw(strategies.magnitudes())
    if draw(st.booleans()):
        return halves(shape, dtype, seed=seed, magnitude=magnitude)
    kinds = [draw(strategies.layouts(len(shape))) for _ in range(2)]
    return tuple(
        make_tensor(shape, dtype, seed=seed + i, magnitude=magnitude, layout=kind) for i, kind in enumerate(kinds)
    )


# ---- accuracy


@pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS, *EMULATED])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@given(tensors=operands())
def test_accuracy(activation, implementation, tensors):
    with using(implementation):
        out = gated(activation, *tensors)
    check(activation, out, *tensors, call(activation, "", *tensors))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@given(tensors=operands())
def test_equal_to_the_composition_bitwise_on_the_cpu(activation, tensors):
    with using("torch"):
        assert torch.equal(gated(activation, *tensors), composition(activation, *tensors))


@EVERY_KERNEL
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_constant_to_the_last_digit(implementation, activation):
    """Element by element, where the default budget looks at the largest."""
    gate = torch.linspace(-3, 3, 2001)
    up = torch.ones_like(gate)
    with using(implementation):
        out = gated(activation, gate, up)
    torch.testing.assert_close(out, call(activation, "", gate, up).float(), rtol=1e-6, atol=4e-7)


@pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS, *EMULATED])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@given(tensors=operands(min_rows=1, min_n=8), seed=strategies.seeds())
def test_gradients(activation, implementation, tensors, seed):
    gate, up = tensors
    grad = make_tensor(gate.shape, gate.dtype, seed=seed)
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    with using(implementation):
        dgate, dup = torch.autograd.grad(gated(activation, *leaves), leaves, grad)
        if implementation not in ("torch", "reference"):  # the rounded activation is what up was multiplied by
            assert torch.equal(dup, gated(activation, gate, grad))
    expected = call(activation, "_backward", grad, gate, up)
    check(activation, dup, gate, grad, expected[1], "dup")
    # a derivative is a sum of terms like x * s * (1 - s): each of the four roundings is of the size of gate at most
    lost = 4 * torch.finfo(torch.float32).eps * (1 + gate.double().abs().clamp(max=20)) * grad.double() * up.double()
    budget = counted_budget(dgate.dtype, lost, expected[0])
    assert_accurate(dgate, expected[0], budget=budget, name="dgate", zeros=False)


@pytest.mark.parametrize("implementation", [*FUSED, *EMULATED])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 2047), (3, 2048), (3, 2049), (1, 16385)])
def test_sizes_around_a_tile(implementation, dtype, shape):
    for gate, up in (halves(shape, dtype, seed=0), (t.contiguous() for t in halves(shape, dtype, seed=1))):
        for activation in ACTIVATIONS:
            with using(implementation):
                out = gated(activation, gate, up)
            check(activation, out, gate, up, call(activation, "", gate, up))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_reference_gradcheck(activation):
    """The reference's own backward is the derivative of its forward, where nothing is rounded."""
    gate, up, grad = (make_tensor((3, 5), torch.float64, seed=i, magnitude=2.0) for i in range(3))
    leaves = gate.requires_grad_(), up.requires_grad_()
    assert torch.autograd.gradcheck(lambda *a: call(activation, "", *a), leaves)
    expected = torch.autograd.grad(call(activation, "", *leaves), leaves, grad)
    for found, wanted in zip(call(activation, "_backward", grad, *leaves), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-13, atol=1e-13)


# ---- properties


@pytest.mark.parametrize("implementation", [*FUSED, *EMULATED])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_special_gates(dtype, activation, implementation):
    """NaN, zeros and infinities of either sign, and the largest numbers, as the formula has them."""
    gate = torch.tensor(special_values(dtype), dtype=dtype)
    with using(implementation):
        out = gated(activation, gate, torch.ones_like(gate))
    for value, result in zip(gate.tolist(), out.tolist(), strict=True):
        if math.isnan(value) or value == -math.inf:
            assert math.isnan(result), f"{activation}({value}) = {result}"
        elif value == 0.0 or value < -1e4:
            assert result == 0.0 and math.copysign(1.0, result) == math.copysign(1.0, value)
        elif value > 1e4 and (activation, implementation) != ("gelu", "torch"):
            assert result == value  # torch's own vector code has inf or NaN here in some dtypes


@pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS, *EMULATED])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@given(tensors=operands(), exponent=st.integers(-3, 3))
def test_out_is_linear_in_up(activation, implementation, tensors, exponent):
    gate, up = tensors[0].float().clamp(min=-8), tensors[1].float()  # no denormal results
    with using(implementation):
        out = gated(activation, gate, up)
        assert torch.equal(gated(activation, gate, up * 2.0**exponent), out * 2.0**exponent)
        assert torch.equal(gated(activation, gate, -up), -out)


@EVERY_KERNEL
@pytest.mark.parametrize("activation", ACTIVATIONS)
@given(tensors=operands(min_rows=1))
def test_layout_and_neighbours_do_not_matter(implementation, activation, tensors):
    """A strided view and an element alone give the same bits (torch's vector and scalar code may differ by one)."""
    gate, up = tensors
    before = gate.clone(), up.clone()
    with using(implementation):
        out = gated(activation, gate, up)
        copied = gated(activation, gate.contiguous(), up.contiguous())
        alone = gated(activation, gate.reshape(-1)[-1:], up.reshape(-1)[-1:])
    assert torch.equal(out, copied) and out.is_contiguous()
    assert torch.equal(out.reshape(-1)[-1:], alone)
    assert torch.equal(gate, before[0]) and torch.equal(up, before[1])


@pytest.mark.parametrize("implementation", [*FUSED, *EMULATED])
@pytest.mark.parametrize("last_offset", [2**31 - 1, 2**31, 2**31 + 1])
def test_offsets_beyond_int32(implementation, last_offset):
    """B12, B16, B17: triton-lang/triton#832: rows more than 2**31 elements apart, read and written."""
    values = make_tensor((2, 48), torch.float16, seed=0)
    far = huge_stride_rows(values, last_offset=last_offset)
    backward = operators()["silu_mul_backward"]
    with using(implementation):
        expected = silu_mul(values, values)
        assert torch.equal(silu_mul(far, values), expected) and torch.equal(silu_mul(values, far), expected)
        grads = zip(backward(far, far, far), backward(values, values, values), strict=True)
        assert all(torch.equal(found, wanted) for found, wanted in grads)
        silu_mul(values, values, out=far)
    assert torch.equal(far, expected)


@pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS, *EMULATED])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(0, 8), (3, 0, 8), (2, 0), (0,)])
def test_empty(implementation, activation, shape):
    gate, up = (torch.empty(shape, requires_grad=True) for _ in range(2))
    with using(implementation):
        out = gated(activation, gate, up)
        grads = torch.autograd.grad(out, (gate, up), torch.empty(shape))
    assert out.shape == grads[0].shape == grads[1].shape == shape


@pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS, *EMULATED])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_out(activation, implementation):
    """`out` may be fresh memory, strided memory, gate or up itself, a half of the packed input too."""
    gate, up = halves((3, 20), torch.bfloat16, seed=0)
    wide = torch.full((3, 27), 7.0, dtype=torch.bfloat16)
    with using(implementation):
        expected = gated(activation, gate, up)
        assert gated(activation, gate, up, out=wide[:, :20]).data_ptr() == wide.data_ptr()
        assert torch.equal(wide[:, :20], expected) and (wide[:, 20:] == 7.0).all()
        for position in range(2):
            tensors = halves((3, 20), torch.bfloat16, seed=0)
            gated(activation, *tensors, out=tensors[position])
            assert torch.equal(tensors[position], expected)
            assert torch.equal(tensors[1 - position], (gate, up)[1 - position])


@pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS, *EMULATED])
def test_more_strides_than_two(implementation):
    """A layout that needs three row strides goes through copies."""
    tensors = (make_tensor((2, 3, 4, 20), torch.float32, seed=i) for i in range(3))
    gate, up, grad = (tensor.permute(2, 0, 1, 3)[:, :, ::2] for tensor in tensors)
    backward = operators()["silu_mul_backward"]
    copies = [tensor.contiguous() for tensor in (grad, gate, up)]
    with using(implementation):
        torch.testing.assert_close(silu_mul(gate, up), silu_mul(*copies[1:]), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(backward(grad, gate, up), backward(*copies), rtol=1e-6, atol=1e-6)


WRONG = {
    "silu": {"gelu": F.gelu, "sigmoid": torch.sigmoid, "no activation": torch.clone, "relu": torch.relu,
             "sigmoid of 1.702 x": lambda x: x * torch.sigmoid(1.702 * x)},
    "gelu": {"silu": F.silu, "tanh form": lambda x: F.gelu(x, approximate="tanh"), "no half": lambda x: 2 * F.gelu(x),
             "erf of x": lambda x: x * 0.5 * (1 + torch.erf(x)), "distribution alone": torch.special.ndtr},
    "gelu_tanh": {"silu": F.silu, "erf form": F.gelu, "relu": torch.relu, "tanh alone": torch.tanh,
                  "no cube": lambda x: x * 0.5 * (1 + torch.tanh((2 / math.pi) ** 0.5 * x))},
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_planted_faults_are_rejected(activation, dtype):
    gate, up = halves((5, 77), dtype, seed=0, magnitude=2.0)
    expected = call(activation, "", gate, up)

    def correct(gate, up):
        with using("triton"):
            return gated(activation, gate, up)

    def fault(name, wrong):
        return Fault(name, lambda gate, up: wrong(gate.float()).to(dtype) * up)

    faults = standard_faults(correct) + argument_faults(correct, 0, "gate") + argument_faults(correct, 1, "up")
    if dtype == torch.float32:  # the forms of GELU are closer to each other than 16 bits resolve
        faults += [fault(name, wrong) for name, wrong in WRONG[activation].items()]
    faults += [
        Fault("gate and up swapped", lambda gate, up: correct(up, gate)),
        Fault("activation of the product", lambda gate, up: correct(gate * up, torch.ones_like(up))),
    ]
    assert_faults_rejected(lambda f: check(activation, f(gate, up), gate, up, expected), correct, faults, minimum=30)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_planted_faults_of_the_gradient_are_rejected(activation):
    gate, up, grad = (make_tensor((5, 77), torch.float32, seed=i) + 0.5 for i in range(3))
    backward = operators()[f"{activation[:4]}_mul_backward"]
    expected = call(activation, "_backward", grad, gate, up)
    extra = {"silu": (), "gelu": ("none",), "gelu_tanh": ("tanh",)}[activation]

    def correct(grad, gate, up):
        with using("triton"):
            return backward(grad, gate, up, *extra)

    def assert_right(candidate):
        for found, wanted in zip(candidate(grad, gate, up), expected, strict=True):
            assert_accurate(found, wanted)

    faults = standard_faults(correct)
    for position, name in enumerate(("grad", "gate", "up")):
        faults += argument_faults(correct, position, name)
    faults.append(Fault("dgate and dup swapped", lambda *args: correct(*args)[::-1]))
    assert_faults_rejected(assert_right, correct, faults, minimum=30)
