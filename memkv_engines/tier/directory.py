"""Directory tier: one file per chunk on local NVMe or a shared mount.

``<root>/<namespace>/<bucket>/<chunk name>``; files 0600, folders 0700. Files are written under a temporary name and
renamed, so a reader sees a whole object or none; an open descriptor survives eviction. All opens are relative to a
directory descriptor and follow no links. Torn or lost writes are found by the checksum, so nothing is fsynced.
"""

from __future__ import annotations

import errno
import os
import secrets
import stat
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from memkv_engines.errors import (
    ChunkForeign,
    ChunkMissing,
    TierFull,
    TierUnavailable,
    TransportError,
)
from memkv_engines.keys import ChunkName, Namespace, bucket_of
from memkv_engines.limits import (
    MAX_BUCKET_ENTRIES_LISTED,
    MAX_CHUNK_BYTES,
    MAX_OPEN_BUCKETS,
    MAX_VARIANTS_EXAMINED,
    TEMPORARY_MAX_AGE_S,
)
from memkv_engines.tier.base import ChunkReader, PutResult, Tier
from memkv_engines.transports.posix import BUFFERED, DIRECT, ModeReport, PosixTransport, probe_modes

_TEMPORARY = ".tmp-"
_DIR_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
# O_NONBLOCK so that a FIFO planted under a chunk's name cannot hang the open; regular files ignore it.
_READ_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
_FULL_BACKOFF_S = 5.0
_GONE = (errno.ENOENT, errno.ESTALE)
_Result = TypeVar("_Result")


class _Folder:
    """An open folder. It closes with its last user, so the cache can drop it while another thread is at work in it."""

    def __init__(self, name: str, dir_fd: int) -> None:
        self.fd = os.open(name, _DIR_FLAGS, dir_fd=dir_fd)

    def __del__(self) -> None:
        if hasattr(self, "fd"):
            os.close(self.fd)


