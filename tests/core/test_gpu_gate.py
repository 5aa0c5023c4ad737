"""benchmarks/gpu_gate.py: stages go on after a failure, end in time, and nothing is claimed without a GPU."""

import importlib.util
import json
import re
import resource
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import fusedops

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


FILES = {f"tests/{path.stem.removeprefix('test_')}" for path in (SCRIPT.parents[1] / "tests/gpu").glob("test_*.py")}
GPU_TESTS = "".join(path.read_text() for path in (SCRIPT.parents[1] / "tests/gpu").glob("test_*.py"))


def row(seconds, timed="device time under a CUDA graph"):
    return {
        "op": "double", "shape": "2x3", "dtype": "float32", "timed": timed, "seconds": seconds,
        "peers": {"torch": 3e-6}, "best_peer": "torch", "speedup": 3e-6 / seconds,
        "error": 1e-7, "goal_met": True, "share_of_copy_bandwidth": 0.5, "share_of_matmul_rate": None,
    }  # fmt: skip


def python(gate, name, code, **more):
    return stage_of(name, [sys.executable, "-c", code], **more)


def stage_of(*args, **more):
    return importlib.import_module("_stages").Stage(*args, **more)


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
    assert result("print('no compiler'); raise SystemExit(77)") == "not run, no compiler"
    assert result("open('d', 'w')", absent="needs a GPU") == "not run, needs a GPU"
    assert result("raise SystemExit(5)") == "failed with status 5"
    of_tests = gate.run_stage(python(gate, "tests/rotary", "raise SystemExit(5)"), log, 60.0)
    assert of_tests["result"] == "not run, no test is chosen"
    assert result("import sys; assert sys.argv[1:] == ['--seconds', '39']", grace=21) == "passed"


def test_a_stage_that_hangs_ends_with_its_children_and_keeps_its_output(gate, tmp_path):
    late = f"import time; time.sleep(4); open({str(tmp_path / 'late')!r}, 'w')"
    child = f"import subprocess, sys; subprocess.run([{sys.executable!r}, '-c', {late!r}])"
    started = time.monotonic()
    ended = gate.run_stage(python(gate, "a", f"print('begun', flush=True); {child}"), tmp_path / "gate.log", 2)
    assert ended["result"] == "out of time" and time.monotonic() - started < 20
    assert (tmp_path / "gate.log").read_text().endswith("begun\n")
    time.sleep(max(0.0, started + 5 - time.monotonic()))
    assert not (tmp_path / "late").exists()


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


def test_fails_crashes_and_hangs_are_told_and_the_rest_goes_on(gate, tmp_path):
    crash, hang = "import os; os.kill(os.getpid(), 11)", "import time; time.sleep(60)"
    codes = {"fails": "raise SystemExit(1)", "crashes": crash, "hangs": hang}
    codes |= {"absent": "raise SystemExit(77)", "works": ""}
    plan = [python(gate, name, code) for name, code in codes.items()]
    results = list(gate.run_stages(plan, tmp_path, time.monotonic() + 12))[-1]
    assert [result["result"] for result in results] == [
        "failed with status 1", "crashed with signal 11", "out of time", "not run, it did not say why", "passed"
    ]  # fmt: skip
    assert list(map(gate.is_bad, results)) == [True, True, True, False, False]
    assert list(map(gate.has_ended, results)) == [True, True, False, True, True]


def test_operators_that_fail_crash_and_hang_are_told_and_the_rest_goes_on(tmp_path):
    """Planted in the library itself; the gate runs the benchmarks of these and of other operators."""
    plant, out, pid = SCRIPT.parents[1] / "tests/data/faulty_gate.py", tmp_path / "out", tmp_path / "pid"
    ended = subprocess.run([sys.executable, plant, out, pid], capture_output=True, text=True, timeout=600)
    assert ended.returncode == 1, ended.stdout[-3000:] + ended.stderr[-3000:]
    (folder,) = out.iterdir()
    results = {one["stage"]: one["result"] for one in json.loads((folder / "summary.json").read_text())["stages"]}
    assert results == {
        "gated_activation": "out of time", "layer_norm": "failed with status 1", "paged_attention": "passed",
        "rotary": "crashed with signal 11", "sparse_matmul": "passed",
    }  # fmt: skip
    operators = {row["op"] for row in json.loads((folder / "rows.json").read_text())}
    assert "add_layer_norm" in operators and not operators & {"silu_mul", "layer_norm", "rotary"}
    assert "failed: layer_norm 1x" in (folder / "gate.log").read_text()
    left = Path(f"/proc/{pid.read_text()}/cmdline")  # of the process that the hanging operator started
    assert not left.exists() or not left.read_bytes()


