"""Gradients of layer_norm and add_layer_norm."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fusedops._core.register import operators
from fusedops.ops.layer_norm import add_layer_norm, layer_norm, reference
from fusedops.testing import Fault, assert_accurate, assert_faults_rejected, make_tensor, strategies
from fusedops.testing.faults import argument_faults, standard_faults
from tests.ops.common import EMULATED, EVERY_KERNEL, FUSED, IMPLEMENTATIONS, gradients, using


def parameters(n, dtype, seed):
    return (make_tensor((n,), dtype, seed=seed + i) for i in range(2))


def truth(x, weight, bias):
    return reference.layer_norm(x, weight, bias, 1e-5)


@pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS, *EMULATED])
@given(
    shape=strategies.row_shapes(6, 200, min_rows=1, min_n=16),
    dtype=strategies.dtypes(),
    layout=st.data(),
    eps=st.sampled_from([1e-5, 1e-6, 0.5, 0.0]),
    seed=strategies.seeds(),
)
def test_gradients(implementation, shape, dtype, layout, eps, seed):
    x, residual, grad, grad_h = (
        make_tensor(shape, dtype, seed=seed + i, layout=layout.draw(strategies.layouts(len(shape)))) for i in range(4)
    )
    weight, bias = parameters(shape[-1], dtype, seed + 4)
    with using(implementation):
        found = gradients(lambda *a: layer_norm(*a, eps), (x, weight, bias), grad)
        found_residual = gradients(lambda *a: add_layer_norm(*a, eps), (x, residual, weight, bias), (grad, grad_h))
    doubles = [t.double() for t in (x, residual, weight, bias, grad, grad_h)]
    expected = gradients(lambda *a: reference.layer_norm(*a, eps), (doubles[0], *doubles[2:4]), doubles[4])
    sums = (x + residual).double()  # the stored sum is what the norm sees, in the truth too

    def residual_truth(x, residual, weight, bias):
        h = x + residual
        h = h + (sums - h).detach()
        return reference.layer_norm(h, weight, bias, eps), h

    expected_residual = gradients(residual_truth, doubles[:4], tuple(doubles[4:]))
    pairs = zip((*found, *found_residual), (*expected, *expected_residual), "xwbxrwb", strict=True)
    for result, wanted, name in pairs:
        assert_accurate(result, wanted, name=f"gradient of {name}", zeros=False)  # terms of either sign cancel


@pytest.mark.parametrize("absent", ["weight", "bias", "both"])
@pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS, *EMULATED])
def test_gradients_without_parameters(implementation, absent):
    x, grad = (make_tensor((5, 40), torch.float32, seed=i) for i in range(2))
    weight, bias = parameters(40, torch.float32, 2)
    leaves = (x, None if absent != "bias" else weight, None if absent != "weight" else bias)
    with using(implementation):
        found = gradients(layer_norm, leaves, grad)
    expected = gradients(truth, [None if leaf is None else leaf.double() for leaf in leaves], grad.double())
    assert [t is None for t in found] == [t is None for t in leaves]
    for result, wanted in zip(found, expected, strict=True):
        if result is not None:
            assert_accurate(result, wanted)


@pytest.mark.parametrize("n", [4096, 4097, 20000])
@pytest.mark.parametrize("implementation", [*FUSED, *EMULATED])
def test_gradients_of_long_rows(implementation, n):
    """Both ways of the backward kernel; more rows than programs, so that partial sums are really joined."""
    x, grad = (make_tensor((11, n), torch.float32, seed=i) for i in range(2))
    weight, bias = parameters(n, torch.float32, 2)
    with using(implementation):
        found = gradients(layer_norm, (x, weight, bias), grad)
        again = gradients(layer_norm, (x, weight, bias), grad)
    expected = gradients(truth, [t.double() for t in (x, weight, bias)], grad.double())
    for result, repeated, wanted in zip(found, again, expected, strict=True):
        assert_accurate(result, wanted)
        assert torch.equal(result, repeated)


@EVERY_KERNEL
@pytest.mark.parametrize("n", [77, 20000])
def test_gradients_with_a_large_mean(implementation, n):
    """The backward kernel finds the deviation from centred values too."""
    x, grad = make_tensor((5, n), torch.float32, seed=0) + 1000, make_tensor((5, n), torch.float32, seed=1)
    leaves = (x, *parameters(n, torch.float32, 2))
    with using(implementation):
        found = gradients(layer_norm, leaves, grad)
    expected = gradients(truth, [t.double() for t in leaves], grad.double())
    for result, wanted in zip(found, expected, strict=True):
        assert_accurate(result, wanted)


def test_reference_gradcheck():
    x, residual = (make_tensor((3, 5), torch.float64, seed=i).requires_grad_() for i in range(2))
    weight, bias = (make_tensor((5,), torch.float64, seed=i).requires_grad_() for i in (2, 3))
    assert torch.autograd.gradcheck(lambda *a: reference.layer_norm(*a, 1e-3), (x, weight, bias))
    assert torch.autograd.gradcheck(lambda *a: reference.add_layer_norm(*a, 1e-3), (x, residual, weight, bias))


def test_planted_faults_of_the_gradient_are_rejected():
    x, grad, grad_h = (make_tensor((5, 77), torch.float32, seed=i) + 0.5 for i in range(3))
    weight, bias = parameters(77, torch.float32, 3)
    backward = operators()["layer_norm_backward"]

    def correct(grad, x, weight, grad_h):
        with using("triton"):
            return backward(grad, x, weight, bias, 1e-5, grad_h)

    def last_row_missing(grad, x, weight, grad_h):
        return correct(grad, x, weight, grad_h)[0], *correct(grad[:-1], x[:-1], weight, None)[1:]

    expected = reference.layer_norm_backward(*(t.double() for t in (grad, x, weight, bias)), 1e-5, grad_h.double())

    def assert_right(candidate):
        for found, wanted in zip(candidate(grad, x, weight, grad_h), expected, strict=True):
            assert_accurate(found, wanted)

    faults = standard_faults(correct, output=0)
    for position, name in enumerate(("grad", "x", "weight", "grad_h")):
        faults += argument_faults(correct, position, name)
    faults += [
        Fault("gradients of weight and bias swapped", lambda *args: tuple(correct(*args)[i] for i in (0, 2, 1))),
        Fault("last row missing from the sums", last_row_missing),
    ]
    assert_faults_rejected(assert_right, correct, faults, minimum=30)
