"""Requests to serve: prompts of mixed lengths cut from real text, how many tokens each wants, and when it arrives."""

import argparse
import random
from dataclasses import dataclass

from fusedops.cli import corpus
from fusedops.cli.console import CommandError

WARM_UP_REQUESTS = 2
WARM_UP_PROMPT = 16
WARM_UP_TOKENS = 3
DRAWN_TOKENS = 2**17


@dataclass(frozen=True)
class Request:
    """One prompt.

    Attributes:
        prompt: Its token ids.
        new_tokens: How many tokens it wants; it gets exactly these, whatever they are.
        arrival: Seconds after the first request.
    """

    prompt: tuple[int, ...]
    new_tokens: int
    arrival: float = 0.0


def span(text):
    """A length such as 64, or a range of lengths such as 16-512, for argparse."""
    parts = text.split("-")
    if len(parts) > 2 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise argparse.ArgumentTypeError(f"must be a positive integer or a range such as 16-512, got {text!r}")
    low, high = int(parts[0]), int(parts[-1])
    if low > high:
        raise argparse.ArgumentTypeError(f"must be a range from low to high, got {text!r}")
    return low, high


def in_words(lengths):
    """A range of lengths as text."""
    low, high = lengths
    return str(low) if low == high else f"{low}-{high}"


def make_requests(text_tokens, count, prompt_tokens, new_tokens, seed, rate=None):
    """Requests in the order of their arrival; the same for the same seed.

    Args:
        text_tokens: Token ids of a long text; each prompt is a piece of it, from a place drawn by chance.
        count: How many.
        prompt_tokens: Least and greatest length of a prompt, all equally likely.
        new_tokens: Least and greatest number of tokens wanted.
        seed: Of everything that is drawn.
        rate: Requests a second, arriving independently of each other; None: all at once.
    """
    if prompt_tokens[1] > len(text_tokens):
        raise CommandError(f"--prompt-tokens must be at most {len(text_tokens)}, got {prompt_tokens[1]}")
    drawn = random.Random(seed)
    made, arrival = [], 0.0
    for _ in range(count):
        length = drawn.randint(*prompt_tokens)
        start = drawn.randint(0, len(text_tokens) - length)
        made.append(Request(tuple(text_tokens[start : start + length]), drawn.randint(*new_tokens), arrival))
        arrival += drawn.expovariate(rate) if rate else 0.0
    return made


def warm_up(requests):
    """A few short requests that go through the same code."""
    return [
        Request(request.prompt[:WARM_UP_PROMPT], min(request.new_tokens, WARM_UP_TOKENS))
        for request in requests[:WARM_UP_REQUESTS]
    ]


def drawn_tokens(vocabulary, seed):
    """Token ids drawn by chance, for a model that has no tokenizer."""
    return random.Random(seed).choices(range(vocabulary), k=DRAWN_TOKENS)


def text_tokens(tokenizer):
    """Token ids of the text that prompts are cut from."""
    return corpus.tokens(tokenizer, corpus.of_python())
