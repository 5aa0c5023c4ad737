"""What `fusedops bench model` prints of its rows."""

MIB = 2**20
SMALL_LAYER = 0.01  # of the time of both passes: below, layers stand together in one line
SHARES = ("p50", "p95", "p99")


def print_tables(rows, others, peak_is, console):
    """Print what the ways achieve, a line each.

    Args:
        rows: Of one set of requests.
        others: Labels of the ways that all are compared with.
        peak_is: What the peak memory is of, in words.
        console: To print to.
    """
    speed, waits, memory = [], [], []
    for row in rows:
        ratios = [_number(row["times_as_fast_as"].get(label), 1, 2) for label in others]
        per_million, per_request = row["cost"]["per_million_tokens"], row["cost"]["per_request"]
        rates = [_number(row[name], 1, digits) for name, digits in (("seconds", 1), ("requests_per_minute", 1))]
        speed.append(
            [row["timed"], *rates, _number(row["tokens_per_second"], 1, 1), *ratios, _number(per_million, 1, 2),
             _number(per_request, 1, 6), _agreement(row)]
        )  # fmt: skip
        cells = [row["timed"]]
        for name, factor, digits in (("first_token", 1, 2), ("between_tokens", 1e3, 1), ("end_to_end", 1, 2)):
            cells += [_number(row[name][share], factor, digits) for share in SHARES]
        waits.append(cells)
        held = [_number(row["kv"]["held_over_used"], 1, 3), _number(row["kv"]["peak_held_bytes"], 1 / MIB, 1)]
        least = [_number(row["least_bytes_per_step"], 1 / MIB, 1), _number(row["share_of_copy_bandwidth"], 100, 0)]
        pool = [_number(row["pool_bytes"], 1 / MIB, 1), _number(row["peak_bytes"], 1 / MIB, 0)]
        memory.append([row["timed"], *held, *pool, *least])
    header = ("", "s", "requests/min", "tokens/s", *(f"x {label}" for label in others), "cost per 1M tokens",
              "per request", "tokens")  # fmt: skip
    shares = [f"{name} {share}" for name in ("first, s", "between, ms", "whole, s") for share in SHARES]
    console.line()
    console.table("Generated tokens, throughput and cost; tokens compared with one by one", header, speed)
    console.table("Time to the first token, between tokens, to the last token", ("", *shares), waits)
    header = ("", "held / used", "most held, MiB", "pool, MiB", f"{peak_is}, MiB", "read a step, MiB", "% of BW*")
    title = (
        "KV cache: bytes held over bytes of live tokens; memory; the least a step reads (weights, live keys and "
        f"values), over its median time, of BW* {rows[0]['copy_bandwidth'] / 1e9:.1f} GB/s, a copy's"
    )
    console.table(title, header, memory)
    for row in rows:
        if row["mismatch"]:
            first, differing = row["mismatch"]
            console.line(f"{row['timed']}: {differing} answers differ from one by one, first {first}")
        if row["calls"]:
            calls = ", ".join(f"{op} ({how}) {count}" for op, how, count in row["calls"])
            console.line(f"{row['timed']} ran {calls}")
        for where, reason, count in row["left_fused_path"]:
            console.line(f"{row['timed']}: {where} left the fused path {count} times: {reason}")


def _agreement(row):
    if row["quantized"] and row["tokens_equal"] is False:
        return f"{row['leading_tokens_equal']:.0%} as before"
    return {None: "-", True: "equal", False: "differ"}[row["tokens_equal"]]


def print_layers(name, told, console):
    """Print where the time of one model's passes goes.

    Args:
        name: What the model is called.
        told: What `fusedops.cli.layers.profile` returns.
        console: To print to.
    """
    prefill, step = told["prefill"], told["step"]
    first = {row["layer"]: row for row in prefill["layers"]}
    later = {row["layer"]: row for row in step["layers"]}
    lines, small = [], [0.0, 0.0]
    for layer in dict.fromkeys((*later, *first)):
        seconds = [found[layer]["seconds"] if layer in found else 0.0 for found in (first, later)]
        shares = [part / whole["seconds"] for part, whole in zip(seconds, (prefill, step), strict=True)]
        if max(shares) < SMALL_LAYER:
            small = [a + b for a, b in zip(small, seconds, strict=True)]
            continue
        row = later.get(layer) or first[layer]
        ours = ", ".join(f"{op} ({how})" for op, how, _ in row["operators"]) or "-"
        lines.append([layer, row["calls"], *_cells(seconds, prefill, step), ours])
    lines.append(["below 1 % each", "", *_cells(small, prefill, step), ""])
    lines.append(["all", "", *_cells([prefill["seconds"], step["seconds"]], prefill, step), ""])
    not_ours = [f"{told[part]['share_not_ours']:.0%}" for part in ("prefill", "step")]
    console.line()
    console.table(
        f"Where the time of {name} goes: each kind of layer without those in it, and our operators that ran in it",
        ("", "a step", "prompt, ms", "%", "step, ms", "%", "ours"), lines,
    )  # fmt: skip
    console.line(
        f"Layers in which no operator of ours ran: {not_ours[0]} of the prompt's time, {not_ours[1]} of a step's. "
        f"With nobody watching, the prompt took {prefill['unwatched_seconds'] * 1e3:.1f} ms and a step "
        f"{step['unwatched_seconds'] * 1e3:.1f} ms."
    )


def _cells(seconds, *wholes):
    pairs = zip(seconds, wholes, strict=True)
    return [text for part, whole in pairs for text in (f"{part * 1e3:.2f}", f"{part / whole['seconds'] * 100:.0f}")]


def _number(value, factor, digits):
    return "-" if value is None else f"{value * factor:.{digits}f}"
