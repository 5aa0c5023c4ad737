"""`fusedops tune` and `fusedops cache`, on kernels in the interpreter."""

import json
import os
from dataclasses import replace

import pytest
import torch

from fusedops import tuning
from fusedops._core import env
from fusedops._core.device import INTERPRETER
from fusedops._core.register import operators
from fusedops._core.tuning import store
from fusedops._core.tuning.entry import Entry, checksum
from fusedops.cli import model_calls
from fusedops.tuning import upkeep
from tests.cli.common import run
from tests.core.tuning_problems import Clock

CONFIG = {
    "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
}  # fmt: skip
ALSO = (torch.float16, torch.float16, False, "once")


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    for name in [name for name in os.environ if name.startswith("FUSEDOPS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("FUSEDOPS_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("FUSEDOPS_BACKEND", "triton")
    store.forget_memory()
    env.refresh()
    torch.use_deterministic_algorithms(False)
    monkeypatch.setattr(norms(), "space", {"block_m": (2, 8), "num_warps": (1, 8)})
    monkeypatch.setattr(tuning.Options, "timer", Clock(lambda name: 0.5 if name == "block_m=2 num_warps=1" else 1.0))
    monkeypatch.setattr(tuning.Options.__init__, "__defaults__", (60.0, False, True, None, tuning.Options.timer))
    yield tmp_path / "cache"
    store.forget_memory()
    env.refresh()


def norms():
    return operators()["rms_norm"].module("triton").FORWARD


def entry(n=256, limits=INTERPRETER, **changes):
    values = {"config": {"block_m": 2, "num_warps": 1}, "date": "2026-01-01", **changes}
    return Entry(norms().key(limits, (n,), ALSO), **values)


def put(*entries):
    for one in entries:
        assert store.current_store().put(one)
    store.forget_memory()


def stored():
    return {one.key["sizes"]["n"]: one for one in store.current_store().user.entries()}


def test_tune_one_operator(capsys):
    arguments = ("tune", "rms_norm", "--shape", "4x256", "--dtype", "float16", "--device", "cpu")
    status, out, _ = run(capsys, *arguments)
    assert status == 0 and "rms_norm: block_m=2 num_warps=1 (measured, 500000.00 us, the default 1000000.00" in out
    status, out, _ = run(capsys, *arguments, "--json")
    (report,) = json.loads(out)
    assert status == 0 and report["tuned"][0]["state"] == "known" and report["call"] == "4x256"
    assert run(capsys, "explain", "rms_norm", "--shape", "4x256", "--dtype", "float16", "--device", "cpu")[1].count(
        "(memory)"
    )
    status, out, _ = run(capsys, "cache", "show")
    assert status == 0 and "block_m=2 num_warps=1" in out and "Triton interpreter" in out and "1 tuned" in out
    (shown,) = json.loads(run(capsys, "cache", "show", "--json", "--op", "rms_norm")[1])
    assert shown["layer"] == "user" and shown["config"] == {"block_m": 2, "num_warps": 1}
    assert json.loads(run(capsys, "cache", "show", "--json", "--op", "attention")[1]) == []


def test_tune_where_nothing_can_be_measured(capsys):
    with env.override("FUSEDOPS_BACKEND", "torch"):
        status, out, _ = run(capsys, "tune", "rms_norm", "--shape", "4x256", "--device", "cpu")
    assert status == 1 and "torch has nothing to configure" in out


def few_configurations(monkeypatch):
    tiles = [operators()[name].module("triton").TILE for name in ("attention", "paged_attention", "rotary")]
    tiles += [operators()[name].module("triton").TILE for name in ("weight_only_matmul", "sparse_matmul")]
    attention, gates = (operators()[name].module("triton") for name in ("attention", "silu_mul"))
    tiles += [gates.FORWARD, gates.BACKWARD, attention.backward_launch.DKDV, attention.backward_launch.DQ]
    for tile in tiles:
        monkeypatch.setattr(tile, "space", {"num_warps": (4,)})


def test_tune_the_gradients_of_a_model(capsys, monkeypatch, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    few_configurations(monkeypatch)
    arguments = ("tune", "--model", tmp_path, "--device", "cpu", "--dtype", "float16", "--prompt", "20", "--backward")
    status, out, _ = run(capsys, *arguments, "--json")
    found = {(report["op"], one["kernel"]) for report in json.loads(out) for one in report["tuned"]}
    assert status == 0 and found == {
        ("rms_norm_backward", "rms_norm_backward"), ("rotary_backward", "rotary"),
        ("attention_backward", "attention_dkdv"), ("attention_backward", "attention_dq"),
        ("silu_mul_backward", "gated_activation_backward"),
    }  # fmt: skip


def test_tune_a_sparse_model(capsys, monkeypatch, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    few_configurations(monkeypatch)
    arguments = ("tune", "--model", tmp_path, "--device", "cpu", "--dtype", "float16", "--scheme", "2:4", "--json")
    status, out, _ = run(capsys, *arguments, "--batches", "1", "--prompt", "8")
    calls = {report["call"] for report in json.loads(out) if report["op"] == "sparse_matmul"}
    assert status == 0 and "1 x 96 x 64" in calls and "8 x 64 x 96" in calls


def test_tune_a_model(capsys, monkeypatch, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    few_configurations(monkeypatch)
    arguments = ("tune", "--model", tmp_path, "--device", "cpu", "--dtype", "float16", "--batches", "1,2", "--prompt",
                 "20", "--scheme", "int4-weight-only", "--json")  # fmt: skip
    status, out, _ = run(capsys, *arguments)
    reports = json.loads(out)
    found = {(report["op"], one["kernel"]) for report in reports for one in report["tuned"]}
    assert status == 0 and found == {
        ("rms_norm", "rms_norm"), ("add_rms_norm", "rms_norm"), ("attention", "attention"),
        ("paged_attention", "paged_attention"), ("weight_only_matmul", "weight_only_matmul"), ("rotary", "rotary"),
        ("silu_mul", "gated_activation"),
    }  # fmt: skip
    assert {one["state"] for report in reports for one in report["tuned"]} <= {"measured", "known"}
    status, out, _ = run(capsys, *arguments)
    assert {one["state"] for report in json.loads(out) for one in report["tuned"]} == {"known"}


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "must be a config.json"), ("[]", "must hold a table"), ("{}", "num_attention_heads must be a positive"),
     ("[" * 100000, "must be a config.json"), (json.dumps({**CONFIG, "head_dim": "8"}), "head_dim must be a positive"),
     (json.dumps({**CONFIG, "hidden_size": 0}), "hidden_size must be a positive number, got 0")],
)  # fmt: skip
def test_a_model_that_cannot_be_read(capsys, tmp_path, text, message):
    (tmp_path / "config.json").write_text(text)
    status, _, err = run(capsys, "tune", "--model", tmp_path / "config.json", "--device", "cpu")
    assert status == 2 and message in err and "Traceback" not in err


def test_the_shapes_of_a_nested_config(tmp_path):
    small = {name: CONFIG[name] for name in ("hidden_size", "intermediate_size", "num_attention_heads")}
    (tmp_path / "config.json").write_text(json.dumps({"text_config": small}))
    shapes = model_calls.read_shapes(tmp_path)
    assert (shapes.kv_heads, shapes.head_dim) == (4, 16) and shapes.linears == ((64, 64), (96, 64), (64, 96))


@pytest.mark.parametrize(
    "arguments",
    [("tune",), ("tune", "rms_norm"), ("tune", "rms_norm", "--shape", "4x0x"), ("tune", "no_such", "--shape", "4x4"),
     ("tune", "rms_norm", "--shape", "4x4", "--model", "x"), ("tune", "--model", "/nowhere"),
     ("tune", "rms_norm", "--shape", "4x4", "--seconds", "-1"), ("tune", "--model", "x", "--batches", "1,,2"),
     ("cache",), ("cache", "no_such"), ("cache", "import", "/nowhere"), ("cache", "merge"),
     ("cache", "export", "/nowhere/at/all"), ("cache", "prune", "--days", "x")],
)  # fmt: skip
def test_bad_input_is_one_line(capsys, arguments):
    status, _, err = run(capsys, *arguments)
    assert status == 2 and err.strip() and "Traceback" not in err


def test_export_and_import(capsys, tmp_path, monkeypatch):
    put(entry(256), entry(512))
    status, out, _ = run(capsys, "cache", "export", tmp_path / "all.json")
    assert status == 0 and "2 entries" in out
    before = stored()
    assert run(capsys, "cache", "clear")[1].startswith("2 files")
    assert stored() == {}
    for number in (2, 0):
        status, out, _ = run(capsys, "cache", "import", tmp_path / "all.json")
        assert status == 0 and f"{number} of 2 entries were new" in out
    assert stored() == before


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "no JSON"), (b"[]", "no file of tuned"), (b'{"schema": 7, "entries": []}', "schema 7"),
     (b"[" * 100_000, "no JSON"), (b'{"schema": 1, "entries": {}}', "no file of tuned"), (b"\xff\xfe", "no JSON")],
)  # fmt: skip
def test_import_refuses_what_is_no_export(capsys, tmp_path, content, message):
    (tmp_path / "bad.json").write_bytes(content)
    status, _, err = run(capsys, "cache", "import", tmp_path / "bad.json")
    assert status == 2 and message in err


