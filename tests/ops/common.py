"""What the tests of every operator share: running one implementation, and torch's own checks."""

import contextlib

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fusedops import counters
from fusedops._core import env
from fusedops._core.register import operators
from fusedops.testing import Budget

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
IMPLEMENTATIONS = ("torch", "triton", "reference")
FUSED = ("torch", "triton")
EMULATED_TARGETS = ("sm_80", "sm_90a")
EMULATED = tuple(pytest.param(f"emulate-{target}", marks=pytest.mark.emulated) for target in EMULATED_TARGETS)
EVERY_KERNEL = pytest.mark.parametrize("implementation", ["triton", *EMULATED])


@contextlib.contextmanager
def using(implementation):
    """Force one implementation, and fail unless it is the one that ran. Of an emulated one the target stands behind."""
    before = counters()
    backend, _, target = implementation.partition("-")
    with contextlib.ExitStack() as stack:
        stack.enter_context(env.override("FUSEDOPS_BACKEND", backend))
        if target:
            stack.enter_context(env.override("FUSEDOPS_EMULATE_TARGET", target))
        yield
    ran = {name for (_, name), calls in counters().items() if calls > before.get((_, name), 0)}
    assert ran == {backend}, f"expected {backend} alone to run, got {ran}"


def assert_rejected(call, error, message):
    """The call raises this, and before anything has run."""
    with pytest.raises(error, match=message):
        call()
    assert not counters(), "something ran before the checks had passed"


def opcheck(name, *args):
    """All four of torch's checks of a registered operator; of float8, which torch cannot compare, three."""
    fp8 = any(isinstance(arg, torch.Tensor) and arg.dtype == torch.float8_e4m3fn for arg in args)
    checks = ["test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    checks += [] if fp8 else ["test_schema"]
    results = torch.library.opcheck(getattr(torch.ops.fusedops, name).default, args, test_utils=checks)
    assert len(results) == len(checks) and set(results.values()) == {"SUCCESS"}, results


def assert_compiles(function, *variants, backend="aot_eager"):
    """`function` traces without a break and with dynamic shapes, and agrees with eager for every set of arguments.

    "aot_eager" runs what was traced, functionalised and derived without the C++ that "inductor" makes of what stands
    around our operators, which takes up to ten times as long and is the same for every operator.
    """
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=backend)
    for args in variants:
        torch.testing.assert_close(compiled(*args), function(*args))


def assert_fake_like_real(name, *args):
    """The fake implementation promises the shapes, strides and dtypes that the real ones give."""
    operator = operators()[name]
    overload = getattr(torch.ops.fusedops, name).default
    with FakeTensorMode() as mode:
        fake_args = [mode.from_tensor(arg) if isinstance(arg, torch.Tensor) else arg for arg in args]
        fakes = as_tuple(overload(*fake_args))
    for implementation in operator.implementations:
        if implementation == "cuda":
            continue
        with using(implementation):
            reals = as_tuple(operator(*args))
        for fake, real in zip(fakes, reals, strict=True):
            described = [(t.shape, t.stride(), t.dtype) for t in (fake, real)]
            assert described[0] == described[1], f"{implementation}: {described}"


def as_tuple(value):
    return value if isinstance(value, tuple) else (value,)


def gradients(function, tensors, grads):
    """Gradients of `function(*tensors)` (a tensor or tuple) with respect to the tensors; None stays None."""
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in tensors]
    outputs = as_tuple(function(*leaves))
    used = [leaf for leaf in leaves if leaf is not None]
    found = iter(torch.autograd.grad(outputs, used, grads))
    return [None if leaf is None else next(found) for leaf in leaves]


def counted_budget(dtype, lost, truth):
    """The default budget of an output, raised by what float32 may lose at each element (absolute, in float64)."""
    budget, epsilon = Budget.for_dtype(dtype), torch.finfo(dtype).eps
    if lost.numel() == 0:
        return budget
    rms, peak = lost.norm() / truth.norm() / epsilon, lost.abs().max() / truth.abs().max() / epsilon
    return Budget(budget.rms + float(rms), budget.peak + float(peak))
