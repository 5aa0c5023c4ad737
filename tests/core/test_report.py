"""benchmarks/: every operator has its benchmark, and the pages' tables and plots say what the rows say."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fusedops

ROOT = Path(__file__).resolve().parents[2]
DATE = "2026-01-02T03:04:05+00:00"


@pytest.fixture
def load_script(monkeypatch):
    """Function that loads a script of benchmarks/ as a module."""

    def load(name):
        monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
        spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture
def report(load_script):
    return load_script("report")


def row(op="rms_norm", shape="8192x4096", seconds=2e-4, date=DATE, timed="device time under a CUDA graph", **more):
    """One row as a GPU would give it."""
    environment = {
        "device": "NVIDIA Test", "capability": "9.0", "driver": "1.2", "torch": "2.11.0", "triton": "3.6.0",
        "commit": "abc1234", "date": date,
    }  # fmt: skip
    return {
        "op": op, "shape": shape, "dtype": "bfloat16", "timed": timed, "backend": "triton",
        "config": "Tile(a=1)", "config_source": "default",
        "seconds": seconds, "low": seconds * 0.99, "high": seconds * 1.01, "bytes": 5e8, "operations": 1e9,
        "peers": {"torch": 3e-4, "liger": 2.2e-4}, "peers_left_out": {"quack": "no"}, "best_peer": "liger",
        "speedup": 2.2e-4 / seconds, "error": 1.7e-3, "goal_met": True, "copy_bandwidth": 3e12, "matmul_rate": 8e14,
        "share_of_copy_bandwidth": 0.83, "share_of_matmul_rate": None, "environment": environment, **more,
    }  # fmt: skip


def test_every_operator_has_its_benchmark():
    folders = {path.parent.name for path in (ROOT / "fusedops/ops").glob("*/__init__.py")}
    assert folders == {path.stem.removeprefix("bench_") for path in (ROOT / "benchmarks").glob("bench_*.py")}


SCRIPTS = sorted(path.stem for path in (ROOT / "benchmarks").glob("bench_*.py"))


@pytest.mark.parametrize("name", SCRIPTS)
def test_no_benchmark_measures_zeros(load_script, name):
    """Constants switch fewer transistors than data, and run faster."""
    for case in load_script(name).cases("cpu", True):
        made = [a.double() for a in case.make(0) if isinstance(a, torch.Tensor) and a.dim() > 1]
        assert made and all(float(a.std()) > 0 for a in made), case


@pytest.mark.parametrize("name", SCRIPTS)
def test_ours_is_right_and_torch_s_ways_do_the_same(load_script, name):
    script = load_script(name)
    common = importlib.import_module("_common")
    common.effort_of("cpu", quick=True)
    for case in script.cases("cpu", True):
        with torch.no_grad():
            used, left_out, error = common.tried(case, graph=False)
        assert error is None or error < case.tolerance / 5, case
        unlike = {other: reason for other, reason in left_out.items() if "torch.compile takes" not in reason}
        if "_scaled_mm" in unlike:  # torch has none of blocks on a CPU, and before 2.13 none of rows
            assert "differ" not in unlike.pop("_scaled_mm")
        assert not unlike and used[0] == next(iter(case.candidates)), case


def test_they_run_under_pytest_benchmark(tmp_path):
    pytest.importorskip("pytest_benchmark", reason="pytest-benchmark is not installed")
    output, plain = tmp_path / "found.json", ("-p", "no:xdist", "-p", "no:cacheprovider")
    command = [sys.executable, "-m", "pytest", "benchmarks", *plain, "-q", "-rs", "--benchmark-only", "-k", "rotary-"]
    alone = {name: value for name, value in os.environ.items() if name != "PYTEST_XDIST_WORKER"}
    done = subprocess.run(
        [*command, f"--benchmark-json={output}"], cwd=ROOT, capture_output=True, text=True, env=alone
    )
    assert done.returncode == 0, done.stdout
    found = json.loads(output.read_text())["benchmarks"]
    groups = {}
    for one in found:
        groups.setdefault(one["group"], {})[one["extra_info"]["candidate"]] = one
    assert set(groups) == {"rotary 1x1x9/3x64 float32", "rotary 1x64x9/3x64 float32"}
    for group in groups.values():
        assert set(group) == {"fusedops", "torch"} and group["fusedops"]["extra_info"]["is_ours"]
        assert not group["torch"]["extra_info"]["is_ours"]
        for one in group.values():
            assert 0 < one["stats"]["min"] <= one["stats"]["median"] < 0.1 and one["stats"]["rounds"] >= 5
            assert one["extra_info"]["backend"] == "torch" and one["extra_info"]["bytes"] > 0
    assert "left out: RuntimeError: torch.compile takes longer" in done.stdout


def test_rows_say_what_their_figures_depend_on(report, load_script):
    rows = load_script("_rows")
    kept = report.load(ROOT / "benchmarks/results")
    assert kept and [found for one in kept for found in rows.violations(one)] == []
    assert rows.violations(row(config_source=None, share_of_matmul_rate=0.5)) == []


def test_a_new_row_says_it_all(load_script, tmp_path):
    output = tmp_path / "rows.json"
    command = [sys.executable, "benchmarks/bench_rotary.py", "--device", "cpu", "--quick", "--json", str(output)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    made = json.loads(output.read_text())
    assert [found for one in made for found in load_script("_rows").violations(one)] == [] and len(made) == 2
    for one in made:
        about = one["environment"]
        assert about["command"] == "python benchmarks/bench_rotary.py --device cpu --quick" and about["quick"] is True
        assert about["threads"] > 0 and about["peers"] == {} and about["commit"]
        assert one["rounds"] == 5 and one["rotating_bytes"] >= 2 * one["bytes"] and one["error"] < 1e-5
        assert "torch.compile takes longer" in one["peers_left_out"]["torch.compile"]
    assert "absent peer: flashinfer.rope (ModuleNotFoundError" in done.stdout and "BW* " in done.stdout


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"seconds": "fast"}, "row.seconds must be number, got 'fast'"),
        ({"seconds": 0.0}, "row.seconds must be above 0, got 0.0"),
        ({"low": float("nan")}, "row.low must be above 0, got nan"),
        ({"bytes": True}, "row.bytes must be number, got True"),
        ({"peers": {"torch": -1.0}}, "row.peers.torch must be above 0, got -1.0"),
        ({"timed": "by hand"}, "row.timed must be one of "),
        ({"goal_met": 1}, "row.goal_met must be boolean or null, got 1"),
        ({"environment": {"device": "x", "torch": "2", "triton": None, "date": DATE}}, "row.environment.commit is mis"),
    ],
)  # fmt: skip
def test_what_is_not_as_the_schema_says_is_found(load_script, change, sentence):
    rows = load_script("_rows")
    (found,) = rows.violations({**row(), **change})
    assert found.startswith(sentence)
    assert rows.violations({name: value for name, value in row().items() if name != "op"}) == ["row.op is missing"]


def test_pages_say_what_the_rows_say(report, capsys):
    assert report.main(["--check"]) == 0, capsys.readouterr().out


def test_a_stale_page_is_noticed_and_written(report, monkeypatch, tmp_path, capsys):
    page = tmp_path / "README.md"
    page.write_text("before\n<!-- results: summary -->\nold\n<!-- results end -->\nafter\n")
    (tmp_path / "rows.json").write_text(json.dumps([row()]))
    for name, value in (("ROOT", tmp_path), ("RESULTS", tmp_path), ("PAGES", (page,))):
        monkeypatch.setattr(report, name, value)
    assert report.main(["--check"]) == 1 and "old" in page.read_text()
    assert "README.md is stale" in capsys.readouterr().out
    assert report.main([]) == 0 and report.main(["--check"]) == 0
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert "| `rms_norm` | 8192x4096 | bfloat16 | 200.0 | 83% BW\\* | liger | 220.0 | 1.10 | 1.7e-03 |" in text
    assert "NVIDIA Test, driver 1.2, torch 2.11.0, triton 3.6.0, commit abc1234, 2026-01-02; BW\\* 3.00 TB/s" in text


def test_what_was_not_measured_is_named_and_without_a_gpu_the_table_says_so(report):
    found = report.summary([row()])
    assert "| `rotary` | 1x4096x32/8x128 | bfloat16 | no figure |  |  |  |  |  |" in found
    (told,) = (line for line in found.splitlines() if line.startswith("No figure of this GPU yet: "))
    assert "`paged_attention`" in told and "`sparse_matmul`" in told and "`rms_norm`," not in told
    assert told in report.tables([row()])
    assert report.unmeasured([row(op=name) for name in report.operators()]) == ""
    cpu = row()
    del cpu["environment"]["capability"]
    assert report.summary([cpu]) == report.NOTHING and report.NOTHING in report.tables([cpu])
    assert "No figure of this" not in report.tables([cpu])


def test_every_public_operator_is_in_a_benchmark(report, load_script):
    measured = {case.op for name in SCRIPTS for case in load_script(name).cases("cpu", True)}
    assert measured == set(report.operators())
    assert all(callable(getattr(fusedops, name)) for name in report.operators())


def test_every_row_is_in_the_long_table_with_all_peers(report):
    text = report.tables([row(), row(timed="wall time of eager calls", seconds=4e-4)])
    assert "| 200.0 | 83% BW\\* | met | 1.7e-03 | torch 1.50, liger 1.10, quack left out | Tile(a=1) |" in text
    assert "Wall time of eager calls:" in text and "| 400.0 |" in text


def test_the_newest_row_counts(report, tmp_path):
    newer = row(seconds=1e-4, date="2026-05-01T00:00:00+00:00")
    (tmp_path / "a.json").write_text(json.dumps([newer]))
    (tmp_path / "z").mkdir()
    (tmp_path / "z" / "rows.json").write_text(json.dumps([row(), row(op="rotary")]))
    rows = report.load(tmp_path)
    assert [(r["op"], r["seconds"]) for r in rows] == [("rms_norm", 1e-4), ("rotary", 2e-4)]


MACHINE = {"device": "A CPU", "threads": 1, "torch": "2.13", "transformers": "5.1", "commit": "abc", "date": DATE}


def test_tables_of_accuracy(report, tmp_path):
    row_of = {"error": None, "weights": 2**21, "seconds": 1.0, "layers": 3}
    told = {
        "model": "tiny", "tokens": 4096, "window": 512, "environment": {**MACHINE, "dtype": "bfloat16"},
        "text": {"source": "words.txt", "sha256": "0123456789abcdef"},
        "rows": [
            {"label": "float32", "perplexity": 20.0, "change": 0.0, "goal": None, "goal_met": None,
             "weight_bytes": 2**23, **row_of},
            {"label": "int8 W8A8", "perplexity": 20.7, "change": 0.035, "goal": 0.025, "goal_met": False,
             "weight_bytes": 2**21, **row_of},
            {"label": "fp8", "perplexity": None, "change": None, "goal": 0.025, "goal_met": False, **row_of,
             "weight_bytes": None, "weights": None},
        ],
    }  # fmt: skip
    (tmp_path / "a.json").write_text(json.dumps(told))
    text = report.accuracy([tmp_path / "a.json"])
    assert "tiny, 4096 tokens in windows of 512 of words.txt (SHA-256 0123456789ab…)" in text
    assert "compute in bfloat16. A CPU, 1 thread, torch 2.13, transformers 5.1, commit abc, 2026-01-02." in text
    assert "| float32 | 20.000 | +0.00% |  | 8.0 | 2.00 |" in text
    assert "| int8 W8A8 | 20.700 | +3.50% | 2.5%, missed | 2.0 | 0.50 |" in text
    assert "| fp8 |  |  | 2.5%, missed |  |  |" in text
    assert report.accuracy([]) == "Not measured yet.\n"


def test_tables_of_the_quantised_demo(report, tmp_path):
    one = {"first_token": 0.05, "between_tokens": 0.02, "tokens_per_second": 48.76}
    told = {
        "model": "tiny", **MACHINE, "threads": 2, "dtype": "bfloat16",
        "quantized": {"scheme": "fp8", "layers": 14, "weight_bytes": 2**21, "times_bfloat16": 0.504},
        "summary": {"unpatched": one, "quantized": {**one, "between_tokens": 0.01}},
        "times_as_fast_as": {"unpatched": {"between_tokens": 2.0}},
    }  # fmt: skip
    (tmp_path / "a.json").write_text(json.dumps(told))
    text = report.converted_demo([tmp_path / "a.json"], "quantized")
    assert "tiny in bfloat16, fp8: 14 layers converted, 2.0 MiB, 0.50 of bfloat16's. A CPU, 2 threads, torch" in text
    assert "| unpatched | 50.0 | 20.0 | 48.8 | 2.00 |" in text and "| quantized | 50.0 | 10.0 | 48.8 |  |" in text
    assert report.converted_demo([], "quantized") == "Not measured yet.\n"


def test_pruned_models_have_tables_of_their_own(report, tmp_path):
    row_of = {
        "error": None, "weights": 2**21, "seconds": 1.0, "layers": 3, "goal": None, "weight_bytes": 2**22,
        "recovered": None, "finetune": None, "asked": None, "goal_met": None,
    }  # fmt: skip
    tuned = {"steps": 10, "tokens": 5120, "seconds": 90.0, "losses": [2.0, *[1.0] * 8, 0.5]}
    told = {
        "model": "tiny", "tokens": 4096, "window": 512,
        "environment": {**MACHINE, "dtype": "float32", "load": 0.2, "cores": 2},
        "text": {"source": "words.txt", "sha256": "0123456789abcdef"},
        "rows": [
            {**row_of, "scheme": "float32", "label": "float32", "perplexity": 20.0, "change": 0.0},
            {**row_of, "scheme": "int8", "label": "int8 W8A8", "perplexity": 20.2, "change": 0.01},
            {**row_of, "scheme": "sparse-x", "label": "2:4", "perplexity": 50.0, "change": 1.5, "asked": "below y",
             "goal_met": True},
            {**row_of, "scheme": "sparse-z", "label": "2:4 tuned", "perplexity": 30.0, "change": 0.5,
             "recovered": 2 / 3, "asked": "at least 33%", "goal_met": False, "finetune": tuned},
        ],
    }  # fmt: skip
    (tmp_path / "a.json").write_text(json.dumps(told))
    text = report.accuracy([tmp_path / "a.json"], sparse=True)
    assert "pruned models compute in float32. A CPU" in text and "int8" not in text
    assert "| float32 | 20.000 | 1.00 |  |  | 3 | 4.0 | 1.00 |" in text
    assert "| 2:4 | 50.000 | 2.50 |  | below y: met | 3 | 4.0 | 1.00 |" in text
    assert "| 2:4 tuned | 30.000 | 1.50 | 67% | at least 33%: missed | 3 | 4.0 | 1.00 |" in text
    assert "2:4 tuned: 10 steps over 5120 tokens in 1.5 minutes; the loss fell from 2.00 to 0.94" in text
    told["environment"]["load"] = 1.5
    (tmp_path / "b.json").write_text(json.dumps(told))
    assert "1.5 minutes while other programs were busy; the" in report.accuracy([tmp_path / "b.json"], sparse=True)
    dense = report.accuracy([tmp_path / "a.json"])
    assert "2:4" not in dense and "| int8 W8A8 | 20.200 | +1.00% |" in dense
    told["rows"] = told["rows"][:2]
    (tmp_path / "a.json").write_text(json.dumps(told))
    assert report.accuracy([tmp_path / "a.json"], sparse=True) == "Not measured yet.\n"


def test_tables_of_the_sparse_demo(report, tmp_path):
    one = {"first_token": 0.05, "between_tokens": 0.02, "tokens_per_second": 48.76}
    told = {
        "model": "tiny", **MACHINE, "dtype": "bfloat16",
        "sparse": {"method": "wanda", "scheme": "int8", "layers": 14, "weight_bytes": 2**21, "times_bfloat16": 0.3},
        "summary": {"unpatched": one, "sparse": one}, "times_as_fast_as": {"unpatched": {"between_tokens": 1.0}},
    }  # fmt: skip
    (tmp_path / "a.json").write_text(json.dumps(told))
    text = report.converted_demo([tmp_path / "a.json"], "sparse")
    assert "tiny in bfloat16, 2:4 on MLPs by wanda, int8: 14 layers converted, 2.0 MiB, 0.30 of bfloat16's" in text
    assert "sparse, times as fast |" in text and report.converted_demo([tmp_path / "a.json"], "quantized")[:3] == "Not"


@pytest.mark.parametrize("page", ["no table", "<!-- results: nonsense -->\n<!-- results end -->"])
def test_a_page_without_a_known_table_is_refused(report, page):
    with pytest.raises(ValueError, match="must have tables named summary or tables"):
        report.updated(page, [])


def test_plots_are_drawn(load_script, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    plots = load_script("plots")
    (tmp_path / "gpu_gone.png").write_text("an operator that is no more")
    prefill = row(op="attention", shape="4x4096", share_of_matmul_rate=0.8, operations=3e14)
    paths = plots.draw([row(), row(op="add_rms_norm"), row(op="attention", shape="1:9"), prefill], tmp_path, "gpu")
    names = {"gpu_roofline.png", "gpu_rms_norm.png", "gpu_attention.png", "gpu_attention_memory.png"}
    assert {path.name for path in paths} == names == {path.name for path in tmp_path.iterdir()}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)
    assert plots.plt.get_fignums() == []


def test_everything_lies_inside_a_picture_and_says_device_and_date(load_script):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    plots = load_script("plots")
    peers = {f"another package's way with a long name, {index}": 3e-4 for index in range(5)}
    rows = [row(op="sparse_matmul", shape=f"{m}x64x64", peers=peers, best_peer=None) for m in (1, 16, 256)]
    ((name, sizes),) = plots.by_batch(rows).items()
    drawn = [plots.bars(rows, "sparse_matmul"), plots.latency(sizes, name), plots.crossover(rows), plots.roofline(rows)]
    for figure in drawn:
        figure.canvas.draw()
        shown = [*figure.legends, figure._suptitle, *figure.axes[0].texts]
        for box in (text.get_window_extent() for text in shown):
            assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1
        assert "NVIDIA Test, torch 2.11.0, triton 3.6.0, 2026-01-02; device time" in figure._suptitle.get_text()
        plots.plt.close(figure)


def test_latency_is_drawn_against_rows(load_script, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    plots = load_script("plots")
    products = [row(op="mm", shape=f"{size}x64x9 rows", seconds=size * 1e-6) for size in (64, 1, 16)]
    few = [row(op="few", shape=f"{size}x64") for size in (1, 2)] + [row(op="few", shape="4x65")]
    kinds = [row(op="of", shape=f"{kind} {size}x8") for kind in ("int8", "fp8") for size in (1, 2, 4)]
    assert list(plots.by_batch(kinds)) == ["of_int8_8_bf16", "of_fp8_8_bf16"]
    ((name, sizes),) = plots.by_batch(products + few).items()
    assert name == "mm_64x9_rows_bf16" and list(sizes) == [1, 16, 64] and sizes[16]["seconds"] == 16e-6
    (axes,) = plots.latency(sizes, name).axes
    drawn = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.get_lines()}
    assert drawn["fusedops"] == ([1, 16, 64], pytest.approx([1.0, 16.0, 64.0]))
    assert drawn["liger"] == ([1, 16, 64], pytest.approx([220.0] * 3)) and set(drawn) == {"fusedops", "torch", "liger"}


def test_rows_are_read_with_python_alone():
    """What the gate itself imports must work beside a torch that is broken."""
    code = "import sys; import _rows; print(sorted({'torch', 'fusedops', 'matplotlib'} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT / "benchmarks", capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"


def test_the_crossover_of_sparse_and_dense_is_drawn(load_script, tmp_path):
    """Beside the best dense way, whatever other sparse ones did; with one number of rows there is no line."""
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    plots = load_script("plots")
    peers = {"F.linear": 4e-4, "matmul, transposed": 3e-4, "_cslt_sparse_mm": 1e-4}
    rows = [row(op="sparse_matmul", shape=f"{m}x4096x4096", peers=peers, seconds=2e-4) for m in (1, 64, 4096)]
    figure = plots.crossover(rows)
    drawn, level = figure.axes[0].get_lines()
    assert list(drawn.get_xdata()) == [1, 64, 4096] and list(drawn.get_ydata()) == pytest.approx([1.5] * 3)
    assert set(level.get_ydata()) == {1}
    assert plots.crossover(rows[:1]) is None and plots.crossover([row()]) is None
    assert "gpu_sparse_matmul_crossover.png" in {path.name for path in plots.draw(rows, tmp_path, "gpu")}


def test_sparse_goals_are_ratios_to_the_dense_ways(load_script):
    """Goal 9: 1.5 up to 64 rows, 1.35 from 2048 on, and another sparse product does not count as dense."""
    bench = load_script("bench_sparse_matmul")
    few, many, between = (bench.case(rows, (64, 128), bench.OUT, "cpu") for rows in (64, 2048, 128))
    assert few.goal == many.goal == between.goal == (None, None)  # a CPU has none
    assert {"F.linear", "matmul, transposed"} < set(few.against) and not set(few.against) & set(bench.SPARSE)
    assert [bench.goal_of("cuda", rows)[0] for rows in (1, 64, 128, 2048, 8192)] == [1.5, 1.5, None, 1.35, 1.35]
