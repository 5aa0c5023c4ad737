"""FUSEDOPS_JIT=forbid: what would be compiled is refused by name, what Triton has in its cache on disk is launched."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fusedops
from fusedops._core import env

ROOT = Path(__file__).resolve().parents[2]
KERNELS = ["_quantize_kernel", "_quantize_int4_kernel"]  # the first by a Relauncher, the second by kernel[grid]


def attempts(cache, *arguments):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(cache / "triton"), "FUSEDOPS_CACHE_DIR": str(cache / "ours")}
    ended = subprocess.run(
        [sys.executable, "-m", "tests.data.jit_worker", *arguments], cwd=ROOT, env=environment, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout)


@pytest.mark.compile
def test_nothing_is_compiled_where_it_is_forbidden(tmp_path):
    refused, foreign, compiled, again = attempts(tmp_path, *"256 forbid 0 forbid 256 allow 256 forbid".split())
    assert refused["launches"] == refused["compiled"] == refused["found"] == []
    assert refused["error"].startswith("quantize: _quantize_kernel(x_ptr: *bf16, ")
    assert "must be compiled for cuda 90" in refused["error"] and "fusedops warmup" in refused["error"]
    assert foreign == {
        "launches": ["_foreign_kernel"], "compiled": ["_foreign_kernel"], "found": [], "error": None,
    }  # fmt: skip
    assert compiled == {"launches": KERNELS, "compiled": KERNELS, "found": [], "error": None}
    assert again == {"launches": KERNELS, "compiled": [], "found": [], "error": None}
    found, refused = attempts(tmp_path, *"256 forbid 264 forbid".split())  # the cache on disk, in another process
    assert found == {"launches": KERNELS, "compiled": [], "found": KERNELS, "error": None}
    assert refused["launches"] == refused["compiled"] == [] and "_quantize_kernel" in refused["error"]


def test_the_interpreter_compiles_nothing():
    with env.override("FUSEDOPS_JIT", "forbid"), env.override("FUSEDOPS_BACKEND", "triton"):
        out = fusedops.rms_norm(torch.ones(2, 8), torch.ones(8))
    torch.testing.assert_close(out, torch.ones(2, 8))


def test_a_wrong_value_is_named():
    with (
        pytest.raises(ValueError, match="FUSEDOPS_JIT must be one of allow, forbid"),
        env.override("FUSEDOPS_JIT", "never"),
    ):
        pass


def test_a_kernels_name_in_the_cache_does_not_follow_from_what_ran_before():
    """Triton hashes a kernel with the constants of those helpers that were hashed earlier in the process."""
    text = """
import sys
from fusedops._core import fingerprint
from fusedops.ops.attention._triton.forward import _attention_kernel as first
from fusedops.ops.paged_attention._triton.forward import _paged_attention_kernel as second
for kernel in (first, second)[:: int(sys.argv[1])]:
    fingerprint.settle(kernel)
print(first.cache_key, second.cache_key)
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    keys = [
        subprocess.run(
            [sys.executable, "-c", text, order], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
        ).stdout
        for order in ("1", "-1")
    ]
    assert keys[0] == keys[1] and len(keys[0].split()) == 2
