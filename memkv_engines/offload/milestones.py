"""Prefixes that are known as a whole, so that a long prompt is not looked up chunk by chunk each time.

A milestone is the chain hash of the last block of every 16th full chunk on the grid; to know it is to know every full
chunk before it. The longest known prefix is then found by bisection: 100,000 tokens in chunks of 32 are 3,125 keys in
the index, but at most 8 here.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Sequence

from memkv_engines.limits import KEY_BYTES, MILESTONE_CHUNKS


class Milestones:
    """A bounded memory of known prefixes. Not thread-safe.

    Args:
        capacity: milestones it can hold; the oldest go first.
        ttl_s: how long one is believed, and all that follow from it.
        clock: monotonic seconds.
    """

    def __init__(self, capacity: int, ttl_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._capacity, self._ttl_s, self._clock = capacity, ttl_s, clock
        self._expiry: OrderedDict[tuple[int, int, bytes], float] = OrderedDict()

    def known_chunks(self, hashes: Sequence[bytes], blocks_per_chunk: int, group: int) -> int:
        """How many full chunks from block 0 on are known by a milestone."""
        return self._reach(hashes, blocks_per_chunk, group)[0] * MILESTONE_CHUNKS

    def extend(self, hashes: Sequence[bytes], blocks_per_chunk: int, group: int, chunks: int) -> None:
        """Learn that this many full chunks from block 0 on are known."""
        known, expiry = self._reach(hashes[: chunks * blocks_per_chunk], blocks_per_chunk, group)
        # What follows from an older milestone is believed no longer than that.
        expiry = min(expiry, self._clock() + self._ttl_s)
        span = MILESTONE_CHUNKS * blocks_per_chunk
        for block in hashes[(known + 1) * span - 1 : chunks * blocks_per_chunk : span]:
            self._expiry[(group, blocks_per_chunk, block[:KEY_BYTES])] = expiry
        while len(self._expiry) > self._capacity:
            self._expiry.popitem(last=False)

    def clear(self) -> None:
        """Forget everything: some chunk is not what it was."""
        self._expiry.clear()

    def _reach(self, hashes: Sequence[bytes], blocks_per_chunk: int, group: int) -> tuple[int, float]:
        """The last known milestone (0: none) and when it expires. A forgotten one in the middle only shortens this."""
        span = MILESTONE_CHUNKS * blocks_per_chunk
        low, high = 0, len(hashes) // span
        reached = float("inf")
        now = self._clock()
        middle = high  # the whole prompt is known more often than any other part of it
        while low < high:
            expiry = self._expiry.get((group, blocks_per_chunk, hashes[middle * span - 1][:KEY_BYTES]), 0.0)
            if expiry > now:
                low, reached = middle, expiry
            else:
                high = middle - 1
            middle = (low + high + 1) // 2
        return low, reached
