"""What the commands print: plain text, or rich tables where a terminal shows them."""

import contextlib
import json
import sys
import time
from pathlib import Path


class CommandError(Exception):
    """The user's input cannot be used; the message is one line that says what to do."""


def first_line(error):
    """An exception as one line of text."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def format_table(header, rows):
    """Lines of a plain table: first column to the left, the others to the right, no wider than needed."""
    cells = [[str(cell) for cell in row] for row in ([header] if header else []) + list(rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    lines = []
    for row in cells:
        aligned = [row[0].ljust(widths[0])] + [
            cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)
        ]
        lines.append("   ".join(aligned).rstrip())
    return lines


def check_output(path):
    """Refuse a file that cannot be written before the long work begins; None is no file."""
    if path is not None and (Path(path).is_dir() or not Path(path).absolute().parent.is_dir()):
        raise CommandError(f"cannot write {path}: it must be a file in a directory that exists")


def write_json(path, data):
    """Write `data` to a file; a path that cannot be written is the user's error."""
    try:
        Path(path).write_text(json.dumps(data, indent=2) + "\n")
    except OSError as error:
        raise CommandError(f"cannot write {path}: {error.strerror}") from error


class Console:
    """Prints progress and tables; uses rich where it is installed and stdout is a terminal."""

    def __init__(self):
        self._rich = None
        if sys.stdout.isatty():
            with contextlib.suppress(ImportError):
                from rich.console import Console as RichConsole

                self._rich = RichConsole(highlight=False)

    def line(self, text=""):
        """Print one line."""
        print(text, flush=True)

    @contextlib.contextmanager
    def step(self, text):
        """Show that something long is going on; print the seconds it took when it ends well.

        The block gets a function that shows how far it is (on a terminal only).
        """
        start = time.perf_counter()
        if self._rich is not None:
            with self._rich.status(text + " ...") as status:
                yield lambda progress: status.update(f"{text}: {progress} ...")
        else:
            self.line(text + " ...")
            yield lambda progress: None
        self.line(f"{text}: {time.perf_counter() - start:.1f} s")

    def table(self, title, header, rows):
        """Print a table with a title."""
        if self._rich is None:
            self.line(title)
            for line in format_table(header, rows):
                self.line("  " + line)
            return
        from rich.table import Table

        table = Table(title=title, title_justify="left")
        for column, name in enumerate(header):
            table.add_column(name, justify="right" if column else "left")
        for row in rows:
            table.add_row(*(str(cell) for cell in row))
        self._rich.print(table)
