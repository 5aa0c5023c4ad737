"""`fusedops demo --sparsify` on a tiny random model, alone and with --quantize."""

import json

import pytest

import fusedops
from fusedops import cli
from fusedops.cli import corpus
from tests.cli.test_cli import run

OPTIONS = ("--device", "cpu", "--prompt", "word3 word4", "--max-new-tokens", 6, "--rounds", 1)
MLPS, ALL = 2 * 3 * 64 * 96, 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 96)
STORED = 2 * (2 * 96 * 64 + 64 * 128)  # of the MLPs, rows of 96 as if of 128
METADATA = 2 * (2 * 96 * 16 + 64 * 16)


@pytest.fixture
def demo(capsys, tiny_model_directory, tmp_path, monkeypatch):
    """Run the demo; status, stdout, stderr and what it wrote. The calibration is of words that the model knows."""
    monkeypatch.setattr(corpus, "of_python", lambda: " ".join(f"word{7 * i % 61}" for i in range(400)))

    def call(*arguments):
        report = tmp_path / "demo.json"
        report.unlink(missing_ok=True)
        given = ("demo", "--model", tiny_model_directory, *OPTIONS, *arguments, "--json", report)
        status, out, err = run(capsys, *given)
        return status, out, err, json.loads(report.read_text()) if report.exists() else None

    return call


def test_sparse_beside_the_others(demo):
    status, out, err, told = demo("--sparsify")
    assert status == 0, out + err
    assert list(told["summary"]) == ["float32", "unpatched", "patched", "sparse"] and told["dtype"] == "bfloat16"
    held = STORED // 2 * 2 + METADATA
    assert told["sparse"]["method"] == "wanda" and told["sparse"]["scheme"] is None and told["sparse"]["layers"] == 6
    assert told["sparse"]["weight_bytes"] == held
    assert told["sparse"]["times_bfloat16"] == pytest.approx(held / (2 * MLPS))
    wanted, found = told["answers"]["unpatched"], told["answers"]["sparse"]
    equal = next((i for i, pair in enumerate(zip(wanted, found)) if pair[0] != pair[1]), len(found))
    assert told["sparse"]["equal_leading_tokens"] == equal
    assert f"Tokens of the sparse model: the first {equal} of {len(found)} are the unpatched" in out
    assert "Pruning the MLPs to 2:4 by wanda" in out and "judged by its perplexity" in out
    assert any(op == "sparse_matmul" for op, _, _ in told["calls"])
    assert told["tokens"]["equal"]  # of the patched model, which is not pruned


def test_sparse_and_8_bits(demo):
    status, out, err, told = demo("--sparsify", "magnitude", "--quantize", "int8", "--no-compare")
    assert status == 0, out + err
    assert told["sparse"]["method"] == "magnitude" and told["sparse"]["scheme"] == "int8"
    assert told["sparse"]["layers"] == 14
    channels = 2 * (64 + 32 + 32 + 64 + 96 + 96 + 64)
    assert told["sparse"]["weight_bytes"] == ALL - MLPS + STORED // 2 + METADATA + 4 * channels
    ran = {op for op, _, _ in told["calls"]}
    assert {"sparse_matmul", "int8_matmul"} <= ran and "summary" not in told


def test_wanda_is_calibrated_and_magnitude_is_not(demo, monkeypatch):
    given, right = [], fusedops.sparsify_
    monkeypatch.setattr(fusedops, "sparsify_", lambda *a, **k: given.append(k) or right(*a, **k))
    for method in ("wanda", "magnitude"):
        assert demo("--sparsify", method, "--no-compare")[0] == 0
    assert [one["method"] for one in given] == ["wanda", "magnitude"] and given[1]["calibration"] is None
    assert sum(batch.numel() for batch in given[0]["calibration"]) == 400


def test_what_does_not_go_together_is_one_line(demo, capsys, tiny_model_directory, monkeypatch):
    status, _, err, _ = demo("--sparsify", "--quantize", "int4-weight-only")
    assert status == 2 and "--sparsify goes with --quantize int8 or fp8, got int4-weight-only" in err

    def refuses(*args, **kwargs):
        raise ValueError("sparsify_: there is nothing to prune\nat all")

    monkeypatch.setattr(fusedops, "sparsify_", refuses)
    status, _, err, _ = demo("--sparsify")
    assert status == 2 and "this model cannot be converted: sparsify_: there is nothing to prune\n" in err
    with pytest.raises(SystemExit):
        cli.main(["demo", "--sparsify", "random"])
    assert "invalid choice: 'random'" in capsys.readouterr().err
