"""A function that is made from its text, as those of dataclasses and named tuples are."""

GIVEN = "<given>"  # in a statement: all parameters, as a call hands them on


class Source:
    """The text of a function of the positional parameters a0, a1, ..., and the names that it uses.

    Attributes:
        lines: The statements, indented.
        names: What the text finds under its global names.
    """

    def __init__(self, num_parameters, lines, names):
        self.parameters = [f"a{number}" for number in range(num_parameters)]
        self.lines, self.names = list(lines), dict(names)

    def before(self, lines, names):
        """The same function with statements in front."""
        return Source(len(self.parameters), [*lines, *self.lines], {**self.names, **names})

    def compile(self, name):
        """The function. Its globals are a dictionary of its own."""
        given, names = ", ".join(self.parameters), dict(self.names)
        exec("\n".join([f"def {name}({given}):", *self.lines]).replace(GIVEN, given), names)
        return names[name]
