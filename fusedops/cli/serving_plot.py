"""A picture of the ways to serve side by side: speed, KV memory and latencies. Readable in print."""

from fusedops.cli.measure import percentile

INK = (
    "#8c8c8c", "#4d4d4d", "#e8c468", "#a23b2a", "#c8d5b9", "#7fb7d1", "#e3b5a4", "#d98e04", "#0b4f6c",
)  # fmt: skip
MARKS = "osD^vP<>X"
BOXES = "boxes: the middle half of the requests and their median; lines: 5 % to 95 %; marks: each request"
STYLE = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True}


def draw(rows, path):
    """Draw the rows of `fusedops bench model` and write the PNG file, and ``..._batch.png`` of several batches."""
    batches = list(dict.fromkeys(row["workload"]["prompts"] for row in rows))
    if len(batches) > 1:
        draw_batches(rows, path.removesuffix(".png") + "_batch.png")
    draw_ways([row for row in rows if row["workload"]["prompts"] == batches[-1]], path)


def draw_batches(rows, path):
    """Throughput and time between tokens of each way, by the number of requests at once."""
    import matplotlib
    from matplotlib.figure import Figure

    ways = list(dict.fromkeys(row["timed"] for row in rows))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8.2, 4.2), layout="constrained")
        speed, waits = figure.subplots(1, 2)
        for place, way in enumerate(ways):
            of_way = [row for row in rows if row["timed"] == way]
            batches = [row["workload"]["prompts"] for row in of_way]
            look = {"color": INK[place % len(INK)], "marker": MARKS[place % len(MARKS)], "linewidth": 1.2}
            speed.plot(batches, [row["tokens_per_second"] for row in of_way], label=way, **look)
            between = [(row["between_tokens"]["p50"] or 0) * 1e3 for row in of_way]
            waits.plot(batches, between, **look)
        for axes, label in ((speed, "generated tokens/s"), (waits, "ms between tokens, median")):
            axes.set_xscale("log", base=2)
            axes.set_xticks(batches, batches)
            axes.set_xlabel("requests at once")
            axes.set_ylabel(label)
            axes.set_ylim(bottom=0)
        figure.legend(loc="outside lower center", ncols=3, fontsize=7.5, frameon=False)
        figure.suptitle(_caption(rows[-1:], "each point: one run"), fontsize=7.5)
        figure.savefig(path, dpi=160)


def draw_ways(rows, path):
    """Speed, KV memory and latencies of each way."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8.2, 2.8 + 0.42 * len(rows)), layout="constrained")
        speed, memory, first, whole = figure.subplots(2, 2, sharey=True).flat
        _bars(speed, [row["tokens_per_second"] for row in rows], "generated tokens/s, more is better", "{:.1f}")
        ratios = [row["kv"]["held_over_used"] for row in rows]
        _bars(memory, ratios, "KV bytes held / bytes of live tokens, 1 is best", "{:.2f}")
        memory.axvline(1, color="black", linewidth=0.8)
        _boxes(first, rows, "first_token", "seconds to the first token of a request")
        _boxes(whole, rows, "end_to_end", "seconds to the last token of a request")
        for axes in (speed, first):
            axes.set_yticks(range(len(rows)), [row["timed"] for row in rows])
            axes.set_ylim(len(rows) - 0.5, -0.5)
        figure.suptitle(_caption(rows), fontsize=7.5)
        figure.savefig(path, dpi=160)


def _caption(rows, marks=BOXES):
    about = rows[0]["environment"]
    what, _, engine = rows[0]["shape"].partition("; ")
    return (
        f"{what}\n{rows[0]['dtype']}, {engine}, {about['date'][:10]}\n"
        f"{about['device']}, {about['threads']} threads, torch {about['torch']}, transformers {about['transformers']}\n"
        f"{marks}"
    )


def _bars(axes, values, label, form):
    there = [(place, value) for place, value in enumerate(values) if value is not None]
    for place, value in there:
        axes.barh(place, value, 0.6, color=INK[place % len(INK)], edgecolor="black", linewidth=0.5)
        axes.annotate(form.format(value), (value, place), xytext=(3, 0), textcoords="offset points", va="center")
    axes.set_xlim(0, max(value for _, value in there) * 1.15 if there else 1)
    axes.set_xlabel(label)


def _boxes(axes, rows, name, label):
    for place, row in enumerate(rows):
        values = [request[name] for request in row["requests"]]
        low, first, middle, third, high = (percentile(values, share) for share in (0.05, 0.25, 0.5, 0.75, 0.95))
        axes.hlines(place, low, high, color="black", linewidth=0.8)
        color = INK[place % len(INK)]
        axes.barh(place, third - first, 0.5, left=first, color=color, edgecolor="black", linewidth=0.5, zorder=2)
        axes.vlines(middle, place - 0.25, place + 0.25, color="black", linewidth=1.5, zorder=3)
        axes.plot(values, [place + 0.36] * len(values), "|", color="black", markersize=4, markeredgewidth=0.5)
    axes.set_xlim(left=0)
    axes.set_xlabel(label)
