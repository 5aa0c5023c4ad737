"""Folders that others may not have written: opened step by step, so that what was checked is what is used."""

import errno
import os
import secrets
import stat

_OPEN_FOLDER = os.O_RDONLY | getattr(os, "O_DIRECTORY", 0) | getattr(os, "O_CLOEXEC", 0)
_OPEN_FILE = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)
_MAKE_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)
TEMPORARY = ".tmp"


class Refused(OSError):
    """A folder or file that somebody else may have written; the message says why."""


def open_folder(root, names, owners, create=False):
    """A descriptor of root/name/name/..., which the caller closes.

    `root` may be reached through links, which are the user's own choice; below it none is followed. Every folder
    `root` on must belong to one of `owners`, and be writable for its owner alone.

    Raises:
        Refused: a folder is not safe.
        OSError: one cannot be opened or made.
    """
    if create:
        os.makedirs(root, 0o700, exist_ok=True)
    found = os.open(root, _OPEN_FOLDER)
    path = str(root)
    try:
        _check(found, path, owners)
        for name in names:
            path = os.path.join(path, name)
            below = _open_below(found, name, path, create)
            os.close(found)
            found = below
            _check(found, path, owners)
    except BaseException:
        os.close(found)
        raise
    return found


def _open_below(folder, name, path, create):
    if create:
        try:
            os.mkdir(name, 0o700, dir_fd=folder)
        except FileExistsError:
            pass
    try:
        return os.open(name, _OPEN_FOLDER | os.O_NOFOLLOW, dir_fd=folder)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENOTDIR):
            raise Refused(f"{path} is a link, or no folder") from error
        raise


def _check(descriptor, path, owners):
    if owners is None:
        return
    status = os.fstat(descriptor)
    if status.st_uid not in owners:
        raise Refused(f"{path} belongs to user {status.st_uid}")
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise Refused(f"{path} can be written by others than its owner")


def read_file(folder, name, owners, max_bytes):
    """(at most max_bytes + 1 bytes of a plain file, its device and inode).

    Raises:
        Refused: the file is not safe, or no plain file.
        OSError: it cannot be read.
    """
    try:
        found = os.open(name, _OPEN_FILE, dir_fd=folder)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise Refused(f"{name} is a link") from error
        raise
    try:
        _check(found, name, owners)
        status = os.fstat(found)
        if not stat.S_ISREG(status.st_mode):
            raise Refused(f"{name} is no plain file")
        parts, left = [], max_bytes + 1
        while left and (part := os.read(found, left)):
            parts.append(part)
            left -= len(part)
        return b"".join(parts), (status.st_dev, status.st_ino)
    finally:
        os.close(found)


def write_file(folder, name, content):
    """Put a file under its name in one step: who reads at any time gets all of the old one or all of the new one."""
    temporary = f".{name}.{os.getpid()}.{secrets.token_hex(6)}{TEMPORARY}"
    made = os.open(temporary, _MAKE_FILE, 0o600, dir_fd=folder)
    try:
        try:
            left = memoryview(content)
            while left:
                left = left[os.write(made, left) :]
            os.fsync(made)
        finally:
            os.close(made)
        os.replace(temporary, name, src_dir_fd=folder, dst_dir_fd=folder)
    except BaseException:
        remove(folder, temporary)
        raise


def remove(folder, name):
    """Remove a file if it is there; whether it was."""
    try:
        os.unlink(name, dir_fd=folder)
    except OSError:
        return False
    return True


def move_aside(folder, name, identity, suffix):
    """Rename a file that was found bad, unless another has taken its name since; whether it was."""
    try:
        os.replace(name, name + suffix, src_dir_fd=folder, dst_dir_fd=folder)
        status = os.stat(name + suffix, dir_fd=folder, follow_symlinks=False)
        if identity is None or (status.st_dev, status.st_ino) == identity:
            return True
        os.link(name + suffix, name, src_dir_fd=folder, dst_dir_fd=folder)
        os.unlink(name + suffix, dir_fd=folder)
    except OSError:
        pass
    return False
