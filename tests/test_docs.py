"""The documentation is true: following adding_an_operator.md to the letter gives an operator that passes everything."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# Where the page's Python blocks go, in their order.
PLACES = (
    "fusedops/ops/relu_square/reference.py",
    "fusedops/ops/relu_square/_triton.py",
    "fusedops/ops/relu_square/_torch.py",
    "fusedops/ops/relu_square/__init__.py",
    "tests/ops/test_relu_square.py",
    "benchmarks/bench_relu_square.py",
)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the sources in which somebody did what the page says."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("fusedops", "tests", "benchmarks", "csrc"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs/adding_an_operator.md").read_text(), re.DOTALL | re.M)
    *files, line = blocks
    for place, text in zip(PLACES, files, strict=True):
        (folder / place).parent.mkdir(exist_ok=True)
        (folder / place).write_text(text)
    init = folder / "fusedops/__init__.py"
    init.write_text(init.read_text().replace("from fusedops.ops.rms_norm", f"{line}from fusedops.ops.rms_norm"))
    return folder


def run(folder, *command):
    environment = {**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    return done.stdout


def test_the_new_operator_passes_its_tests_and_the_rules(checkout):
    out = run(checkout, "-m", "pytest", "-q", "-p", "no:xdist", "tests/ops/test_relu_square.py", "tests/test_layers.py")
    assert " passed" in out and "failed" not in out


@pytest.mark.compile
def test_the_new_operator_is_compiled_for_every_target(checkout):
    out = run(checkout, "-m", "pytest", "-v", "-p", "no:xdist", "tests/test_compile.py", "-k", "relu_square")
    assert "[relu_square-usual] PASSED" in out


def test_the_new_operator_is_explained_and_measured(checkout, tmp_path):
    out = run(checkout, "-m", "fusedops", "explain", "relu_square", "--shape", "8192x4096", "--target", "sm_90a")
    assert "runs on       triton" in out and "FlatConfig" in out
    rows = tmp_path / "rows.json"
    run(checkout, "benchmarks/bench_relu_square.py", "--quick", "--device", "cpu", "--json", str(rows))
    assert {row["op"] for row in json.loads(rows.read_text())} == {"relu_square"}


def test_the_example_of_testing_a_kernel_runs(tmp_path):
    (example,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs/testing.md").read_text(), re.DOTALL | re.M)
    (tmp_path / "test_example.py").write_text(example)
    out = run(tmp_path, "-m", "pytest", "-q", "-p", "no:xdist", "test_example.py")
    assert "2 passed" in out


def test_the_site_builds_with_a_page_for_every_operator(tmp_path):
    pytest.importorskip("mkdocs", reason="mkdocs is not installed")
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)],
        cwd=ROOT, env=environment, check=True, timeout=300,
    )  # fmt: skip
    page = (tmp_path / "operators/rms_norm/index.html").read_text()
    assert "add_rms_norm" in page and "Root Mean Square Layer Normalization" in page and "mean(h**2)" in page
    support = (tmp_path / "operators/attention/index.html").read_text()
    assert "Who takes what" in support and "compute capability 8.9" in support
    assert {p.name for p in (tmp_path / "operators").iterdir()} == {
        p.parent.name for p in (ROOT / "fusedops/ops").glob("*/__init__.py")
    }
    assert "FUSEDOPS_FALLBACK" in (tmp_path / "environment/index.html").read_text()