def signed(one, **changes):
    data = {**one.as_dict(), **changes}
    return {**data, "checksum": checksum(data)}


def test_import_takes_the_good_and_names_the_bad(capsys, tmp_path):
    good = entry(256)
    other = {**good.key, "source": "0" * 32}
    bad = {
        "wrong checksum": {**signed(good), "host": "x"},
        "not legal": signed(good, config={"block_m": 3, "num_warps": 1}),
        "not legal there": signed(entry(4096), config={"block_m": 8, "num_warps": 1}),
        "other code": signed(good, key=other),
        "no such kernel": signed(good, key={**good.key, "op": "no_such"}),
        "means nothing": signed(good, key={**good.key, "environment": {}}),
        "other fields": "text",
    }
    content = {"schema": 1, "entries": [signed(good), *bad.values()]}
    (tmp_path / "some.json").write_text(json.dumps(content))
    status, out, _ = run(capsys, "cache", "import", tmp_path / "some.json")
    assert status == 1 and "1 of 1 entries were new" in out and out.count("refused: ") == len(bad)
    for number, reason in enumerate(bad, 1):
        assert any(f"entry {number} " in line and reason.removesuffix(" there") in line for line in out.splitlines())
    assert stored() == {256: good}


def test_merge_is_commutative_and_idempotent(capsys, tmp_path, monkeypatch):
    old, new = entry(256, date="2026-01-01"), entry(256, date="2026-02-01", config={"block_m": 8, "num_warps": 8})
    unfinished = entry(256, date="2026-03-01", complete=False)
    a, b, c = [old, entry(512)], [new], [unfinished, entry(1024)]
    whole = store.merged(a, b, c)
    assert {one.key["sizes"]["n"]: one.date for one in whole} == {256: "2026-02-01", 512: "2026-01-01",
                                                                  1024: "2026-01-01"}  # fmt: skip
    for order in ((a, c, b), (b, a, c), (c, b, a), (a, a, b, c, c), (whole, a), (a, whole)):
        assert store.merged(*order) == whole
    twins = [entry(256, host="a"), entry(256, host="b")]
    assert store.merged(twins) == store.merged(twins[::-1])
    found = []
    for order in ((a, b, c), (c, a, b)):
        sources = []
        for number, entries in enumerate(order):
            sources.append(tmp_path / f"{len(found)} {number}")
            for one in entries:
                assert store.Layer("user", sources[-1], ("tuning",), True).put(one)
        for _ in range(2):
            status, out, _ = run(capsys, "cache", "merge", *sources)
            assert status == 0
        assert "0 of 3 entries" in out
        found.append(stored())
        run(capsys, "cache", "clear")
    assert found[0] == found[1] == {one.key["sizes"]["n"]: one for one in whole}


