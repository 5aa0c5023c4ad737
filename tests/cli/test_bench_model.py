"""`fusedops bench model` on a tiny random model: every way to serve, what is written, and what is refused."""

import json
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import fusedops
from fusedops import cli
from fusedops.cli import (
    bench_model,
    byte_bound,
    console,
    layers,
    measure,
    models,
    serving,
    serving_figures,
    serving_plot,
    setting,
    traffic,
)
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
    "tokens_equal": (bool,) + OR_NONE, "leading_tokens_equal": NUMBER + OR_NONE, "quantized": TEXT + OR_NONE,
    "model_is": TEXT, "weight_bytes": NUMBER, "least_bytes_per_step": NUMBER, "copy_bandwidth": NUMBER,
    "share_of_copy_bandwidth": NUMBER, "calls": (list,), "left_fused_path": (list,), "workload": (dict,),
    "environment": (dict,),
}  # fmt: skip
ENVIRONMENT = {"device", "date", "dtype", "threads", "torch", "triton", "transformers", "commit", "load"}
SMALL = ("--device", "cpu", "--prompts", "5", "--prompt-tokens", "3-40", "--new-tokens", "2-6")


@pytest.fixture(scope="module")
def letters(tmp_path_factory):
    """Directory of a random Llama whose tokens are letters, so that prompts of real text differ from each other."""
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


@pytest.fixture(autouse=True)
def nothing_long(monkeypatch):
    """Traced for the compiled way, but not compiled; and a short copy."""
    monkeypatch.setattr(serving, "COMPILE", {"backend": "eager"})
    monkeypatch.setattr(byte_bound, "COPY_BYTES", 2**20)


@pytest.fixture
def bench(capsys, letters, text, monkeypatch):
    """Run the command on the tiny model; exit status, stdout and stderr."""
    monkeypatch.setattr(traffic, "text_tokens", lambda tokenizer: text)

    def run(*arguments):
        try:
            model = () if "--model" in arguments else ("--model", letters)
            status = cli.main(["bench", "model", *map(str, (*model, *arguments))])
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
    labels = [way.label + " int8-weight-only" * way.quantized for way in serving.WAYS.values()]
    assert [row["timed"] for row in rows] == labels
    for row in rows:
        assert [name for name, types in FIELDS.items() if not isinstance(row[name], types)] == []
        assert row["environment"].keys() >= ENVIRONMENT
        assert row["tokens_equal"] or row["quantized"], row["timed"]
        assert 0 <= row["leading_tokens_equal"] <= 1
        assert row["least_bytes_per_step"] == row["weight_bytes"] + row["kv"]["median_used_bytes"]
        least = row["share_of_copy_bandwidth"] * row["copy_bandwidth"] * row["between_tokens"]["p50"]
        assert least == pytest.approx(row["least_bytes_per_step"])
        assert row["kv"]["held_over_used"] >= 1 and row["cost"]["per_million_tokens"] > 0
        assert row["timed"] in out
        assert bool(row["calls"]) == row["patched"] and row["left_fused_path"] == []
    by_way = {row["timed"]: row["kv"]["held_over_used"] for row in rows}
    assert by_way["one by one"] == 1 < by_way["transformers paged"] < by_way["padded batch"]
    assert "all arrive at once" in out and "pages of 16 tokens" in out
    assert picture.read_bytes().startswith(b"\x89PNG") and not (tmp_path / "ways_batch.png").exists()
    check_layers(rows, out)
    assert cli.main(["bench", "compare", str(report), str(report)]) == 0
    assert f"{len(rows)} rows unchanged" in capsys.readouterr().out


