"""Settings of every test: Triton's interpreter, NaN in fresh memory, seeded Hypothesis, no state left behind."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported; compile tests start processes without it

import pytest
import torch
from hypothesis import settings

from fusedops import reset_counters
from fusedops._core import env
from fusedops.testing import interpreter
from fusedops.testing.ptx import build

EMULATED_SHARE = 12  # of so many examples one is emulated

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


@pytest.fixture(autouse=True)
def _few_emulated_examples(request):
    """What is drawn is new to the compiler nearly every time, and compiling takes longer than running."""
    function = getattr(request, "function", None)
    with pytest.MonkeyPatch.context() as patch:  # the fixture monkeypatch would outlive those of the tests
        if request.node.get_closest_marker("emulated") and hasattr(function, "_hypothesis_internal_use_settings"):
            few = settings(max_examples=settings.default.max_examples // EMULATED_SHARE)
            patch.setattr(function, "_hypothesis_internal_use_settings", few)
        yield


def _turn(item):
    """The longest first, who would wait for its results last."""
    if item.path.name == "test_compile.py":
        return 0
    return 2 if hasattr(item.module, "compiled_rows") else 1


def pytest_collection_modifyitems(items):
    items.sort(key=_turn)
    if build.missing() is not None:
        skip = pytest.mark.skip(reason=build.missing())
        for item in items:
            if item.get_closest_marker("emulated"):
                item.add_marker(skip)
    if not torch.cuda.is_available() and os.environ.get("GPU_TESTS_DRY_RUN") != "1":
        skip = pytest.mark.skip(reason="needs an NVIDIA GPU: torch.cuda.is_available() is False")
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(skip)
