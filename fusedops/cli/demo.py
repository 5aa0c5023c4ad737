"""Watch a real language model answer through the fused operators, and compare its speed without them.

With ``--sparsify`` and ``--quantize`` the model that answers is pruned and quantised too, and its speed stands beside
that of the others.
"""

import argparse

from fusedops.cli import models, quantized, setting
from fusedops.cli.console import Console, check_output, write_json

PROMPT = "What is the capital of France?"
MIB = 2**20
# (key of measure.summarise, label, factor, digits)
ROWS = (
    ("first_token", "time to first token, ms", 1e3, 1),
    ("between_tokens", "time between tokens, median, ms", 1e3, 2),
    ("between_tokens_p95", "time between tokens, 95 % are below, ms", 1e3, 2),
    ("tokens_per_second", "tokens per second", 1, 2),
)


def add_arguments(parser):
    """Declare the command's arguments."""
    setting.add_arguments(parser)
    parser.add_argument("--prompt", default=PROMPT, metavar="TEXT", help=f"default: {PROMPT!r}")
    parser.add_argument(
        "--max-new-tokens",
        type=setting.positive,
        default=64,
        metavar="N",
        help="length limit of the answer, and of each timed run",
    )
    parser.add_argument(
        "--rounds", type=setting.positive, default=6, metavar="N", help="timed rounds, unpatched and patched in each"
    )
    parser.add_argument(
        "--quantize",
        choices=quantized.SCHEMES,
        help="quantise the linear layers too; --dtype auto is then bfloat16, with the float32 model as a comparison",
    )
    parser.add_argument(
        "--output-head", action=argparse.BooleanOptionalAction,
        help="with --quantize: the output head too, and the embedding that shares its weight "
        f"(by default with {', '.join(quantized.WITH_HEAD)}, whose perplexity stays within 0.5 %% of float32's)",
    )  # fmt: skip
    parser.add_argument(
        "--sparsify", nargs="?", const=quantized.METHODS[0], choices=quantized.METHODS, metavar="METHOD",
        help="keep 2 of every 4 weights of the MLPs, by wanda (default, calibrated on Python's reference) or "
        "magnitude; --dtype auto as with --quantize, int8 and fp8 of which go with it",
    )  # fmt: skip
    parser.add_argument(
        "--no-compare", action="store_true", help="only the answer, without the unpatched model and the timing"
    )
    parser.add_argument("--json", metavar="FILE", help="write everything that was measured to a file")


def run(args):
    """Run the command; 1 where the greedy tokens of the patched model differ in float32."""
    import torch

    console = Console()
    load = setting.load()
    models.require_transformers()
    name = quantized.name_of(args)
    device, dtype = setting.place(args, cpu_dtype="bfloat16" if name else "float32")
    check_output(args.json)
    loaded = models.load(args.model, device, dtype, console)
    inputs = models.encode(loaded, args.prompt)
    environment = setting.environment(device, dtype, load)
    setting.describe(environment, console)
    shown = {"unpatched": loaded.model}
    shown["patched"], handle = setting.patched_twin(loaded.model, console)
    handles = [handle]
    result = {"model": loaded.name, "prompt": args.prompt, **environment}
    result["replaced"] = dict(handle.report.counts)
    if name:
        shown[name], handle, result[name] = quantized.twin(loaded, args, console)
        handles.append(handle)
    result["answer"], answer_tokens = _answer(loaded, list(shown.values())[-1], inputs, args, console)
    status = 0
    if not args.no_compare:
        if name and loaded.model.dtype != torch.float32:
            shown = {"float32": models.load(args.model, device, torch.float32, console).model, **shown}
        result.update(_compare(loaded, shown, inputs, args, answer_tokens, console))
        if name:
            quantized.compare(result, name, console)
        status = int(result["dtype"] == "float32" and not result["tokens"]["equal"])
    _print_implementations(result, handles, console)
    if args.json:
        write_json(args.json, result)
    return status


def _answer(loaded, model, inputs, args, console):
    """Stream a model's answer; return its text and tokens."""
    from transformers import TextStreamer

    from fusedops.cli import measure

    console.line(f"\n> {args.prompt}\n")
    show = TextStreamer(loaded.tokenizer, skip_prompt=True, skip_special_tokens=True)
    answer = measure.generate(model, inputs, args.max_new_tokens, show=show)
    console.line()
    return loaded.tokenizer.decode(answer.tokens, skip_special_tokens=True), answer.tokens


