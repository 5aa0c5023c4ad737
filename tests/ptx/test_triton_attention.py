"""Causal attention in Triton, run on the CPU as compiled for sm_80 and sm_90a."""

import pytest
import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from fusedops.testing import Budget, assert_accurate, ptx
from tests.ptx.kernels import CHECKS_OF_POINTERS, attention

SCALE_LOG2 = 64**-0.5 * 1.4426950408889634
BUDGET = Budget(2, 4)  # probabilities are rounded to 8 or 11 bits before they multiply the values


def inputs(s, dtype):
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(2, s, 64, generator=generator).to(dtype) for _ in range(3))


def check(out, q, k, v):
    truth = torch.nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=True)
    assert_accurate(out, truth, budget=BUDGET)


@pytest.mark.parametrize("target", ("sm_80", "sm_90a"))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_pointers(dtype, target):
    q, k, v = inputs(100, dtype)
    out = torch.empty_like(q)
    ptx.run(attention.attention_kernel, (2, 2), q, k, v, out, 100, SCALE_LOG2, D=64, BLOCK_M=64, BLOCK_N=32,
            num_stages=2, target=target, checks=CHECKS_OF_POINTERS)  # fmt: skip
    check(out, q, k, v)


@pytest.mark.parametrize("warp_specialize", (False, True), ids=("plain", "specialised"))
@pytest.mark.parametrize("target", ("sm_80", "sm_90a"))
def test_descriptors(target, warp_specialize):
    q, k, v = inputs(128, torch.bfloat16)
    out = torch.empty_like(q)
    descriptors = [TensorDescriptor.from_tensor(one.flatten(0, 1), [64, 64]) for one in (q, k, v, out)]
    ptx.run(
        attention.descriptor_attention_kernel, (2, 2), *descriptors, 128, SCALE_LOG2, D=64, BLOCK_M=64, BLOCK_N=64,
        WARP_SPECIALIZE=warp_specialize, target=target,
    )  # fmt: skip
    check(out, q, k, v)
