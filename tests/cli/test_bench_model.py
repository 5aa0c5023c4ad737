"""`fusedops bench model` on a tiny random model: every way to serve, what is written, and what is refused."""

import json
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest

from fusedops import cli
from fusedops.cli import bench_model, console, serving, serving_plot, setting, traffic
from fusedops.cli.serving import KvSample
from fusedops.cli.traffic import Request

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("pydoc_data.topics", reason="this Python comes without its reference")

NUMBER, TEXT = (int, float), (str,)
OR_NONE = (type(None),)
FIELDS = {  # what every row must say
    "op": TEXT, "shape": TEXT, "dtype": TEXT, "timed": TEXT, "patched": (bool,), "seconds": NUMBER, "low": NUMBER,
    "high": NUMBER, "requests_per_minute": NUMBER, "tokens_per_second": NUMBER, "first_token": (dict,),
    "between_tokens": (dict,), "end_to_end": (dict,), "kv": (dict,), "pool_bytes": NUMBER + OR_NONE,
    "peak_bytes": NUMBER, "cost": (dict,), "requests": (list,), "times_as_fast_as": (dict,),
    "tokens_equal": (bool,) + OR_NONE, "calls": (list,), "left_fused_path": (list,), "workload": (dict,),
    "environment": (dict,),
}  # fmt: skip
ENVIRONMENT = {"device", "date", "dtype", "threads", "torch", "triton", "transformers", "commit", "load"}
SMALL = ("--device", "cpu", "--prompts", "5", "--prompt-tokens", "3-40", "--new-tokens", "2-6")