def test_resumes_where_the_last_run_stopped(gate, monkeypatch, tmp_path, capsys):
    rows = tmp_path / "bench.json"
    rows.write_text(json.dumps([row(2e-6)]))
    hang = python(gate, "second", "import time; time.sleep(60)", rows=rows)
    steps = [python(gate, "first", "raise SystemExit(3)"), hang, python(gate, "third", "")]
    monkeypatch.setattr(gate, "stages", lambda scratch, quick, dry_run: steps)
    monkeypatch.setattr(gate._processes, "preload", lambda: None)  # of this process
    assert gate.main(["--dry-run", "--resume", "--out", str(tmp_path / "out")]) == 2
    assert "there are none" in capsys.readouterr().err
    gate.main(["--dry-run", "--minutes", "0.08", "--out", str(tmp_path / "out")])
    rows.write_text(json.dumps([row(1e-6), row(9e-6, "wall time of eager calls")]))
    steps = [python(gate, "first", "raise SystemExit(4)"), python(gate, "second", "", rows=rows), steps[2]]
    assert gate.main(["--dry-run", "--resume", "--out", str(tmp_path / "out")]) == 1
    (folder,) = (tmp_path / "out").iterdir()
    summary = json.loads((folder / "summary.json").read_text())
    found = {stage["stage"]: stage["result"] for stage in summary["stages"]}
    assert found == {"first": "failed with status 3", "second": "passed", "third": "passed"}
    assert [one["seconds"] for one in json.loads((folder / "rows.json").read_text())] == [1e-6, 9e-6]


def test_only_chooses_stages(gate, tmp_path):
    plan = list(gate.stages(tmp_path, False, False))
    others = [stage.name for stage in plan if not (stage.rows or stage.is_test)]
    assert others == ["ceilings", "build", "host_cost", "model", "model_batch", "sanitizer", "tune"]
    assert {stage.absent for stage in plan if stage.rows or stage.is_test} == {None} and plan[-1].absent is None
    assert {stage.forked for stage in plan} == {False}  # no copy of a process can use a GPU
    assert {stage.name for stage in plan if stage.is_test} == FILES
    assert gate.chosen(plan, None) == plan
    assert {stage.name for stage in gate.chosen(plan, "tests")} == FILES
    assert [stage.name for stage in gate.chosen(plan, "rotary,build")] == ["build", "rotary"]
    picked = gate.chosen(plan, "tests,rotary,rms_norm")
    assert [stage.name for stage in picked if not stage.is_test] == ["rms_norm", "rotary"]
    assert {tuple(stage.command[-2:]) for stage in picked if stage.is_test} == {("-k", "rms_norm or rotary")}
    one, benchmark = gate.chosen(plan, "tests/operators,rotary")
    assert one.command[-2:] == ["-k", "rotary"] and benchmark.rows
    assert gate.chosen(plan, "tests/attention")[0].command[-1].endswith("tests/gpu/test_attention.py")
    with pytest.raises(ValueError, match="must name stages out of attention, .*rotary.*got nonsense"):
        gate.chosen(plan, "rotary,nonsense")


def test_time_is_shared_by_weight(gate, monkeypatch, tmp_path):
    given = []
    monkeypatch.setattr(gate, "run_stage", lambda stage, log, seconds: given.append(seconds) or {"result": "passed"})
    plan = [stage_of("tests", [], 3), stage_of("a", []), stage_of("b", [])]
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


GATE = [sys.executable, str(SCRIPT), "--dry-run", "--out"]


def test_dry_run(tmp_path):
    """All stages as they run on a GPU, on tiny shapes, within 4 minutes on a machine that does nothing else."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    ended = subprocess.run([*GATE, tmp_path], capture_output=True, text=True, timeout=1200)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert ended.returncode == 0, ended.stdout[-6000:] + ended.stderr[-3000:]
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 240
    (folder,) = tmp_path.iterdir()
    summary = json.loads((folder / "summary.json").read_text())
    results = {stage["stage"]: stage["result"] for stage in summary["stages"]}
    for name in ("build", "host_cost"):  # which need compilers
        result = results.pop(name)
        assert result == "passed" or result.startswith("not run, ")
        on_host = [goal["met"] for goal in summary["goals"] if "on the host" in goal["asked"]]
    assert len(on_host) == 2 and (result != "passed" or None not in on_host)  # it names what they are about
    absent = {name for name, result in results.items() if result != "passed"}
    assert absent == {"tests/attention_hopper", "model", "model_batch", "sanitizer", "tune"}
    assert all(results[name].startswith("not run, ") and "time" not in results[name] for name in absent)
    assert {name for name in results if name.startswith("tests/")} == FILES
    assert set(fusedops.OPERATORS) <= {row["op"] for row in json.loads((folder / "rows.json").read_text())}
    said = (folder / "gate.log").read_text()
    for name in fusedops.OPERATORS:
        tested = re.search(rf"test_\w+\[{name}[-\]].* PASSED", said)
        assert tested or f"{name}(" in GPU_TESTS, name
    assert {goal["number"] for goal in summary["goals"]} == set(range(1, 13))
    assert ended.stdout.splitlines()[-1].split()[0] in fusedops.OPERATORS  # the table is last
