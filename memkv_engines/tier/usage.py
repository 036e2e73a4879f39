"""How many bytes the chunks below a directory hold, counted together by all processes that share it.

One small file, ``.usage``, read and written under ``flock``. Only the capacity depends on it: a file that is lost or
wrong is rebuilt by the next scan. Back of the envelope: two locks, one read and one write are about 10 us a chunk.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass

from memkv_engines.errors import TierUnavailable

NAME = ".usage"
_MAGIC = b"MEMKVUS1"
_RECORD = struct.Struct("<8sQQ")


@dataclass(frozen=True)
class Count:
    """Bytes held, and how often a scan has corrected them."""

    used_bytes: int
    corrections: int


class UsageFile:
    """The count of one directory; thread-safe. Every call blocks for the locks of others, microseconds each.

    Args:
        root_fd: descriptor of the directory; not kept.

    Raises:
        TierUnavailable: the file cannot be opened; of every method but ``close``: locked, read or written.
    """

    def __init__(self, root_fd: int) -> None:
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            self._fd = os.open(NAME, flags, 0o600, dir_fd=root_fd)
        except OSError as error:
            raise TierUnavailable(f"cannot open the usage file {NAME}: {error.strerror}") from error
        # A lock belongs to the open file, which all threads of this process share.
        self._lock = threading.Lock()

    def count(self) -> Count:
        """What is counted now."""
        with self._locked():
            return self._read()

    def reserve(self, size_bytes: int, capacity_bytes: int) -> tuple[bool, int]:
        """Count bytes in unless they would exceed the capacity; whether they were, and what is counted now."""
        with self._locked():
            count = self._read()
            if count.used_bytes + size_bytes > capacity_bytes:
                return False, count.used_bytes
            self._write(Count(count.used_bytes + size_bytes, count.corrections))
            return True, count.used_bytes + size_bytes

    def add(self, size_bytes: int) -> None:
        """Count bytes in, or out if negative."""
        with self._locked():
            count = self._read()
            self._write(Count(max(0, count.used_bytes + size_bytes), count.corrections))

    def correct(self, scanned_bytes: int, before: Count) -> None:
        """Take over what a scan counted; what changed since ``before`` was read at its start is added.

        What was written meanwhile may be counted twice until the next scan, but never not at all. Of scans that
        overlap, the first to end counts.
        """
        with self._locked():
            now = self._read()
            if now.corrections == before.corrections:
                used = max(0, scanned_bytes + now.used_bytes - before.used_bytes)
                self._write(Count(used, now.corrections + 1))

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with self._lock:
            try:
                fcntl.flock(self._fd, fcntl.LOCK_EX)
                try:
                    yield
                finally:
                    fcntl.flock(self._fd, fcntl.LOCK_UN)
            except OSError as error:
                raise TierUnavailable(f"cannot use the usage file {NAME}: {error.strerror}") from error

    def _read(self) -> Count:
        data = os.pread(self._fd, _RECORD.size, 0)
        if len(data) != _RECORD.size:
            return Count(0, 0)
        magic, used, corrections = _RECORD.unpack(data)
        return Count(used, corrections) if magic == _MAGIC else Count(0, 0)

    def _write(self, count: Count) -> None:
        os.pwrite(self._fd, _RECORD.pack(_MAGIC, count.used_bytes, count.corrections % 2**64), 0)
