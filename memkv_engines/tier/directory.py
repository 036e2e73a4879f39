"""Directory tier: one file per chunk on local NVMe or a shared mount.

``<root>/<namespace>/<bucket>/<chunk name>``; files 0600, folders 0700. Files are written under a temporary name and
renamed, so a reader sees a whole object or none; an open descriptor survives eviction. All opens are relative to a
directory descriptor and follow no links. Torn or lost writes are found by the checksum, so nothing is fsynced.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar, cast

from memkv_engines.errors import (
    ChunkForeign,
    ChunkMissing,
    TierError,
    TierFull,
    TierUnavailable,
    TransportError,
)
from memkv_engines.keys import ChunkName, Namespace, bucket_of
from memkv_engines.limits import (
    CLOCK_SLACK_S,
    MAX_CHUNK_BYTES,
    MAX_OPEN_BUCKETS,
    MAX_VARIANTS_EXAMINED,
    TOUCH_EVERY_NS,
)
from memkv_engines.tier import listing
from memkv_engines.tier.base import ChunkReader, PutResult, Tier
from memkv_engines.tier.eviction import SEGMENTED_LRU
from memkv_engines.tier.folders import Folder, as_tier_error, dated_names, unlink_quietly
from memkv_engines.tier.quotas import TenantAccounts
from memkv_engines.tier.records import MANIFEST, READ_FLAGS, owned_by_us, temporary_name, write_record
from memkv_engines.tier.upkeep import Upkeep, needs_listing
from memkv_engines.tier.usage import NAME, UsageFile
from memkv_engines.transports.base import FileTransport, View
from memkv_engines.transports.files import attach, prove
from memkv_engines.transports.posix import BUFFERED, DIRECT, ModeReport, PosixTransport, probe_modes
from memkv_engines.transports.select import TransportPlan

_FULL_BACKOFF_S = 5.0
_QUICK_SCANS, _QUICK_S = 3, 0.1
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
        direct_io: ``auto``, ``on``, ``off`` or ``page_cache``, see ``probe_modes``.
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
        self._usage: UsageFile | None = None
        self._pressure = threading.Event()
        self._root_fd = self._open_root()
        try:
            self.mode_report = self._choose_mode(direct_io)
            self._transport = self._open_transport(transport)
            if not read_only and (capacity_bytes or has_usage_file(self._root_fd)):
                self._usage = UsageFile(self._root_fd)
        except BaseException:
            os.close(self._root_fd)
            raise
        self._accounts = TenantAccounts(self._root_fd)
        self._upkeep = Upkeep(self._root_fd, self._usage, self._accounts, capacity_bytes, eviction)
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
        self._reserve(folder, size)
        try:
            written = self._publish(folder, name, views)
        except BaseException as error:
            self._account(folder, -size)
            if isinstance(error, TierFull):
                self._full_until = time.monotonic() + _FULL_BACKOFF_S
            raise
        if replaced:
            self._account(folder, -replaced)
        return PutResult(written, False)

    def _reserve(self, folder: str, size_bytes: int) -> None:
        if time.monotonic() < self._full_until:
            raise TierFull("the device was full a moment ago")
        account = self._accounts.of(folder)
        if account is not None:
            self._reserve_in(account.usage, size_bytes, account.quota_bytes, f"the quota of tenant {account.tenant!r}")
        if self._usage is not None:
            try:
                self._reserve_in(self._usage, size_bytes, self._capacity_bytes, "capacity_bytes")
            except BaseException:
                if account is not None:
                    account.usage.add(-size_bytes)
                raise
        with self._lock:
            self._written_bytes += size_bytes

    def _reserve_in(self, usage: UsageFile, size_bytes: int, bound_bytes: int, what: str) -> None:
        granted, count = usage.reserve(size_bytes, bound_bytes)
        if not granted or needs_listing(count, bound_bytes):
            self._pressure.set()
        if not granted:
            raise TierFull(f"{what}={bound_bytes} reached: {count.used_bytes} B used")

    def _account(self, folder: str, size_bytes: int) -> None:
        if self._usage is not None:
            # What was done is done: a count that is off until the next scan is no reason to call it failed.
            with contextlib.suppress(TierError):
                self._usage.add(size_bytes)
        account = self._accounts.of(folder)
        if account is not None:
            with contextlib.suppress(TierError):
                account.usage.add(size_bytes)
        with self._lock:
            self._written_bytes += size_bytes

    def _stored_bytes(self, folder: str, name: ChunkName) -> int:
        try:
            info = self._stat(folder, name)
        except OSError:
            return 0
        return info.st_size if stat.S_ISREG(info.st_mode) else 0

    def _publish(self, folder: str, name: ChunkName, views: Sequence[View]) -> int:
        temporary = temporary_name()
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
        self._account(folder, -size)
        return True

    def write_manifest(self, namespace: Namespace) -> None:
        if self._read_only:
            return
        self._make_folder(self._root_fd, namespace.folder)
        try:
            opened = Folder(namespace.folder, self._root_fd)
        except OSError as error:
            raise as_tier_error(error, f"cannot open namespace folder {namespace.folder}") from error
        write_record(opened.fd, MANIFEST, namespace.canonical_json)

    # --- reading -------------------------------------------------------------

    def open(self, folder: str, name: ChunkName) -> ChunkReader:
        flags = READ_FLAGS | self._transport.open_flags
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
            if not owned_by_us(info):
                raise ChunkForeign(f"owned by user {info.st_uid}, not by us: {name.text}")
            if info.st_size > MAX_CHUNK_BYTES:
                raise ChunkForeign(f"{info.st_size} B is larger than any chunk: {name.text}")
            self._touch(fd, info)
        except OSError as error:
            os.close(fd)
            raise TransportError(f"cannot look at a chunk: {error.strerror}") from error
        except BaseException:
            os.close(fd)
            raise
        return _FileReader(self._transport, attach(self._transport, fd), info.st_size)

    def _touch(self, fd: int, info: os.stat_result) -> None:
        """Note that a chunk was used, for eviction: mounts with ``noatime`` do not, and direct reads may not either."""
        if self._read_only:
            return
        now, used, written = time.time_ns(), info.st_atime_ns, info.st_mtime_ns
        if written < used <= now < used + TOUCH_EVERY_NS:
            return
        if max(used, written) > now + CLOCK_SLACK_S * 10**9:
            written = now  # It is from before a clock was set back, and would never be old.
        try:
            os.utime(fd, ns=(max(now, written + 1), written))
        except OSError:
            pass  # Another user's file, or a read-only mount: it is read, and its use not noted.

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
        return (entry.name for entry in listing.chunks(self._root_fd, folder) if entry.name is not None)

    def used_bytes(self) -> int | None:
        if self._usage is not None and self._capacity_bytes:
            return self._usage.count().used_bytes
        if self._scanned_bytes is None:
            return None
        return self._scanned_bytes + self._written_bytes

    def scan(self) -> int:
        """Count the bytes of all namespaces and collect old temporary files. Slow; for a background thread.

        Returns:
            Bytes held by chunks below the root.

        Raises:
            TierError: a folder cannot be listed, or the count not written; it stays as it was.
        """
        for _ in range(_QUICK_SCANS):
            with self._lock:
                written_before = self._written_bytes
            started = time.monotonic()
            total = self._upkeep.scan(collect=not self._read_only)
            # What was written meanwhile may be counted twice until the next scan, but never not at all: once more,
            # where that is cheap.
            if self._written_bytes == written_before or time.monotonic() - started > _QUICK_S:
                break
        with self._lock:
            self._scanned_bytes = total
            self._written_bytes -= written_before
        if self._usage is not None and needs_listing(self._usage.count(), self._capacity_bytes):
            self._pressure.set()
        return total

    # --- eviction ------------------------------------------------------------

    def wait_for_pressure(self, timeout_s: float | None = None) -> bool:
        """Block until a store found the directory nearly full, or the time is up; whether one did."""
        pressed = self._pressure.wait(timeout_s)
        self._pressure.clear()
        return pressed

    def wake(self) -> None:
        """Let ``wait_for_pressure`` return at once."""
        self._pressure.set()

    def evict(self, *, recount: bool = False) -> int:
        """As ``Upkeep.evict``; nothing where the tier is read-only."""
        return 0 if self._read_only else self._upkeep.evict(recount=recount)

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
        self._accounts.close()
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
        mode = BUFFERED if direct_io in ("off", "page_cache") else DIRECT
        why = "read-only tier" if self._read_only else "the device is full"
        return ModeReport(mode, f"{mode} assumed without a probe: {why}", {}, {})


def has_usage_file(root_fd: int) -> bool:
    """Whether the bytes of a directory are being counted."""
    try:
        os.stat(NAME, dir_fd=root_fd, follow_symlinks=False)
    except OSError:
        return False
    return True