@pytest.fixture(scope="module")
def letters(tmp_path_factory):
    """Directory of a random Llama whose tokens are letters, so that prompts of real text differ from each other."""
    import torch
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("letters")
    signs = ["<unk>", "</s>", *map(chr, range(32, 127)), "\n"]
    core = Tokenizer(models.WordLevel({sign: i for i, sign in enumerate(signs)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token="</s>")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(signs), hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, eos_token_id=1, pad_token_id=1, initializer_range=0.2,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text(letters):
    """The text in letters, read once: half a million of them take a second."""
    return traffic.text_tokens(transformers.AutoTokenizer.from_pretrained(letters))


@pytest.fixture
def bench(capsys, letters, text, monkeypatch):
    """Run the command on the tiny model; exit status, stdout and stderr."""
    monkeypatch.setattr(traffic, "text_tokens", lambda tokenizer: text)

    def run(*arguments):
        try:
            status = cli.main(["bench", "model", "--model", str(letters), *map(str, arguments)])
        except SystemExit as leaving:
            status = leaving.code
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def test_every_way_gives_the_same_tokens_and_a_whole_row(bench, capsys, tmp_path):
    report, picture = tmp_path / "rows.json", tmp_path / "ways.png"
    status, out, err = bench(*SMALL, "--price-per-hour", 2, "--json", report, "--plot", picture)
    assert status == 0, out + err
    rows = json.loads(report.read_text())
    assert [row["timed"] for row in rows] == [way.label for way in serving.WAYS.values()]
    for row in rows:
        assert [name for name, types in FIELDS.items() if not isinstance(row[name], types)] == []
        assert row["environment"].keys() >= ENVIRONMENT
        assert row["tokens_equal"], row["timed"]
        assert row["kv"]["held_over_used"] >= 1 and row["cost"]["per_million_tokens"] > 0
        assert row["timed"] in out
        assert bool(row["calls"]) == row["patched"] and row["left_fused_path"] == []
    by_way = {row["timed"]: row["kv"]["held_over_used"] for row in rows}
    assert by_way["one by one"] == 1 < by_way["transformers paged"] < by_way["padded batch"]
    assert "all arrive at once" in out and "pages of 16 tokens" in out
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert cli.main(["bench", "compare", str(report), str(report)]) == 0
    assert f"{len(rows)} rows unchanged" in capsys.readouterr().out


@pytest.mark.parametrize("dtype, failed", [("float32", 1), ("bfloat16", 0)])
def test_wrong_tokens_of_a_patched_model_fail_in_float32(bench, monkeypatch, dtype, failed):
    def wrong(model, requests, settings):
        run = serving.padded(model, requests, settings)
        run.served[-1] = replace(run.served[-1], tokens=(0, *run.served[-1].tokens[1:]))
        return run

    for name, patched in (("padded", False), ("fusedops-padded", True)):
        monkeypatch.setitem(serving.WAYS, name, serving.Way("wrong one", patched, wrong))
        options = ("--ways", f"one-by-one,{name}", "--dtype", dtype)
        status, out, _ = bench(*SMALL[2:4], "--prompt-tokens", 4, "--new-tokens", 3, "--device", "cpu", *options)
        assert "answers differ from one by one, first request" in out  # in 16 bits, ties may make more differ
        assert dtype == "bfloat16" or "1 answers differ from one by one, first request 4, token 0: 0 instead of" in out
        assert status == (failed if patched else 0)


def test_a_way_that_cannot_run_is_said_and_the_others_go_on(bench, monkeypatch):
    def broken(model, requests, settings):
        raise NotImplementedError("no such engine")

    monkeypatch.setitem(serving.WAYS, "transformers-paged", serving.Way("broken one", False, broken))
    status, out, _ = bench(*SMALL, "--ways", "one-by-one,transformers-paged")
    assert status == 1
    assert "broken one cannot run: NotImplementedError: no such engine" in out
    assert "equal" in out
    status, out, _ = bench(*SMALL, "--ways", "transformers-paged")
    assert status == 1 and "held / used" not in out


def test_requests_that_arrive_later(bench, tmp_path):
    """Each one's time counts from its own arrival, in rounds that go through the ways in turn."""
    report = tmp_path / "rows.json"
    options = ("--rate", 20, "--rounds", 2, "--ways", "one-by-one,padded,transformers-paged")
    status, out, _ = bench(*SMALL, *options, "--json", report)
    assert status == 0 and "20 requests/s arrive" in out
    for row in json.loads(report.read_text()):
        last = max(request["arrival"] for request in row["requests"])
        assert last > 0 and row["seconds"] >= last
        assert all(0 < request["first_token"] <= request["end_to_end"] for request in row["requests"])
        assert row["low"] <= row["seconds"] <= row["high"]


@pytest.fixture(scope="module")
def model(letters):
    """The tiny model itself."""
    return transformers.AutoModelForCausalLM.from_pretrained(letters).eval()


@pytest.fixture(scope="module")
def patched_model(model):
    """The same weights, patched."""
    return setting.patched_twin(model, console.Console())[0]


SETTINGS = serving.Settings(page_size=16, batch_tokens=512, pad_token=1)
TOKEN = 2 * 2 * 2 * 16 * 4  # bytes: layers, keys and values, heads, numbers, float32


@pytest.mark.parametrize("name", serving.WAYS)
def test_kv_of_one_request(model, patched_model, name):
    """30 tokens and five more: pages of 16 are two, then three."""
    way = serving.WAYS[name]
    run = way.serve(patched_model if way.patched else model, [Request(tuple(range(2, 32)), 5)], SETTINGS)
    used = [length * TOKEN for length in range(30, 35)]
    paged = "paged" in name or "cache" in name
    held = [pages * 16 * TOKEN for pages in (2, 2, 2, 3, 3)] if paged else used
    assert run.kv == [KvSample(*pair) for pair in zip(held, used, strict=True)]
    assert (run.pool_bytes or 0) >= (3 * 16 * TOKEN if paged else 0)


@pytest.mark.parametrize("name", serving.WAYS)
def test_times_agree_with_a_stopwatch(model, patched_model, name):
    """A model that waits: every step takes at least that long, and all of them no longer than the call."""
    pause = 0.02
    requests = [Request((5, 6, 7), 4), Request((8, 9), 6)]
    way = serving.WAYS[name]
    chosen = patched_model if way.patched else model
    watch = chosen.register_forward_pre_hook(lambda *args: time.sleep(pause))
    try:
        before = time.perf_counter()
        run = way.serve(chosen, requests, SETTINGS)
        whole = time.perf_counter() - before
    finally:
        watch.remove()
    steps = {"one-by-one": 10}.get(name, 6)
    assert steps * pause <= max(answer.times[-1] for answer in run.served) <= whole
    for request, answer in zip(requests, run.served, strict=True):
        assert len(answer.tokens) == len(answer.times) == request.new_tokens
        assert all(after - before >= pause for before, after in zip(answer.times, answer.times[1:], strict=False))


def test_calls_that_left_the_fused_path_are_told(model, monkeypatch):
    """Those of this run, and none of the runs before it."""
    counts = {("layers.0", "dropout"): 2, ("layers.1", "dropout"): 1}

    def leaves(model, requests, settings):
        counts["layers.0", "dropout"] += 3
        return serving.Run([], [])

    handle = SimpleNamespace(fallbacks=lambda: dict(counts))
    monkeypatch.setattr(serving.dispatch, "fallbacks", lambda: {("attention", "no kernel"): 4})
    run = serving.timed(serving.Way("leaves", True, leaves), model, handle, [], SETTINGS)
    assert run.left == [("layers.0", "dropout", 3), ("attention", "no kernel", 4)]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--ways", "one-by-one,magic"), "got 'magic'"),
        (("--rate", "-1"), "must be a positive number, got '-1'"),
        (("--price-per-hour", "free"), "must be a positive number, got 'free'"),
        (("--prompt-tokens", "9-3"), "must be a range from low to high, got '9-3'"),
        (("--prompts", "0"), "must be a positive integer, got '0'"),
        (("--prompt-tokens", "100-120"), "must fit into the model's 128 positions, got 1"),
        (("--prompt-tokens", "9999999"), "--prompt-tokens must be at most"),
        (("--json", "/no/such/folder/rows.json"), "cannot write"),
        (("--plot", "/no/such/folder/ways.png"), "cannot write"),
        (("--plot", "ways.txt"), "must be a file that ends with .png, got ways.txt"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_bad_arguments(bench, arguments, message):
    status, _, err = bench(*arguments)
    assert status == 2 and message in err and err.startswith("fusedops bench model") and err.count("\n") == 1, err


def test_plot_needs_matplotlib(bench, monkeypatch, tmp_path):
    monkeypatch.setattr(bench_model.importlib.util, "find_spec", lambda name: None)
    status, _, err = bench("--plot", tmp_path / "ways.png")
    assert status == 2 and "pip install 'fusedops[bench]'" in err


def test_options_before_the_word_model_are_refused(capsys):
    assert cli.main(["bench", "--quick", "model"]) == 2
    assert "model must come right after bench" in capsys.readouterr().err


def test_quick_gives_way_to_what_is_asked():
    parser = cli.build_parser()
    for line, prompts, new_tokens in (("", 32, (64, 64)), ("--quick", 6, (8, 8)), ("--quick --prompts 9", 9, (8, 8))):
        args = parser.parse_args(["bench model", *line.split()])
        bench_model._fill_in(args)
        assert (args.prompts, args.new_tokens) == (prompts, new_tokens)


def test_picture_without_kv_figures(tmp_path):
    """A cache that does not tell what it holds leaves its bar out."""
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    about = {"device": "a machine", "date": "2026-01-01", "threads": 2, "torch": "2", "transformers": "5"}
    requests = [{"first_token": 1.0, "end_to_end": 2.0}]
    row = {"timed": "a way", "tokens_per_second": 3.0, "kv": {"held_over_used": None}, "requests": requests}
    serving_plot.draw([{**row, "shape": "a; b", "dtype": "float32", "environment": about}], tmp_path / "one.png")
    assert (tmp_path / "one.png").stat().st_size > 1000
