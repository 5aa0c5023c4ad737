"""benchmarks/gpu_gate.py: stages go on after a failure, end in time, and nothing is claimed without a GPU."""

import importlib.util
import json
import re
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu_gate.py"


@pytest.fixture
def gate(monkeypatch):
    """The script as a module, beside its neighbours."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    spec = importlib.util.spec_from_file_location("gpu_gate", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gpu_gate", module)
    spec.loader.exec_module(module)
    return module


def row(seconds, timed="device time under a CUDA graph"):
    return {
        "op": "double", "shape": "2x3", "dtype": "float32", "timed": timed, "seconds": seconds,
        "peers": {"torch": 3e-6}, "best_peer": "torch", "speedup": 3e-6 / seconds,
        "error": 1e-7, "goal_met": True, "share_of_copy_bandwidth": 0.5, "share_of_matmul_rate": None,
    }  # fmt: skip


def python(gate, name, code, **more):
    return gate.Stage(name, [sys.executable, "-c", code], **more)


def test_refuses_without_a_device(gate, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gate.main([]) == 2
    assert "needs an NVIDIA GPU" in capsys.readouterr().err


def test_stage_results(gate, tmp_path):
    log = tmp_path / "gate.log"

    def result(code, seconds=60.0, **more):
        return gate.run_stage(python(gate, "stage", code, **more), log, seconds)["result"]

    assert result("print('seen')") == "passed" and log.read_text().endswith("seen\n")
    assert result("raise SystemExit(3)") == "failed with status 3"
    assert result("open('d', 'w')", -1) == "not run, out of time"
    assert result("raise SystemExit(5)") == "there is no GPU test"
    assert result("raise SystemExit(5)", rows=tmp_path / "rows") == "failed with status 5"


def test_a_stage_that_hangs_ends_with_its_children_and_keeps_its_output(gate, tmp_path):
    child = f"import subprocess, sys; subprocess.run([{sys.executable!r}, '-c', 'import time; time.sleep(60)'])"
    started = time.monotonic()
    ended = gate.run_stage(python(gate, "a", f"print('begun', flush=True); {child}"), tmp_path / "gate.log", 2)
    assert ended["result"] == "out of time" and time.monotonic() - started < 20
    assert (tmp_path / "gate.log").read_text().endswith("begun\n")


def test_goes_on_after_a_failure_and_prints_the_table_last(gate, monkeypatch, tmp_path, capsys):
    properties = SimpleNamespace(name="NVIDIA Test 80GB", major=9, minor=0, total_memory=1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    rows = tmp_path / "bench.json"
    rows.write_text(json.dumps([row(2e-6), row(6e-6, "wall time of eager calls")]))
    steps = [python(gate, "first", "raise SystemExit(1)"), python(gate, "second", "", rows=rows)]
    monkeypatch.setattr(gate, "stages", lambda scratch, quick, dry_run: steps)
    assert gate.main(["--out", str(tmp_path / "out")]) == 1
    (folder,) = (tmp_path / "out").iterdir()
    assert folder.name.startswith("nvidia_test_80gb_")
    summary = json.loads((folder / "summary.json").read_text())
    assert [stage["result"] for stage in summary["stages"]] == ["failed with status 1", "passed"]
    assert summary["environment"]["torch"] == torch.__version__
    assert len(json.loads((folder / "rows.json").read_text())) == 2
    last = capsys.readouterr().out.splitlines()[-1].split()
    assert last == "double 2x3 float32 2.0 torch 3.0 1.50 50% BW* met 1.0e-07 6.0 0.50".split()


def test_only_chooses_stages(gate, tmp_path):
    plan = list(gate.stages(tmp_path, False, False))
    assert gate.chosen(plan, None) == plan
    assert gate.chosen(plan, "tests") == plan[:1]
    assert [stage.name for stage in gate.chosen(plan, "rotary")] == ["rotary"]
    tests, *benchmarks = gate.chosen(plan, "tests,rotary,rms_norm")
    assert tests.command[-2:] == ["-k", "rotary or rms_norm"]
    assert [stage.name for stage in benchmarks] == ["rms_norm", "rotary"]
    with pytest.raises(ValueError, match="must name stages out of tests, .*rotary.*got nonsense"):
        gate.chosen(plan, "rotary,nonsense")


def test_time_is_shared_by_weight(gate, monkeypatch, tmp_path):
    given = []
    monkeypatch.setattr(gate, "run_stage", lambda stage, log, seconds: given.append(seconds) or {"result": "passed"})
    plan = [gate.Stage("tests", [], 3), gate.Stage("a", []), gate.Stage("b", [])]
    list(gate.run_stages(plan, tmp_path, time.monotonic() + 100))
    assert given == pytest.approx([90, 75, 100], rel=0.02)


@pytest.mark.parametrize(
    ("against", "seconds", "met"),
    [((), 1.0, True), ((), 1.5, False), (("slow",), 1.5, True), (("slow",), 3.0, False), (("absent",), 1.0, None)],
)
def test_a_goal_may_name_its_peers(gate, against, seconds, met):
    """The best peer takes 2 seconds, the slow one 4; the goal is 1.5 times as fast, and half of the ceiling."""
    common = importlib.import_module("_common")
    case = common.Case("double", "2x3", torch.float32, None, {}, {}, goal=(1.5, 0.5), against=against)
    measured = row(seconds) | {"peers": {"best": 2.0, "slow": 4.0}, "speedup": 2.0 / seconds}
    assert common.judged(case, measured) is met
    assert common.judged(case, measured | {"share_of_copy_bandwidth": 0.4}) in (False, None)


def test_dry_run(gate, tmp_path, capsys):
    """A stage of tests and a benchmark as they run on a GPU, on tiny shapes."""
    assert gate.main(["--dry-run", "--only", "tests,rotary", "--out", str(tmp_path)]) == 0, capsys.readouterr().out
    (folder,) = tmp_path.iterdir()
    summary = json.loads((folder / "summary.json").read_text())
    assert [(stage["stage"], stage["result"]) for stage in summary["stages"]] == [
        ("tests", "passed"),
        ("rotary", "passed"),
    ]
    assert {row["op"] for row in json.loads((folder / "rows.json").read_text())} == {"rotary"}
    assert re.search(
        r"test_accuracy_and_determinism\[rotary.* PASSED|PASSED .*\[rotary", (folder / "gate.log").read_text()
    )
