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
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar, cast

from memkv_engines.errors import ChunkForeign, ChunkMissing, TierFull, TierUnavailable, TransportError
from memkv_engines.keys import ChunkName, Namespace, bucket_of
from memkv_engines.limits import (
    EVICT_ABOVE_SHARE,
    EVICT_TO_SHARE,
    MAX_CHUNK_BYTES,
    MAX_OPEN_BUCKETS,
    MAX_VARIANTS_EXAMINED,
    TEMPORARY_MAX_AGE_S,
    TOUCH_EVERY_S,
)
from memkv_engines.tier.base import ChunkReader, PutResult, Tier
from memkv_engines.tier.eviction import OFF, SEGMENTED_LRU, StoredChunk, choose_victims
from memkv_engines.tier.folders import DIR_FLAGS, Folder, as_tier_error, dated_names, only_one, unlink_quietly, walk
from memkv_engines.tier.usage import UsageFile
from memkv_engines.transports.base import FileTransport, View
from memkv_engines.transports.files import attach, prove
from memkv_engines.transports.posix import BUFFERED, DIRECT, ModeReport, PosixTransport, probe_modes
from memkv_engines.transports.select import TransportPlan

_TEMPORARY = ".tmp-"
# O_NONBLOCK so that a FIFO planted under a chunk's name cannot hang the open; regular files ignore it.
_READ_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
_FULL_BACKOFF_S = 5.0
_GONE = (errno.ENOENT, errno.ESTALE)
_Result = TypeVar("_Result")


class _FileReader(ChunkReader):
    def __init__(self, transport: FileTransport[Any], handle: Any, object_bytes: int) -> None:
        self._transport, self._handle = transport, handle
        self.object_bytes = object_bytes

    def read(self, views: Sequence[View], offset: int) -> None:
        self._transport.read(self._handle, cast("Sequence[memoryview]", views), offset)

    def close(self) -> None:
        handle, self._handle = self._handle, None
        if handle is not None:
            self._transport.detach(handle)


