"""An inspection as text: one column for each configuration that is compared, then one for each kernel."""

from fusedops._core import sass


def lines(inspections, names=None):
    """Lines of text that show inspections of one call side by side.

    Args:
        inspections: At least one.
        names: What heads each of them where there are several.
    """
    first = inspections[0]
    call = [["operator", first.op], ["device", f"{first.device}, {first.arch}"]]
    call += [["bytes", _number(first.bytes)], ["operations", _number(first.operations)]]
    several = names is not None
    call += [["", *names]] if several else []
    call += _columns([[("configuration", config) for config in one.configs] + _bounds(one) for one in inspections])
    heads = names if several else [""]
    kernels = _columns([
        _kernel(kernel, head) for head, one in zip(heads, inspections, strict=True) for kernel in one.kernels
    ])  # fmt: skip
    return [*_aligned(call), "", *_aligned(kernels)]


def _columns(columns):
    """Rows of labels and values from lists of (label, value); a label that a column lacks is a dash there."""
    labels = list(dict.fromkeys(label for column in columns for label, _ in column))
    given = [dict(column) for column in columns]
    return [[label, *(str(column.get(label, "-")) for column in given)] for label in labels]


def _aligned(rows):
    widths = [max(len(row[i]) for row in rows if i < len(row)) for i in range(max(map(len, rows)))]
    # a line that stands in the first column alone does not widen it for those that have several
    if len(widths) > 2:
        widths[1] = max((len(row[1]) for row in rows if len(row) > 2), default=widths[1])
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]


def _number(value):
    return "not known" if value is None else f"{value:,}"


def _bounds(one):
    """How long the call takes at least, and the arithmetic behind it."""
    if one.bound is None:
        return [("bound", f"none: {one.bound_missing}")]
    found = one.bound
    return [
        ("memory", f"{_micros(found.memory)} (bytes by the data sheet's bandwidth)"),
        ("arithmetic", f"{_micros(found.arithmetic)} (operations by the data sheet's peak of {found.kind})"),
        ("bound", f"{_micros(found.seconds)} (the longer of both)"),
        ("latency", f"{_micros(found.latency)} ({found.in_flight:,} bytes under way, {found.needed:,} fill the bus)"),
        ("rounds", f"{found.rounds:.2f} of programs; {_micros(found.uneven)} of arithmetic with idle places"),
        ("limiter", found.limiter),
    ]


def _micros(seconds):
    return f"{seconds * 1e6:.2f} us"


def _kernel(kernel, head):
    report, held, loop = kernel.report, kernel.occupancy, kernel.main_loop
    name = f"{head} {kernel.kernel}".strip()
    where = "in a loop" if report.spill_in_loop else "outside loops"
    spills = f"{report.spill_stores} stores, {report.spill_loads} loads, {where}"
    limits = ", ".join(f"{count} by {resource}" for resource, count in held.limits.items())
    rows = [
        ("kernel", name),
        ("machine code", kernel.origin),
        ("grid", " x ".join(map(str, kernel.grid))),
        ("warps", report.num_warps),
        ("registers", report.registers),
        ("stack", f"{report.stack_bytes} bytes"),
        ("spills", spills if report.spill_stores or report.spill_loads else "none"),
        ("shared memory", f"{report.shared_bytes:,} bytes"),
        ("occupancy", f"{held.share:.0%}: {held.programs} programs, {held.warps} warps a multiprocessor"),
        ("limited by", f"{held.limited_by} ({limits})"),
    ]
    for title, counts in (("in all", report.instructions), ("an iteration", loop and loop["instructions"])):
        if counts is None:
            continue
        rows += [
            (f"matrix {title}", _counted(sass.matrix(counts))),
            (f"loads {title}", _counted(_chosen(counts, sass.GLOBAL_LOADS))),
            (f"stores {title}", _counted(_chosen(counts, sass.GLOBAL_STORES))),
            (f"shared {title}", _counted(_chosen(counts, sass.SHARED))),
            (f"instructions {title}", sum(counts.values())),
        ]
    others = [other for other in report.loops if other is not loop]
    return rows + [(f"other loop {i}", _loop(other)) for i, other in enumerate(others, 1)]


def _loop(loop):
    counts = loop["instructions"]
    work = sass.matrix(counts) | _chosen(counts, (*sass.GLOBAL_LOADS, *sass.GLOBAL_STORES))
    return f"{sum(counts.values())} instructions: {_counted(work)}"


def _chosen(counts, names):
    return {opcode: count for opcode, count in counts.items() if sass.base(opcode) in names}


def _counted(counts):
    """Instructions with their modifiers, the most frequent first; "none" of none."""
    ordered = sorted(counts.items(), key=lambda pair: -pair[1])
    return ", ".join(f"{count} {opcode}" for opcode, count in ordered) or "none"
