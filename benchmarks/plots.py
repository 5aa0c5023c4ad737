"""Plots of results: our speed beside the others', latency against rows, the roofline. Readable in print.

python benchmarks/plots.py ROWS.json DIR PREFIX
"""

import json
import re
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from _rows import EAGER, ON_DEVICE, share
from matplotlib.ticker import LogLocator, NullLocator

MAX_GROUPS = 12  # of bars in one picture
MIN_SIZES = 3  # numbers of rows that make a line
LEGEND_WIDTH = 110  # characters beside each other
INK = ("#0b4f6c", "#7fb7d1", "#d98e04", "#8c8c8c", "#c8d5b9", "#6b3e75", "#e3b5a4", "#3d3d3d")  # apart in grey as well
SPARSE = ("_cslt_sparse_mm", "SparseSemiStructuredTensor", "torchao")  # peers of sparse_matmul that are not dense
MARKERS = "osD^vP*X"
HATCHES = ("", "//", "..", "xx", "", "\\\\", "--", "")
plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "hatch.linewidth": 0.5})


def draw(rows, folder, prefix):
    """Draw what the rows of one device show, and return the files.

    Args:
        rows: Of one device; the device's time where there is one, else that of eager calls.
        folder: Receives ``<prefix>_<picture>.png``; pictures of the same prefix that are there go first.
        prefix: Of the file names.
    """
    timed = ON_DEVICE if any(row["timed"] == ON_DEVICE for row in rows) else EAGER
    rows = [row for row in rows if row["timed"] == timed]
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.glob(f"{prefix}_*.png"):
        path.unlink()
    makers = {"roofline": (roofline, rows), "sparse_matmul_crossover": (crossover, rows)}
    makers |= {name: (bars, group, name) for name, group in groups(rows).items()}
    makers |= {f"{name}_latency": (latency, group, name) for name, group in by_batch(rows).items()}
    paths = []
    for name, (make, *about) in makers.items():
        figure = make(*about)
        if figure is not None:
            paths.append(folder / f"{prefix}_{name}.png")
            figure.savefig(paths[-1], dpi=160)
            plt.close(figure)
    return paths


def groups(rows):
    """Name of a picture to its rows: of one operator and that which adds a residual first, under the same ceiling."""
    found = {}
    for row in rows:
        found.setdefault((row["op"].removeprefix("add_"), under_operations(row)), []).append(row)
    named = {}
    for (op, by_operations), group in found.items():
        both = (op, not by_operations) in found
        name = f"{op}_memory" if both and not by_operations else op
        group = sorted(group, key=lambda row: row["op"])
        for first in range(0, len(group), MAX_GROUPS):
            part = f"_{1 + first // MAX_GROUPS}" if len(group) > MAX_GROUPS else ""
            named[name + part] = group[first : first + MAX_GROUPS]
    return named


def by_batch(rows):
    """Name of a picture to the rows by the first number of their shapes, which else are equal."""
    found = {}
    for row in rows:
        size = re.match(r"(\w+ )?(\d+)x(.+)", row["shape"])  # such as "int8 64x4096x4096"
        if size and row["seconds"]:
            found.setdefault((row["op"], (size[1] or "") + size[3], row["dtype"]), []).append((int(size[2]), row))
    named = {}
    for (op, rest, dtype), group in found.items():
        sizes = dict(sorted(group, key=lambda pair: pair[0]))
        if len(sizes) >= MIN_SIZES:
            named[re.sub(r"\W+", "_", f"{op}_{rest}_{short(dtype)}")] = sizes
    return named


