"""Serve requests of mixed lengths through one model in several ways, side by side, and compare speed, memory and cost.

One by one, compiled, in a padded batch with ``generate``, and with transformers' continuous batching; of the model as
it is, and of a patched one that shares its weights; one by one of a quantised one too.
"""

import argparse
import importlib.util
import os
from dataclasses import replace
from types import SimpleNamespace

from fusedops.cli import (
    byte_bound,
    layers,
    measure,
    models,
    quantized,
    serving,
    serving_figures,
    serving_plot,
    serving_tables,
    setting,
    traffic,
)
from fusedops.cli.console import CommandError, Console, check_output, first_line, write_json

REFERENCE, PEER = "one-by-one", "transformers-paged"
USUAL = {"prompts": 32, "prompt_tokens": (16, 512), "new_tokens": (64, 64)}
QUICK = {"prompts": 6, "prompt_tokens": (16, 128), "new_tokens": (8, 8)}
AS_IS, PATCHED, QUANTIZED = "the model as it is", "the patched model", "the quantised model"
PROFILED_STEPS = 8


def add_arguments(parser):
    """Declare the command's arguments."""
    setting.add_arguments(parser)
    span = {"type": traffic.span, "metavar": "N|LOW-HIGH"}
    parser.add_argument("--prompts", type=setting.positive, metavar="N", help="requests (default: 32)")
    parser.add_argument(
        "--batch", type=_batches, metavar="N,...", help="instead of --prompts: so many requests at once, in turn"
    )
    parser.add_argument("--prompt-tokens", **span, help="length of each prompt (default: 16-512)")
    parser.add_argument("--new-tokens", **span, help="tokens that each request wants (default: 64)")
    parser.add_argument("--ways", type=_ways, metavar="WAY,...", help=f"default: {','.join(serving.WAYS)}")
    parser.add_argument(
        "--quantize",
        choices=quantized.SCHEMES,
        default="int8-weight-only",
        help="scheme of fusedops-quantized (default: %(default)s)",
    )
    parser.add_argument(
        "--layers", action=argparse.BooleanOptionalAction, default=True, help="tell where each model's time goes"
    )
    number = {"type": setting.positive_number, "metavar": "X"}
    parser.add_argument("--rate", **number, help="requests a second (default: all at once)")
    parser.add_argument("--page-size", type=setting.positive, default=16, metavar="N", help="tokens (default: 16)")
    parser.add_argument(
        "--batch-tokens",
        type=setting.positive,
        default=512,
        metavar="N",
        help="the most tokens that a step of continuous batching computes, in all ways (default: 512)",
    )
    parser.add_argument("--rounds", type=setting.positive, default=1, metavar="N", help="all ways in each (default: 1)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of all that is drawn (default: 0)")
    parser.add_argument("--price-per-hour", **number, help="of this machine, for the cost")
    parser.add_argument("--quick", action="store_true", help="6 prompts of 16-128 tokens, 8 new tokens, unless given")
    parser.add_argument("--json", metavar="FILE", help="write a row for each way to a file")
    parser.add_argument(
        "--plot", metavar="FILE.png", help="draw the ways side by side; with --batch also FILE_batch.png"
    )


def _ways(text):
    chosen = text.split(",")
    unknown = [name for name in chosen if name not in serving.WAYS]
    if unknown:
        raise argparse.ArgumentTypeError(f"must be some of {', '.join(serving.WAYS)}, got {unknown[0]!r}")
    return [name for name in serving.WAYS if name in chosen]


def _batches(text):
    found = [setting.positive(part) for part in text.split(",")]
    if len(set(found)) < len(found):
        raise argparse.ArgumentTypeError(f"must be different numbers, got {text!r}")
    return sorted(found)


