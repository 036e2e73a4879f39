"""Every chunk below a root, one at a time: what a scan, an eviction and the commands go through.

Only folders with the names of namespaces and buckets are entered, no link is followed, and no more is held in memory
than the names of one namespace's buckets and of the namespaces themselves.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from memkv_engines.errors import TierUnavailable
from memkv_engines.keys import ChunkName
from memkv_engines.tier.eviction import StoredChunk
from memkv_engines.tier.folders import DIR_FLAGS
from memkv_engines.tier.records import TEMPORARY, is_bucket, is_namespace, parse_name

# It was removed meanwhile, or something else is there now.
_NO_FOLDER = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)
OnError = Callable[[str, OSError], None]


def refuse(place: str, error: OSError) -> None:
    """What to do about a folder that cannot be listed, unless the caller knows better: a part is not the whole.

    Raises:
        TierUnavailable: always.
    """
    raise TierUnavailable(f"cannot list {place}: {error.strerror}") from error


@dataclass(frozen=True)
class Entry:
    """A file found in a bucket, or a temporary file found anywhere.

    Attributes:
        folder: the namespace, empty for the root.
        place: path of the folder it is in, relative to the root.
        dir_fd: descriptor of that folder, open until the next entry is asked for.
        text: its name.
        info: its inode.
        name: the parsed name if it is a chunk in its place, else None.
    """

    folder: str
    place: str
    dir_fd: int
    text: str
    info: os.stat_result
    name: ChunkName | None

    @property
    def is_temporary(self) -> bool:
        """Whether it is a file that was being written."""
        return self.text.startswith(TEMPORARY)

    def chunk(self, priority: int = 0) -> StoredChunk:
        """As evictions see it."""
        return StoredChunk(
            f"{self.folder}/{self.text}", self.info.st_size, self.info.st_mtime_ns, self.info.st_atime_ns, priority
        )


def namespaces(root_fd: int, on_error: OnError = refuse) -> list[str]:
    """Names of the namespace folders below a root, sorted."""
    return sorted(name for name, is_dir in _scan(root_fd, ".", ".", on_error) if is_dir and is_namespace(name))


def chunks(root_fd: int, folder: str, on_error: OnError = refuse) -> Iterator[Entry]:
    """Every chunk of a namespace; what is foreign is passed over."""
    return (entry for entry in files(root_fd, folder, on_error) if entry.name is not None)


def files(root_fd: int, folder: str, on_error: OnError = refuse) -> Iterator[Entry]:
    """Every file in the buckets of a namespace, foreign ones too, and the temporary files beside them."""
    fd = _open(root_fd, folder, folder, on_error)
    if fd < 0:
        return
    try:
        buckets = []
        for text, is_dir in _scan(fd, ".", folder, on_error):
            if is_dir and is_bucket(text):
                buckets.append(text)
            elif text.startswith(TEMPORARY):
                yield from _entry(fd, folder, folder, text, None, on_error)
        for bucket in buckets:
            yield from _bucket(fd, folder, bucket, on_error)
    finally:
        os.close(fd)


def root_temporaries(root_fd: int, on_error: OnError = refuse) -> Iterator[Entry]:
    """Temporary files in the root itself."""
    for text, is_dir in _scan(root_fd, ".", ".", on_error):
        if not is_dir and text.startswith(TEMPORARY):
            yield from _entry(root_fd, "", ".", text, None, on_error)


def _bucket(namespace_fd: int, folder: str, bucket: str, on_error: OnError) -> Iterator[Entry]:
    place = f"{folder}/{bucket}"
    fd = _open(namespace_fd, bucket, place, on_error)
    if fd < 0:
        return
    try:
        for text, is_dir in _scan(fd, ".", place, on_error):
            if not is_dir:
                yield from _entry(fd, folder, place, text, parse_name(text, bucket), on_error)
    finally:
        os.close(fd)


def _entry(
    dir_fd: int, folder: str, place: str, text: str, name: ChunkName | None, on_error: OnError
) -> Iterator[Entry]:
    try:
        info = os.stat(text, dir_fd=dir_fd, follow_symlinks=False)
    except FileNotFoundError:
        return  # It was removed meanwhile.
    except OSError as error:
        on_error(f"{place}/{text}", error)
        return
    yield Entry(folder, place, dir_fd, text, info, name if stat.S_ISREG(info.st_mode) else None)


def _scan(parent_fd: int, name: str, place: str, on_error: OnError) -> Iterator[tuple[str, bool]]:
    """Names in a folder, and whether each is a folder itself. Through a descriptor of its own: it has a position."""
    fd = _open(parent_fd, name, place, on_error)
    if fd < 0:
        return
    try:
        with os.scandir(fd) as entries:
            for entry in entries:
                yield entry.name, entry.is_dir(follow_symlinks=False)
    except OSError as error:
        on_error(place, error)
    finally:
        os.close(fd)


def _open(parent_fd: int, name: str, place: str, on_error: OnError) -> int:
    try:
        return os.open(name, DIR_FLAGS, dir_fd=parent_fd)
    except OSError as error:
        if error.errno not in _NO_FOLDER:
            on_error(place, error)
        return -1
