"""Every variant of a kernel that a real call can reach compiles, as a GPU would get it, within the static gates."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

WORKER = Path(__file__).resolve().parent / "data" / "launch_worker.py"
LAUNCHES = 64
KERNELS = {
    "_rms_norm_kernel", "_rms_norm_backward_kernel", "_layer_norm_kernel", "_layer_norm_backward_kernel",
    "_gated_kernel", "_gated_backward_kernel", "_rotary_kernel",
}  # fmt: skip


@pytest.mark.compile
@pytest.mark.slow
def test_real_launches_compile():
    """Options left out are None, one row is the constant 1, odd sizes are not multiples of 16: each is other code."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_DISABLE_LINE_INFO": "1"}
    done = subprocess.run(
        [sys.executable, str(WORKER), "sm_90a"], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-4000:]
    reports = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(reports) == LAUNCHES and {report["kernel"] for report in reports} == KERNELS
    bad = [r["launch"] for r in reports if r["spill_in_loop"] or r["stack_bytes"] > 64 or r["target"] != "sm_90a"]
    assert not bad
