"""Which implementation runs, what a fallback does, and when the short way of eager calls is taken."""

import warnings
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import fusedops
from fusedops import FallbackWarning, counters, fallbacks, reset_counters
from fusedops._core import device, dispatch, env
from fusedops._core.register import operators

X, W = torch.randn(4, 8), torch.randn(8)
ON_GPU = SimpleNamespace(device=torch.device("cuda:0"))


def test_cpu_tensors_run_on_torch_and_that_is_no_fallback():
    fusedops.rms_norm(X, W)
    fusedops.rms_norm(X, W)
    assert counters() == {("rms_norm", "torch"): 2} and fallbacks() == {}
    reset_counters()
    assert counters() == {}


@pytest.mark.parametrize("backend", ["torch", "triton", "reference"])
def test_a_forced_backend_runs(backend):
    with env.override("FUSEDOPS_BACKEND", backend):
        fusedops.rms_norm(X, W)
    assert counters() == {("rms_norm", backend): 1}


def test_a_forced_backend_that_cannot_run_says_why(monkeypatch):
    with env.override("FUSEDOPS_BACKEND", "cuda"):
        with pytest.raises(RuntimeError, match=r"rms_norm: .*\(cuda: this operator has no such implementation\)"):
            fusedops.rms_norm(X, W)
    monkeypatch.setattr(device, "interpreting", lambda: False)
    with env.override("FUSEDOPS_BACKEND", "triton"):
        with pytest.raises(RuntimeError, match=r"triton: CPU tensors need Triton's interpreter \(TRITON_INTERPRET=1\)"):
            fusedops.rms_norm(X, W)


def test_supports_is_asked(monkeypatch):
    """The one predicate of an implementation decides, and its words reach the user."""
    selector = operators()["rms_norm"]._selector
    function = selector._load("triton")[0]
    monkeypatch.setitem(selector._loaded, "triton", (function, lambda x, *rest: "only on Sundays"))
    assert selector.select((X, W), limits=device.TARGETS["sm_90a"]) == ("torch", [("triton", "only on Sundays")])
    with env.override("FUSEDOPS_BACKEND", "triton"), pytest.raises(RuntimeError, match="triton: only on Sundays"):
        fusedops.rms_norm(X, W)


def test_leaving_the_fused_path_warns_once_for_each_reason():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for reason in ("too long", "too long", "too wide"):
            dispatch.leave_fused_path("rms_norm", ON_GPU, reason)
        dispatch.leave_fused_path("rms_norm", X, "on the CPU")
    messages = [str(w.message) for w in caught if w.category is FallbackWarning]
    assert messages == [
        f"rms_norm: runs on the torch implementation instead of a fused kernel ({reason})"
        for reason in ("too long", "too wide")
    ]
    assert fallbacks() == {("rms_norm", "too long"): 2, ("rms_norm", "too wide"): 1}


def test_leaving_the_fused_path_can_raise_or_be_silent():
    with env.override("FUSEDOPS_FALLBACK", "raise"), pytest.raises(RuntimeError, match="instead of a fused kernel"):
        dispatch.leave_fused_path("rms_norm", ON_GPU, "too long")
    with env.override("FUSEDOPS_FALLBACK", "silent"), warnings.catch_warnings():
        warnings.simplefilter("error")
        dispatch.leave_fused_path("rms_norm", ON_GPU, "too long")
    assert fallbacks() == {("rms_norm", "too long"): 2}


# ---- the short way: checks and selection happen once for arguments that look the same


def checks_made(monkeypatch):
    made = []
    original = fusedops.ops.rms_norm._check
    monkeypatch.setattr(fusedops.ops.rms_norm, "_check", lambda *a, **k: (made.append(a), original(*a, **k)))
    return made


def test_equal_arguments_are_checked_once(monkeypatch):
    made = checks_made(monkeypatch)
    env.refresh()
    first = fusedops.rms_norm(X, W)
    assert torch.equal(fusedops.rms_norm(X.clone(), W), first) and len(made) == 1
    assert counters() == {("rms_norm", "torch"): 2}


@pytest.mark.parametrize(
    "args, options, error",
    [
        ((X.double(), W), {}, TypeError),
        ((X, W[:7]), {}, ValueError),
        ((X[:, ::2], W[:4]), {}, ValueError),
        ((X, W), {"eps": -1.0}, ValueError),
        ((X, W), {"eps": [1e-6]}, TypeError),
        ((X, W), {"rounding": "up"}, ValueError),
        ((X, W.to("meta")), {}, ValueError),
        (([1.0], W), {}, TypeError),
    ],
)
def test_what_differs_is_checked_again(args, options, error):
    fusedops.rms_norm(X, W)
    fusedops.rms_norm(X, W)
    with pytest.raises(error, match="^rms_norm: "):
        fusedops.rms_norm(*args, **options)


