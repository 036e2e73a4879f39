"""Several directories, one per drive, as one tier.

A chunk's home is chosen by rendezvous hashing of its first block's hash with the drives' own ids, so that variants
which start at one block stay together, a drive that comes or goes moves only its own share, and neither the order of
the paths nor where a drive is mounted matters. A drive that refuses a store is left alone for a while and its share
goes to the *runner-up*, the drive with the next score; so every look-up that misses at home asks the runner-up too.
That is all the state there is: processes need not agree on which drive is ill.

What is lost with a drive is a miss. What was stored at the runner-up meanwhile is found there for as long as it stays.
"""

from __future__ import annotations

import errno
import heapq
import os
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from xxhash import xxh3_64_intdigest

from memkv_engines.errors import (
    ChunkForeign,
    ChunkMissing,
    MemKVError,
    TierError,
    TierFull,
    TierUnavailable,
    TransferOverdue,
    TransportError,
)
from memkv_engines.keys import ChunkName, Namespace
from memkv_engines.limits import DRIVE_DOWN_S, MAX_VARIANTS_EXAMINED
from memkv_engines.log import get_logger
from memkv_engines.tier.base import ChunkReader, PutResult, Tier
from memkv_engines.tier.directory import DirectoryTier
from memkv_engines.tier.eviction import SEGMENTED_LRU
from memkv_engines.tier.folders import unlink_quietly
from memkv_engines.tier.records import read_record, temporary_name, write_record
from memkv_engines.transports.base import View
from memkv_engines.transports.posix import ModeReport
from memkv_engines.transports.select import TransportPlan

log = get_logger(__name__)

ID_FILE = ".drive"
_ID_HEX = 32
_ID = re.compile(rb"[0-9a-fA-F]{%d}" % _ID_HEX)


@dataclass
class Drive:
    """One directory.

    Attributes:
        tier: open, maybe for reading only although stores are wanted.
        seed: from the drive's id.
        takes_stores: whether it was opened for writing.
        ill_until: no store is tried before, by the monotonic clock.
    """

    tier: DirectoryTier
    seed: int
    takes_stores: bool = True
    ill_until: float = field(default=0.0)

    @property
    def ill(self) -> bool:
        """Whether stores go elsewhere for now."""
        return not self.takes_stores or time.monotonic() < self.ill_until

    def score(self, first: bytes) -> int:
        """Its score for chunks that begin with a block: 16 bytes of its hash."""
        return xxh3_64_intdigest(first, self.seed)


class StripedTier(Tier):
    """A tier over several directories.

    Args:
        drives: at least one, with different seeds.
        lost: drives that could not be opened, and why; told, not used.
    """

    def __init__(self, drives: Sequence[Drive], lost: Sequence[str] = ()) -> None:
        if not drives:
            raise TierUnavailable(f"no directory can be used: {'; '.join(lost)}")
        if len({drive.seed for drive in drives}) < len(drives):
            roots = [str(drive.tier.root) for drive in drives]
            raise TierUnavailable(
                f"two of {roots} are one drive, or a copy: name each once, remove {ID_FILE} in a copy"
            )
        self._drives = list(drives)
        self.name = f"striped({', '.join(drive.tier.name for drive in drives)})"
        self.align_bytes = max(drive.tier.align_bytes for drive in drives)
        self.moves_device_memory = all(drive.tier.moves_device_memory for drive in drives)
        told = [f"{drive.tier.root}: {drive.tier.mode_report.reason}" for drive in drives]
        told += [f"LOST {text}" for text in lost]
        self.mode_report = ModeReport(drives[0].tier.mode_report.mode, "; ".join(told), {}, {})

    @property
    def directories(self) -> list[DirectoryTier]:
        """The directories that take stores, each of which wants a keeper."""
        return [drive.tier for drive in self._drives if drive.takes_stores]

    def put(self, folder: str, name: ChunkName, views: Sequence[View], *, replace: bool = False) -> PutResult:
        if not replace and self.exists(folder, [name])[0]:
            return PutResult(0, True)
        failure: MemKVError | None = None
        for drive in self._by_score(name.first):
            if drive.ill:
                continue
            try:
                return drive.tier.put(folder, name, views, replace=replace)
            except TierFull:
                raise  # Its keeper makes room; a chunk elsewhere would take another drive's.
            except (TierUnavailable, TransportError) as error:
                failure = error
                drive.ill_until = time.monotonic() + DRIVE_DOWN_S
                log.warning(
                    "%s takes no stores, others take its share for %g s: %s", drive.tier.root, DRIVE_DOWN_S, error
                )
                if isinstance(error, TransferOverdue):
                    raise  # What it still reads from must be withheld, and whoever is told of success would not.
        raise failure or TierUnavailable("no drive takes stores")

    def open(self, folder: str, name: ChunkName) -> ChunkReader:
        failure: MemKVError = ChunkMissing(f"no object {name.text}")
        for drive in self._homes(name.first):
            try:
                return drive.tier.open(folder, name)
            except ChunkMissing:
                continue
            except (ChunkForeign, TransportError) as error:
                failure = error
        raise failure

    def exists(self, folder: str, names: Iterable[ChunkName]) -> list[bool]:
        return [any(d.tier.exists(folder, [name])[0] for d in self._homes(name.first)) for name in names]

    def variants(self, folder: str, first: bytes, group: int, shard_text: str) -> list[ChunkName]:
        found = [drive.tier.variants(folder, first, group, shard_text) for drive in self._homes(first)]
        return list(dict.fromkeys(name for names in found for name in names))[:MAX_VARIANTS_EXAMINED]

    def remove(self, folder: str, name: ChunkName) -> bool:
        removed, failure = False, None
        for drive in self._homes(name.first):
            try:
                removed |= drive.tier.remove(folder, name)
            except TierError as error:
                failure = error
        if failure is not None and not removed:
            raise failure
        return removed

    def names(self, folder: str) -> Iterator[ChunkName]:
        """As in every tier, but a chunk that lies on two drives comes twice."""
        for drive in self._drives:
            yield from drive.tier.names(folder)

    def write_manifest(self, namespace: Namespace) -> None:
        """Write it everywhere; what fails on some drives is only told."""
        failures = []
        for drive in self._drives:
            try:
                drive.tier.write_manifest(namespace)
            except TierError as error:
                log.warning("%s: %s", drive.tier.root, error)
                failures.append(error)
        if len(failures) == len(self._drives):
            raise failures[0]

    def used_bytes(self) -> int | None:
        used = [drive.tier.used_bytes() for drive in self._drives]
        return None if None in used else sum(filter(None, used))

    def scan(self) -> int:
        """As ``DirectoryTier.scan``, over all drives."""
        return sum(drive.tier.scan() for drive in self._drives)

    def prove(self, views: Sequence[View]) -> None:
        """As ``DirectoryTier.prove``, on every drive that takes stores; the first that fails is told."""
        for tier in self.directories:
            try:
                tier.prove(views)
            except (MemKVError, OSError) as error:
                raise TransportError(f"{tier.root}: {error}") from error

    def register_memory(self, address: int, length_bytes: int, *, device: int | None = None) -> None:
        for drive in self._drives:
            drive.tier.register_memory(address, length_bytes, device=device)

    def deregister_memory(self, address: int) -> None:
        for drive in self._drives:
            drive.tier.deregister_memory(address)

    def close(self) -> None:
        for drive in self._drives:
            drive.tier.close()

    def _by_score(self, first: bytes) -> list[Drive]:
        return sorted(self._drives, key=lambda drive: drive.score(first), reverse=True)

    def _homes(self, first: bytes) -> list[Drive]:
        """Where to look: home and runner-up; the one that takes stores first, since what was written last is there."""
        best = heapq.nlargest(2, self._drives, key=lambda drive: drive.score(first))
        return best if not best[0].ill else best[::-1]


