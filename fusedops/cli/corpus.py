"""The English text that every machine has: the reference of its language, which Python carries."""

from fusedops.cli.console import CommandError


def of_python():
    """Some 460,000 characters; they are others in other releases of Python."""
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise CommandError("this Python comes without its reference, pydoc_data.topics") from error
    return "\n".join(topics.values())


def tokens(tokenizer, text):
    """Token ids of a text, without any that mark its start or end."""
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def apart(windows, held_out, length):
    """Those of the windows (tensors of tokens) that share no run of `length` tokens with `held_out`.

    A text may repeat itself: the reference of Python says the same under several of its topics.
    """
    known = _runs(held_out, length)
    return [window for window in windows if known.isdisjoint(_runs(window.tolist(), length))]


def _runs(tokens, length):
    """All runs of consecutive tokens of a length."""
    return {tuple(tokens[start : start + length]) for start in range(len(tokens) - length + 1)}