def test_a_change_of_the_environment_forgets_what_was_selected():
    fusedops.rms_norm(X, W)
    with env.override("FUSEDOPS_BACKEND", "reference"):
        fusedops.rms_norm(X, W)
    fusedops.rms_norm(X, W)
    assert counters() == {("rms_norm", "torch"): 2, ("rms_norm", "reference"): 1}


def test_gradients_modes_and_transforms_see_the_operator():
    """After the short way was opened for equal tensors, whoever must see the operator still does."""
    for _ in range(2):
        fusedops.rms_norm(X, W)
    leaf = X.clone().requires_grad_()
    with torch.no_grad():
        assert not fusedops.rms_norm(leaf, W).requires_grad
    fusedops.rms_norm(leaf, W).sum().backward()
    again = X.clone().requires_grad_()
    torch.nn.functional.rms_norm(again, (8,), W, 1e-6).sum().backward()
    torch.testing.assert_close(leaf.grad, again.grad)
    with pytest.raises(RuntimeError, match="functorch transforms"):  # torch refuses them for registered operators
        torch.func.grad(lambda x: fusedops.rms_norm(x, W).sum())(X)
    with FakeTensorMode() as mode:
        assert type(fusedops.rms_norm(mode.from_tensor(X), mode.from_tensor(W))).__name__ == "FakeTensor"
    with FlopCounterMode(display=False):
        fusedops.rms_norm(X, W)
    traced = torch.jit.trace(lambda x: fusedops.rms_norm(x, W), X, check_trace=False)
    assert "fusedops::rms_norm" in str(traced.graph)


def test_the_memory_of_signatures_is_bounded(monkeypatch):
    monkeypatch.setattr("fusedops._core.register._MAX_PLANS", 3)
    for rows in range(1, 10):
        fusedops.rms_norm(torch.ones(rows, 8), W)
        assert len(operators()["rms_norm"]._plans) <= 3


def test_direct_is_torchs_composition_on_the_cpu_without_gradients():
    operator = operators()["rms_norm"]
    with torch.no_grad():
        run = operator.direct(X)
        assert run is operator._selector.module("torch").rms_norm and counters() == {("rms_norm", "torch"): 1}
        assert operator.direct(X.double()) is None and operator.direct(X.to("meta")) is None
        with env.override("FUSEDOPS_BACKEND", "triton"):
            assert operator.direct(X) is None
        assert operator.direct(X) is run
    assert operator.direct(X) is None


def test_direct_refuses_a_second_tensor_that_torch_would_promote_or_broadcast():
    operator = operators()["silu_mul"]
    with torch.no_grad():
        assert operator.direct(X, X) is not None
        assert operator.direct(X, X.half()) is None and operator.direct(X, X[:1]) is None
    assert counters() == {("silu_mul", "torch"): 1}


def test_selection_is_made_once_for_a_call(monkeypatch):
    """Also where no plan can be kept, as with the reference."""
    selector = operators()["rms_norm"]._selector
    asked = []
    original = selector.select
    monkeypatch.setattr(selector, "select", lambda *args: asked.append(1) or original(*args))
    with env.override("FUSEDOPS_BACKEND", "reference"):
        fusedops.rms_norm(X, W)
        fusedops.rms_norm(X, W)
    assert len(asked) == 2


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("grad", [False, True])
def test_autocast_changes_no_bit(backend, grad):
    """An operator's dtypes are its arguments': torch's compositions of it must not be rounded on the way."""
    q, table = torch.randn(1, 5, 2, 16), torch.arange(1, dtype=torch.int32)[None]
    codes, scale = fusedops.quantize_fp8(torch.randn(6, 64))
    values, scale_b = fusedops.quantize_int8(torch.randn(7, 64))
    cache, lengths = torch.randn(1, 8, 2, 16), torch.tensor([5], dtype=torch.int32)
    x = torch.randn(6, 64, requires_grad=grad)
    calls = [
        lambda: fusedops.fp8_matmul(codes, codes, scale, scale, out_dtype=torch.float32),
        lambda: fusedops.weight_only_matmul(x.detach(), values, scale_b),
        lambda: fusedops.attention(q.requires_grad_(grad), q, q, causal=True, softcap=2.0),
        lambda: fusedops.paged_attention(q[0, :1].detach(), cache, cache, table, lengths, softcap=2.0),
        lambda: fusedops.rms_norm(x, torch.ones(64)),
    ]
    with env.override("FUSEDOPS_BACKEND", backend):
        for call in calls:
            expected = [call(), call()]
            with torch.autocast("cpu", torch.bfloat16):
                found = [call(), call()]
            assert all(torch.equal(*pair) and pair[0].dtype == pair[1].dtype for pair in zip(found, expected))
