"""What docs/testing_without_a_gpu.md takes from the code. ``python -m tests.ptx.page`` writes it anew."""

import re
from pathlib import Path

from fusedops.testing import ptx
from tests.ptx.test_planted_bugs import BUGS

PAGE = Path(__file__).resolve().parents[2] / "docs" / "testing_without_a_gpu.md"
CHAPTERS = {  # of the PTX ISA 8.7
    "9.7.1": "integers", "9.7.2": "extended precision", "9.7.3": "floating point", "9.7.4": "half precision",
    "9.7.5": "mixed precision", "9.7.6": "comparison and selection", "9.7.7": "comparison of halves",
    "9.7.8": "logic and shifts", "9.7.9": "data movement and conversion", "9.7.12": "control flow",
    "9.7.13": "synchronisation and communication", "9.7.14": "matrices of a warp", "9.7.15": "matrices of a warpgroup",
    "9.7.17": "stack", "9.7.18": "video", "9.7.19": "miscellaneous",
}  # fmt: skip
_LONG, _MANY = 200, 6  # characters of a line, and lines of a report, that are shown


def numbers(section):
    return [int(part) for part in section.split(".")]


def instructions():
    """Every instruction with its section, a row for each chapter."""
    rows = ["| chapter | instructions and their sections |", "|---|---|"]
    named = [(name, section) for name, sections in ptx.instructions().items() for section in sections]
    known = sorted(named, key=lambda one: (numbers(one[1]), one[0]))
    for chapter, title in CHAPTERS.items():
        listed = [f"`{name}` {section}" for name, section in known if section.startswith(f"{chapter}.")]
        if listed:
            rows.append(f"| {chapter} {title} | {', '.join(listed)} |")
    return "\n".join(rows)


def schedules():
    rows = ["| name | order of warps | instructions of a turn | `asynchronous` | blocks |", "|---|---|---|---|---|"]
    for name, one in ptx.SCHEDULES.items():
        turn = "until it waits" if one.order in ("ascending", "descending") else one.quantum
        turn = f"up to {turn}" if one.order == "random" else turn
        blocks = "last first" if one.blocks_reversed else "first to last"
        rows.append(f"| `{name}` | {one.order.replace('_', ' ')} | {turn} | {one.asynchronous} | {blocks} |")
    return "\n".join(rows)


def report(name):
    """What a planted bug makes the emulator say under the default schedule."""
    launch = BUGS[name].problem()
    try:
        launch.run("default", BUGS[name].plant(launch))
    except ptx.Fault as fault:
        lines = [line if len(line) <= _LONG else f"{line[:_LONG]} ..." for line in str(fault).splitlines()]
        if len(lines) > _MANY:
            lines[3:-1] = ["  ..."]
        return "\n".join(["```text", *lines, "```"])
    raise AssertionError(f"{name}: nothing was reported")


def rewritten(text):
    """The page with every part made anew."""
    parts = {"instructions": instructions, "schedules": schedules}

    def made(match):
        kind, _, name = match[1].partition(": ")
        body = report(name) if kind == "report" else parts[kind]()
        return f"<!-- {match[1]} -->\n{body}\n<!-- /{kind} -->"

    return re.sub(r"<!-- ((instructions|schedules|report)[^\n]*) -->\n.*?<!-- /\2 -->", made, text, flags=re.DOTALL)


if __name__ == "__main__":
    PAGE.write_text(rewritten(PAGE.read_text()))
