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