def run(args):
    """Run the command; 1 where a way cannot run, or where tokens of a patched model differ in float32."""
    console = Console()
    load = setting.load()
    models.require_transformers()
    device, dtype = setting.place(args)
    _check_outputs(args)
    _fill_in(args)
    loaded = _loaded(args, device, dtype, console)
    batches = args.batch or [args.prompts]
    text = _text(loaded, args.seed)
    requests = traffic.make_requests(text, batches[-1], args.prompt_tokens, args.new_tokens, args.seed, args.rate)
    longest = _longest(loaded.model, requests)
    environment = setting.environment(device, dtype, load)
    setting.describe(environment, console)
    ways = {name: _named(serving.WAYS[name], args.quantize) for name in args.ways or serving.WAYS}
    served_by = _models(loaded, ways, args.quantize, console)
    with console.step("Copying, for its bandwidth"):
        bandwidth = byte_bound.bandwidth(device)
    settings = serving.Settings(args.page_size, args.batch_tokens, _pad_token(loaded.tokenizer), longest)
    rows, failed = [], []
    for batch in batches:
        some = requests[:batch]
        console.line(f"\n{loaded.name}, {environment['dtype']}: {in_words(args, some)}")
        runs, cannot = _run_ways(served_by, ways, some, settings, args.rounds, console)
        found = _rows(args, loaded.name, some, runs, ways, environment)
        for row, name in zip(found, runs, strict=True):
            read = byte_bound.weight_bytes(served_by[_kind(ways[name])][0])
            row |= byte_bound.figures(row, read, row["kv"]["median_used_bytes"], bandwidth)
        if found:
            others = [serving.WAYS[name].label for name in (REFERENCE, PEER)]
            serving_tables.print_tables(found, others, measure.PeakMemory(device).describe(), console)
        rows, failed = rows + found, failed + cannot
    if rows and args.layers:
        _profile(rows, served_by, requests, console)
    if args.json:
        write_json(args.json, rows)
    if args.plot and rows:
        serving_plot.draw(rows, args.plot)
    return int(bool(failed) or _patched_differ(rows))


def _loaded(args, device, dtype, console):
    """The model; of a config.json, or a directory that holds no weights beside it, one with random weights."""
    source = args.model
    if source is not None and os.path.isdir(source) and not _has_weights(source):
        source = os.path.join(source, "config.json")
    if source is not None and os.path.isfile(source):
        return models.of_config(source, device, dtype, console, args.seed)
    return models.load(source, device, dtype, console)


def _has_weights(folder):
    return any(name.endswith((".safetensors", ".bin", ".index.json")) for name in os.listdir(folder))


def _text(loaded, seed):
    """Token ids that prompts are cut from."""
    if loaded.tokenizer is None:
        return traffic.drawn_tokens(loaded.model.config.get_text_config().vocab_size, seed)
    return traffic.text_tokens(loaded.tokenizer)


def _named(way, scheme):
    """A quantised way's label ends with the scheme."""
    return replace(way, label=f"{way.label} {scheme}") if way.quantized else way


def _kind(way):
    """Which model a way is served by."""
    return QUANTIZED if way.quantized else PATCHED if way.patched else AS_IS


def _models(loaded, ways, scheme, console):
    """(model, handle of its patch or None) of each kind that the ways need; all share weights where these are equal."""
    kinds = {_kind(way) for way in ways.values()}
    made = {AS_IS: (loaded.model, None)}
    if PATCHED in kinds:
        made[PATCHED] = setting.patched_twin(loaded.model, console)
    if QUANTIZED in kinds:
        wanted = SimpleNamespace(sparsify=None, quantize=scheme, output_head=None)
        made[QUANTIZED] = quantized.twin(loaded, wanted, console)[:2]
    return made