def _compare(loaded, shown, inputs, args, answer_tokens, console):
    """Time all models, print the table and return its numbers; the last model gave the answer."""
    from fusedops.cli import measure

    *others, last = shown
    compared = [name for name in others if name != "float32"]
    answers = {name: measure.generate(shown[name], inputs, args.max_new_tokens).tokens for name in compared}
    answers[last] = answer_tokens
    what = f"Timing {args.rounds} rounds of {args.max_new_tokens} tokens, {', '.join(others)} and {last} in turn"
    with console.step(what) as show:
        runs = measure.alternate(
            shown, inputs, args.max_new_tokens, args.rounds, lambda done: show(f"{done} of {args.rounds} done")
        )
    summary = {name: measure.summarise(of_name) for name, of_name in runs.items()}
    ratio = {name: measure.ratios(runs[name], runs[last]) for name in others}
    memory = measure.PeakMemory(loaded.model.device).describe()
    _print_table(loaded, summary, ratio, memory, inputs, console)
    both = {name: runs[name] for name in ("unpatched", "patched")}
    tokens = _agreement(answers["unpatched"], answers["patched"], both)
    console.line(tokens["text"])
    timed = {name: [[run.first, *run.intervals] for run in of_name] for name, of_name in runs.items()}
    return {
        "summary": summary, "ratio": measure.ratios(*both.values()), "tokens": tokens, "peak_memory_is": memory,
        "seconds_per_token": timed, "times_as_fast_as": ratio, "answers": answers,
    }  # fmt: skip


def _print_table(loaded, summary, ratio, memory, inputs, console):
    """Print the models side by side; where a ratio is above 1, the last one is faster than that other."""
    rows = []
    for key, label, factor, digits in ROWS:
        values = [one[key] for one in summary.values()]
        cells = ["-" if value is None else f"{value * factor:.{digits}f}" for value in values]
        rows.append([label, *cells, *("" if one.get(key) is None else f"{one[key]:.2f}" for one in ratio.values())])
    rows.append([f"{memory}, MiB", *(f"{one['peak_bytes'] / MIB:.0f}" for one in summary.values()), *[""] * len(ratio)])
    dtype = str(loaded.model.dtype).removeprefix("torch.")
    title = f"{loaded.name}, {dtype}, {loaded.model.device.type}, prompt of {inputs['input_ids'].shape[-1]} tokens"
    compared = ["times as fast"] if len(ratio) == 1 else [f"times as fast as {name}" for name in ratio]
    console.line()
    console.table(title, ("", *summary, *compared), rows)


def _agreement(unpatched_answer, patched_answer, runs):
    """Whether all greedy tokens agree, and where they first do not."""
    from fusedops.cli import measure

    reference = runs["unpatched"][0].tokens
    texts = []
    index = measure.first_difference(unpatched_answer, patched_answer)
    if index is not None:
        texts.append(f"the answers differ from token {index} on")
    for name, of_name in runs.items():
        for number, run in enumerate(of_name, 1):
            index = measure.first_difference(reference, run.tokens)
            if index is not None:
                texts.append(f"{name} run {number} differs from token {index} on")
    text = "; ".join(texts) or f"equal, {len(patched_answer)} of the answer and {len(reference)} of each timed run"
    return {"equal": not texts, "text": f"Greedy tokens: {text}."}


def _print_implementations(result, handles, console):
    """Print which implementation ran each operator, and every call that did not reach a fused one."""
    from fusedops._core import dispatch

    rows = [[*key, count] for key, count in sorted(dispatch.counters().items())]
    if rows:
        console.line()
        console.table("What ran", ("operator", "implementation", "calls"), rows)
    left = [[operator, reason, count] for (operator, reason), count in dispatch.fallbacks().items()]
    left += [[path, reason, count] for one in handles for (path, reason), count in one.fallbacks().items()]
    for where, reason, count in left:
        console.line(f"{where} left the fused path {count} times: {reason}")
    result["calls"] = rows
    result["left_fused_path"] = left
