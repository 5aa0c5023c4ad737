"""Results into words: write the tables of README.md and of docs/ from benchmarks/results/.

    python benchmarks/report.py            # write the tables anew
    python benchmarks/report.py --check    # exit status 1 where a table is not what the rows say
    python benchmarks/report.py --plots    # draw docs/images/*.png of every GPU first (needs matplotlib)

A table stands between two comments, ``<!-- results: NAME -->`` and ``<!-- results end -->``; the rest of a page is
written by hand. Of rows about the same operator, shape, dtype and device the newest counts.
"""

import argparse
import ast
import json
import re
import sys

from _rows import EAGER, ON_DEVICE, ROOT, error, goal, microseconds, ratio, share

RESULTS = ROOT / "benchmarks/results"
SERVING = RESULTS / "serving"  # what `fusedops bench model --json` wrote
ACCURACY = RESULTS / "accuracy"  # what `fusedops bench accuracy --json` wrote
DEMO = RESULTS / "demo"  # what `fusedops demo --json` wrote with --quantize or --sparsify
WITH_TABLES = ("performance", "serving", "quantization", "sparsity")
PAGES = ROOT / "README.md", *(ROOT / f"docs/{name}.md" for name in WITH_TABLES)
IMAGES = ROOT / "docs/images"
BLOCK = re.compile(r"(<!-- results: (\w+) -->\n).*?(<!-- results end -->)", re.DOTALL)
PACKAGE = ROOT / "fusedops/__init__.py"
OPS, UNTIMED = "fusedops.ops.", ("is_24",)  # the folders of operators; what only looks at a weight
NOTHING = "No GPU has been measured yet, so there is no figure.\n"
MIB = 2**20
NAMED = {"quantized": "quantised", "sparse": "sparse"}  # models of `fusedops demo`, as its JSON and as pages name them

# What the README shows, on a GPU: (operator, shape, dtype)
HEADLINES = (
    ("attention", "4x4096x32/8x128 causal", "bfloat16"),
    ("attention", "1x16384x32/8x128 causal", "bfloat16"),
    ("attention", "4x4096x32/8x64 causal", "bfloat16"),
    ("attention", "4x4096x16/4x256 causal", "bfloat16"),
    ("attention", "4x4096x32/8x128 causal", "float8_e4m3fn"),
    ("attention", "16x1:32768x32/8x128", "bfloat16"),
    ("rms_norm", "8192x4096", "bfloat16"),
    ("add_rms_norm", "8192x4096", "bfloat16"),
    ("layer_norm", "8192x4096", "bfloat16"),
    ("add_layer_norm", "8192x4096", "bfloat16"),
    ("silu_mul", "8192x14336", "bfloat16"),
    ("gelu_mul", "8192x14336", "bfloat16"),
    ("rotary", "1x4096x32/8x128", "bfloat16"),
    ("rms_norm", "1x4096", "bfloat16"),
)


def load(folder):
    """The newest row of each operator, shape, dtype, way of timing and device, in the order of the files."""
    rows = {}
    for path in sorted([*folder.glob("*.json"), *folder.glob("*/rows.json")]):
        for row in json.loads(path.read_text()):
            key = row["environment"]["device"], row["op"], row["shape"], row["dtype"], row["timed"]
            if key not in rows or rows[key]["environment"]["date"] <= row["environment"]["date"]:
                rows[key] = row
    return list(rows.values())


def on_a_gpu(row):
    return "capability" in row["environment"]


def devices(rows):
    """Device to its rows, GPUs first."""
    found = {}
    for row in sorted(rows, key=lambda row: not on_a_gpu(row)):
        found.setdefault(row["environment"]["device"], []).append(row)
    return found


def runs(rows):
    """The different environments of rows as text: everything that a figure depends on, and what the device reached."""
    found = {}
    for row in rows:
        about = row["environment"]
        parts = [about["device"]]
        parts += [f"{about['threads']} threads"] if about.get("threads") else []
        parts += [f"{name} {about[name]}" for name in ("driver", "torch", "triton") if about.get(name)]
        parts += [f"commit {about['commit']}", about["date"][:10]]
        found.setdefault(", ".join(parts), []).append(row)
    return [line + ceilings([row for row in group if row.get("copy_bandwidth")]) for line, group in found.items()]


