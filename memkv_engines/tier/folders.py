"""Folders by descriptor: opened without following links, listed, and held by one process at a time."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
from collections.abc import Iterator

from memkv_engines.errors import ChunkForeign, TierFull, TierUnavailable
from memkv_engines.keys import ChunkName
from memkv_engines.limits import MAX_BUCKET_ENTRIES_LISTED

DIR_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
EVICTING = ".evicting"


class Folder:
    """An open folder. It closes with its last user, so the cache can drop it while another thread is at work in it."""

    def __init__(self, name: str, dir_fd: int) -> None:
        self.fd = os.open(name, DIR_FLAGS, dir_fd=dir_fd)

    def __del__(self) -> None:
        if hasattr(self, "fd"):
            os.close(self.fd)


@contextlib.contextmanager
def only_one(root_fd: int) -> Iterator[bool]:
    """Whether this is the only eviction under way in a directory; for as long as the context lasts.

    Raises:
        TierFull, TierUnavailable: nobody can tell.
    """
    try:
        fd = os.open(EVICTING, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=root_fd)
    except OSError as error:
        raise as_tier_error(error, f"cannot open {EVICTING}") from error
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True
    finally:
        os.close(fd)


def dated_names(bucket_fd: int, prefix: str) -> list[tuple[int, ChunkName]]:
    """The chunks of a bucket whose names begin with a prefix, each with its time of modification.

    Raises:
        FileNotFoundError: the folder is empty, or was removed, which looks the same.
    """
    # A listing moves the descriptor's own position, which threads would share: list through one that is ours alone.
    fd = os.open(".", DIR_FLAGS, dir_fd=bucket_fd)
    try:
        entries = os.listdir(fd)
    finally:
        os.close(fd)
    if not entries:
        raise FileNotFoundError(errno.ENOENT, "empty folder")
    found = []
    for text in entries[:MAX_BUCKET_ENTRIES_LISTED]:
        if not text.startswith(prefix):
            continue
        try:
            name = ChunkName.parse(text)
            info = os.stat(text, dir_fd=bucket_fd, follow_symlinks=False)
        except (ChunkForeign, OSError):
            continue
        if stat.S_ISREG(info.st_mode):
            found.append((info.st_mtime_ns, name))
    return found


def unlink_quietly(name: str, dir_fd: int) -> None:
    """Remove a file if that is possible."""
    try:
        os.unlink(name, dir_fd=dir_fd)
    except OSError:
        pass


def as_tier_error(error: OSError, what: str) -> TierFull | TierUnavailable:
    """The error of ours that stands for one of the system's."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return TierFull(f"{what}: {error.strerror}")
    return TierUnavailable(f"{what}: {error.strerror}")
