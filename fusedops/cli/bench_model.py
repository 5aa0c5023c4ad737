"""Serve requests of mixed lengths through one model in several ways, side by side, and compare speed, memory and cost.

One by one and in a padded batch with ``generate``, and with transformers' continuous batching; each of the model as it
is, and of a patched one that shares its weights.
"""

import argparse
import importlib.util

from fusedops.cli import measure, models, serving, serving_figures, serving_plot, setting, traffic
from fusedops.cli.console import CommandError, Console, check_output, first_line, write_json

MIB = 2**20
REFERENCE, PEER = "one-by-one", "transformers-paged"
USUAL = {"prompts": 32, "prompt_tokens": (16, 512), "new_tokens": (64, 64)}
QUICK = {"prompts": 6, "prompt_tokens": (16, 128), "new_tokens": (8, 8)}


def add_arguments(parser):
    """Declare the command's arguments."""
    setting.add_arguments(parser)
    span = {"type": traffic.span, "metavar": "N|LOW-HIGH"}
    parser.add_argument("--prompts", type=setting.positive, metavar="N", help="requests (default: 32)")
    parser.add_argument("--prompt-tokens", **span, help="length of each prompt (default: 16-512)")
    parser.add_argument("--new-tokens", **span, help="tokens that each request wants (default: 64)")
    parser.add_argument("--ways", type=_ways, metavar="WAY,...", help=f"default: {','.join(serving.WAYS)}")
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
    parser.add_argument("--plot", metavar="FILE.png", help="draw the ways side by side")


def _ways(text):
    chosen = text.split(",")
    unknown = [name for name in chosen if name not in serving.WAYS]
    if unknown:
        raise argparse.ArgumentTypeError(f"must be some of {', '.join(serving.WAYS)}, got {unknown[0]!r}")
    return [name for name in serving.WAYS if name in chosen]


def run(args):
    """Run the command; 1 where a way cannot run, or where tokens of a patched model differ in float32."""
    console = Console()
    load = setting.load()
    models.require_transformers()
    device, dtype = setting.place(args)
    _check_outputs(args)
    _fill_in(args)
    loaded = models.load(args.model, device, dtype, console)
    text = traffic.text_tokens(loaded.tokenizer)
    requests = traffic.make_requests(text, args.prompts, args.prompt_tokens, args.new_tokens, args.seed, args.rate)
    _check_lengths(loaded.model, requests)
    environment = setting.environment(device, dtype, load)
    setting.describe(environment, console)
    console.line(f"{loaded.name}, {environment['dtype']}: {in_words(args, requests)}")
    chosen = {name: serving.WAYS[name] for name in args.ways or serving.WAYS}
    settings = serving.Settings(args.page_size, args.batch_tokens, _pad_token(loaded.tokenizer))
    runs, failed = _run_ways(loaded.model, chosen, requests, settings, args.rounds, console)
    rows = _rows(args, loaded.name, requests, runs, environment)
    if rows:
        _print_tables(rows, measure.PeakMemory(device).describe(), console)
    if args.json:
        write_json(args.json, rows)
    if args.plot and rows:
        serving_plot.draw(rows, args.plot)
    return int(bool(failed) or _patched_differ(rows))


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


def _check_lengths(model, requests):
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = max(len(request.prompt) + request.new_tokens for request in requests)
    if limit is not None and longest > limit:
        raise CommandError(f"prompt and new tokens must fit into the model's {limit} positions, got {longest}")


def _pad_token(tokenizer):
    """A token that exists; what it is makes no difference, its places are masked."""
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


def _run_ways(model, ways, requests, settings, rounds, console):
    """Runs of each way by name, a run a round; and names of ways that cannot run, which was said.

    After a warm-up of each, every round goes through the ways, first to last and then last to first.
    """
    any_patched = any(way.patched for way in ways.values())
    served_by = {False: (model, None), True: setting.patched_twin(model, console) if any_patched else None}
    runs, failed = {}, []
    for name, way in ways.items():
        try:
            serving.timed(way, *served_by[way.patched], traffic.warm_up(requests), settings)
            runs[name] = []
        except Exception as error:  # models and engines refuse each other with many types; the other ways go on
            failed.append(name)
            console.line(f"{way.label} cannot run: {type(error).__name__}: {first_line(error)}")
    for done in range(rounds):
        for name in list(runs) if done % 2 == 0 else list(reversed(runs)):
            way = ways[name]
            with console.step(way.label + (f", round {done + 1} of {rounds}" if rounds > 1 else "")):
                runs[name].append(serving.timed(way, *served_by[way.patched], requests, settings))
    return runs, failed