def _profile(rows, served_by, requests, console):
    """Tell where the time of each model that ran goes, and add it to the first of its rows."""
    prompt = sorted((request.prompt for request in requests), key=len)[len(requests) // 2]
    for kind, (model, _) in served_by.items():
        row = next((row for row in rows if row["model_is"] == kind), None)
        if row is None:
            continue
        try:
            told = layers.profile(model, prompt, PROFILED_STEPS)
        except Exception as error:  # a model's own forward may want more than tokens
            console.line(f"where the time of {kind} goes cannot be told: {type(error).__name__}: {first_line(error)}")
            continue
        row["layers"] = {"prompt_tokens": len(prompt), **told}
        serving_tables.print_layers(f"{kind}, {len(prompt)} tokens and then one at a time,", told, console)


def _check_outputs(args):
    for path in (args.json, args.plot):
        check_output(path)
    if args.plot and not args.plot.endswith(".png"):
        raise CommandError(f"--plot must be a file that ends with .png, got {args.plot}")
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        raise CommandError("--plot needs matplotlib: pip install 'fusedops[bench]'")


def _fill_in(args):
    """Give the arguments that were not given their values, which depend on --quick."""
    for name, value in (QUICK if args.quick else USUAL).items():
        if getattr(args, name) is None:
            setattr(args, name, value)


def _longest(model, requests):
    """Tokens of the longest request, which the model must have room for."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = max(len(request.prompt) + request.new_tokens for request in requests)
    if limit is not None and longest > limit:
        raise CommandError(f"prompt and new tokens must fit into the model's {limit} positions, got {longest}")
    return longest


def _pad_token(tokenizer):
    """A token that exists; what it is makes no difference, its places are masked."""
    if tokenizer is None:
        return 0
    return next((token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if token is not None), 0)


def in_words(args, requests):
    """The requests and the engine's settings as text."""
    arrive = f"{args.rate:g} requests/s arrive" if args.rate else "all arrive at once"
    return (
        f"{len(requests)} prompts of {traffic.in_words(args.prompt_tokens)} tokens "
        f"({sum(len(request.prompt) for request in requests)} in all), {traffic.in_words(args.new_tokens)} new tokens "
        f"each ({sum(request.new_tokens for request in requests)} in all), seed {args.seed}, {arrive}; "
        f"pages of {args.page_size} tokens, steps of at most {args.batch_tokens} tokens"
    )


def _run_ways(served_by, ways, requests, settings, rounds, console):
    """Runs of each way by name, a run a round; and names of ways that cannot run, which was said.

    After a warm-up of each, every round goes through the ways, first to last and then last to first.
    """
    runs, failed = {}, []
    for name, way in ways.items():
        try:
            serving.timed(way, *served_by[_kind(way)], traffic.warm_up(requests), settings)
            runs[name] = []
        except Exception as error:  # models and engines refuse each other with many types; the other ways go on
            failed.append(name)
            console.line(f"{way.label} cannot run: {type(error).__name__}: {first_line(error)}")
    for done in range(rounds):
        for name in list(runs) if done % 2 == 0 else list(reversed(runs)):
            way = ways[name]
            with console.step(way.label + (f", round {done + 1} of {rounds}" if rounds > 1 else "")):
                runs[name].append(serving.timed(way, *served_by[_kind(way)], requests, settings))
    return runs, failed


def _rows(args, model_name, requests, runs, ways, environment):
    """One row a way: what was asked, what came out, and on which machine."""
    workload = {
        "model": model_name, "prompts": len(requests), "prompt_tokens": args.prompt_tokens,
        "new_tokens": args.new_tokens, "rate": args.rate, "seed": args.seed, "page_size": args.page_size,
        "batch_tokens": args.batch_tokens, "rounds": args.rounds, "price_per_hour": args.price_per_hour,
    }  # fmt: skip
    rows = []
    for name, of_way in runs.items():
        way, right = ways[name], runs[REFERENCE][0] if REFERENCE in runs else None
        mismatch = serving_figures.first_mismatch(of_way, right) if right else None
        rows.append(
            {
                "op": "model",
                "shape": f"{model_name}, {in_words(args, requests)}",
                "dtype": environment["dtype"],
                "timed": way.label,
                "patched": way.patched,
                "quantized": args.quantize if way.quantized else None,
                "model_is": _kind(way),
                **serving_figures.summarise(requests, of_way, args.price_per_hour),
                "times_as_fast_as": {
                    serving.WAYS[other].label: serving_figures.times_as_fast(of_way, runs[other])
                    for other in (REFERENCE, PEER)
                    if other in runs
                },
                "tokens_equal": mismatch is None if right else None,
                "leading_tokens_equal": serving_figures.leading_equal(of_way, right) if right else None,
                "mismatch": mismatch,
                "calls": of_way[-1].calls,
                "left_fused_path": of_way[-1].left,
                "workload": workload,
                "environment": environment,
            }
        )
    return rows


def _patched_differ(rows):
    """Whether a patched model's tokens differ where they must not: 16-bit ties may fall either way."""
    judged = (row for row in rows if row["patched"] and not row["quantized"] and row["dtype"] == "float32")
    return any(row["tokens_equal"] is False for row in judged)
