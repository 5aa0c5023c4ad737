"""benchmarks/gpu_gate.py: stages go on after a failure, end in time, and nothing is claimed without a GPU."""

import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu_gate.py"


@pytest.fixture
def gate():
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("gpu_gate", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def python(code):
    return [sys.executable, "-c", code]


def test_refuses_without_a_device(gate, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gate.main([]) == 2
    assert "needs an NVIDIA GPU" in capsys.readouterr().err


def test_stage_results(gate, tmp_path):
    passed = gate.run_stage("a", python("print('seen')"), tmp_path, 60)
    assert passed["result"] == "passed" and (tmp_path / "a.log").read_text() == "seen\n"
    assert gate.run_stage("b", python("raise SystemExit(3)"), tmp_path, 60)["result"] == "failed with status 3"
    assert gate.run_stage("c", python("import time; time.sleep(60)"), tmp_path, 0.5)["result"] == "out of time"
    assert gate.run_stage("d", python("open('d', 'w')"), tmp_path, -1)["result"] == "not run, out of time"
    assert gate.run_stage("tests", python("raise SystemExit(5)"), tmp_path, 60)["result"] == "there is no GPU test"


def test_goes_on_after_a_failure_and_summarises(gate, monkeypatch, tmp_path):
    properties = SimpleNamespace(name="NVIDIA Test 80GB", major=9, minor=0, total_memory=1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    steps = [("first", python("raise SystemExit(1)")), ("second", python(""))]
    monkeypatch.setattr(gate, "stages", lambda folder, quick: iter(steps))
    assert gate.main(["--output", str(tmp_path)]) == 1
    (folder,) = tmp_path.iterdir()
    assert folder.name.startswith("nvidia_test_80gb_")
    summary = json.loads((folder / "summary.json").read_text())
    assert [stage["result"] for stage in summary["stages"]] == ["failed with status 1", "passed"]
    assert summary["environment"]["torch"] == torch.__version__
