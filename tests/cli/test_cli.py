"""The command line: help, bad input, doctor, explain, bench, and the demo on a tiny random model."""

import json
import os
import subprocess
import sys

import pytest
import torch

import fusedops
from fusedops import cli
from fusedops._core import env
from fusedops.cli import bench, console, doctor
from tests.cli.common import run


@pytest.fixture(autouse=True)
def fresh_environment(monkeypatch, tmp_path):
    """No variable of ours is set, the cache is a new folder, and what was read before is forgotten."""
    for name in [name for name in os.environ if name.startswith("FUSEDOPS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("FUSEDOPS_CACHE_DIR", str(tmp_path / "cache"))
    env.refresh()
    yield
    env.refresh()


def set_variable(monkeypatch, name, value):
    monkeypatch.setenv(name, str(value))
    env.refresh()


def test_help_lists_every_command(capsys):
    status, out, _ = run(capsys, "--help")
    assert status == 0
    assert all(name in out for name in cli.COMMANDS)


def test_module_runs_without_heavy_imports():
    code = "import sys; from fusedops.cli import build_parser; build_parser(); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert {"triton", "transformers", "rich"}.isdisjoint(done.stdout.split())
    done = subprocess.run([sys.executable, "-m", "fusedops", "explain"], capture_output=True, text=True)
    assert done.returncode == 2


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("unknown",),
        ("demo", "--rounds", "0"),
        ("demo", "--max-new-tokens", "many"),
        ("demo", "--dtype", "int8"),
        ("demo", "--quantize", "int3"),
        ("demo", "--model", "/no/such/directory"),
        ("demo", "--model", "a/b/c"),
        ("demo", "--json", "/no/such/directory/file.json"),
        ("explain", "rms_norm"),
        ("explain", "rms_norm", "--shape", "8by8"),
        ("explain", "no_such_operator", "--shape", "8x8"),
        ("explain", "rms_norm", "--shape", "8x8", "--target", "sm_10"),
        ("explain", "rms_norm", "--shape", "2x1000000"),
        ("explain", "rotary", "--shape", "8x8"),
        ("bench", "no_such_operator"),
    ],
    ids=" ".join,
)
def test_bad_input_is_one_line_and_status_2(capsys, arguments):
    status, out, err = run(capsys, *arguments)
    assert status == 2
    assert err.startswith("fusedops") and err.count("\n") == 1, err
    assert "Traceback" not in out + err


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")
def test_cuda_is_refused_where_there_is_none(capsys):
    for arguments in (("demo", "--device", "cuda"), ("explain", "rms_norm", "--shape", "8x8", "--device", "cuda")):
        status, _, err = run(capsys, *arguments)
        assert status == 2 and "--device cuda" in err


def test_a_directory_that_is_no_model_is_refused(capsys, tmp_path):
    status, _, err = run(capsys, "demo", "--model", tmp_path)
    assert status == 2 and "config.json" in err
    (tmp_path / "config.json").write_text("{}")
    status, _, err = run(capsys, "demo", "--model", tmp_path)
    assert status == 2 and "cannot load a language model" in err and err.count("\n") == 1


@pytest.mark.parametrize("op", fusedops.OPERATORS)
def test_explain_every_operator(capsys, op):
    has_heads = op == "rotary" or "attention" in op or "kv_cache" in op
    arguments = ("explain", op, "--shape", "2x16x8x64" if has_heads else "512x1024")
    fastest = "cuda" if op == "sparse_matmul" else "triton"
    status, out, _ = run(capsys, *arguments, "--target", "sm_90a", "--json")
    told = json.loads(out)
    assert status == 0 and told["backend"] == fastest and told["bytes"] > 0 and told["config"]
    status, out, _ = run(capsys, *arguments, "--device", "cpu")
    assert status == 0 and op in out


def test_doctor_finds_nothing_broken(capsys):
    status, out, _ = run(capsys, "doctor")
    assert status == 0, out
    assert out.rstrip().endswith("Nothing is broken.")
    assert all(op in out for op in fusedops.OPERATORS)


def broken(capsys):
    """Names of what the doctor finds broken; its exit status must say the same."""
    status, out, _ = run(capsys, "doctor", "--json")
    names = json.loads(out)["broken"]
    assert status == (1 if names else 0)
    return names


def test_doctor_finds_a_wrong_variable(capsys, monkeypatch):
    set_variable(monkeypatch, "FUSEDOPS_VALIDATE", "7")
    assert "FUSEDOPS_VALIDATE" in broken(capsys)