def _rows(args, model_name, requests, runs, environment):
    """One row a way: what was asked, what came out, and on which machine."""
    workload = {
        "model": model_name, "prompts": args.prompts, "prompt_tokens": args.prompt_tokens,
        "new_tokens": args.new_tokens, "rate": args.rate, "seed": args.seed, "page_size": args.page_size,
        "batch_tokens": args.batch_tokens, "rounds": args.rounds, "price_per_hour": args.price_per_hour,
    }  # fmt: skip
    rows = []
    for name, of_way in runs.items():
        mismatch = None
        if REFERENCE in runs:
            mismatch = serving_figures.first_mismatch(of_way, runs[REFERENCE][0])
        rows.append(
            {
                "op": "model",
                "shape": f"{model_name}, {in_words(args, requests)}",
                "dtype": environment["dtype"],
                "timed": serving.WAYS[name].label,
                "patched": serving.WAYS[name].patched,
                **serving_figures.summarise(requests, of_way, args.price_per_hour),
                "times_as_fast_as": {
                    serving.WAYS[other].label: serving_figures.times_as_fast(of_way, runs[other])
                    for other in (REFERENCE, PEER)
                    if other in runs
                },
                "tokens_equal": mismatch is None if REFERENCE in runs else None,
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
    return any(row["patched"] and row["tokens_equal"] is False and row["dtype"] == "float32" for row in rows)


def _print_tables(rows, peak_is, console):
    """Print what the ways achieve, a line each."""
    others = [serving.WAYS[name].label for name in (REFERENCE, PEER)]
    speed, waits, memory = [], [], []
    for row in rows:
        ratios = [_number(row["times_as_fast_as"].get(label), 1, 2) for label in others]
        per_million, per_request = row["cost"]["per_million_tokens"], row["cost"]["per_request"]
        rates = [_number(row[name], 1, digits) for name, digits in (("seconds", 1), ("requests_per_minute", 1))]
        speed.append(
            [row["timed"], *rates, _number(row["tokens_per_second"], 1, 1), *ratios, _number(per_million, 1, 2),
             _number(per_request, 1, 6), {None: "-", True: "equal", False: "differ"}[row["tokens_equal"]]]
        )  # fmt: skip
        cells = [row["timed"]]
        for name, factor, digits in (("first_token", 1, 2), ("between_tokens", 1e3, 0), ("end_to_end", 1, 2)):
            cells += [_number(row[name][share], factor, digits) for share in ("p50", "p95")]
        waits.append(cells)
        held = [_number(row["kv"]["held_over_used"], 1, 3), _number(row["kv"]["peak_held_bytes"], 1 / MIB, 1)]
        memory.append(
            [row["timed"], *held, _number(row["pool_bytes"], 1 / MIB, 1), _number(row["peak_bytes"], 1 / MIB, 0)]
        )
    header = ("", "s", "requests/min", "tokens/s", *(f"x {label}" for label in others), "cost per 1M tokens",
              "per request", "tokens")  # fmt: skip
    shares = [f"{name} {share}" for name in ("first, s", "between, ms", "whole, s") for share in ("p50", "p95")]
    console.line()
    console.table("Generated tokens, throughput and cost; tokens compared with one by one", header, speed)
    console.table("Time to the first token, between tokens, to the last token", ("", *shares), waits)
    header = ("", "held / used", "most held, MiB", "pool, MiB", f"{peak_is}, MiB")
    console.table("KV cache: bytes held over bytes of live tokens; memory", header, memory)
    for row in rows:
        if row["mismatch"]:
            first, differing = row["mismatch"]
            console.line(f"{row['timed']}: {differing} answers differ from one by one, first {first}")
        if row["calls"]:
            calls = ", ".join(f"{op} ({how}) {count}" for op, how, count in row["calls"])
            console.line(f"{row['timed']} ran {calls}")
        for where, reason, count in row["left_fused_path"]:
            console.line(f"{row['timed']}: {where} left the fused path {count} times: {reason}")


def _number(value, factor, digits):
    return "-" if value is None else f"{value * factor:.{digits}f}"
