"""A picture of the ways to serve side by side: speed, KV memory and latencies. Readable in print."""

from fusedops.cli.measure import percentile

INK = ("#8c8c8c", "#c8d5b9", "#7fb7d1", "#e3b5a4", "#d98e04", "#0b4f6c")  # apart in grey as well
STYLE = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True}


def draw(rows, path):
    """Draw the rows of `fusedops bench model` and write the PNG file."""
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


def _caption(rows):
    about = rows[0]["environment"]
    what, _, engine = rows[0]["shape"].partition("; ")
    return (
        f"{what}\n{rows[0]['dtype']}, {engine}, {about['date'][:10]}\n"
        f"{about['device']}, {about['threads']} threads, torch {about['torch']}, transformers {about['transformers']}\n"
        "boxes: the middle half of the requests and their median; lines: 5 % to 95 %; marks: each request"
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
