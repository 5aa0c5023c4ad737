"""`fusedops warmup`: arguments, what it prints, and its exit status."""

import json

import pytest

import fusedops
from fusedops import cli
from fusedops.warm import WarmUp


def test_arguments_reach_the_function(monkeypatch, capsys, tmp_path):
    given = {}

    def warmup(model, **options):
        for done in range(1, 21):
            options["progress"](done, 20, f"kernel{done}")
        given.update(options, model=model)
        return WarmUp("sm_80", 20, 3, {}, {"attention": "attention: too wide"}, 1.5)

    monkeypatch.setattr(fusedops, "warmup", warmup)
    out = tmp_path / "done.json"
    arguments = (
        "warmup --model DIR --dtype float16 --max-batch 3 --max-seqlen 77 --target sm_80 --quantize int8 --jobs 5 "
            "--sparsity 2:4 --page-size 64 --gradients"
    )
    assert cli.main([*arguments.split(), "--json", str(out)]) == 0
    given.pop("progress")
    assert str(given.pop("dtype")) == "torch.float16"
    assert given == {
        "model": "DIR", "max_batch": 3, "max_seqlen": 77, "target": "sm_80", "scheme": "int8", "jobs": 5,
            "sparsity": "2:4", "page_size": 64, "gradients": True,
    }  # fmt: skip
    printed = capsys.readouterr().out.splitlines()
    assert printed[:2] == ["2 of 20 kernels, kernel2", "4 of 20 kernels, kernel4"]
    assert printed[9:] == [
        "20 of 20 kernels, kernel20",
        "sm_80: 20 kernels, 3 compiled, 17 found, 1.5 s",
        "  not ours: attention: too wide",
    ]
    assert json.loads(out.read_text())["compiled"] == 3


def test_a_kernel_that_cannot_be_compiled_is_a_failure(monkeypatch, capsys):
    done = WarmUp("sm_80", 2, 1, {"_kernel": "PTXASError: too much"}, {}, 1.0)
    monkeypatch.setattr(fusedops, "warmup", lambda model, **options: done)
    assert cli.main(["warmup", "--model", "DIR"]) == 1
    assert "0 found" in (printed := capsys.readouterr().out) and "_kernel cannot be compiled: PTXASError" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "missing"], "model must be a config.json"),
        (["--model", "x", "--max-batch", "0"], "must be a positive integer, got '0'"),
        (["--model", "x", "--json", "/nowhere/at/all.json"], "cannot write /nowhere/at/all.json"),
        ([], "--model"),
    ],
)
def test_bad_input_is_one_line(arguments, message, capsys):
    try:
        status = cli.main(["warmup", *arguments])
    except SystemExit as ended:
        status = ended.code
    error = capsys.readouterr().err
    assert status == cli.BAD_INPUT and message in error and len(error.splitlines()) == 1