def check_layers(rows, out):
    """The first row of each model tells where its time goes; the parts make the whole."""
    told = {row["model_is"]: row["layers"] for row in rows if "layers" in row}
    assert list(told) == [bench_model.AS_IS, bench_model.PATCHED, bench_model.QUANTIZED]
    for name, passes in told.items():
        assert f"Where the time of {name}" in out
        for part in (passes["prefill"], passes["step"]):
            names = [row["layer"] for row in part["layers"]]
            assert {"lm_head", "model.layers.*.mlp", "model.layers.*.self_attn"} <= set(names)
            assert sum(row["seconds"] for row in part["layers"]) == pytest.approx(part["seconds"])
            assert [row["calls"] for row in part["layers"] if row["layer"] == "model.layers.*"] == [2]
            ours = {op for row in part["layers"] for op, _, _ in row["operators"]}
            assert bool(ours) == (name != bench_model.AS_IS)
            assert part["share_not_ours"] == 1 if not ours else 0 < part["share_not_ours"] < 1
    by_layer = {row["layer"]: row["operators"] for row in told[bench_model.PATCHED]["step"]["layers"]}
    assert [op for op, *_ in by_layer["model.layers.*.self_attn"]][0] == "attention"
    assert by_layer["lm_head"] == []


def test_layers_add_up_to_a_stopwatch(model):
    """Layers that wait: what is told of each is at least that, and all of it is no more than the passes take."""
    pause, steps = 0.02, 5
    watches = [
        module.register_forward_pre_hook(lambda *_: time.sleep(pause)) for module in (model.lm_head, model.model.norm)
    ]
    try:
        before = time.perf_counter()
        told = layers.profile(model, tuple(range(2, 30)), steps)
        whole = time.perf_counter() - before
    finally:
        for watch in watches:
            watch.remove()
    for part in (told["prefill"], told["step"]):
        seconds = {row["layer"]: row["seconds"] for row in part["layers"]}
        for name in ("lm_head", "model.norm"):
            assert seconds[name] < pause  # the hook ran before ours: its time is that of the layer around it
        outer = seconds["(outside of layers)"] + seconds["model"]
        assert outer >= 2 * pause
        assert part["seconds"] == pytest.approx(part["unwatched_seconds"], rel=0.5)
    assert told["prefill"]["seconds"] + steps * told["step"]["seconds"] <= whole / 3 * 1.5
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_figures_agree_with_a_stopwatch_around_generate(model):
    """Within 5 %, over the same requests: the least disturbed of alternating rounds of each, and the model waits."""
    requests = [Request(tuple(range(2, 12)), 12), Request(tuple(range(5, 40)), 8)]

    def stopwatch():
        before = time.perf_counter()
        for request in requests:
            ids, length = torch.tensor([request.prompt]), request.new_tokens
            model.generate(ids, max_new_tokens=length, do_sample=False, eos_token_id=-1, pad_token_id=1)
        return time.perf_counter() - before

    watch = model.register_forward_pre_hook(lambda *_: time.sleep(0.05))
    try:
        stopwatch()  # the first call of generate prepares more than it runs
        runs, taken = [], []
        for _ in range(3):
            runs.append(serving.timed(serving.WAYS["one-by-one"], model, None, requests, SETTINGS))
            taken.append(stopwatch())
    finally:
        watch.remove()
    told = min((serving_figures.summarise(requests, [run]) for run in runs), key=lambda row: row["seconds"])
    assert told["seconds"] == pytest.approx(min(taken), rel=0.05)
    assert told["tokens_per_second"] == pytest.approx(20 / min(taken), rel=0.05)
    assert told["end_to_end"]["p99"] == pytest.approx(min(taken), rel=0.05)
    assert told["between_tokens"]["p50"] == pytest.approx(min(taken) / 20, rel=0.05)


