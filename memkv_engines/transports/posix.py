"""POSIX transport: direct I/O where the file system takes it, RWF_DONTCACHE or buffered I/O where not.

The mode is chosen once per tier directory, by trying and timing it (``probe_modes``), and is part of the transport's
name. Vectored calls carry at most IOV_MAX pieces; pieces are as long as the caller made them.
"""

from __future__ import annotations

import errno
import mmap
import os
import secrets
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from memkv_engines.errors import ChunkError, ChunkMissing, ChunkTruncated, TierFull, TierUnavailable, TransportError
from memkv_engines.limits import ALIGN_BYTES, MAX_IOVECS_PER_CALL, MIB
from memkv_engines.transports.base import FileTransport

DIRECT, DONTCACHE, BUFFERED = "direct", "dontcache", "buffered"
_CANDIDATES = {
    "auto": [DIRECT, DONTCACHE, BUFFERED],
    "on": [DIRECT],
    "off": [DONTCACHE, BUFFERED],
    "page_cache": [BUFFERED],
}
RWF_DONTCACHE = 0x80
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class PosixTransport(FileTransport[int]):
    """``preadv``/``pwritev`` on file descriptors; a handle is the descriptor itself.

    Args:
        mode: ``direct`` (O_DIRECT), ``dontcache`` (RWF_DONTCACHE) or ``buffered``.
    """

    def __init__(self, mode: str) -> None:
        if mode not in (DIRECT, DONTCACHE, BUFFERED):
            raise ValueError(f"unknown posix mode {mode!r}")
        self.mode = mode
        self.name = f"posix/{mode}"
        self.align_bytes = ALIGN_BYTES if mode == DIRECT else 1
        self.open_flags = os.O_DIRECT if mode == DIRECT else 0
        self._call_flags = RWF_DONTCACHE if mode == DONTCACHE else 0

    def attach(self, fd: int, *, writable: bool = False) -> int:
        return fd

    def detach(self, handle: int) -> None:
        os.close(handle)

    def write(self, handle: int, views: Sequence[memoryview], offset: int) -> int:
        total = 0
        for batch in _batches(views):
            want = sum(v.nbytes for v in batch)
            try:
                done = os.pwritev(handle, batch, offset + total, self._call_flags)
            except OSError as error:
                if error.errno in _NO_ROOM:
                    raise TierFull(f"no room on the device: {error.strerror}") from error
                raise TransportError(f"write failed: {error.strerror}") from error
            if done != want:
                # A short write on a local file means the device filled up in the middle of it.
                raise TierFull(f"short write: {done} of {want} B")
            total += done
        return total

    def read(self, handle: int, views: Sequence[memoryview], offset: int) -> None:
        position = offset
        for batch in _batches(views):
            want = sum(v.nbytes for v in batch)
            try:
                done = os.preadv(handle, batch, position, self._call_flags)
            except OSError as error:
                if error.errno == errno.ESTALE:
                    raise ChunkMissing("object vanished under the reader") from error
                raise TransportError(f"read failed: {error.strerror}") from error
            if done != want:
                raise ChunkTruncated(f"object ends {want - done} B early")
            position += done


def _batches(views: Sequence[memoryview]) -> Iterator[Sequence[memoryview]]:
    for start in range(0, len(views), MAX_IOVECS_PER_CALL):
        yield views[start : start + MAX_IOVECS_PER_CALL]


@dataclass(frozen=True)
class ModeReport:
    """What was found out about a directory: the mode taken and why."""

    mode: str
    reason: str
    write_gb_per_s: dict[str, float]
    read_gb_per_s: dict[str, float]


def probe_modes(dir_fd: int, direct_io: str = "auto", size_bytes: int = 8 * MIB, rounds: int = 3) -> ModeReport:
    """Try the modes in a directory and choose one.

    Args:
        dir_fd: descriptor of a writable directory; a scratch file is made and removed.
        direct_io: ``on`` (direct or an error), ``off`` (never direct), ``auto`` (the fastest sum of write and read
            that works, direct preferred within 10%, since it spares the page cache and the CPU), or ``page_cache``
            (buffered: what was written or read stays in memory that the machine has to spare).
        size_bytes: bytes written and read per round.
        rounds: rounds per mode; medians are compared.

    Raises:
        TierUnavailable: the directory takes no file, or ``on`` and direct I/O is refused.
        TierFull: there is no room for a probe file.
    """
    candidates = _CANDIDATES[direct_io]
    writes: dict[str, float] = {}
    reads: dict[str, float] = {}
    refused: dict[str, str] = {}
    # Freed with its last user: closing it here would fail, and hide the error, while a traceback still holds a view.
    view = memoryview(mmap.mmap(-1, size_bytes))
    for mode in candidates:
        try:
            writes[mode], reads[mode] = _time_mode(dir_fd, PosixTransport(mode), view, rounds)
        except (OSError, TransportError, ChunkError) as error:
            if isinstance(error, OSError) and error.errno in _NO_ROOM:
                raise TierFull(f"no room for a probe file: {error.strerror}") from error
            refused[mode] = str(error.__cause__ or error)
    if not writes:
        raise TierUnavailable(f"the tier directory takes no file I/O in mode(s) {candidates}: {refused}")
    best = min(writes, key=lambda mode: 1 / writes[mode] + 1 / reads[mode])
    if DIRECT in writes and best != DIRECT:
        cost = {m: 1 / writes[m] + 1 / reads[m] for m in (DIRECT, best)}
        if cost[DIRECT] <= 1.1 * cost[best]:
            best = DIRECT
    reason = f"{best} chosen of {sorted(writes)}" + (f"; refused: {refused}" if refused else "")
    return ModeReport(best, reason, writes, reads)


def _time_mode(dir_fd: int, transport: PosixTransport, view: memoryview, rounds: int) -> tuple[float, float]:
    # Process ids repeat over containers that share a mount, so the name cannot rest on them.
    name = f".tmp-probe-{secrets.token_hex(8)}"
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC | transport.open_flags
    fd = os.open(name, flags, 0o600, dir_fd=dir_fd)
    try:
        writes, reads = [], []
        for _ in range(rounds):
            start = time.perf_counter()
            transport.write(fd, [view], 0)
            if transport.mode != DIRECT:
                os.fdatasync(fd)
            writes.append(time.perf_counter() - start)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            start = time.perf_counter()
            transport.read(fd, [view], 0)
            reads.append(time.perf_counter() - start)
        size_gb = view.nbytes / 1e9
        return size_gb / statistics.median(writes), size_gb / statistics.median(reads)
    finally:
        os.close(fd)
        os.unlink(name, dir_fd=dir_fd)
