"""Settings of every test: Triton's interpreter, NaN in fresh memory, seeded Hypothesis, no state left behind."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported; compile tests start processes without it

import pytest
import torch
from hypothesis import settings

from fusedops import reset_counters
from fusedops._core import env
from fusedops.testing import interpreter

settings.register_profile("ci", derandomize=True, max_examples=25, deadline=None, database=None)
settings.register_profile("deep", max_examples=1000, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

if os.environ["TRITON_INTERPRET"] == "1":
    interpreter.install()


@pytest.fixture(autouse=True)
def _clean_state():
    """`torch.empty` gives NaN, so what a kernel leaves unwritten shows; settings and counters start fresh."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    env.refresh()
    reset_counters()
    yield
    torch.use_deterministic_algorithms(False)


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name != "test_compile.py")  # the longest first, beside all others
    if not torch.cuda.is_available() and os.environ.get("GPU_TESTS_DRY_RUN") != "1":
        skip = pytest.mark.skip(reason="needs an NVIDIA GPU: torch.cuda.is_available() is False")
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(skip)
