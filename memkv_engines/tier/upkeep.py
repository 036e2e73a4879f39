"""What a directory needs from time to time: its bytes counted, leftovers collected, chunks removed that have to go.

Works from outside of a tier too, on a descriptor of the root: the keeper of an engine and the commands share it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator

from memkv_engines.errors import TierUnavailable
from memkv_engines.keys import ChunkName
from memkv_engines.limits import CLOCK_SLACK_S, EVICT_ABOVE_SHARE, EVICT_TO_SHARE, UPKEEP_EVERY_S
from memkv_engines.tier import listing
from memkv_engines.tier.eviction import LRU, OFF, Chooser, StoredChunk
from memkv_engines.tier.folders import EVICTING, Folder, as_tier_error, only_one, unlink_quietly
from memkv_engines.tier.listing import Entry
from memkv_engines.tier.policy import NamespacePolicy, policy_of
from memkv_engines.tier.quotas import TenantAccounts, tenant_of
from memkv_engines.tier.records import is_leftover
from memkv_engines.tier.usage import Count, UsageFile


def is_expired(written_ns: int, ttl_s: int, now_ns: int) -> bool:
    """Whether a chunk is older than its namespace allows; a time in the future is not believed."""
    age_ns = now_ns - written_ns
    return bool(ttl_s) and (age_ns >= ttl_s * 10**9 or age_ns < -CLOCK_SLACK_S * 1e9)


class Upkeep:
    """The upkeep of one directory. Everything here lists folders and is slow; for background threads and commands.

    Args:
        root_fd: descriptor of the directory; not owned.
        usage: the count of all bytes, if there is one.
        accounts: the counts of tenants with a quota.
        capacity_bytes: bound on all bytes, 0 for none.
        eviction: in which order chunks go, ``off`` for none (expired chunks go all the same).
    """

    def __init__(
        self, root_fd: int, usage: UsageFile | None, accounts: TenantAccounts, capacity_bytes: int, eviction: str
    ) -> None:
        self._root_fd, self._usage, self._accounts = root_fd, usage, accounts
        self._capacity_bytes, self._eviction = capacity_bytes, eviction

    # --- counting ------------------------------------------------------------

    def scan(self, *, collect: bool) -> int:
        """Count the bytes of all namespaces, correct the count with it, and collect old temporary files if wanted."""
        before = self._usage.count() if self._usage is not None else None
        total = 0
        for entry in self._everything():
            if entry.name is not None:
                total += entry.info.st_size
            elif collect:
                _collect(entry)
        if self._usage is not None and before is not None:
            self._usage.correct(total, before)
        return total

    def _everything(self) -> Iterator[Entry]:
        yield from listing.root_temporaries(self._root_fd)
        for folder in listing.namespaces(self._root_fd):
            yield from listing.files(self._root_fd, folder)

    # --- removing ------------------------------------------------------------

    def evict(self, *, recount: bool = False) -> int:
        """Remove what has expired, then what tenants hold beyond their quotas, then what the directory has too much.

        Of the processes that share the directory one at a time does it. Open readers go on reading.

        Args:
            recount: a round that nobody needs yet: list what tenants with a quota hold although their counts do not
                ask for it. Nothing is done where another process made one within half of ``UPKEEP_EVERY_S``.

        Returns:
            Bytes freed; 0 too while another process is at it.

        Raises:
            TierError: something cannot be removed or counted; what could be was removed.
        """
        with only_one(self._root_fd) as alone:
            if not alone or (recount and not self._round_is_due()):
                return 0
            folders = listing.namespaces(self._root_fd)
            freed = self._expire(folders)
            for account in self._accounts.all():
                if recount or needs_listing(account.usage.count(), account.quota_bytes):
                    own = [folder for folder in folders if tenant_of(self._root_fd, folder) == account.tenant]
                    freed += self._make_room(own, account.usage, account.quota_bytes)
            if self._usage is not None and needs_listing(self._usage.count(), self._capacity_bytes):
                freed += self._make_room(folders, self._usage, self._capacity_bytes)
            if recount:
                self._note_round()
            return freed

    def _round_is_due(self) -> bool:
        try:
            info = os.stat(EVICTING, dir_fd=self._root_fd, follow_symlinks=False)
        except OSError:
            return True
        # Empty: it was made for its lock, and tells of no round.
        return not info.st_size or not 0 <= time.time() - info.st_mtime < UPKEEP_EVERY_S / 2

    def _note_round(self) -> None:
        try:
            fd = os.open(EVICTING, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self._root_fd)
        except OSError as error:
            raise as_tier_error(error, f"cannot open {EVICTING}") from error
        try:
            os.pwrite(fd, b"1", 0)
        except OSError:
            pass  # No room, maybe: the next process makes its round too.
        finally:
            os.close(fd)

    def _expire(self, folders: list[str]) -> int:
        freed, now_ns = 0, time.time_ns()
        for folder in folders:
            ttl_s = policy_of(self._root_fd, folder).ttl_s
            for entry in listing.chunks(self._root_fd, folder) if ttl_s else ():
                if is_expired(entry.info.st_mtime_ns, ttl_s, now_ns):
                    freed += self.remove(entry)
        return freed

    def _make_room(self, folders: list[str], usage: UsageFile, bound_bytes: int) -> int:
        """Bring what some namespaces hold below its bound. The listing counts it too: no count is trusted to remove."""
        before = usage.count()
        goal = int(EVICT_TO_SHARE * bound_bytes)
        # A bound that is not reached is listed all the same, for the count alone: then the least is held.
        chooser = Chooser(max(1, before.used_bytes - goal), self._eviction, time.time_ns())
        total = 0
        for chunk, policy in self._chunks_of(folders):
            total += chunk.size_bytes
            if not policy.pinned:
                chooser.offer(chunk)
        usage.correct(total, before, int((1 - EVICT_ABOVE_SHARE) * bound_bytes))
        now = usage.count()
        if self._eviction == OFF or not bound_bytes or now.used_bytes <= EVICT_ABOVE_SHARE * bound_bytes:
            return 0
        return self.remove_chunks(chooser.victims(now.used_bytes - goal))

    def _chunks_of(self, folders: list[str]) -> Iterator[tuple[StoredChunk, NamespacePolicy]]:
        """Every chunk of some namespaces; leftovers that are met on the way are collected."""
        for folder in folders:
            policy = policy_of(self._root_fd, folder)
            for entry in listing.files(self._root_fd, folder):
                if entry.name is not None:
                    yield entry.chunk(policy.priority), policy
                else:
                    _collect(entry)

    def evict_some(
        self, folders: list[str], free_bytes: int | None, wanted: Callable[[Entry], bool], *, dry_run: bool = False
    ) -> tuple[int, int]:
        """Remove chunks on demand, least recently used first; pins and priorities do not matter.

        Args:
            folders: namespaces.
            free_bytes: stop when so much was freed; None for all.
            wanted: which chunks may go.
            dry_run: only count.

        Returns:
            Chunks and bytes removed.
        """
        removed = freed = 0
        if free_bytes is None:
            for folder in folders:
                for entry in filter(wanted, listing.chunks(self._root_fd, folder)):
                    size = entry.info.st_size if dry_run else self.remove(entry)
                    removed, freed = removed + bool(size), freed + size
            return removed, freed
        while freed < free_bytes:
            chooser = Chooser(free_bytes - freed, LRU, time.time_ns())
            for folder in folders:
                for entry in filter(wanted, listing.chunks(self._root_fd, folder)):
                    chooser.offer(entry.chunk())
            victims = chooser.victims(free_bytes - freed)
            size = sum(chunk.size_bytes for chunk in victims) if dry_run else self.remove_chunks(victims)
            removed, freed = removed + len(victims), freed + size
            if dry_run or not size:
                break
        return removed, freed

    def remove(self, entry: Entry) -> int:
        """Remove one file of a listing; the bytes it had, 0 if it was gone.

        Raises:
            TierUnavailable: it cannot be removed.
        """
        try:
            os.unlink(entry.text, dir_fd=entry.dir_fd)
        except FileNotFoundError:
            return 0
        except OSError as error:
            raise TierUnavailable(f"cannot remove a chunk: {error.strerror}") from error
        if entry.name is not None:
            self._account(entry.folder, -entry.info.st_size)
        return entry.info.st_size

    def remove_chunks(self, victims: list[StoredChunk]) -> int:
        """Remove chunks of a listing that is over; the bytes they had.

        Raises:
            TierUnavailable: one cannot be removed; those before it were.
        """
        freed = 0
        for victim in victims:
            folder, _, text = victim.path.partition("/")
            name = ChunkName.parse(text)
            try:
                namespace = Folder(folder, self._root_fd)
                bucket = Folder(name.bucket, namespace.fd)
                info = os.stat(text, dir_fd=bucket.fd, follow_symlinks=False)
            except OSError:
                continue  # Gone, with its folder maybe.
            freed += self.remove(Entry(folder, f"{folder}/{name.bucket}", bucket.fd, text, info, name))
        return freed

    def _account(self, folder: str, size_bytes: int) -> None:
        if self._usage is not None:
            self._usage.add(size_bytes)
        account = self._accounts.of(folder)
        if account is not None:
            account.usage.add(size_bytes)


def _collect(entry: Entry) -> None:
    """Remove a temporary file whose writer must be dead."""
    if entry.is_temporary and is_leftover(entry.info):
        unlink_quietly(entry.text, entry.dir_fd)


def needs_listing(count: Count, bound_bytes: int) -> bool:
    """Whether chunks have to go, or no scan has corrected the count yet, which may hide that they do."""
    return not count.corrections or (bool(bound_bytes) and count.used_bytes > EVICT_ABOVE_SHARE * bound_bytes)