def test_doctor_finds_a_misspelt_variable(capsys, monkeypatch):
    set_variable(monkeypatch, "FUSEDOPS_FALLBAK", "raise")
    assert broken(capsys) == ["FUSEDOPS_FALLBAK"]


def test_doctor_finds_a_backend_that_cannot_run(capsys, monkeypatch):
    set_variable(monkeypatch, "FUSEDOPS_BACKEND", "cuda")
    assert set(broken(capsys)) == set(fusedops.OPERATORS)


def test_doctor_judges_the_cache_directory(capsys, monkeypatch, tmp_path):
    a_file = tmp_path / "file"
    a_file.touch()
    for unusable in (a_file, a_file / "below"):
        set_variable(monkeypatch, "FUSEDOPS_CACHE_DIR", unusable)
        assert broken(capsys) == ["cache"]
    folder = tmp_path / "cache"
    folder.mkdir()
    set_variable(monkeypatch, "FUSEDOPS_CACHE_DIR", folder)
    assert broken(capsys) == []
    folder.chmod(0o777)
    assert broken(capsys) == ["cache"]


def test_doctor_finds_an_operator_that_is_wrong(capsys, monkeypatch):
    right = fusedops.rms_norm

    def wrong_unless_reference(*args, **kwargs):
        return right(*args, **kwargs) * (1 if env.backend() == "reference" else 1.01)

    monkeypatch.setattr(fusedops, "rms_norm", wrong_unless_reference)
    assert broken(capsys) == ["rms_norm"]


def test_doctor_finds_a_package_that_is_too_old(monkeypatch):
    import torch

    monkeypatch.setattr(torch, "__version__", "2.9.1")
    assert doctor._version("torch").status == doctor.BROKEN


def test_bench_needs_a_checkout(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "FOLDER", tmp_path)
    status, _, err = run(capsys, "bench", "all")
    assert status == 2 and "source checkout" in err


def test_bench_gathers_rows_and_reports_failures(capsys, monkeypatch, tmp_path):
    writes = "import json, sys; json.dump([{'arguments': sys.argv[3:]}], open(sys.argv[2], 'w'))"
    (tmp_path / "bench_one.py").write_text(writes)
    (tmp_path / "bench_two.py").write_text("raise SystemExit(3)")
    monkeypatch.setattr(bench, "FOLDER", tmp_path)
    rows = tmp_path / "rows.json"
    status, _, err = run(capsys, "bench", "all", "--device", "cpu", "--quick", "--json", rows)
    assert status == 1 and "failed: two" in err
    assert json.loads(rows.read_text()) == [{"arguments": ["--device", "cpu", "--quick"]}]
    assert run(capsys, "bench", "one")[0] == 0


def test_bench_draws_its_rows(capsys, monkeypatch, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    writes = "import sys; open(sys.argv[sys.argv.index('--json') + 1], 'w').write('[7]')"
    (tmp_path / "bench_one.py").write_text(writes)
    draws = "import sys; rows, folder, prefix = sys.argv[1:]; open(folder, 'w').write(open(rows).read() + prefix)"
    (tmp_path / "plots.py").write_text(draws)
    monkeypatch.setattr(bench, "FOLDER", tmp_path)
    assert run(capsys, "bench", "one", "--plot", tmp_path / "drawn")[0] == 0
    assert (tmp_path / "drawn").read_text() == "[7]one"
    status, _, err = run(capsys, "bench", "one", "--plot", tmp_path / "no" / "folder")
    assert status == 1 and "failed: --plot" in err
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: None)
    status, _, err = run(capsys, "bench", "one", "--plot", tmp_path / "drawn")
    assert status != 0 and "needs matplotlib" in err


def bench_row(op, seconds, device="cpu", **about):
    return {"op": op, "shape": "2x3", "dtype": "float32", "timed": "wall time of eager calls", "seconds": seconds,
            "low": seconds * 0.99, "high": seconds * 1.01, "environment": {"device": device, **about}}  # fmt: skip