def ceilings(rows):
    """BW* and TC* of rows as text; several processes measured them several times."""
    if not rows:
        return ""
    bandwidth = between([row["copy_bandwidth"] / 1e12 for row in rows], 2)
    rate = between([row["matmul_rate"] / 1e12 for row in rows], 0)
    return f"; BW\\* {bandwidth} TB/s, TC\\* {rate} TFLOP/s"


def between(values, digits):
    low, high = f"{min(values):.{digits}f}", f"{max(values):.{digits}f}"
    return low if low == high else f"{low} to {high}"


def markdown(header, lines):
    """A table; the first columns are text, and what `header` ends in ":" is a number."""
    rule = ["---:" if name.endswith(":") else "---" for name in header]
    rows = [[name.rstrip(":") for name in header], rule, *lines]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def summary(rows):
    """README's table: the headlines of every GPU that was measured, on the device's clock."""
    text = ""
    for found in devices([row for row in rows if on_a_gpu(row)]).values():
        by_key = {(row["op"], row["shape"], row["dtype"]): row for row in found if row["timed"] == ON_DEVICE}
        shown = [by_key[key] for key in HEADLINES if key in by_key]
        lines = [headline(key, by_key.get(key)) for key in HEADLINES]
        header = ("operator", "shape", "dtype", "µs:", "reached:", "fastest other", "µs:", "times as fast:", "error:")
        text += "\n".join([markdown(header, lines), *(f"{line}.  " for line in runs(shown)), "", unmeasured(found)])
    return text or NOTHING


def operators():
    """Public names of the operators that benchmarks measure, in the order of ``fusedops/__init__.py``."""
    tree = ast.parse(PACKAGE.read_text())
    imports = [line for line in tree.body if isinstance(line, ast.ImportFrom) and line.module.startswith(OPS)]
    return [alias.name for line in imports for alias in line.names if alias.name not in UNTIMED]


def unmeasured(rows):
    """A sentence on the operators of which a GPU's rows say nothing; empty where there is none."""
    missing = [f"`{name}`" for name in operators() if name not in {row["op"] for row in rows}]
    return f"No figure of this GPU yet: {', '.join(missing)}.\n" if missing else ""


def headline(key, row):
    """One line of the README's table."""
    op, shape, dtype = key
    if row is None:
        return [f"`{op}`", shape, dtype, "no figure", *[""] * 5]
    best = row["peers"].get(row["best_peer"])
    return [
        f"`{op}`", shape, dtype, microseconds(row["seconds"]), share(row).replace("*", "\\*"),
        row["best_peer"] or "none", microseconds(best), ratio(row), error(row),
    ]  # fmt: skip


def tables(rows):
    """Every row of every device, each with all its peers."""
    text = NOTHING + "\n" if not any(map(on_a_gpu, rows)) else ""
    for device, found in devices(rows).items():
        text += f"## {device}\n\n" + "".join(f"- {line}\n" for line in runs(found)) + "\n"
        if on_a_gpu(found[0]) and unmeasured(found):
            text += unmeasured(found) + "\n"
        for path in sorted(IMAGES.glob(f"{slug(device)}_*.png")):
            name = path.stem.removeprefix(slug(device)).strip("_").replace("_", " ")
            text += f"![{name} on {device}](images/{path.name})\n\n"
        for timed in (ON_DEVICE, EAGER):
            lines = [line_of(row) for row in found if row["timed"] == timed]
            if lines:
                header = (
                    "operator",
                    "shape",
                    "dtype",
                    "µs:",
                    "reached:",
                    "goal",
                    "error:",
                    "others, by our time",
                    "runs as",
                )
                text += f"{timed[0].upper()}{timed[1:]}:\n\n{markdown(header, lines)}\n"
    return text


def line_of(row):
    """One line of the page's table, with every peer."""
    others = [f"{name} {seconds / row['seconds']:.2f}" for name, seconds in row["peers"].items()]
    others += [f"{name} left out" for name in row.get("peers_left_out", ())]
    config = row["config"].replace("|", "\\|") if row["config"] else row["backend"]
    return [
        f"`{row['op']}`", row["shape"], row["dtype"], microseconds(row["seconds"]), share(row).replace("*", "\\*"),
        goal(row), error(row), ", ".join(others) or "none", config,
    ]  # fmt: skip


