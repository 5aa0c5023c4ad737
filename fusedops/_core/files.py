"""Files that other processes may read at any time."""

import os
import tempfile


def write_whole(path, content):
    """Write a file, of text or bytes, so that it appears whole or not at all; makes the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(dir=path.parent)
    with os.fdopen(handle, "w" if isinstance(content, str) else "wb") as file:
        file.write(content)
    os.replace(partial, path)
