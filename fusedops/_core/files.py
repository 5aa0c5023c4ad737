"""Files that other processes may read at any time."""

import os
import tempfile


def write_whole(path, text):
    """Write a file so that it appears whole or not at all; makes the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(dir=path.parent)
    with os.fdopen(handle, "w") as file:
        file.write(text)
    os.replace(partial, path)
