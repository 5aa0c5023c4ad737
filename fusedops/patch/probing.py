"""Running a module's code on chosen inputs without touching the module."""

import contextlib

import torch
from torch import nn

from fusedops.testing.accuracy import Budget, errors

PROBE_DTYPES = (torch.float32, torch.bfloat16)


def detached_copy(module):
    """A shallow copy: replacing its parameters, children or attributes leaves the module as it is."""
    copy = object.__new__(type(module))
    copy.__dict__.update(module.__dict__)
    for name in ("_parameters", "_buffers", "_modules"):
        copy.__dict__[name] = dict(module.__dict__[name])
    copy.__dict__.pop("forward", None)
    return copy


@contextlib.contextmanager
def probing():
    """On the CPU, no gradients, no autocast, and the random state of the process as it was."""
    with torch.device("cpu"), torch.random.fork_rng(devices=[]), torch.no_grad(), torch.autocast("cpu", enabled=False):
        yield


def attempt(function, *args):
    """The result of a call, or None where it raises: code that does not take the probe is not what we look for."""
    try:
        return function(*args)
    except Exception:
        return None


def generator():
    """The probes' own random numbers: the same ones for every module."""
    return torch.Generator("cpu").manual_seed(0)


def agreement(out, expected, budgets=1):
    """0 where the tensors are equal, their largest rms difference in epsilons where it is small, else None.

    The budget, or this multiple, holds for each row (index of the second last dimension), so that rows of large numbers
    hide nothing.
    """
    if not isinstance(out, torch.Tensor) or out.shape != expected.shape or out.dtype != expected.dtype:
        return None
    if torch.equal(out, expected):
        return 0.0
    if not torch.equal(torch.isfinite(out), torch.isfinite(expected)):
        return None
    budget = Budget.for_dtype(out.dtype)
    largest = 0.0
    for row, truth in zip(out.unbind(-2), expected.double().unbind(-2), strict=True):
        measured = errors(row, truth)
        if not (measured.rms <= budgets * budget.rms and measured.peak <= budgets * budget.peak):
            return None
        largest = max(largest, measured.rms)
    return largest


class Recorder(nn.Module):
    """Stands in for a child module: keeps its inputs and returns a tensor that was set beforehand."""

    def __init__(self, answer):
        super().__init__()
        self.answer = answer
        self.inputs = []

    def forward(self, x):
        self.inputs.append(x)
        return self.answer