def open_directories(
    paths: Sequence[str],
    *,
    direct_io: str = "auto",
    capacity_bytes: int = 0,
    read_only: bool = False,
    eviction: str = SEGMENTED_LRU,
    transport: TransportPlan | None = None,
) -> DirectoryTier | StripedTier:
    """Open one directory, or several as one tier.

    One is made if it is missing. Of several each must be there already: a mount point without its drive would else be
    filled in the drive's place. One that is missing or broken is taken for lost, as long as another is left; one that
    takes no writes is read.

    Args:
        paths: directories.
        direct_io, capacity_bytes, read_only, eviction, transport: of each, as in ``DirectoryTier``.

    Raises:
        TierUnavailable: none can be used, or two are the same.
        ConfigError: the transport does not work here.
    """

    def opened(path: str, *, only_read: bool) -> DirectoryTier:
        return DirectoryTier(
            path,
            direct_io=direct_io,
            capacity_bytes=capacity_bytes,
            read_only=only_read,
            eviction=eviction,
            transport=transport,
        )

    if len(paths) == 1:
        return opened(paths[0], only_read=read_only)
    drives: list[Drive] = []
    lost: list[str] = []
    for path in paths:
        try:
            if not Path(path).is_dir():
                raise TierUnavailable("there is no such directory; of several each must be made by hand, on its drive")
            try:
                tier, takes_stores = opened(path, only_read=read_only), not read_only
            except TierUnavailable as error:
                tier, takes_stores = opened(path, only_read=True), False
                log.warning("%s is only read: %s", path, error)
            drives.append(Drive(tier, drive_seed(path, may_write=takes_stores), takes_stores or read_only))
        except (TierUnavailable, OSError) as error:
            log.warning("%s is lost, and what is stored there with it: %s", path, error)
            lost.append(f"{path}: {error}")
    try:
        return StripedTier(drives, lost)
    except TierUnavailable:
        for drive in drives:
            drive.tier.close()
        raise


def drive_seed(path: str, *, may_write: bool) -> int:
    """A number that stays with a directory wherever it is mounted; made at its first use.

    Where it cannot be kept the path stands for the directory.
    """
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        text = _read_id(fd)
        if text is None and may_write:
            _make_id(fd)
            text = _read_id(fd)
    except (TierError, OSError) as error:
        log.warning("%s has no id, its path is taken for one: %s", path, error)
        text = None
    finally:
        os.close(fd)
    return int(text, 16) % 2**64 if text else xxh3_64_intdigest(os.path.abspath(path).encode())


def _read_id(dir_fd: int) -> str | None:
    try:
        data = read_record(dir_fd, ID_FILE, _ID_HEX)
    except ChunkForeign:
        return None
    return data.decode("ascii") if data is not None and _ID.fullmatch(data) else None


def _make_id(dir_fd: int) -> None:
    """Give a directory an id. Of processes that do so at once the first one's stays."""
    text = os.urandom(_ID_HEX // 2).hex().encode()
    temporary = temporary_name()
    write_record(dir_fd, temporary, text)
    try:
        os.link(temporary, ID_FILE, src_dir_fd=dir_fd, dst_dir_fd=dir_fd, follow_symlinks=False)
    except OSError as error:
        if error.errno != errno.EEXIST:
            raise
        if _read_id(dir_fd) is None:
            write_record(dir_fd, ID_FILE, text)  # What was there is damaged.
    finally:
        unlink_quietly(temporary, dir_fd)