def test_bench_compare(capsys, tmp_path):
    before, after = tmp_path / "before.json", tmp_path / "after.json"
    old = {"slow": 1e-5, "fast": 1e-5, "same": 1e-5, "noisy": 1e-5, "gone": 1e-5}
    new = {"slow": 2e-5, "fast": 5e-6, "same": 1e-5, "noisy": 1.025e-5, "new": 1e-5}
    before.write_text(json.dumps([bench_row(op, seconds) for op, seconds in old.items()]))
    after.write_text(json.dumps([bench_row(op, seconds) for op, seconds in new.items()]))
    status, out, _ = run(capsys, "bench", "compare", before, after)
    assert status == 1
    moved = [line.split() for line in out.splitlines() if "2x3" in line and "wall" in line]
    assert [(words[0], words[-1]) for words in moved] == [("slow", "+100.0%"), ("fast", "-50.0%")]
    assert "2 rows unchanged, 1 faster, 1 slower" in out
    assert "1 rows only before: gone 2x3 float32" in out and "1 rows only after: new 2x3 float32" in out
    status, out, _ = run(capsys, "bench", "compare", before, before)
    assert status == 0 and "5 rows unchanged, 0 faster, 0 slower" in out
    after.write_text(json.dumps([bench_row("slow", 1e-5, torch="9.9", threads=3)]))
    status, out, _ = run(capsys, "bench", "compare", before, after)
    assert status == 0 and "Not alike: torch 9.9 and None" in out and "Not alike: threads 3 and None" in out
    assert "Not alike: driver" not in out


def test_bench_compare_judges_noise_by_the_rows_own_rounds(capsys, tmp_path):
    """A tenth slower is within the noise of rounds that vary by a fifth, and beyond that of steady ones."""
    before, after = tmp_path / "before.json", tmp_path / "after.json"
    varied, steady = bench_row("varied", 1e-5), bench_row("steady", 1e-5)
    varied["high"] = 1.2e-5
    before.write_text(json.dumps([varied, steady]))
    after.write_text(json.dumps([bench_row("varied", 1.1e-5), bench_row("steady", 1.1e-5)]))
    status, out, _ = run(capsys, "bench", "compare", before, after)
    assert status == 1 and "1 rows unchanged, 0 faster, 1 slower" in out and "varied" not in out
    status, out, _ = run(capsys, "bench", "compare", after, before)
    assert status == 0 and "1 rows unchanged, 1 faster, 0 slower" in out and "-9.1%" in out


def test_bench_compare_bad_input(capsys, tmp_path):
    rows = tmp_path / "rows.json"
    rows.write_text('{"a": 1}')
    here, other, unlike, partial = (tmp_path / f"{name}.json" for name in ("here", "other", "unlike", "partial"))
    here.write_text(json.dumps([bench_row("one", 1e-5, "a")]))
    other.write_text(json.dumps([bench_row("one", 1e-5, "b")]))
    unlike.write_text(json.dumps([bench_row("two", 1e-5, "a")]))
    partial.write_text(json.dumps([{name: value for name, value in bench_row("one", 1).items() if name != "high"}]))
    for arguments, message in (
        (("compare",), "compare must have two files, got 0"),
        (("compare", tmp_path / "none.json", rows), "cannot read"),
        (("compare", rows, rows), "must hold rows that bench --json wrote"),
        (("compare", here, other), "must have rows of one device, got a and b"),
        (("compare", here, unlike), "must have files with a row in common"),
        (("compare", here, partial), "must hold rows that bench --json wrote, got a row without high"),
        (("rms_norm", rows), "rms_norm must stand alone"),
    ):
        status, _, err = run(capsys, "bench", *arguments)
        assert status == 2 and message in err


def test_demo_on_a_tiny_model(capsys, tiny_model_directory, tmp_path):
    report = tmp_path / "demo.json"
    options = ("--device", "cpu", "--prompt", "word3 word5", "--max-new-tokens", 6, "--rounds", 2, "--json", report)
    status, out, err = run(capsys, "demo", "--model", tiny_model_directory, *options)
    assert status == 0, err
    told = json.loads(report.read_text())
    assert told["tokens"]["equal"] and "Greedy tokens: equal" in out
    assert told["replaced"] and sum(told["replaced"].values()) >= 7
    assert all(len(run) == 6 for runs in told["seconds_per_token"].values() for run in runs)
    assert len(told["seconds_per_token"]["patched"]) == len(told["seconds_per_token"]["unpatched"]) == 2
    assert told["calls"] and told["summary"]["patched"]["tokens_per_second"] > 0
    assert "times as fast" in out


