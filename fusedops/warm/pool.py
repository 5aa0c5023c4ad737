"""Compile in parallel, in processes of their own: Triton holds the interpreter lock, and CUDA must not be forked."""

import os
import pickle
import queue
import subprocess
import sys
import threading
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def compile_all(jobs, processes, launcher, progress):
    """What became of each job, in the order of completion.

    Args:
        jobs: To compile.
        processes: At most so many at a time.
        launcher: Also make what launches them on the GPU at hand.
        progress: Function of (done, total, name).

    Raises:
        RuntimeError: a process ended by itself.
    """
    waiting, replies = queue.SimpleQueue(), queue.SimpleQueue()
    for job in jobs:
        waiting.put((job, launcher))
    workers = [_start() for _ in range(min(processes, len(jobs)))]
    for worker in workers:
        threading.Thread(target=_feed, args=(worker, waiting, replies), daemon=True).start()
    results = []
    try:
        while len(results) < len(jobs):
            result = replies.get()
            if isinstance(result, Exception):
                raise RuntimeError("warmup: a compiling process ended by itself (was it out of memory?)") from result
            results.append(result)
            progress(len(results), len(jobs), result["name"])
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    return results


def _start():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    paths = [str(ROOT), *filter(None, [environment.get("PYTHONPATH")])]
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    return subprocess.Popen(
        [sys.executable, "-m", "fusedops.warm.worker"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
    )


def _feed(worker, waiting, replies):
    """Give a process one job after the other."""
    try:
        while True:
            pickle.dump(waiting.get_nowait(), worker.stdin)
            worker.stdin.flush()
            replies.put(pickle.load(worker.stdout))
    except queue.Empty:
        return
    except (OSError, EOFError, pickle.PickleError) as error:
        replies.put(error)
