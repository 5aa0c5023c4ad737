"""attention: accuracy over all implementations, forward and backward."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fusedops import attention
from fusedops.ops.attention import reference
from fusedops.testing import assert_accurate, make_tensor
from tests.ops.attention_problems import EVERY_OPTION, FEATURES, Problem, problems, qkv
from tests.ops.common import DTYPES, EVERY_KERNEL, counted_budget, gradients, using

EPSILON = torch.finfo(torch.float32).eps
MANY = 4 * settings.default.max_examples  # times four sets of features: 400 cases of each dtype in the interpreter
SETS = pytest.mark.parametrize("features", [(name,) for name in FEATURES[1:]] + [FEATURES], ids="+".join)

# ---- accuracy


@SETS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("implementation", ["torch", "reference"])
@given(data=st.data())
def test_accuracy(implementation, dtype, features, data):
    problem = data.draw(problems(dtype, features))
    with using(implementation):
        problem.check(*problem.run())


@EVERY_KERNEL
@SETS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(max_examples=MANY)
@given(data=st.data())
def test_accuracy_of_the_kernels(implementation, dtype, features, data):
    problem = data.draw(problems(dtype, features, max_pairs=2000))
    with using(implementation):
        problem.check(*problem.run())


@SETS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(data=st.data())
def test_gradients(dtype, features, data):
    """Of q, k, v and sinks, through out alone and through lse too; the truth differentiates the reference."""
    problem = data.draw(problems(dtype, features, head_dims=(8, 16, 40, 64), hot=False))
    through_lse = data.draw(st.booleans())
    out, lse = problem.truth()
    grads = make_tensor(out.shape, dtype, seed=1), make_tensor(lse.shape, torch.float32, seed=2) * through_lse
    tensors = problem.q, problem.k, problem.v, problem.options.get("sinks")

    def run(q, k, v, sinks):
        outputs = attention(q, k, v, return_lse=True, **{**problem.options, "sinks": sinks})
        return outputs if through_lse else outputs[0]

    def run_truth(q, k, v, sinks):
        return reference.attention(q, k, v, sinks, *problem.positional(torch.Tensor.double)[4:])

    with using("torch"):
        found = gradients(run, tensors, grads if through_lse else grads[:1])
    wide = [t if t is None else t.double() for t in tensors]
    exact = gradients(run_truth, wide, [grad.double() for grad in grads])
    # A model of what may be lost: the rows' sums grad * out, of an out that is rounded, act as a gradient of lse does.
    products = grads[0].double() * (out.to(dtype).double() - out)
    slack = (products.sum(-1).abs() + 8 * EPSILON * (grads[0].double() * out).abs().sum(-1)).transpose(1, 2)
    off = gradients(run_truth, wide, [grads[0].double(), grads[1].double() - slack])
    for name, result, wanted, other in zip(("dq", "dk", "dv", "dsinks"), found, exact, off, strict=True):
        if result is None or result.numel() == 0:
            continue
        if wanted.any():
            # twice the model and one rounding, which of a denormal number is a large part of it
            lost = 2 * (other - wanted).abs() + (wanted.to(result.dtype).double() - wanted).abs()
            budget = counted_budget(result.dtype, lost, wanted)
            assert_accurate(result, wanted, budget=budget, name=name, zeros=False)
        else:  # nothing to be relative to, as where each query sees one key
            assert result.abs().max() <= 2 * (other - wanted).abs().max(), name


@EVERY_OPTION
def test_reference_gradcheck(options):
    q, k, v = (t.requires_grad_() for t in qkv(1, 5, 7, head_dim=4, dtype=torch.float64))
    sinks = make_tensor((2,), torch.float64, seed=3).requires_grad_()
    mask = torch.ones(1, 1, 5, 7, dtype=torch.bool)
    mask[..., 2, :] = False  # a row without keys
    rest = Problem(q, k, v, {**options, "mask": mask}).positional()[4:]
    assert torch.autograd.gradcheck(lambda *t: reference.attention(*t, *rest), (q, k, v, sinks))
    without = lambda q, k, v: reference.attention(q, k, v, None, *rest)[0]  # noqa: E731
    assert torch.autograd.gradcheck(without, (q, k, v))