def test_demo_without_comparison(capsys, tiny_model_directory):
    options = ("--device", "cpu", "--prompt", "word3", "--max-new-tokens", 1, "--no-compare")
    status, out, _ = run(capsys, "demo", "--model", tiny_model_directory, *options)
    assert status == 0 and "times as fast" not in out and "What ran" in out


@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_demo_of_a_quantised_model(capsys, tiny_model_directory, tmp_path, dtype):
    """It answers, and stands beside the others, which are told as without it; auto adds the float32 model."""
    report = tmp_path / "demo.json"
    options = ("--device", "cpu", "--dtype", dtype, "--prompt", "word3 word5", "--max-new-tokens", 5, "--rounds", 2)
    line = ("demo", "--model", tiny_model_directory, *options, "--quantize", "int8-weight-only", "--json", report)
    status, out, err = run(capsys, *line)
    assert status == 0, out + err
    told = json.loads(report.read_text())
    others = ["unpatched", "patched"] if dtype == "float32" else ["float32", "unpatched", "patched"]
    assert list(told["summary"]) == list(told["seconds_per_token"]) == [*others, "quantized"]
    assert told["dtype"] == ("float32" if dtype == "float32" else "bfloat16")
    assert list(told["times_as_fast_as"]) == others
    seconds = told["seconds_per_token"]
    for ratios, name in ((told["ratio"], "patched"), (told["times_as_fast_as"]["unpatched"], "quantized")):
        of_rounds = [before[0] / after[0] for before, after in zip(seconds["unpatched"], seconds[name])]
        assert ratios["first_token"] == pytest.approx(sum(of_rounds) / 2)
    count, channels = 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 96), 2 * (64 + 32 + 32 + 64 + 96 + 96 + 64)
    count, channels = count + 64 * 64, channels + 64  # the output head
    held = count + channels * (4 if dtype == "float32" else 2)
    assert told["quantized"]["scheme"] == "int8-weight-only" and told["quantized"]["layers"] == 15
    assert told["quantized"]["weight_bytes"] == held
    assert told["quantized"]["times_bfloat16"] == pytest.approx(held / (2 * count))
    wanted, found = told["answers"]["unpatched"], told["answers"]["quantized"]
    equal = next((i for i, pair in enumerate(zip(wanted, found)) if pair[0] != pair[1]), len(found))
    assert told["quantized"]["equal_leading_tokens"] == equal
    assert f"the first {equal} of {len(found)} are the unpatched" in out and "judged by its perplexity" in out
    assert all(f"times as fast as {name}" in out for name in others)
    assert any(op == "weight_only_matmul" for op, _, _ in told["calls"])


@pytest.mark.parametrize(
    ("scheme", "option", "expected"),
    [("int8-weight-only", None, True), ("int8-weight-only", "--no-output-head", False), ("fp8", None, False),
     ("fp8", "--output-head", True)],
)  # fmt: skip
def test_demo_takes_the_output_head_where_it_is_told_to(capsys, tiny_model_directory, scheme, option, expected):
    """By itself with int8 weights alone; the report names it either way."""
    options = ("--device", "cpu", "--prompt", "word3", "--max-new-tokens", 1, "--no-compare", "--quantize", scheme)
    line = ("demo", "--model", tiny_model_directory, *options, *([option] if option else []))
    status, out, _ = run(capsys, *line)
    head = "1 x lm_head" if expected else "1 x Linear  - named in skip ('lm_head')"
    assert status == 0 and head in out


def test_demo_of_a_quantised_model_alone(capsys, tiny_model_directory, monkeypatch):
    options = ("--device", "cpu", "--prompt", "word3", "--max-new-tokens", 1, "--no-compare", "--quantize", "fp8")
    status, out, _ = run(capsys, "demo", "--model", tiny_model_directory, *options)
    assert status == 0 and "times as fast" not in out and "fp8_matmul" in out

    def refuses(*args, **kwargs):
        raise ValueError("quantize_: there is nothing to replace")

    monkeypatch.setattr(fusedops, "quantize_", refuses)
    status, _, err = run(capsys, "demo", "--model", tiny_model_directory, *options)
    assert status == 2 and "this model cannot be converted: quantize_: there is nothing to replace" in err
    status, _, err = run(capsys, "demo", "--model", tiny_model_directory, "--no-output-head")
    assert status == 2 and "--no-output-head go with --quantize" in err


def test_table_is_aligned():
    assert console.format_table(("", "a"), [("x", 1), ("long", 100)]) == ["         a", "x        1", "long   100"]
