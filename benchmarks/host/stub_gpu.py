"""Pretend that there is an H100: Triton compiles for it and launches on a driver that runs nothing.

Tensors stay on the CPU, so that torch's own part of a call is the CPU's; kernels compile to real machine code.
"""

import contextlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

MARK = "FUSEDOPS_STUB_DRIVER"


def restart():
    """Start this process again where the loader finds the stub in place of libcuda; once."""
    if os.environ.get(MARK):
        return
    folder = tempfile.mkdtemp(prefix="fusedops-stub-")
    source = Path(__file__).with_name("driver_stub.c")
    compiler = os.environ.get("CC", "cc")
    subprocess.run([compiler, "-O2", "-shared", "-fPIC", "-o", f"{folder}/libcuda.so.1", source], check=True)
    libraries = os.pathsep.join(filter(None, (folder, os.environ.get("LD_LIBRARY_PATH"))))
    changed = {MARK: folder, "LD_LIBRARY_PATH": libraries, "TRITON_LIBCUDA_PATH": folder}
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | changed
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


@contextlib.contextmanager
def in_place():
    """Let fusedops launch its kernels on CPU tensors. Only in a process that `restart` has started."""
    import torch
    from triton.backends.nvidia.driver import CudaDriver
    from triton.runtime import driver

    torch._C._cuda_getCurrentRawStream = lambda index: 0
    torch.cuda.current_device = lambda: 0
    torch.cuda.get_device_capability = lambda device=None: (9, 0)
    driver.set_active(CudaDriver())
    import fusedops  # noqa: F401 - after the driver: nothing of it must be asked of torch.cuda
    from fusedops._core import dispatch, env

    dispatch.triton_rejection = lambda device: None
    with env.override("FUSEDOPS_BACKEND", "triton"):
        yield
