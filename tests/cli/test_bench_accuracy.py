"""`fusedops bench accuracy`: perplexity by hand, every way on a tiny random model, goals, and what is refused."""

import hashlib
import json
import math
import random
from types import SimpleNamespace

import pytest
import torch

import fusedops
from fusedops import cli
from fusedops.cli import bench_accuracy, corpus, perplexity, ways
from fusedops.cli.bench_accuracy import WAYS

VOCABULARY = 8
SMALL = ("--device", "cpu", "--tokens", "60", "--window", "20")
ENVIRONMENT = {"device", "date", "dtype", "threads", "python", "torch", "transformers", "commit"}


# ---- perplexity


def test_every_token_but_the_first_is_predicted_once():
    cut = perplexity.windows(range(11), 4)
    assert [(inputs.tolist(), targets.tolist()) for inputs, targets in cut] == [
        ([0, 1, 2, 3], [1, 2, 3, 4]), ([4, 5, 6, 7], [5, 6, 7, 8]), ([8, 9], [9, 10]),
    ]  # fmt: skip
    assert len(perplexity.windows(range(9), 4)) == 2


class Counts(torch.nn.Module):
    """Gives the number after its input the probability p, and the others the rest; notes what it is called with."""

    device = torch.device("cpu")

    def __init__(self, p):
        super().__init__()
        self.seen = []
        self.p = p

    def forward(self, ids, use_cache):
        self.seen.append(ids.tolist())
        logits = torch.full((*ids.shape, VOCABULARY), math.log((1 - self.p) / (VOCABULARY - 1)))
        right = math.log(self.p) if self.p else -math.inf
        return SimpleNamespace(logits=logits.scatter_(-1, (ids[..., None] + 1) % VOCABULARY, right))


def test_perplexity_by_hand():
    tokens = torch.arange(21) % VOCABULARY
    model = Counts(0.25)
    assert perplexity.perplexity(model, perplexity.windows(tokens, 8)) == pytest.approx(4.0, rel=1e-6)
    assert model.seen == [[tokens[start : start + 8][: 20 - start].tolist()] for start in (0, 8, 16)]
    tokens[20] = 7  # it was 4: one of 20 is now another number, with probability 0.75 / 7
    wanted = math.exp((19 * math.log(4) + math.log(7 / 0.75)) / 20)
    assert perplexity.perplexity(Counts(0.25), perplexity.windows(tokens, 8)) == pytest.approx(wanted, rel=1e-6)


def test_what_is_no_number_stays_none():
    assert math.isnan(perplexity.perplexity(Counts(float("nan")), perplexity.windows(range(5), 4)))
    assert perplexity.perplexity(Counts(0.0), perplexity.windows(range(5), 4)) == math.inf


