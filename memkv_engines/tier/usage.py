"""How many bytes the chunks below a directory hold, counted together by all processes that share it.

One small file, read and written under ``flock``: ``.usage`` for all chunks, and one more for each tenant with a quota.
Only capacities depend on it: a file that is lost, damaged or wrong is rebuilt by the next scan. Back of the envelope:
two locks, one read and one write are about 10 us a chunk.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import struct
import threading
from collections.abc import Iterator
from typing import NamedTuple

from xxhash import xxh3_64_intdigest

from memkv_engines.errors import TierFull, TierUnavailable
from memkv_engines.tier.folders import as_tier_error
from memkv_engines.tier.records import read_record

NAME = ".usage"
_MAGIC = b"MEMKVUS2"
_BODY = struct.Struct("<8sQQ")
_RECORD = struct.Struct("<8sQQQ")
_FLAGS = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK


class Count(NamedTuple):
    """Bytes held, and how often a scan has corrected them; never, where the file was lost or damaged."""

    used_bytes: int
    corrections: int


class UsageFile:
    """The count of one directory; thread-safe. Every call blocks for the locks of others, microseconds each.

    Args:
        root_fd: descriptor of the directory; not kept, but must stay open for as long as this is used.
        name: of the file.

    Raises:
        TierUnavailable: the file cannot be opened; of every method but ``close``: locked, read or written. A device
            without room is no reason: it is tried again later.
    """

    def __init__(self, root_fd: int, name: str = NAME) -> None:
        self._root_fd, self._name = root_fd, name
        self._fd = -1
        # A lock belongs to the open file, which all threads of this process share.
        self._lock = threading.Lock()
        with contextlib.suppress(TierFull):
            self._open()

    def count(self) -> Count:
        """What is counted now.

        Raises:
            TierFull, TierUnavailable: the file cannot be read.
        """
        with self._locked():
            return self._read()

    def reserve(self, size_bytes: int, capacity_bytes: int) -> tuple[bool, Count]:
        """Count bytes in unless they would exceed the capacity (0: none); whether they were, and what is counted now.

        Raises:
            TierFull, TierUnavailable: the file cannot be written; nothing was counted.
        """
        with self._locked():
            count = self._read()
            if capacity_bytes and count.used_bytes + size_bytes > capacity_bytes:
                return False, count
            count = Count(count.used_bytes + size_bytes, count.corrections)
            self._write(count)
            return True, count

    def add(self, size_bytes: int) -> None:
        """Count bytes in, or out if negative. Where that fails, the next scan corrects it."""
        with contextlib.suppress(TierFull, TierUnavailable), self._locked():
            count = self._read()
            self._write(Count(max(0, count.used_bytes + size_bytes), count.corrections))

    def correct(self, scanned_bytes: int, before: Count, slack_bytes: int = 0) -> None:
        """Take over what a scan counted; what changed since ``before`` was read at its start is added.

        What was written meanwhile may be counted twice until the next scan. What was reserved before the scan and
        published behind its back is not in it: a count that is too high by no more than ``slack_bytes`` is left as it
        is, unless it was never corrected. Of scans that overlap, the first to end counts.

        Raises:
            TierFull, TierUnavailable: the file cannot be written.
        """
        with self._locked():
            now = self._read()
            if now.corrections == before.corrections:
                used = max(0, scanned_bytes + now.used_bytes - before.used_bytes)
                if now.corrections and now.used_bytes - slack_bytes <= used < now.used_bytes:
                    used = now.used_bytes
                self._write(Count(used, now.corrections + 1))

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._close()
            self._root_fd = -1

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with self._lock:
            try:
                # A file that was removed is nobody else's any more: the count goes on in the one that is there now.
                if self._fd < 0 or not os.fstat(self._fd).st_nlink:
                    self._open()
                fcntl.flock(self._fd, fcntl.LOCK_EX)
                try:
                    yield
                finally:
                    fcntl.flock(self._fd, fcntl.LOCK_UN)
            except OSError as error:
                raise as_tier_error(error, f"cannot count in {self._name}") from error

    def _open(self) -> None:
        self._close()
        try:
            fd = os.open(self._name, _FLAGS | os.O_CREAT, 0o600, dir_fd=self._root_fd)
        except OSError as error:
            raise as_tier_error(error, f"cannot open the usage file {self._name}") from error
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise TierUnavailable(f"{self._name} is no regular file: remove it")
        self._fd = fd

    def _close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _read(self) -> Count:
        return _decode(os.pread(self._fd, _RECORD.size, 0))

    def _write(self, count: Count) -> None:
        body = _BODY.pack(_MAGIC, min(count.used_bytes, 2**64 - 1), count.corrections % 2**64)
        os.pwrite(self._fd, body + xxh3_64_intdigest(body).to_bytes(8, "little"), 0)


def read_count(root_fd: int, name: str = NAME) -> Count | None:
    """What is counted, without a lock and without making the file; None if nobody counts.

    Raises:
        ChunkForeign: what is there is not a file of ours.
        OSError: it cannot be read.
    """
    data = read_record(root_fd, name, _RECORD.size)
    return _decode(data) if data is not None else None


def _decode(data: bytes) -> Count:
    if len(data) != _RECORD.size:
        return Count(0, 0)
    magic, used, corrections, digest = _RECORD.unpack(data)
    if magic != _MAGIC or digest != xxh3_64_intdigest(data[: _BODY.size]):
        return Count(0, 0)
    return Count(used, corrections)
