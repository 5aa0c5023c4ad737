"""The gate's dry run with operators that fail, crash and hang: python tests/data/faulty_gate.py OUT PID_FILE.

Stages are forked from this process, so that what is planted here is theirs.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import _processes
import gpu_gate

STAGES = "gated_activation,layer_norm,paged_attention,rotary,sparse_matmul"


def plant(out, pid_file):
    """Replace public operators, and run some stages."""
    _processes.preload()
    import fusedops

    def fail(*args, **options):
        raise RuntimeError("planted")

    def crash(*args, **options):
        os.kill(os.getpid(), signal.SIGSEGV)

    def hang(*args, **options):
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        Path(pid_file).write_text(str(child.pid))
        child.wait()

    fusedops.silu_mul, fusedops.layer_norm, fusedops.rotary = hang, fail, crash
    return gpu_gate.main(["--dry-run", "--minutes", "0.6", "--only", STAGES, "--out", out])


if __name__ == "__main__":
    sys.exit(plant(*sys.argv[1:]))
