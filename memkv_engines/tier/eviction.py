"""Which chunks go when a directory, or a tenant's share of it, is too full. Pure; the caller lists and unlinks.

The inode tells all that is needed, so that it is shared by processes and survives restarts: a chunk that was never read
since it was written has ``atime <= mtime``; a load sets ``atime``. Chunks of a lower priority go before all of a higher
one, pinned ones never. Within a priority two orders are offered:

* ``segmented_lru``: chunks that were read at least once are protected. Those never read go first, oldest first, but for
  a share that new chunks need to be found again in; then protected ones, least recently read first. So a scan, that is
  many prompts that are seen once, displaces itself and not the hot prefixes.
* ``lru``: by the last use, writing included.

A time in the future is not believed, since a clock jumped: such a chunk goes before the others of its segment.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from dataclasses import dataclass, field

from memkv_engines.limits import CLOCK_SLACK_S, MAX_VICTIMS_HELD

SEGMENTED_LRU, LRU, OFF = "segmented_lru", "lru", "off"
POLICIES = (SEGMENTED_LRU, LRU, OFF)
PROBATION_SHARE = 0.1
"""Share of the directory that chunks never read may keep while read ones have to go."""


@dataclass(frozen=True)
class StoredChunk:
    """One chunk as a listing shows it.

    Attributes:
        path: relative to the root.
        size_bytes: of the file.
        written_ns: ``mtime``.
        used_ns: ``atime``.
        priority: of its namespace.
    """

    path: str
    size_bytes: int
    written_ns: int
    used_ns: int
    priority: int = 0

    @property
    def was_read(self) -> bool:
        """Whether it was loaded since it was written."""
        return self.used_ns > self.written_ns

    @property
    def last_use_ns(self) -> int:
        """When it was written or loaded last."""
        return max(self.used_ns, self.written_ns)

    def age_ns(self, now_ns: int) -> int:
        """How long ago it was written or loaded last; longer than any other if its time is not to be believed."""
        age = now_ns - self.last_use_ns
        return age if age >= -CLOCK_SLACK_S * 1e9 else (1 << 62) - age


class _Oldest:
    """The least recently used chunks that together free so many bytes; holds no more than it needs."""

    def __init__(self, wanted_bytes: int, now_ns: int, most: int) -> None:
        self._wanted_bytes, self._now_ns, self._most = wanted_bytes, now_ns, most
        self._heap: list[tuple[int, str, StoredChunk]] = []
        self._held_bytes = 0

    def offer(self, chunk: StoredChunk) -> None:
        heapq.heappush(self._heap, (chunk.age_ns(self._now_ns), chunk.path, chunk))
        self._held_bytes += chunk.size_bytes
        while len(self._heap) > self._most or (
            self._heap and self._held_bytes - self._heap[0][2].size_bytes >= self._wanted_bytes
        ):
            self._held_bytes -= heapq.heappop(self._heap)[2].size_bytes

    def in_order(self) -> list[StoredChunk]:
        return [chunk for _, _, chunk in sorted(self._heap, key=lambda item: (-item[0], item[1]))]


@dataclass
class _Class:
    """The chunks of one priority that may go."""

    unread: _Oldest
    read: _Oldest
    total_bytes: int = 0
    unread_bytes: int = 0


@dataclass
class Chooser:
    """Takes every chunk of a listing once and keeps only those that may go.

    Attributes:
        wanted_bytes: no more than this will be asked for.
        policy: ``segmented_lru`` or ``lru``.
        now_ns: the time, as files have it.
        most: victims it holds at most in each segment of each priority.
    """

    wanted_bytes: int
    policy: str = SEGMENTED_LRU
    now_ns: int = 1 << 62
    most: int = MAX_VICTIMS_HELD
    _classes: dict[int, _Class] = field(default_factory=dict)

    def offer(self, chunk: StoredChunk) -> None:
        """Consider a chunk."""
        held = self._classes.get(chunk.priority)
        if held is None:
            unread, read = (_Oldest(self.wanted_bytes, self.now_ns, self.most) for _ in range(2))
            held = self._classes[chunk.priority] = _Class(unread, read)
        held.total_bytes += chunk.size_bytes
        if self.policy == SEGMENTED_LRU and chunk.was_read:
            held.read.offer(chunk)
        else:
            held.unread_bytes += chunk.size_bytes
            held.unread.offer(chunk)

    def victims(self, free_bytes: int) -> list[StoredChunk]:
        """The chunks to remove, first to go first: at least so many bytes, if there are so many."""
        victims: list[StoredChunk] = []
        for priority in sorted(self._classes):
            if free_bytes <= 0:
                break
            found = self._of_class(self._classes[priority], free_bytes)
            victims += found
            free_bytes -= sum(chunk.size_bytes for chunk in found)
        return victims

    def _of_class(self, held: _Class, free_bytes: int) -> list[StoredChunk]:
        keep = int(PROBATION_SHARE * held.total_bytes) if self.policy == SEGMENTED_LRU else 0
        unread = held.unread.in_order()
        victims, left = _take(unread, min(free_bytes, held.unread_bytes - keep), free_bytes)
        more, left = _take(held.read.in_order(), left, left)
        # Only chunks that were never read are left: their share cannot be kept.
        rest, _ = _take(unread[len(victims) :], left, left)
        return victims + more + rest


def choose_victims(chunks: Iterable[StoredChunk], free_bytes: int, policy: str = SEGMENTED_LRU) -> list[StoredChunk]:
    """The chunks to remove, first to go first, where it is known beforehand how much must go.

    Args:
        chunks: all chunks of a directory but those that are pinned; read once.
        free_bytes: at least so much is to be freed, if there is so much.
        policy: ``segmented_lru`` or ``lru``.
    """
    chooser = Chooser(max(0, free_bytes), policy)
    for chunk in chunks if free_bytes > 0 else ():
        chooser.offer(chunk)
    return chooser.victims(free_bytes)


def _take(chunks: list[StoredChunk], limit_bytes: int, wanted_bytes: int) -> tuple[list[StoredChunk], int]:
    """Chunks from the front until a limit is reached; with them what is still wanted."""
    taken: list[StoredChunk] = []
    for chunk in chunks:
        if limit_bytes <= 0:
            break
        taken.append(chunk)
        limit_bytes -= chunk.size_bytes
        wanted_bytes -= chunk.size_bytes
    return taken, max(0, wanted_bytes)
