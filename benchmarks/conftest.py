"""Options of `pytest benchmarks`."""

import torch


def pytest_addoption(parser):
    group = parser.getgroup("fusedops benchmarks")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    group.addoption("--device", choices=("cpu", "cuda"), default=default, help=f"default here: {default}")
    group.addoption("--full", action="store_true", help="every shape, and torch.compile on a CPU too")
