"""Shed chunks of requests that have ended: stored after all, while the engine's prefix cache still holds their pages.

A step may complete more chunks than staging holds. While a request lives, its shed chunks are offered again; one that
ends with the step would lose them. Its pages are free then, but hold what they held until the engine hands them out: as
long as every page of a chunk is cached under the chunk's own hashes, the chunk may be gathered as if the request lived.
No page is kept from anyone for it, so that nothing can run out of pages here.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import chain

from memkv_engines.limits import (
    LEFTOVER_BATCH_CHUNKS,
    LEFTOVER_PAUSE_MAX_S,
    LEFTOVER_PAUSE_S,
    LEFTOVER_S,
    MAX_PENDING_STORE_CHUNKS,
)

Holds = Callable[[int, Sequence[bytes], Sequence[int]], bool]
"""Whether the pages of a group (third) hold the blocks with these chain hashes (second) once this step has run."""


@dataclass(frozen=True)
class SentChunk:
    """A chunk as it was handed out; ``chunk`` counts the request's chunks, ``block_ids`` has 0 for holes."""

    request_id: str
    group: int
    chunk: int
    hashes: tuple[bytes, ...]
    block_ids: tuple[int, ...]
    holes: int
    namespace: bytes


class Leftovers:
    """Waiting chunks, one batch of which is under way at a time. Not thread-safe.

    Args:
        clock: seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._waiting: deque[tuple[float, SentChunk]] = deque()
        self._batch: dict[SentChunk, float] = {}
        self._not_before = 0.0
        self._pause_s = LEFTOVER_PAUSE_S
        self._lost = 0

    def add(self, sent: SentChunk) -> None:
        """A chunk was shed, and nobody else will offer it again. It waits for ``LEFTOVER_S`` at most."""
        if len(self._waiting) < MAX_PENDING_STORE_CHUNKS:
            self._waiting.append((self._clock() + LEFTOVER_S, sent))
        else:
            self._lost += 1

    def take(self, holds: Holds) -> list[SentChunk]:
        """The next batch, to be followed by ``answered``. Chunks whose pages hold something else are given up."""
        now = self._clock()
        if any(now < until for until in self._batch.values()) or now < self._not_before:
            return []
        self._batch.clear()  # an answer that is so late is not waited for
        while self._waiting and len(self._batch) < LEFTOVER_BATCH_CHUNKS:
            until, sent = self._waiting.popleft()
            if now < until and holds(sent.group, sent.hashes[sent.holes :], sent.block_ids[sent.holes :]):
                self._batch[sent] = until
            else:
                self._lost += 1
        return list(self._batch)

    def answered(self, shed: Collection[SentChunk]) -> None:
        """The batch is through, but for what was shed once more; pauses grow while nothing of it finds room."""
        again = [(until, sent) for sent, until in self._batch.items() if sent in shed]
        found_room = len(again) < len(self._batch)
        self._pause_s = LEFTOVER_PAUSE_S if found_room else min(2 * self._pause_s, LEFTOVER_PAUSE_MAX_S)
        self._not_before = self._clock() + (self._pause_s if again else 0.0)
        self._waiting.extendleft(reversed(again))
        self._batch.clear()

    @property
    def pending(self) -> bool:
        """Whether something waits, or is under way, that is worth another step of an idle engine."""
        now = self._clock()
        return any(now < until for until in chain(self._batch.values(), (until for until, _ in self._waiting)))

    def take_lost(self) -> int:
        """How many were given up since the last call."""
        lost, self._lost = self._lost, 0
        return lost

    def clear(self) -> None:
        """Forget everything."""
        self._waiting.clear()
        self._batch.clear()
