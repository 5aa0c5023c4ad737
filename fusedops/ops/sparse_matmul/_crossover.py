"""For how many rows a sparse product is faster than the dense one: measured on demand, kept as tuned configurations.

The operator has no dense weight, so who keeps a copy of it asks here; without a measurement the answer is: for all.
"""

import functools
from dataclasses import dataclass
from pathlib import Path

import torch

from fusedops._core.device import cpu_name, limits
from fusedops._core.tuning import DEFAULT, Tunable

MEASURED_ROWS = tuple(2**power for power in range(14))
END = 2**30  # rows that no call has


@dataclass(frozen=True)
class Crossover:
    """The numbers of rows for which the sparse product is the faster one: first, and last (inclusive)."""

    first: int = 1
    last: int = END

    def is_sparse(self, rows):
        """Whether a call of so many rows takes the compressed weight."""
        return self.first <= rows <= self.last


CROSSOVER = Tunable(
    "sparse_matmul_crossover",
    default=lambda *asked: Crossover(),
    sizes=("columns", "depth"),
    flags=("dtype", "processor"),
    space={"first": (*MEASURED_ROWS, END), "last": (*MEASURED_ROWS, END)},
    fits=lambda config, *asked: config.first <= config.last,
    source=str(Path(__file__).with_name("__init__.py")),  # all files of the operator
)


def question(N, K, dtype, device):
    """What is asked of CROSSOVER for a weight [N, K] on a device."""
    return limits(device), (N, K, str(dtype), _processor(device.type, torch.get_num_threads()))


@functools.cache
def _processor(kind, threads):
    """Of a CPU what the environment of a key does not say."""
    return f"{cpu_name()}, {threads} threads" if kind == "cpu" else "gpu"


def is_sparse(rows, N, K, dtype, device):
    """Whether a product of so many rows with a weight [N, K] shall take the compressed one where there is a dense one.

    In batch-invariant mode, and where torch traces a graph for any number of rows, it always does.
    """
    if torch.compiler.is_compiling():
        return True
    return CROSSOVER.choose(*question(N, K, dtype, device)).is_sparse(rows)


def described(a, values):
    """The answer for a call, in words."""
    choice = CROSSOVER.look_up(*question(values.shape[0], a.shape[1], a.dtype, a.device))
    if choice.source == DEFAULT:
        return "not measured: sparse for any number of rows"
    found = choice.config
    if found.first == END:
        text = "dense for any number of rows"
    else:
        text = f"sparse from {found.first} rows" + (f" to {found.last}" if found.last < END else "")
    return f"{text}, where a layer keeps both ({choice.source})"