def test_bytes_of_a_step(model):
    """All weights but the embedding; of a head that is the embedding, that; of quantised weights their codes."""
    sizes = {name: tensor.nbytes for name, tensor in model.named_parameters()}
    buffers = sum(tensor.nbytes for tensor in model.buffers())
    everything = sum(sizes.values()) + buffers
    assert byte_bound.weight_bytes(model) == everything - sizes["model.embed_tokens.weight"]
    tied = measure.twin(model)
    tied.lm_head.weight = tied.model.embed_tokens.weight
    assert byte_bound.weight_bytes(tied) == everything - sizes["lm_head.weight"]
    coded = measure.twin(model)
    report = fusedops.quantize_(coded, "int8-weight-only").report
    saved = sum(row.bytes_before - row.bytes_after for row in report.converted)
    assert saved > 0 and byte_bound.weight_bytes(coded) == byte_bound.weight_bytes(model) - saved


def test_several_batches_of_a_config(bench, letters, tmp_path):
    """Random weights, prompts drawn from the vocabulary; a row for each way and batch, and two pictures."""
    report, picture = tmp_path / "rows.json", tmp_path / "ways.png"
    options = ("--batch", "3,1", "--ways", "one-by-one,fusedops-padded", "--no-layers", "--json", report)
    config = letters / "config.json"
    status, out, err = bench("--model", config, *SMALL[:2], *SMALL[4:], *options, "--plot", picture)
    assert status == 0, out + err
    rows = json.loads(report.read_text())
    assert [(row["workload"]["prompts"], row["timed"]) for row in rows] == [
        (batch, serving.WAYS[way].label) for batch in (1, 3) for way in ("one-by-one", "fusedops-padded")
    ]
    assert all(row["tokens_equal"] and "config (random weights)" in row["shape"] for row in rows)
    assert all("layers" not in row for row in rows) and "Where the time" not in out
    assert picture.exists() and (tmp_path / "ways_batch.png").read_bytes().startswith(b"\x89PNG")


def test_random_weights_repeat_with_the_seed(letters):
    made = [
        models.of_config(letters / "config.json", torch.device("cpu"), torch.float32, console.Console(), seed)
        for seed in (1, 1, 2)
    ]
    first, again, other = (one.model.lm_head.weight for one in made)
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert made[0].tokenizer is None and not made[0].model.training


@pytest.mark.parametrize("dtype, failed", [("float32", 1), ("bfloat16", 0)])
def test_wrong_tokens_of_a_patched_model_fail_in_float32(bench, monkeypatch, dtype, failed):
    def wrong(model, requests, settings):
        run = serving.padded(model, requests, settings)
        run.served[-1] = replace(run.served[-1], tokens=(0, *run.served[-1].tokens[1:]))
        return run

    for name, patched in (("padded", False), ("fusedops-padded", True)):
        monkeypatch.setitem(serving.WAYS, name, serving.Way("wrong one", patched, wrong))
        options = ("--ways", f"one-by-one,{name}", "--dtype", dtype)
        status, out, _ = bench(
            *SMALL[2:4], "--prompt-tokens", 4, "--new-tokens", 3, "--device", "cpu", "--no-layers", *options
        )
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
    options = ("--rate", 20, "--rounds", 2, "--no-layers", "--ways", "one-by-one,padded,transformers-paged")
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
    paged, static = "paged" in name or "cache" in name, name == "compiled"
    held = [pages * 16 * TOKEN for pages in (2, 2, 2, 3, 3)] if paged else [35 * TOKEN] * 5 if static else used
    assert run.kv == [KvSample(*pair) for pair in zip(held, used, strict=True)]
    assert (run.pool_bytes or 0) >= (3 * 16 * TOKEN if paged else 0)


@pytest.mark.parametrize("name", [name for name in serving.WAYS if name != "compiled"])  # it would trace the pause
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
    steps = 10 if way.serve in (serving.one_by_one, serving.compiled) else 6
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
        (("--batch", "2,0"), "must be a positive integer, got '0'"),
        (("--batch", "2,2"), "must be different numbers, got '2,2'"),
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
    row |= {"shape": "a; b", "dtype": "float32", "environment": about, "workload": {"prompts": 1}}
    serving_plot.draw([row], str(tmp_path / "one.png"))
    assert (tmp_path / "one.png").stat().st_size > 1000
