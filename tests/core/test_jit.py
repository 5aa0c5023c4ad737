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
KERNELS = ["_quantize_kernel", "_rms_norm_kernel"]  # the first by a Relauncher, the second by kernel[grid]


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