class DirectoryTier(Tier):
    """Chunks as files below one directory that any number of processes may share.

    Args:
        root: the directory; made with mode 0700 if it is missing.
        direct_io: ``auto``, ``on`` or ``off``, see ``probe_modes``.
        capacity_bytes: bound on the bytes of chunks below ``root``, 0 for none; counted by all processes that share the
            directory and give a bound (``usage``), so that it is kept but for what a first scan has not seen yet.
            A store beyond it fails; ``evict`` makes room.
        read_only: never write, not even to probe.
        eviction: which chunks ``evict`` removes: ``segmented_lru``, ``lru``, or none with ``off``.
        transport: what was decided to move the bytes with; posix if None.

    Raises:
        TierUnavailable: the directory cannot be made, opened or written.
        ConfigError: the transport does not work here.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        direct_io: str = "auto",
        capacity_bytes: int = 0,
        read_only: bool = False,
        eviction: str = SEGMENTED_LRU,
        transport: TransportPlan | None = None,
    ) -> None:
        self.root = Path(root)
        self._capacity_bytes = capacity_bytes
        self._read_only = read_only
        self._eviction = eviction
        self._usage: UsageFile | None = None
        self._pressure = threading.Event()
        self._root_fd = self._open_root()
        try:
            self.mode_report = self._choose_mode(direct_io)
            self._transport = self._open_transport(transport)
            if capacity_bytes and not read_only:
                self._usage = UsageFile(self._root_fd)
        except BaseException:
            os.close(self._root_fd)
            raise
        self.name = f"directory({self._transport.name})"
        self.align_bytes = self._transport.align_bytes
        self.moves_device_memory = self._transport.moves_device_memory
        self._lock = threading.Lock()
        self._buckets: OrderedDict[tuple[str, str], Folder] = OrderedDict()
        self._written_bytes = 0
        self._scanned_bytes: int | None = None
        self._full_until = 0.0

    # --- writing -------------------------------------------------------------

    def put(self, folder: str, name: ChunkName, views: Sequence[View], *, replace: bool = False) -> PutResult:
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
        if self._usage is not None:
            granted, used = self._usage.reserve(size_bytes, self._capacity_bytes)
            if used > EVICT_ABOVE_SHARE * self._capacity_bytes or not granted:
                self._pressure.set()
            if not granted:
                raise TierFull(f"capacity_bytes={self._capacity_bytes} reached: {used} B used")
        with self._lock:
            self._written_bytes += size_bytes

    def _account(self, size_bytes: int) -> None:
        if self._usage is not None:
            self._usage.add(size_bytes)
        with self._lock:
            self._written_bytes += size_bytes

    def _stored_bytes(self, folder: str, name: ChunkName) -> int:
        try:
            info = self._stat(folder, name)
        except OSError:
            return 0
        return info.st_size if stat.S_ISREG(info.st_mode) else 0

    def _publish(self, folder: str, name: ChunkName, views: Sequence[View]) -> int:
        temporary = f"{_TEMPORARY}{os.getpid()}-{secrets.token_hex(8)}"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC | self._transport.open_flags
        try:
            bucket, fd = self._create(folder, name.bucket, temporary, flags)
        except OSError as error:
            raise as_tier_error(error, f"cannot create a chunk in {folder}/{name.bucket}") from error
        bucket_fd = bucket.fd
        try:
            handle = attach(self._transport, fd, writable=True)
            try:
                written = self._transport.write(handle, cast("Sequence[memoryview]", views), 0)
            finally:
                self._transport.detach(handle)
            os.rename(temporary, name.text, src_dir_fd=bucket_fd, dst_dir_fd=bucket_fd)
        except OSError as error:
            unlink_quietly(temporary, bucket_fd)
            raise as_tier_error(error, "cannot publish a chunk") from error
        except BaseException:
            unlink_quietly(temporary, bucket_fd)
            raise
        return written

    def _create(self, folder: str, bucket: str, name: str, flags: int) -> tuple[Folder, int]:
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
            folder_fd = os.open(namespace.folder, DIR_FLAGS, dir_fd=self._root_fd)
        except OSError as error:
            raise TierUnavailable(f"cannot open namespace folder {namespace.folder}: {error.strerror}") from error
        temporary = f"{_TEMPORARY}{os.getpid()}-{secrets.token_hex(8)}"
        try:
            fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=folder_fd)
            with os.fdopen(fd, "wb") as file:
                file.write(namespace.canonical_json)
            os.rename(temporary, "manifest.json", src_dir_fd=folder_fd, dst_dir_fd=folder_fd)
        except OSError as error:
            unlink_quietly(temporary, folder_fd)
            raise as_tier_error(error, "cannot write the namespace manifest") from error
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
            self._touch(fd, info)
        except BaseException:
            os.close(fd)
            raise
        return _FileReader(self._transport, attach(self._transport, fd), info.st_size)

    def _touch(self, fd: int, info: os.stat_result) -> None:
        """Note that a chunk was used, for eviction: mounts with ``noatime`` do not, and direct reads may not either."""
        if self._usage is None:
            return
        now = time.time_ns()
        if info.st_atime_ns <= info.st_mtime_ns or now - info.st_atime_ns > TOUCH_EVERY_S * 1e9:
            try:
                os.utime(fd, ns=(max(now, info.st_mtime_ns + 1), info.st_mtime_ns))
            except OSError:
                pass  # Another user's file: it is read, and its use not noted.

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
            found = self._within(folder, bucket_of(first), lambda fd: dated_names(fd, first.hex()))
        except OSError:
            return []
        found = [(when, name) for when, name in found if (name.group, name.shard_text) == (group, shard_text)]
        found.sort(key=lambda pair: pair[0], reverse=True)
        return [name for _, name in found[:MAX_VARIANTS_EXAMINED]]

    def names(self, folder: str) -> Iterator[ChunkName]:
        return (name for name, info in self._chunks(folder))

    def _chunks(self, folder: str) -> Iterator[tuple[ChunkName, os.stat_result]]:
        """Every chunk of a namespace with its inode; foreign files are passed over."""
        for place, _, entry in walk(self._root_fd, folder, depth=1):
            try:
                name = ChunkName.parse(entry.name)
                info = entry.stat(follow_symlinks=False)
            except (ChunkForeign, OSError):
                continue
            if name.bucket == place and stat.S_ISREG(info.st_mode):
                yield name, info

    def used_bytes(self) -> int | None:
        if self._usage is not None:
            return self._usage.count().used_bytes
        if self._scanned_bytes is None:
            return None
        return self._scanned_bytes + self._written_bytes

    def scan(self) -> int:
        """Count the bytes of all namespaces and collect old temporary files. Slow; for a background thread.

        Returns:
            Bytes held by chunks below the root.
        """
        before = self._usage.count() if self._usage is not None else None
        with self._lock:
            written_before = self._written_bytes
        total = 0
        for _, dir_fd, entry in walk(self._root_fd, ".", depth=2):
            try:
                info = entry.stat(follow_symlinks=False)
            except OSError:
                continue
            if entry.name.startswith(_TEMPORARY):
                if not self._read_only and time.time() - info.st_mtime > TEMPORARY_MAX_AGE_S:
                    unlink_quietly(entry.name, dir_fd)
            elif entry.name.endswith(".kv") and stat.S_ISREG(info.st_mode):
                total += info.st_size
        with self._lock:
            # What was written meanwhile may be counted twice until the next scan, but never not at all.
            self._scanned_bytes = total
            self._written_bytes -= written_before
        if self._usage is not None and before is not None:
            self._usage.correct(total, before)
            if self._usage.count().used_bytes > EVICT_ABOVE_SHARE * self._capacity_bytes:
                self._pressure.set()
        return total

    # --- eviction ------------------------------------------------------------

    @property
    def evicts(self) -> bool:
        """Whether ``evict`` may ever remove anything."""
        return self._usage is not None and self._eviction != OFF

    def wait_for_pressure(self, timeout_s: float | None = None) -> bool:
        """Block until a store found the directory nearly full, or the time is up; whether one did."""
        pressed = self._pressure.wait(timeout_s)
        self._pressure.clear()
        return pressed

    def wake(self) -> None:
        """Let ``wait_for_pressure`` return at once."""
        self._pressure.set()

    def evict(self) -> int:
        """Remove the least useful chunks until the directory is no longer nearly full. Slow; for a background thread.

        Of the processes that share the directory one at a time does it. Open readers go on reading.

        Returns:
            Bytes freed.
        """
        if self._usage is None or not self.evicts:
            return 0
        with only_one(self._root_fd) as alone:
            used = self._usage.count().used_bytes
            if not alone or used <= EVICT_ABOVE_SHARE * self._capacity_bytes:
                return 0
            victims = choose_victims(self._listing(), used - int(EVICT_TO_SHARE * self._capacity_bytes), self._eviction)
            freed = 0
            for victim in victims:
                folder, _, text = victim.path.partition("/")
                if self.remove(folder, ChunkName.parse(text)):
                    freed += victim.size_bytes
        return freed

    def _listing(self) -> Iterator[StoredChunk]:
        """Every chunk of every namespace; foreign files are passed over."""
        with os.scandir(self._root_fd) as entries:
            folders = [e.name for e in entries if e.is_dir(follow_symlinks=False) and not e.name.startswith(".")]
        for folder in folders:
            for name, info in self._chunks(folder):
                yield StoredChunk(f"{folder}/{name.text}", info.st_size, info.st_mtime_ns, info.st_atime_ns)

    def prove(self, views: Sequence[View]) -> None:
        """Move bytes of this kind of memory into a scratch file and back, as ``files.prove``; not if read-only."""
        if not self._read_only:
            prove(self._transport, self._root_fd, views)

    def register_memory(self, address: int, length_bytes: int, *, device: int | None = None) -> None:
        self._transport.register(address, length_bytes, device=device)

    def deregister_memory(self, address: int) -> None:
        self._transport.deregister(address)

    def close(self) -> None:
        self._transport.close()
        if self._usage is not None:
            self._usage.close()
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
        # Held in a name: it closes with its last user, and the cache may drop it before the action is done.
        current = self._bucket(folder, bucket)
        return action(current.fd)

    def _is_current(self, folder: str, bucket: str, opened: Folder) -> bool:
        try:
            return os.path.samestat(os.stat(f"{folder}/{bucket}", dir_fd=self._root_fd), os.fstat(opened.fd))
        except OSError:
            return False

    def _bucket(self, folder: str, bucket: str) -> Folder:
        with self._lock:
            opened = self._buckets.get((folder, bucket))
            if opened is None:
                namespace = Folder(folder, self._root_fd)
                opened = Folder(bucket, namespace.fd)
                self._buckets[(folder, bucket)] = opened
                if len(self._buckets) > MAX_OPEN_BUCKETS:
                    self._buckets.popitem(last=False)
            else:
                self._buckets.move_to_end((folder, bucket))
            return opened

    def _make_bucket(self, folder: str, bucket: str) -> Folder:
        try:
            return self._bucket(folder, bucket)
        except FileNotFoundError:
            self._make_folder(self._root_fd, folder)
            namespace = Folder(folder, self._root_fd)
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
            raise as_tier_error(error, f"cannot make folder {name}") from error

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

    def _open_transport(self, plan: TransportPlan | None) -> FileTransport[Any]:
        if plan is None:
            return PosixTransport(self.mode_report.mode)
        self.mode_report = replace(self.mode_report, reason=f"{plan.reason}; {self.mode_report.reason}")
        return plan.open(self.mode_report.mode, None if self._read_only else self._root_fd)

    def _choose_mode(self, direct_io: str) -> ModeReport:
        if not self._read_only:
            try:
                return probe_modes(self._root_fd, direct_io)
            except TierFull:
                pass
        mode = BUFFERED if direct_io == "off" else DIRECT
        why = "read-only tier" if self._read_only else "the device is full"
        return ModeReport(mode, f"{mode} assumed without a probe: {why}", {}, {})