class _FileReader(ChunkReader):
    def __init__(self, transport: PosixTransport, fd: int, object_bytes: int) -> None:
        self._transport, self._fd = transport, fd
        self.object_bytes = object_bytes

    def read(self, views: Sequence[memoryview], offset: int) -> None:
        self._transport.read(self._fd, views, offset)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class DirectoryTier(Tier):
    """Chunks as files below one directory that any number of processes may share.

    Args:
        root: the directory; made with mode 0700 if it is missing.
        direct_io: ``auto``, ``on`` or ``off``, see ``probe_modes``.
        capacity_bytes: stores stop when the chunks below ``root`` reach this size, 0 for no bound. The size is counted
            by a background scan and this process's own writes: processes that share a directory may overshoot by what
            the others wrote since the scan.
        read_only: never write, not even to probe.

    Raises:
        TierUnavailable: the directory cannot be made, opened or written.
    """

    def __init__(
        self, root: str | Path, *, direct_io: str = "auto", capacity_bytes: int = 0, read_only: bool = False
    ) -> None:
        self.root = Path(root)
        self._capacity_bytes = capacity_bytes
        self._read_only = read_only
        self._root_fd = self._open_root()
        try:
            self.mode_report = self._choose_mode(direct_io)
        except BaseException:
            os.close(self._root_fd)
            raise
        self._transport = PosixTransport(self.mode_report.mode)
        self.name = f"directory({self._transport.name})"
        self.align_bytes = self._transport.align_bytes
        self._lock = threading.Lock()
        self._buckets: OrderedDict[tuple[str, str], _Folder] = OrderedDict()
        self._written_bytes = 0
        self._scanned_bytes: int | None = None
        self._full_until = 0.0

    # --- writing -------------------------------------------------------------

    def put(self, folder: str, name: ChunkName, views: Sequence[memoryview], *, replace: bool = False) -> PutResult:
        if self._read_only:
            raise TierUnavailable("the tier is read-only")
        if not replace and self.exists(folder, [name])[0]:
            return PutResult(0, True)
        size = sum(v.nbytes for v in views)
        replaced = self._stored_bytes(folder, name) if replace else 0
        self._reserve(size)
        try:
            written = self._publish(folder, name, views)
        except BaseException as error:
            self._account(-size)
            if isinstance(error, TierFull):
                self._full_until = time.monotonic() + _FULL_BACKOFF_S
            raise
        self._account(-replaced)
        return PutResult(written, False)

    def _reserve(self, size_bytes: int) -> None:
        if time.monotonic() < self._full_until:
            raise TierFull("the device was full a moment ago")
        with self._lock:
            used = (self._scanned_bytes or 0) + self._written_bytes
            if self._capacity_bytes and used + size_bytes > self._capacity_bytes:
                raise TierFull(f"capacity_bytes={self._capacity_bytes} reached: {used} B used")
            self._written_bytes += size_bytes

    def _account(self, size_bytes: int) -> None:
        with self._lock:
            self._written_bytes += size_bytes

    def _stored_bytes(self, folder: str, name: ChunkName) -> int:
        try:
            info = self._stat(folder, name)
        except OSError:
            return 0
        return info.st_size if stat.S_ISREG(info.st_mode) else 0

    def _publish(self, folder: str, name: ChunkName, views: Sequence[memoryview]) -> int:
        temporary = f"{_TEMPORARY}{os.getpid()}-{secrets.token_hex(8)}"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC | self._transport.open_flags
        try:
            bucket, fd = self._create(folder, name.bucket, temporary, flags)
        except OSError as error:
            raise _as_tier_error(error, f"cannot create a chunk in {folder}/{name.bucket}") from error
        bucket_fd = bucket.fd
        try:
            try:
                written = self._transport.write(fd, views, 0)
            finally:
                os.close(fd)
            os.rename(temporary, name.text, src_dir_fd=bucket_fd, dst_dir_fd=bucket_fd)
        except OSError as error:
            _unlink_quietly(temporary, bucket_fd)
            raise _as_tier_error(error, "cannot publish a chunk") from error
        except BaseException:
            _unlink_quietly(temporary, bucket_fd)
            raise
        return written

    def _create(self, folder: str, bucket: str, name: str, flags: int) -> tuple[_Folder, int]:
        """Create a file in a bucket folder; makes the folder, once more if it vanishes meanwhile."""
        try:
            opened = self._make_bucket(folder, bucket)
            return opened, os.open(name, flags, 0o600, dir_fd=opened.fd)
        except OSError as error:
            if error.errno not in _GONE:
                raise
        self._forget(folder, bucket)
        opened = self._make_bucket(folder, bucket)
        return opened, os.open(name, flags, 0o600, dir_fd=opened.fd)

    def remove(self, folder: str, name: ChunkName) -> bool:
        if self._read_only:
            return False
        size = self._stored_bytes(folder, name)
        try:
            self._within(folder, name.bucket, lambda fd: os.unlink(name.text, dir_fd=fd))
        except OSError as error:
            if error.errno in _GONE:
                return False
            raise TierUnavailable(f"cannot remove a chunk: {error.strerror}") from error
        self._account(-size)
        return True

    def write_manifest(self, namespace: Namespace) -> None:
        if self._read_only:
            return
        self._make_folder(self._root_fd, namespace.folder)
        try:
            folder_fd = os.open(namespace.folder, _DIR_FLAGS, dir_fd=self._root_fd)
        except OSError as error:
            raise TierUnavailable(f"cannot open namespace folder {namespace.folder}: {error.strerror}") from error
        temporary = f"{_TEMPORARY}{os.getpid()}-{secrets.token_hex(8)}"
        try:
            fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=folder_fd)
            with os.fdopen(fd, "wb") as file:
                file.write(namespace.canonical_json)
            os.rename(temporary, "manifest.json", src_dir_fd=folder_fd, dst_dir_fd=folder_fd)
        except OSError as error:
            _unlink_quietly(temporary, folder_fd)
            raise _as_tier_error(error, "cannot write the namespace manifest") from error
        finally:
            os.close(folder_fd)

    # --- reading -------------------------------------------------------------

    def open(self, folder: str, name: ChunkName) -> ChunkReader:
        flags = _READ_FLAGS | self._transport.open_flags
        try:
            fd = self._within(folder, name.bucket, lambda fd: os.open(name.text, flags, dir_fd=fd))
        except OSError as error:
            if error.errno in _GONE:
                raise ChunkMissing(f"no object {name.text}") from error
            if error.errno in (errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.ENXIO, errno.EINVAL):
                raise ChunkForeign(f"not a regular file: {name.text}") from error
            raise TransportError(f"cannot open a chunk: {error.strerror}") from error
        try:
            info = os.fstat(fd)
            if not stat.S_ISREG(info.st_mode):
                raise ChunkForeign(f"not a regular file: {name.text}")
            if info.st_uid not in (os.geteuid(), 0):
                raise ChunkForeign(f"owned by user {info.st_uid}, not by us: {name.text}")
            if info.st_size > MAX_CHUNK_BYTES:
                raise ChunkForeign(f"{info.st_size} B is larger than any chunk: {name.text}")
        except BaseException:
            os.close(fd)
            raise
        return _FileReader(self._transport, fd, info.st_size)

    def exists(self, folder: str, names: Iterable[ChunkName]) -> list[bool]:
        return [self._exists(folder, name) for name in names]

    def _exists(self, folder: str, name: ChunkName) -> bool:
        try:
            return stat.S_ISREG(self._stat(folder, name).st_mode)
        except OSError:
            return False

    def _stat(self, folder: str, name: ChunkName) -> os.stat_result:
        return self._within(folder, name.bucket, lambda fd: os.stat(name.text, dir_fd=fd, follow_symlinks=False))

    def variants(self, folder: str, first: bytes, group: int, shard_text: str) -> list[ChunkName]:
        try:
            found = self._within(folder, bucket_of(first), lambda fd: _dated_names(fd, first.hex()))
        except OSError:
            return []
        found = [(when, name) for when, name in found if (name.group, name.shard_text) == (group, shard_text)]
        found.sort(key=lambda pair: pair[0], reverse=True)
        return [name for _, name in found[:MAX_VARIANTS_EXAMINED]]

    def names(self, folder: str) -> Iterator[ChunkName]:
        for place, _, entry in _walk(self._root_fd, folder, depth=1):
            try:
                name = ChunkName.parse(entry.name)
            except ChunkForeign:
                continue
            if name.bucket == place and entry.is_file(follow_symlinks=False):
                yield name

    def used_bytes(self) -> int | None:
        if self._scanned_bytes is None:
            return None
        return self._scanned_bytes + self._written_bytes

    def scan(self) -> int:
        """Count the bytes of all namespaces and collect old temporary files. Slow; for a background thread.

        Returns:
            Bytes held by chunks below the root.
        """
        with self._lock:
            written_before = self._written_bytes
        total = 0
        for _, dir_fd, entry in _walk(self._root_fd, ".", depth=2):
            try:
                info = entry.stat(follow_symlinks=False)
            except OSError:
                continue
            if entry.name.startswith(_TEMPORARY):
                if not self._read_only and time.time() - info.st_mtime > TEMPORARY_MAX_AGE_S:
                    _unlink_quietly(entry.name, dir_fd)
            elif entry.name.endswith(".kv") and stat.S_ISREG(info.st_mode):
                total += info.st_size
        with self._lock:
            # What was written meanwhile may be counted twice until the next scan, but never not at all.
            self._scanned_bytes = total
            self._written_bytes -= written_before
        return total

    def close(self) -> None:
        with self._lock:
            self._buckets.clear()
            if self._root_fd >= 0:
                os.close(self._root_fd)
                self._root_fd = -1

    # --- folders -------------------------------------------------------------

    def _within(self, folder: str, bucket: str, action: Callable[[int], _Result]) -> _Result:
        """Run an action on an existing bucket folder, once more if the folder was replaced while we held it open.

        Raises:
            OSError: as the action does; ENOENT if there is no such folder.
        """
        opened = self._bucket(folder, bucket)
        try:
            return action(opened.fd)
        except OSError as error:
            if error.errno not in _GONE or self._is_current(folder, bucket, opened):
                raise
        self._forget(folder, bucket)
        return action(self._bucket(folder, bucket).fd)

    def _is_current(self, folder: str, bucket: str, opened: _Folder) -> bool:
        try:
            return os.path.samestat(os.stat(f"{folder}/{bucket}", dir_fd=self._root_fd), os.fstat(opened.fd))
        except OSError:
            return False

    def _bucket(self, folder: str, bucket: str) -> _Folder:
        with self._lock:
            opened = self._buckets.get((folder, bucket))
            if opened is None:
                namespace = _Folder(folder, self._root_fd)
                opened = _Folder(bucket, namespace.fd)
                self._buckets[(folder, bucket)] = opened
                if len(self._buckets) > MAX_OPEN_BUCKETS:
                    self._buckets.popitem(last=False)
            else:
                self._buckets.move_to_end((folder, bucket))
            return opened

    def _make_bucket(self, folder: str, bucket: str) -> _Folder:
        try:
            return self._bucket(folder, bucket)
        except FileNotFoundError:
            self._make_folder(self._root_fd, folder)
            namespace = _Folder(folder, self._root_fd)
            self._make_folder(namespace.fd, bucket)
            return self._bucket(folder, bucket)

    def _forget(self, folder: str, bucket: str) -> None:
        with self._lock:
            self._buckets.pop((folder, bucket), None)

    @staticmethod
    def _make_folder(parent_fd: int, name: str) -> None:
        try:
            os.mkdir(name, 0o700, dir_fd=parent_fd)
        except FileExistsError:
            pass
        except OSError as error:
            raise _as_tier_error(error, f"cannot make folder {name}") from error

    def _open_root(self) -> int:
        try:
            if not self._read_only:
                self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
            fd = os.open(self.root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise TierUnavailable(
                f"path={str(self.root)!r} cannot be used as tier directory: {error.strerror}. "
                "Give a directory this user may create or write."
            ) from error
        if not self._read_only and not os.access(".", os.W_OK | os.X_OK, dir_fd=fd, effective_ids=True):
            os.close(fd)
            raise TierUnavailable(f"path={str(self.root)!r} is not writable by this user: fix its mode or owner")
        return fd

    def _choose_mode(self, direct_io: str) -> ModeReport:
        if not self._read_only:
            try:
                return probe_modes(self._root_fd, direct_io)
            except TierFull:
                pass
        mode = BUFFERED if direct_io == "off" else DIRECT
        why = "read-only tier" if self._read_only else "the device is full"
        return ModeReport(mode, f"{mode} assumed without a probe: {why}", {}, {})


def _walk(parent_fd: int, name: str, depth: int) -> Iterator[tuple[str, int, os.DirEntry[str]]]:
    """Everything but folders below a folder: (name and descriptor of the folder it is in, entry)."""
    try:
        fd = os.open(name, _DIR_FLAGS, dir_fd=parent_fd)
    except OSError:
        return
    try:
        folders = []
        with os.scandir(fd) as entries:
            for entry in entries:
                if not entry.is_dir(follow_symlinks=False):
                    yield name, fd, entry
                elif not entry.name.startswith("."):
                    folders.append(entry.name)
        for folder in folders if depth else ():
            yield from _walk(fd, folder, depth - 1)
    finally:
        os.close(fd)


def _dated_names(bucket_fd: int, prefix: str) -> list[tuple[int, ChunkName]]:
    """The chunks of a bucket whose names begin with a prefix, each with its time of modification.

    Raises:
        FileNotFoundError: the folder is empty, or was removed, which looks the same.
    """
    # A listing moves the descriptor's own position, which threads would share: list through one that is ours alone.
    fd = os.open(".", _DIR_FLAGS, dir_fd=bucket_fd)
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


def _unlink_quietly(name: str, dir_fd: int) -> None:
    try:
        os.unlink(name, dir_fd=dir_fd)
    except OSError:
        pass


def _as_tier_error(error: OSError, what: str) -> TierFull | TierUnavailable:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return TierFull(f"{what}: {error.strerror}")
    return TierUnavailable(f"{what}: {error.strerror}")