def serving(paths):
    """A table for each run of `fusedops bench model`, a line for each way."""
    text = ""
    for path in paths:
        rows = json.loads(path.read_text())
        header = ("way", "tokens/s:", "times one by one:", "times transformers paged:")
        header += ("first token, s:", "between tokens, ms:", "KV held / used:", "tokens as one by one")
        text += f"{rows[0]['shape']}; {rows[0]['dtype']}. {machine(rows[0]['environment'])}.\n\n"
        text += markdown(header, [line_of_way(row) for row in rows]) + "\n"
    return text


def line_of_way(row):
    """One line of a serving table; two numbers are p50 and p95."""
    times = [f"{row['times_as_fast_as'][name]:.2f}" for name in ("one by one", "transformers paged")]
    first, between_tokens = row["first_token"], row["between_tokens"]
    return [
        row["timed"], f"{row['tokens_per_second']:.1f}", *times, f"{first['p50']:.1f}, {first['p95']:.1f}",
        f"{between_tokens['p50'] * 1e3:.0f}, {between_tokens['p95'] * 1e3:.0f}", f"{row['kv']['held_over_used']:.3f}",
        "all equal" if row["tokens_equal"] else "differ",
    ]  # fmt: skip


def machine(about):
    """Device, versions, commit and date of a command that runs a model, as text."""
    versions = ", ".join(f"{name} {about[name]}" for name in ("torch", "transformers", "commit"))
    threads = f"{about['threads']} thread" + ("s" if about["threads"] > 1 else "")
    return f"{about['device']}, {threads}, {versions}, {about['date'][:10]}"


def accuracy(paths, sparse=False):
    """A table for each run of `fusedops bench accuracy`: the model as it is, and its quantised or its pruned ways."""
    text = ""
    for path in paths:
        told = json.loads(path.read_text())
        rows = [row for row in told["rows"] if is_plain(row) or is_sparse(row) == sparse]
        if all(map(is_plain, rows)):
            continue
        dtype, kind = told["environment"]["dtype"], "pruned" if sparse else "quantised"
        text += (
            f"{told['model']}, {told['tokens']} tokens in windows of {told['window']} of {told['text']['source']} "
            f"(SHA-256 {told['text']['sha256'][:12]}…); {kind} models compute in {dtype}. "
            f"{machine(told['environment'])}.\n\n"
        )
        if sparse:
            text += sparse_table(rows, told["environment"])
            continue
        header = ("weights, activations", "perplexity:", "change:", "goal:", "converted layers, MiB:", "of bfloat16's:")
        text += markdown(header, [line_of_weights(row) for row in rows]) + "\n"
    return text or "Not measured yet.\n"


def is_sparse(row):
    """Whether an accuracy row is of a pruned model."""
    return row.get("scheme", "").startswith("sparse")


def is_plain(row):
    """Whether an accuracy row is of the model as it is."""
    return row.get("scheme", row["label"]) in ("float32", "bfloat16")


def sparse_table(rows, about):
    """The table of pruned models, and a line on how each fine-tuned one was trained."""
    busy = " while other programs were busy" if (about["load"] or 0) > about["cores"] / 2 else ""
    header = ("weights", "perplexity:", "times dense's:", "gap won back:", "goal", "layers:", "MiB:", "of bfloat16's:")
    lines = []
    for row in rows:
        asked, won = row["asked"], row["recovered"]
        value, change, *_, size, share = line_of_weights(row)[1:]
        lines.append([
            row["label"], value, f"{row['change'] + 1:.2f}" if change else "", "" if won is None else f"{won:.0%}",
            f"{asked}: {'met' if row['goal_met'] else 'missed'}" if asked else "",
            "" if row["layers"] is None else str(row["layers"]), size, share,
        ])  # fmt: skip
    text = markdown(header, lines) + "\n"
    for row in rows:
        if row["finetune"]:
            of = row["finetune"]
            first, last = of["losses"][0], sum(of["losses"][-8:]) / len(of["losses"][-8:])
            took = f"{of['seconds'] / 60:.1f} minutes{busy}"
            text += (
                f"{row['label']}: {of['steps']} steps over {of['tokens']} tokens in {took}; "
                f"the loss fell from {first:.2f} to {last:.2f}, the mean of the last 8.\n\n"
            )
    return text