def test_verify(capsys, cache):
    put(entry(256))
    assert run(capsys, "cache", "verify")[:2] == (0, "Every entry can be used.\n")
    stale = entry(512)
    put(replace(stale, key={**stale.key, "source": "0" * 32}))
    status, out, _ = run(capsys, "cache", "verify")
    assert status == 0 and "other code" in out and "1 entries cannot be used" in out
    put(entry(1024, config={"block_m": 3, "num_warps": 1}))
    path = cache.joinpath("tuning", *entry(256).folder, entry(256).name)
    path.write_text("{")
    with pytest.warns(store.TuningWarning, match="moved aside"):
        status, out, _ = run(capsys, "cache", "verify")
    assert status == 1 and "is damaged" in out and "is not legal there" in out and "3 entries" in out


def test_prune_and_clear(capsys, cache):
    elsewhere = replace(INTERPRETER, name="another GPU")
    put(entry(256), entry(512), entry(256, elsewhere))
    folder = cache.joinpath("tuning", *entry(256).folder)
    old, fresh, aside = folder / ".x.tmp", folder / ".y.tmp", folder / "z.json.bad"
    for path in (old, fresh, aside):
        path.write_text("")
    os.utime(old, (0, 0))
    os.utime(folder / entry(512).name, (0, 0))
    assert run(capsys, "cache", "prune")[1] == "2 files removed\n"
    assert fresh.exists() and not old.exists() and not aside.exists() and len(stored()) == 2
    assert run(capsys, "cache", "prune", "--days", "30")[1] == "1 files removed\n"
    assert run(capsys, "cache", "prune", "--other-environments")[1] == "1 files removed\n"
    assert stored() == {256: entry(256)}
    put(replace(entry(256), key={**entry(256).key, "op": "other"}))
    assert run(capsys, "cache", "clear", "--op", "other")[1] == "1 files removed\n"
    assert stored() == {256: entry(256)}
    assert run(capsys, "cache", "clear")[1] == "2 files removed\n" and stored() == {}


def test_nothing_outside_the_library_is_removed(capsys, cache):
    put(entry(256))
    kept = [cache / "other.json", cache / "tuning" / "note.txt", cache.parent / "target"]
    kept[2].mkdir()
    kept.append(kept[2] / "file.json")
    for path in (*kept[:2], kept[3]):
        path.write_text("")
    os.utime(kept[3], (0, 0))
    (cache / "tuning" / "v1" / "link").symlink_to(kept[2])
    run(capsys, "cache", "prune", "--days", "0", "--other-environments")
    run(capsys, "cache", "clear")
    assert all(path.exists() for path in kept)


def test_an_export_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "all.json"
    upkeep.export(path, [entry(256)])
    before = path.read_bytes()

    def full(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr(upkeep.os, "replace", full)
        upkeep.export(path, [entry(256), entry(512)])
    assert path.read_bytes() == before and [one.name for one in tmp_path.glob("*.json*")] == ["all.json"]
