"""docs/testing_without_a_gpu.md is true: its examples run, and its tables and reports are those of the code."""

import importlib.util
import re
from pathlib import Path

import pytest

from fusedops.testing import ptx
from tests.ptx import page
from tests.ptx.cuda import build


def example(title):
    return re.search(rf'^```\S+ title="{re.escape(title)}"\n(.*?)^```', page.PAGE.read_text(), re.DOTALL | re.M)[1]


def run_example(folder, name, function):
    (folder / name).write_text(example(name))
    spec = importlib.util.spec_from_file_location(Path(name).stem, folder / name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    getattr(module, function)()


def test_tables_and_reports_are_current():
    text = page.PAGE.read_text()
    assert text == page.rewritten(text), "run python -m tests.ptx.page"


def test_every_instruction_has_a_row():
    shown = re.search(r"<!-- instructions -->(.*)<!-- /instructions -->", page.PAGE.read_text(), re.DOTALL)[1]
    assert set(re.findall(r"`([^`]+)`", shown)) == set(ptx.instructions())


def test_every_check_is_explained():
    text = page.PAGE.read_text()
    assert all(f"| `{name}` |" in text for name in ptx.CHECKS)


def test_the_triton_example_runs(tmp_path):
    pytest.importorskip("triton", reason="triton is not installed")
    run_example(tmp_path, "test_my_triton_kernel.py", "test_scale")


@pytest.mark.skipif(build.nvcc() is None, reason=f"needs nvcc of CUDA {build.NVCC_RELEASE} on the PATH")
def test_the_cuda_example_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_kernel.cu").write_text(example("my_kernel.cu"))
    run_example(tmp_path, "test_my_cuda_kernel.py", "test_scale")
