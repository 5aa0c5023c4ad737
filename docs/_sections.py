"""Griffe extension: the docstring sections that are plain text become paragraphs with a bold title."""

import re

import griffe

_TITLES = ("Numerics", "Runs on", "From")
_RETURNS = "Returns:"
_SECTION = re.compile(rf"^({'|'.join(_TITLES)}):[ ]", re.MULTILINE)


class Sections(griffe.Extension):
    """Rewrites docstrings before they are parsed."""

    def on_instance(self, *, obj, **kwargs):
        if not isinstance(obj, griffe.Alias) and obj.docstring is not None:
            obj.docstring.value = rewritten(obj.docstring.value)


def rewritten(text):
    """The docstring with each of our sections as a paragraph; their continuation lines lose their indentation."""
    lines, inside = [], False
    for line in text.splitlines():
        if _SECTION.match(line):
            inside = True
            lines += ["", _SECTION.sub(r"**\1.** ", line)]
            continue
        if line == _RETURNS:
            inside = True
            lines += ["", "**Returns:**"]
            continue
        inside = inside and line.startswith(" ")
        lines.append(line.strip() if inside else line)
    return "\n".join(lines)