# ---- the command


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A file of 200 words that the tiny model knows."""
    path = tmp_path_factory.mktemp("text") / "words.txt"
    drawn = random.Random(0)
    path.write_text(" ".join(f"word{drawn.randrange(61)}" for _ in range(200)))
    return path


@pytest.fixture
def bench(capsys, tiny_model_directory, text):
    """Run the command on the tiny model; exit status, stdout and stderr."""

    def run(*arguments):
        line = ["bench", "accuracy", "--model", str(tiny_model_directory), "--text", str(text), *map(str, arguments)]
        try:
            status = cli.main(line)
        except SystemExit as leaving:
            status = leaving.code
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_way_gives_a_whole_row(bench, text, tmp_path, dtype):
    report = tmp_path / "accuracy.json"
    status, out, err = bench(*SMALL, "--dtype", dtype, "--finetune", 2, "--json", report)
    assert status == 0, out + err
    told = json.loads(report.read_text())
    assert told["environment"].keys() >= ENVIRONMENT and told["environment"]["dtype"] == dtype
    assert (told["tokens"], told["window"], told["calibration_tokens"]) == (60, 20, 120)
    digest = hashlib.sha256(text.read_bytes()).hexdigest()
    assert told["text"] == {"source": "words.txt", "characters": len(text.read_text()), "sha256": digest}
    rows = {row["scheme"]: row for row in told["rows"]}
    assert list(rows) == list(WAYS) and all(way.label in out for way in WAYS.values())
    exact = rows["float32"]
    assert exact["change"] == 0 and 40 < exact["perplexity"] < 100  # 61 words by chance, and weights by chance
    for name, row in rows.items():
        mlps_alone = "mlp" in name and "int8" not in name
        assert row["error"] is None and row["seconds"] > 0
        assert row["layers"] == (6 if mlps_alone else 15 if "head" in name else 14)
        assert row["goal"] is row["asked"] is row["goal_met"] is None
        assert name == "float32" or 0 < abs(row["change"]) < (0.3 if "sparse" in name else 0.05)
    itemsize = 4 if dtype == "float32" else 2
    count, channels = rows["int8"]["weights"], 2 * (64 + 32 + 32 + 64 + 96 + 96 + 64)
    assert count == 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 96)
    assert rows["float32"]["weight_bytes"] == 4 * count and rows["bfloat16"]["weight_bytes"] == 2 * count
    assert rows["int8"]["weight_bytes"] == rows["fp8"]["weight_bytes"] == count + 4 * channels
    assert rows["int8-weight-only"]["weight_bytes"] == count + itemsize * channels
    assert rows["int4-weight-only"]["weight_bytes"] == count // 2 + (itemsize + 1) * count // 32
    assert rows["int4-weight-only-64"]["weight_bytes"] < rows["int4-weight-only"]["weight_bytes"]
    mlps, padded = 2 * 3 * 64 * 96, 2 * 64 * (128 - 96)  # down_proj: rows of 96 are stored as if of 128
    assert rows["sparse-wanda-mlp"]["weights"] == mlps and rows["sparse-wanda"]["weights"] == count
    groups = 2 * (2 * 96 * 128 + 64 * 128) // 8  # bytes of metadata, for rows of whole 128 columns
    for name in ("sparse-magnitude-mlp", "sparse-wanda-mlp", "sparse-wanda-mlp-tuned"):
        itemsize_here = 4 if "tuned" in name else itemsize
        assert rows[name]["weight_bytes"] == (mlps + padded) // 2 * itemsize_here + groups
    assert rows["sparse-wanda-mlp-int8"]["weight_bytes"] < rows["int8"]["weight_bytes"]
    found = [row["perplexity"] for row in told["rows"]]
    assert len(set(found)) == len(found)
    tuned = rows["sparse-wanda-mlp-tuned"]
    gap = rows["sparse-wanda-mlp"]["perplexity"] - exact["perplexity"]
    won = rows["sparse-wanda-mlp"]["perplexity"] - tuned["perplexity"]
    assert tuned["recovered"] == pytest.approx(won / gap) and "of the gap won back" in out
    assert (tuned["finetune"]["steps"], tuned["finetune"]["tokens"], len(tuned["finetune"]["losses"])) == (2, 40, 2)
    assert all(row["recovered"] is row["finetune"] is None for row in rows.values() if row is not tuned)
    assert told["apart_tokens"] == 120 and "step 2 of 2" in out


def test_ways_are_chosen_and_leave_the_model_alone(bench, tmp_path, monkeypatch):
    """Both times the same bits, with other ways before; the float32 model is always there."""
    found = []
    for schemes in ("int8", "int8-smoothquant,fp8,int4-weight-only,int8"):
        bench(*SMALL, "--schemes", schemes, "--json", tmp_path / "rows.json")
        found.append({row["scheme"]: row for row in json.loads((tmp_path / "rows.json").read_text())["rows"]})
    assert list(found[0]) == ["float32", "int8"]
    assert list(found[1]) == ["float32", "int8", "int8-smoothquant", "fp8", "int4-weight-only"]
    for name in found[0]:
        assert found[0][name]["perplexity"] == found[1][name]["perplexity"]


def test_calibration_sees_another_part_of_the_text(bench, text, tiny_model_directory, monkeypatch):
    from transformers import AutoTokenizer

    given, taken = [], []
    right, counted = fusedops.quantize_, perplexity.perplexity
    monkeypatch.setattr(fusedops, "quantize_", lambda *a, **k: given.append(k.get("calibration")) or right(*a, **k))
    monkeypatch.setattr(perplexity, "perplexity", lambda model, cut, show: taken.append(cut) or counted(model, cut))
    bench(*SMALL[:2], "--tokens", 70, "--window", 20, "--schemes", "int8,int8-smoothquant")
    ids = corpus.tokens(AutoTokenizer.from_pretrained(tiny_model_directory), text.read_text())
    assert given[0] is None and [one.shape for one in given[1]] == [(1, 20)] * 6
    assert torch.cat(given[1], 1)[0].tolist() == ids[-120:]
    targets = torch.cat([target for _, target in taken[0]]).tolist()
    assert targets == ids[1:71] and len(ids) - 120 >= 71
    assert all(cut is taken[0] for cut in taken)


def test_fine_tuning_comes_with_what_it_is_compared_with(bench, tmp_path):
    """The pruned model is measured too, each time the same bits; the float32 model of other ways stays as it was."""
    found = []
    for arguments in (("--schemes", "sparse-wanda-mlp-tuned,int8", "--finetune", 3), ("--schemes", "int8")):
        bench(*SMALL, *arguments, "--json", tmp_path / "rows.json")
        found.append({row["scheme"]: row for row in json.loads((tmp_path / "rows.json").read_text())["rows"]})
    assert list(found[0]) == ["float32", "int8", "sparse-wanda-mlp", "sparse-wanda-mlp-tuned"]
    assert list(found[1]) == ["float32", "int8"] and found[0]["int8"]["perplexity"] == found[1]["int8"]["perplexity"]
    assert list(ways.chosen(None, False)) == [name for name in WAYS if name not in ways.TUNED]
    assert list(ways.chosen(None, True)) == list(WAYS)


def test_wanda_and_fine_tuning_see_nothing_of_what_is_predicted(bench, tmp_path, tiny_model_directory, monkeypatch):
    """A text that says its beginning again: no window with a run of 16 tokens of that is seen, and none twice."""
    from transformers import AutoTokenizer

    drawn = random.Random(1)
    words = [f"word{drawn.randrange(61)}" for _ in range(321)]
    words[101:141] = words[20:60]
    words[310:] = words[5:16]  # a run of 11 is none
    again = tmp_path / "again.txt"
    again.write_text(" ".join(words))
    pruned, tuned = [], []
    right, learn = fusedops.sparsify_, fusedops.distill_
    monkeypatch.setattr(fusedops, "sparsify_", lambda *a, **k: pruned.append(k.get("calibration")) or right(*a, **k))
    monkeypatch.setattr(fusedops, "distill_", lambda m, t, b, **k: tuned.append(b) or learn(m, t, b, **k))
    status, out, err = bench(*SMALL, "--text", again, "--schemes", "sparse-magnitude,sparse-wanda-mlp-tuned",
                             "--finetune", 5)  # fmt: skip
    assert status == 0, out + err
    assert len(pruned) == 3 and sum(given is None for given in pruned) == 1 and len(tuned) == 1
    ids = corpus.tokens(AutoTokenizer.from_pretrained(tiny_model_directory), again.read_text())
    assert len(ids) == 321
    seen = [window[0].tolist() for window in (*pruned[0], *tuned[0])]
    held_out = {tuple(ids[start : start + 16]) for start in range(46)}
    for window in seen:
        assert len(window) == 20 and held_out.isdisjoint(tuple(window[i : i + 16]) for i in range(5))
    starts = [next(i for i in range(302) if ids[i : i + 20] == window) for window in seen]
    assert len(set(starts)) == len(starts) and all(start >= 61 for start in starts)


def test_a_text_that_is_all_the_same_prunes_nothing(bench, tmp_path):
    same = tmp_path / "same.txt"
    same.write_text("word1 " * 200)
    status, out, _ = bench(*SMALL, "--text", same, "--schemes", "int8,sparse-wanda")
    assert status == 1 and "2:4 everywhere, Wanda cannot run: the text must have two more windows that share" in out


def test_steps_beyond_the_text_take_it_again():
    windows = [torch.full((4,), number) for number in range(12)]
    data = ways.Data([], [], windows)
    assert [int(one[0]) for one in data.pruning()] == [6, 7, 8, 9, 10, 11]
    drawn = [int(one[0]) for one in data.training(15)]
    assert sorted(drawn[:6]) == sorted(drawn[6:12]) == list(range(6)) and len(drawn) == 15
    assert drawn[:6] != sorted(drawn[:6]) and drawn == [int(one[0]) for one in data.training(15)]
    assert len(ways.Data([], [], windows * 5).pruning()) == 8


def test_a_way_that_cannot_run_is_said_and_the_model_is_as_it_was(bench, monkeypatch):
    right, counted, models = fusedops.quantize_, perplexity.perplexity, []

    def refuses(model, scheme, **options):
        if scheme == "fp8":
            raise ValueError("quantize_: no such thing here\nsecond line")
        return right(model, scheme, **options)

    def fails(model, cut, show):
        models.append(model)
        if len(models) == 2:
            raise NotImplementedError("no such product")
        return counted(model, cut, show)

    monkeypatch.setattr(fusedops, "quantize_", refuses)
    monkeypatch.setattr(perplexity, "perplexity", fails)
    status, out, _ = bench(*SMALL, "--schemes", "int8-weight-only,fp8,int8")
    assert status == 1
    assert "int8 weight-only cannot run: no such product\n" in out
    assert "fp8 W8A8 cannot run: quantize_: no such thing here\n" in out
    assert not any(isinstance(module, fusedops.nn.QuantizedLinear) for module in models[0].modules())
    assert any(line.strip().startswith("int8 W8A8 ") and "%" in line for line in out.splitlines())


def test_ranges_beyond_the_model_or_the_text_are_refused(bench, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("word1 " * 80)
    latin = tmp_path / "latin.txt"
    latin.write_bytes(b"\xff\xfe\xff")
    for arguments, message in (
        (("--schemes", "int8,magic"), "must be some of float32, bfloat16, int8-weight-only"),
        (("--tokens", "0"), "must be a positive integer, got '0'"),
        (("--window", "4096"), "--window must be at most the model's 2048 positions, got 4096"),
        (("--tokens", 60, "--window", 20, "--text", short), "the text must have 81 tokens, the last window for"),
        (("--text", tmp_path / "none.txt"), "cannot read"),
        (("--text", latin), "cannot read"),
        (("--json", tmp_path / "none" / "rows.json"), "cannot write"),
    ):
        status, _, err = bench(*arguments)
        assert status == 2 and message in err and err.count("\n") == 1, err
    assert bench("--text", short, "--device", "cpu", "--tokens", 59, "--window", 20, "--schemes", "float32")[0] == 0


def test_pythons_text_is_named_with_its_release(monkeypatch):
    pytest.importorskip("pydoc_data.topics", reason="this Python comes without its reference")
    import platform

    text, told = bench_accuracy._text(None)
    assert len(text) == told["characters"] > 300_000
    assert told["source"] == f"pydoc_data.topics of Python {platform.python_version()}"
    assert told["sha256"] == hashlib.sha256(text.encode()).hexdigest()
    monkeypatch.setitem(__import__("sys").modules, "pydoc_data.topics", None)
    with pytest.raises(bench_accuracy.CommandError, match="comes without its reference"):
        bench_accuracy._text(None)


# ---- goals


def judged(usual=True, **found):
    rows = [{"scheme": name, "layers": None, "perplexity": value} for name, value in found.items()]
    bench_accuracy._judge(rows, usual)
    return {row["scheme"]: row for row in rows}


def test_goals_are_bounds_of_the_change():
    rows = judged(**{"float32": 20.0, "int8-weight-only": 20.09, "fp8": 20.71, "int4-weight-only-64": 30.0})
    assert rows["int8-weight-only"]["change"] == pytest.approx(0.0045)
    assert rows["int8-weight-only"]["goal_met"] is True and rows["fp8"]["goal_met"] is False
    assert rows["int4-weight-only-64"]["goal_met"] is rows["float32"]["goal_met"] is None
    assert bench_accuracy.in_cells(rows["int8-weight-only"]) == ("20.090", "+0.45%", "0.5%: met")
    assert bench_accuracy.in_cells(rows["fp8"])[2] == "3.5%: missed"


def test_smoothquant_must_stay_below_what_it_improves():
    for plain, met in ((20.5, True), (20.3, False), (20.4, False), (None, True)):
        found = {"float32": 20.0, "int8-smoothquant": 20.4} | ({"int8": plain} if plain else {})
        rows = judged(**found)
        assert rows["int8-smoothquant"]["goal_met"] is met, plain
    assert bench_accuracy.in_cells(rows["int8-smoothquant"])[2] == "2.5%, below int8 W8A8: met"


def test_goals_are_those_of_one_model_and_text():
    rows = judged(usual=False, **{"float32": 20.0, "int8-weight-only": 40.0})
    assert rows["int8-weight-only"]["goal_met"] is None and rows["int8-weight-only"]["change"] == 1.0


def test_fine_tuning_must_win_a_third_back():
    for tuned, met, share in ((40.0, True, 1 / 3), (41.0, False, 0.3), (None, False, None)):
        found = {"float32": 20.0, "sparse-wanda-mlp": 50.0, "sparse-wanda-mlp-tuned": tuned}
        row = judged(**found)["sparse-wanda-mlp-tuned"]
        assert row["goal_met"] is met and row["recovered"] == (share and pytest.approx(share)), tuned
    row = judged(**found | {"sparse-wanda-mlp-tuned": 30.0})["sparse-wanda-mlp-tuned"]
    assert bench_accuracy.in_cells(row)[2] == "67% of the gap won back; at least 33%: met"


def test_wanda_must_stay_below_magnitude():
    for other, met in ((900.0, True), (100.0, False), (None, True)):
        found = {"float32": 20.0, "sparse-wanda": 100.0} | ({"sparse-magnitude": other} if other else {})
        assert judged(**found)["sparse-wanda"]["goal_met"] is met
    assert judged(**found)["float32"]["goal_met"] is None


def test_what_is_not_finite_misses_its_goal():
    rows = judged(**{"float32": 20.0, "fp8-weight-only": None})
    assert rows["fp8-weight-only"]["goal_met"] is False and rows["fp8-weight-only"]["change"] is None