def latency(sizes, name):
    """Time against the number of rows, a line for each candidate."""
    rows = list(sizes.values())
    figure, axes = plt.subplots(figsize=(8.2, 3.8), layout="constrained")
    for place, candidate in enumerate(["fusedops", *dict.fromkeys(peer for row in rows for peer in row["peers"])]):
        times = {size: {"fusedops": row["seconds"], **row["peers"]}.get(candidate) for size, row in sizes.items()}
        there = [(size, seconds * 1e6) for size, seconds in times.items() if seconds is not None]
        style = {"color": INK[place % len(INK)], "marker": MARKERS[place % len(MARKERS)], "markersize": 5}
        axes.plot(*zip(*there), label=candidate, linewidth=2 if place == 0 else 1, **style)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(NullLocator())
    counted(axes, sizes)
    axes.set_xlabel("rows (of pages: sequences)")
    axes.set_ylabel("µs, less is better")
    axes.grid(True, which="major", linewidth=0.3)
    figure.suptitle(f"{name.replace('_', ' ')}\n{caption(rows)}", fontsize=8.5)
    figure.legend(loc="outside right center", fontsize=8, frameon=False)
    return figure


def counted(axes, sizes):
    """A logarithmic axis of numbers of rows, on which each that was measured is written."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(sizes), list(map(str, sizes)))
    axes.xaxis.set_minor_locator(NullLocator())


def under_operations(row):
    """Whether the operations of a row bound it, not its bytes."""
    return row.get("share_of_matmul_rate") is not None


def caption(rows):
    """Device, versions and dates that the rows were made with, and how they were timed."""
    about = rows[0]["environment"]
    dates = sorted({row["environment"]["date"][:10] for row in rows})
    when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    return f"{about['device']}, torch {about['torch']}, triton {about['triton'] or '-'}, {when}; {rows[0]['timed']}"


def bars(rows, name):
    """Operations or bytes per second of everybody, one group of bars a shape; the ceiling as a line."""
    by_operations = under_operations(rows[0])
    amount, unit, label = ("operations", 1e12, "TFLOP/s") if by_operations else ("bytes", 1e9, "GB/s")
    candidates = ["fusedops", *dict.fromkeys(peer for row in rows for peer in row["peers"])]
    height = 0.84 / len(candidates)
    figure, axes = plt.subplots(figsize=(8.2, 0.9 + 0.16 * len(rows) * (len(candidates) + 1)), layout="constrained")
    times = [{"fusedops": row["seconds"], **row["peers"]} for row in rows]
    for place, candidate in enumerate(candidates):
        there = [index for index, taken in enumerate(times) if candidate in taken]
        speed = [rows[index][amount] / times[index][candidate] / unit for index in there]
        where = [index + height * position(times[index], candidate, candidates) for index in there]
        style = {"color": INK[place % len(INK)], "hatch": HATCHES[place % len(HATCHES)], "edgecolor": "white"}
        drawn = axes.barh(where, speed, height, label=candidate, zorder=2, **style)
        box = {"facecolor": "white", "edgecolor": "none", "pad": 0.4}
        axes.bar_label(drawn, map(figure_of, speed), padding=2, fontsize=6.5, bbox=box)
    key = "matmul_rate" if by_operations else "copy_bandwidth"
    ceiling = rows[0].get(key)
    if ceiling:
        line = "TC*" if by_operations else "BW*"
        axes.axvline(ceiling / unit, color="black", linewidth=1, linestyle="--", zorder=1)
        axes.annotate(
            f" {line} {ceiling / unit:.4g}", (ceiling / unit, 1), xycoords=("data", "axes fraction"), va="bottom"
        )
    axes.set_yticks(
        range(len(rows)),
        [f"{row['op']}\n{row['shape']}, {short(row['dtype'])}" for row in rows],
        fontsize=7.5,
    )
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlabel(f"{label}, more is better")
    figure.suptitle(f"{name.replace('_', ' ')}\n{caption(rows)}", fontsize=8.5)
    columns = max(1, min(len(candidates), LEGEND_WIDTH // (6 + max(map(len, candidates)))))
    figure.legend(loc="outside lower center", ncols=columns, fontsize=8, frameon=False)
    return figure


def position(taken, candidate, candidates):
    """The place of a bar around the middle of its group, in which some candidates may be missing."""
    there = [name for name in candidates if name in taken]
    return there.index(candidate) - (len(there) - 1) / 2


def short(dtype):
    return {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "float8_e4m3fn": "fp8"}.get(dtype, dtype)


def figure_of(value):
    """Three digits or more."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def crossover(rows):
    """How much faster the sparse product is than the best dense one, by rows; None where that was not measured."""
    lines = {}
    for row in rows:
        dense = [seconds for name, seconds in row["peers"].items() if name not in SPARSE]
        if row["op"] == "sparse_matmul" and dense:
            number, _, weight = row["shape"].partition("x")
            place = int(number), min(dense) / row["seconds"]
            lines.setdefault(f"{weight}, {short(row['dtype'])}", []).append(place)
    lines = {name: sorted(places) for name, places in lines.items() if len(places) > 1}
    if not lines:
        return None
    figure, axes = plt.subplots(figsize=(8.2, 3.8), layout="constrained")
    for index, (name, places) in enumerate(lines.items()):
        style = {"color": INK[index % len(INK)], "linestyle": ("-", "--", ":")[index // len(INK) % 3], "markersize": 4}
        axes.plot(*zip(*places), MARKERS[index % len(MARKERS)], label=name, **style)
    axes.axhline(1, color="black", linewidth=1)
    counted(axes, sorted({number for places in lines.values() for number, _ in places}))
    axes.set_xlabel("rows of a")
    axes.set_ylabel("time of the best dense / ours")
    axes.grid(True, which="major", linewidth=0.3)
    figure.suptitle(f"2:4 sparse beside dense: above 1 sparse is faster\n{caption(rows)}", fontsize=8.5)
    figure.legend(loc="outside right center", fontsize=7.5, frameon=False)
    return figure


def roofline(rows):
    """Each operator's best row under what the device reaches; None where rows do not say what it reaches."""
    rows = [row for row in rows if row.get("copy_bandwidth") and row["operations"]]
    if not rows:
        return None
    bandwidth, rate = rows[0]["copy_bandwidth"], rows[0]["matmul_rate"]
    best = {}
    for row in rows:
        key = row["op"], row["dtype"], under_operations(row)
        if key not in best or reached(row) > reached(best[key]):
            best[key] = row
    places = [row["operations"] / row["bytes"] for row in best.values()]
    low, high, knee = min([*places, 0.3]) / 2, max([*places, rate / bandwidth]) * 3, rate / bandwidth
    figure, axes = plt.subplots(figsize=(8.2, 4.4), layout="constrained")
    axes.plot([low, knee, high], [low * bandwidth / 1e12, rate / 1e12, rate / 1e12], color="black", linewidth=1.2)
    axes.annotate(f"TC* {rate / 1e12:.3g} TFLOP/s", (knee, rate / 1e12), xytext=(4, 4), textcoords="offset points")
    axes.annotate(
        f"BW* {bandwidth / 1e9:.4g} GB/s",
        ((low * knee) ** 0.5, (low * knee) ** 0.5 * bandwidth / 1e12),
        xytext=(-6, 4),
        textcoords="offset points",
        ha="right",
    )
    for index, (place, row) in enumerate(sorted(zip(places, best.values()), key=lambda pair: pair[0])):
        label = f"{row['op']} {row['shape']} {short(row['dtype'])}: {share(row)}"
        color, marker = INK[index % len(INK)], MARKERS[index % len(MARKERS)]
        fill = color if index < len(MARKERS) else "none"  # no two alike
        axes.plot(
            place, row["operations"] / row["seconds"] / 1e12, marker, color=color, markerfacecolor=fill, markersize=6,
            label=label,
        )  # fmt: skip
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("operations per byte")
    axes.set_ylabel("TFLOP/s")
    axes.grid(True, which="major", linewidth=0.3)
    figure.suptitle(f"Best row of each operator under the roofline\n{caption(rows)}", fontsize=8.5)
    figure.legend(loc="outside right center", fontsize=7, frameon=False)
    return figure


def reached(row):
    """The part of its ceiling."""
    return row["share_of_matmul_rate"] if under_operations(row) else row["share_of_copy_bandwidth"]


if __name__ == "__main__":
    source, folder, prefix = sys.argv[1:]
    for drawn in draw(json.loads(Path(source).read_text()), Path(folder), prefix):
        print(drawn)
