"""Which chunks go when a directory is too full. Pure; the directory tier lists and unlinks.

The inode tells all that is needed, so that it is shared by processes and survives restarts: a chunk that was never read
since it was written has ``atime <= mtime``; a load sets ``atime``. Two orders are offered:

* ``segmented_lru``: chunks that were read at least once are protected. Those never read go first, oldest first, but for
  a share that new chunks need to be found again in; then protected ones, least recently read first. So a scan, that is
  many prompts that are seen once, displaces itself and not the hot prefixes.
* ``lru``: by the last use, writing included.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from dataclasses import dataclass

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
    """

    path: str
    size_bytes: int
    written_ns: int
    used_ns: int

    @property
    def was_read(self) -> bool:
        """Whether it was loaded since it was written."""
        return self.used_ns > self.written_ns

    @property
    def last_use_ns(self) -> int:
        """When it was written or loaded last."""
        return max(self.used_ns, self.written_ns)


class _Oldest:
    """The least recently used chunks that together free so many bytes; holds no more than it needs."""

    def __init__(self, wanted_bytes: int) -> None:
        self._wanted_bytes = wanted_bytes
        self._heap: list[tuple[int, str, StoredChunk]] = []
        self._held_bytes = 0

    def offer(self, chunk: StoredChunk) -> None:
        heapq.heappush(self._heap, (-chunk.last_use_ns, chunk.path, chunk))
        self._held_bytes += chunk.size_bytes
        while self._heap and self._held_bytes - self._heap[0][2].size_bytes >= self._wanted_bytes:
            self._held_bytes -= heapq.heappop(self._heap)[2].size_bytes

    def in_order(self) -> list[StoredChunk]:
        return [chunk for _, _, chunk in sorted(self._heap, key=lambda item: (-item[0], item[1]))]


def choose_victims(chunks: Iterable[StoredChunk], free_bytes: int, policy: str = SEGMENTED_LRU) -> list[StoredChunk]:
    """The chunks to remove, first to go first.

    Args:
        chunks: all chunks of a directory; read once, and only what may go is kept in memory.
        free_bytes: at least so much is to be freed, if there is so much.
        policy: ``segmented_lru`` or ``lru``.
    """
    if free_bytes <= 0:
        return []
    unread, read = _Oldest(free_bytes), _Oldest(free_bytes)
    total = unread_bytes = 0
    for chunk in chunks:
        total += chunk.size_bytes
        if policy == SEGMENTED_LRU and chunk.was_read:
            read.offer(chunk)
        else:
            unread_bytes += chunk.size_bytes
            unread.offer(chunk)
    keep = int(PROBATION_SHARE * total) if policy == SEGMENTED_LRU else 0
    victims, left = _take(unread.in_order(), min(free_bytes, unread_bytes - keep), free_bytes)
    more, left = _take(read.in_order(), left, left)
    # Only chunks that were never read are left: their share cannot be kept.
    rest, _ = _take(unread.in_order()[len(victims) :], left, left)
    return victims + more + rest


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
