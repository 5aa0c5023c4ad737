"""attention on the CPU takes memory linear in the number of keys: the scores never stand in memory as a whole."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MIB = 1 << 20
OPTIONS = {
    "causal": {"causal": True},
    "sliding": {"causal": True, "window_size": [1000, 0]},
    "softcap": {"causal": True, "softcap": 30.0},
    "alibi": {"causal": True, "alibi_slopes": 0.1},
    "mask": {"mask": "bool"},
}
CODE = """
import json, resource, sys
import torch, fusedops
length, heads, dtype, backward, options = json.loads(sys.argv[1])

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

def call(length):
    q, k, v = (torch.randn(1, length, heads, 64).to(getattr(torch, dtype)).requires_grad_(backward) for _ in "qkv")
    if "alibi_slopes" in options:
        options["alibi_slopes"] = torch.full((heads,), 0.1)
    if "mask" in options:
        options["mask"] = torch.arange(length).view(1, 1, 1, length) < length - 100
    before = peak()
    out = fusedops.attention(q, k, v, **options)
    if backward:
        out.backward(torch.ones(()).to(out.dtype).expand(out.shape))
    return peak() - before

call(600)
print(call(length))
"""


def peak_above_inputs(length, heads, dtype, options, backward=False):
    """Bytes by which a call in a process of its own raised the peak of that process."""
    arguments = json.dumps([length, heads, dtype, backward, options])
    environment = {**os.environ, "TRITON_INTERPRET": "0", "FUSEDOPS_BACKEND": "auto"}
    done = subprocess.run(
        [sys.executable, "-c", CODE, arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.parametrize("name", list(OPTIONS))
def test_scores_are_made_in_blocks(name):
    """3,000 keys and 16 heads: the scores would take 549 MiB."""
    assert peak_above_inputs(3000, 16, "float32", OPTIONS[name]) < 250 * MIB


def test_backward_makes_scores_in_blocks():
    for name in ("sliding", "softcap"):
        assert peak_above_inputs(3000, 16, "float32", OPTIONS[name], backward=True) < 300 * MIB


@pytest.mark.deep
@pytest.mark.parametrize("name", list(OPTIONS))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_16k_by_16k(name, dtype):
    """The scores of four heads would take 4 GiB."""
    assert peak_above_inputs(16384, 4, dtype, OPTIONS[name]) < 1.2e9