def line_of_weights(row):
    """One line of an accuracy table."""
    goal = "" if row["goal"] is None else f"{row['goal']:.1%}, {'met' if row['goal_met'] else 'missed'}"
    size, whole = row["weight_bytes"], row["weights"]
    return [
        row["label"], "" if row["perplexity"] is None else f"{row['perplexity']:.3f}",
        "" if row["change"] is None else f"{row['change']:+.2%}", goal,
        "" if size is None else f"{size / MIB:.1f}", "" if size is None else f"{size / (2 * whole):.2f}",
    ]  # fmt: skip


def converted_demo(paths, name):
    """A table for each run of `fusedops demo` with a converted model of this name, a line for each model in it."""
    text = ""
    for path in paths:
        told = json.loads(path.read_text())
        if name not in told:
            continue
        of, ratios = told[name], told["times_as_fast_as"]
        what = [f"2:4 on MLPs by {of['method']}"] if of.get("method") else []
        what += [of["scheme"]] if of["scheme"] else []
        text += (
            f"{told['model']} in {told['dtype']}, {', '.join(what)}: {of['layers']} layers converted, "
            f"{of['weight_bytes'] / MIB:.1f} MiB, {of['times_bfloat16']:.2f} of bfloat16's. {machine(told)}.\n\n"
        )
        header = ("model", "first token, ms:", "between tokens, ms:", "tokens/s:", f"{NAMED[name]}, times as fast:")
        lines = []
        for model, one in told["summary"].items():
            ratio = f"{ratios[model]['between_tokens']:.2f}" if model in ratios else ""
            first, between = (f"{one[key] * 1e3:.1f}" for key in ("first_token", "between_tokens"))
            lines.append([model, first, between, f"{one['tokens_per_second']:.1f}", ratio])
        text += markdown(header, lines) + "\n"
    return text or "Not measured yet.\n"


def slug(device):
    """A device's name as part of a file's name."""
    return re.sub(r"[^a-z0-9]+", "_", device.lower()).strip("_")


def updated(text, rows):
    """A page with its tables as the rows say.

    Raises:
        ValueError: the page has no table, or one of an unknown name.
    """
    served = sorted(SERVING.glob("*.json"))
    makers = {"summary": summary, "tables": tables}
    makers |= {"serving": lambda rows: serving(served), "served": lambda rows: serving(served[:1])}
    makers["accuracy"] = lambda rows: accuracy(sorted(ACCURACY.glob("*.json")))
    makers["sparse_accuracy"] = lambda rows: accuracy(sorted(ACCURACY.glob("*.json")), sparse=True)
    for name in NAMED:
        makers[name] = lambda rows, name=name: converted_demo(sorted(DEMO.glob("*.json")), name)
    names = [name for _, name, _ in BLOCK.findall(text)]
    if not names or set(names) - set(makers):
        raise ValueError(f"report: a page must have tables named {' or '.join(makers)}, found {names}")
    return BLOCK.sub(lambda found: found[1] + makers[found[2]](rows) + found[3], text)


def main(argv=None):
    """Write, or check, every page."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 where a page is stale")
    parser.add_argument("--plots", action="store_true", help="draw the plots first")
    args = parser.parse_args(argv)
    rows = load(RESULTS)
    if args.plots:
        from plots import draw

        for device, found in devices([row for row in rows if on_a_gpu(row)]).items():
            for path in draw(found, IMAGES, slug(device)):
                print(f"drew {path.relative_to(ROOT)}")
    stale = 0
    for page in PAGES:
        text = page.read_text()
        if (new := updated(text, rows)) != text:
            stale += 1
            print(f"{page.relative_to(ROOT)} {'is stale: run benchmarks/report.py' if args.check else 'written'}")
            if not args.check:
                page.write_text(new)
    return int(args.check and stale > 0)


if __name__ == "__main__":
    sys.exit(main())
