"""The interface of silu_mul and gelu_mul: bad arguments and torch's own checks."""

import pytest
import torch

from fusedops._core import env
from fusedops.ops.gated_activation import gelu_mul, silu_mul
from fusedops.testing import make_tensor
from tests.ops.common import DTYPES, assert_compiles, assert_fake_like_real, opcheck
from tests.ops.test_gated_activation import halves

# ---- rejects

X = torch.ones(4, 8)
REJECTS = [
    (lambda: silu_mul([1.0], X), TypeError, "silu_mul: gate must be a torch.Tensor, got list"),
    (lambda: silu_mul(X, None), TypeError, "silu_mul: up must be a torch.Tensor, got NoneType"),
    (lambda: silu_mul(X, X[:3]), ValueError, r"silu_mul: up must have shape .* N=8, got \[3, 8\]"),
    (lambda: silu_mul(X, X[:, :1]), ValueError, r"silu_mul: up must have shape .* N=8, got \[4, 1\]"),
    (lambda: silu_mul(X, X[0]), ValueError, r"silu_mul: up must have shape .* got \[8\]"),
    (lambda: silu_mul(X[0, 0], X[0, 0]), ValueError, r"gate must have shape \[..., N\], got \[\]"),
    (lambda: silu_mul(X.double(), X.double()), TypeError, "gate must be float16, bfloat16 or float32, got float64"),
    (lambda: silu_mul(X, X.half()), TypeError, "up must be float32, got float16"),
    (lambda: silu_mul(X, X.to("meta")), ValueError, "up must be on cpu, got meta"),
    (lambda: silu_mul(X.t(), X.t()), ValueError, r"gate must have a contiguous last .* strides \[1, 8\]"),
    (lambda: silu_mul(X[:, ::2].contiguous(), X[:, ::2]), ValueError, "up must have a contiguous last dimension"),
    (lambda: silu_mul(X, X, out=X.half()), TypeError, "out must be float32, got float16"),
    (lambda: silu_mul(X, X, out=torch.ones(4, 9)), ValueError, r"out must have shape \[4, 8\], got \[4, 9\]"),
    (lambda: silu_mul(X, X, out=X[:1].expand(4, 8)), ValueError, "out must not overlap itself"),
    (lambda: silu_mul(X[:3], X[:3].clone(), out=X[1:]), ValueError, "out must be gate itself or memory of its own"),
    (lambda: silu_mul(X[:3].clone(), X[:3], out=X[1:]), ValueError, "out must be up itself or memory of its own"),
    (lambda: silu_mul(X.clone().requires_grad_(), X, out=X), RuntimeError, "out must not be given where gradients"),
    (lambda: gelu_mul(X, X[:3]), ValueError, r"gelu_mul: up must have shape .* got \[3, 8\]"),
    (lambda: gelu_mul(X, X, approximate="erf"), ValueError, "approximate must be one of 'none', 'tanh', got 'erf'"),
]  # fmt: skip


@pytest.mark.parametrize("call, error, message", REJECTS)
def test_rejects(call, error, message):
    with pytest.raises(error, match=message):
        call()
    assert torch.equal(X, torch.ones(4, 8))


def test_validation_can_be_lowered_to_what_is_undefined():
    with env.override("FUSEDOPS_VALIDATE", "0"), pytest.raises(ValueError, match="up must have shape"):
        silu_mul(X, X[:3])


# ---- torch


def arguments(dtype=torch.float32, grad=False):
    """Batch > 1, a length that is no multiple of a tile, a transposed view beside half of a packed buffer (B56)."""
    gate = make_tensor((3, 2, 37), dtype, seed=0).transpose(0, 1).requires_grad_(grad)
    up = halves((2, 3, 37), dtype, seed=1)[1].requires_grad_(grad)
    return gate, up


@pytest.mark.parametrize("grad", [False, True])
def test_opcheck(grad):
    gate, up = arguments(grad=grad)
    opcheck("silu_mul", gate, up)
    opcheck("gelu_mul", gate, up, "none")
    opcheck("gelu_mul", gate, up, "tanh")
    gate, up = gate.detach(), up.detach()
    opcheck("silu_mul_out", gate, up, torch.empty(2, 3, 37))
    opcheck("gelu_mul_out", gate, up, "tanh", torch.empty(2, 3, 37))
    opcheck("silu_mul_backward", up, gate, up)
    opcheck("gelu_mul_backward", up, gate, up, "none")


@pytest.mark.parametrize("dtype", DTYPES)
def test_fake_strides_are_the_real_ones(dtype):
    gate, up = arguments(dtype)
    for first, second in ((gate, up), (up, gate), (gate[:1].expand(2, 3, 37), gate)):
        assert_fake_like_real("silu_mul", first, second)
        assert_fake_like_real("gelu_mul", first, second, "tanh")
        assert_fake_like_real("silu_mul_backward", gate, first, second)
        assert_fake_like_real("gelu_mul_backward", gate, first, second, "none")


def test_torch_compile():
    def function(gate, up):
        return gelu_mul(silu_mul(gate, up) + 1, up, approximate="tanh") * gelu_mul(gate, up)

    def into(gate, up):
        return silu_mul(gate, up, out=torch.empty(gate.shape))

    other = tuple(torch.randn(5, 64) for _ in range(2))
    assert_compiles(function, arguments(), other)
    assert_compiles(into, arguments(), other)
    leaves = arguments(grad=True)
    compiled = torch.compile(function, fullgraph=True, dynamic=True)
    grads = torch.autograd.grad(compiled(*leaves).square().sum(), leaves)
    torch.testing.assert_close(grads, torch.autograd.grad(function(*leaves).square().sum(), leaves))


def test_second_derivatives_are_refused():
    gate, up = arguments(grad=True)
    (dgate,) = torch.autograd.grad(silu_mul(gate, up).sum(), gate, create_graph=True)
    with pytest.raises(NotImplementedError, match="silu_mul_backward: the result must not be differentiated"):
        dgate.sum().backward()
