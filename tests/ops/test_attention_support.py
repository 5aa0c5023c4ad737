"""The table of what each way takes says what happens."""

import pytest
import torch

from fusedops import attention, attention_varlen
from fusedops._core import device
from fusedops.ops.attention import _torch
from fusedops.ops.attention._support import NOT_DIFFERENTIABLE, SUPPORT
from fusedops.ops.attention._torch import flash
from tests.ops.attention_problems import Problem, packed_lengths, qkv
from tests.ops.common import using

FP8 = [t.to(torch.float8_e4m3fn) for t in qkv(1, 5, 7)]
MASK = torch.zeros(1, 1, 5, 7)
# One call for each feature, and the tensors that a gradient is asked for (default: the operands).
CALLS = {
    "float16, bfloat16, float32": Problem(*qkv(1, 5, 7, dtype=torch.bfloat16)),
    "float8_e4m3fn": Problem(*FP8),
    "D and Dv of 8, 16, ... 256, and 512": Problem(*qkv(1, 5, 7, head_dim=512)),
    "Dv other than D": Problem(*qkv(1, 5, 7, value_dim=24)),
    "H a multiple of Hk": Problem(*qkv(1, 5, 7, heads=6, kv_heads=2)),
    "causal": Problem(*qkv(1, 5, 7), {"causal": True}),
    "window_size": Problem(*qkv(1, 5, 7), {"window_size": (2, 1)}),
    "softcap": Problem(*qkv(1, 5, 7), {"softcap": 3.0}),
    "sinks": Problem(*qkv(1, 5, 7), {"sinks": torch.ones(2)}),
    "alibi_slopes": Problem(*qkv(1, 5, 7), {"alibi_slopes": torch.ones(2)}),
    "mask": Problem(*qkv(1, 5, 7), {"mask": MASK}),
    "q_scale, k_scale, v_scale": Problem(*FP8, {"q_scale": torch.ones(1, 2), "k_scale": torch.ones(1, 1)}),
    "packed sequences": Problem(*(t[0] for t in qkv(1, 5, 7)), {}, packed_lengths([(2, 3), (3, 4)])),
    "lse": Problem(*qkv(1, 5, 7)),
    "no queries or no keys": Problem(*qkv(1, 5, 0)),
}


def test_every_feature_has_a_call():
    assert list(CALLS) == list(SUPPORT)


@pytest.mark.parametrize("feature", list(SUPPORT))
def test_every_way_that_the_table_names_takes_the_call(feature):
    problem, (_, fused, _) = CALLS[feature], SUPPORT[feature]
    for implementation in ("torch", "triton", "reference"):
        with using(implementation):
            problem.check(*problem.run())
    if not problem.lengths:
        q, k, v, *options = problem.positional()
        assert flash.covers(q, k, v, _torch.Options(*options)) is fused


@pytest.mark.parametrize("feature", [name for name, (_, _, gradient) in SUPPORT.items() if gradient is not None])
def test_gradients_are_as_the_table_says(feature):
    problem = CALLS[feature]
    options = {name: value for name, value in problem.options.items() if isinstance(value, torch.Tensor)}
    tensors = [t.clone() for t in (problem.q, problem.k, problem.v)]
    named = {name: value.clone().requires_grad_() for name, value in options.items()}
    leaves = list(named.values()) or [t.requires_grad_() for t in tensors]
    function = attention_varlen if problem.lengths else attention

    def call():
        return function(*tensors, *problem.lengths, **{**problem.options, **named}, return_lse=True)

    if SUPPORT[feature][2]:
        out, lse = call()
        grads = torch.autograd.grad((out.float().sum() + lse.nan_to_num(0, 0, 0).sum()), leaves)
        assert all(grad.shape == leaf.shape for grad, leaf in zip(grads, leaves, strict=True))
    else:
        with pytest.raises(NotImplementedError, match="must not require a gradient"):
            call()


def test_capabilities_are_those_of_the_kernels():
    assert {capability for capability, _, _ in SUPPORT.values()} == {device.MIN_CAPABILITY, device.MIN_FP8_CAPABILITY}
    assert {name for name, row in SUPPORT.items() if row[0] == device.MIN_FP8_CAPABILITY} == {
        "float8_e4m3fn", "q_scale, k_scale, v_scale"
    }  # fmt: skip
    assert NOT_DIFFERENTIABLE == {"float8_e4m3fn", "alibi_slopes", "mask", "q_scale", "k_scale", "v_scale"}
