"""Run a stage in a process of its own, for a limited time. Needs nothing but Python."""

import contextlib
import importlib
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys

from _rows import ROOT

# What nearly every stage imports first, and takes longer for than for all else of a dry run. The deterministic mode
# that the tests ask for brings torch._inductor.config.
PRELOADED = ("torch", "torch._inductor.config", "torch._dynamo", "triton", "pytest", "fusedops")


def status_of(command, variables, output, seconds, forked=False):
    """How a Python command ended that ran for at most so long.

    Args:
        command: Interpreter, script or ``-m`` and a module, arguments.
        variables: What it finds in the environment.
        output: A file for what it prints.
        forked: Whether it begins as a copy of this process, with all that `preload` has imported. No such copy can use
            a GPU.

    Returns:
        The exit status, minus the signal that ended it, or None where its time was over: then its children ended too.
    """
    if forked:
        arguments = command, variables, output.fileno()
        process = multiprocessing.get_context("fork").Process(target=_become, args=arguments)
        process.start()
        process.join(seconds)
        status = process.exitcode
    else:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, cwd=ROOT, env=variables, start_new_session=True
        )
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
        status = process.returncode
    if status is None:
        with contextlib.suppress(ProcessLookupError):  # it has not come to lead a group yet
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        (process.join if forked else process.wait)()
    return status


def preload():
    """Import what forked stages share; kernels are interpreted, which is settled when triton is imported."""
    os.environ.update(TRITON_INTERPRET="1", OMP_NUM_THREADS="1")  # a pool of threads does not survive a fork
    sys.path.insert(1, str(ROOT))  # before an installed package of another checkout
    for name in PRELOADED:
        importlib.import_module(name)


def _become(command, variables, output):
    """Turn a fork of this process into what the command line would start."""
    os.setsid()
    for descriptor in (1, 2):
        os.dup2(output, descriptor)
    sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))  # by lines, if killed
    os.chdir(ROOT)
    os.environ.clear()
    os.environ.update(variables)
    sys.orig_argv = command
    if command[1] == "-m":
        sys.argv, sys.path[0] = command[2:], str(ROOT)
        runpy.run_module(command[2], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = command[1:], os.path.dirname(command[1])
        runpy.run_path(command[1], run_name="__main__")
