"""Chunks known by their first block: tails of conversations and chunks of prompts that diverge inside them."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from memkv_engines.limits import (
    HASH_BYTES,
    KEY_BYTES,
    MAX_KNOWN_MISSES,
    MAX_KNOWN_VARIANTS,
    MAX_VARIANT_HASH_BYTES,
    MAX_VARIANTS_EXAMINED,
)


@dataclass(frozen=True)
class Variant:
    """A known chunk and the hashes of its leading blocks, as far as they are known (joined, 32 bytes each)."""

    last: bytes
    block_count: int
    holes: int
    hashes: bytes
    expires: float

    def shared_blocks(self, own: Sequence[bytes], position: int) -> int:
        """How many leading blocks are those of a prompt from ``position`` on."""
        shared = 0
        limit = min(len(self.hashes) // HASH_BYTES, len(own) - position)
        while shared < limit and self.hashes[shared * HASH_BYTES : (shared + 1) * HASH_BYTES] == own[position + shared]:
            shared += 1
        return shared


class VariantTable:
    """A memory of variants by first block, bounded in number and bytes; the longest unheard of go. Not thread-safe.

    Args:
        ttl_s: how long an entry is believed.
        clock: monotonic seconds.
    """

    def __init__(self, ttl_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._ttl_s, self._clock = ttl_s, clock
        self._table: OrderedDict[tuple[int, bytes], tuple[Variant, ...]] = OrderedDict()
        self._hash_bytes = 0

    def add(self, group: int, hashes: Sequence[bytes], last: bytes, block_count: int, holes: int) -> None:
        """Learn a chunk whose leading blocks have these hashes (all of them, or as many as are known)."""
        variant = Variant(last[:KEY_BYTES], block_count, holes, b"".join(hashes), self._clock() + self._ttl_s)
        key = (group, hashes[0][:KEY_BYTES])
        others = tuple(
            v for v in self._taken(key) if (v.last, v.block_count, v.holes) != (variant.last, block_count, holes)
        )
        self._put(key, (variant, *others)[:MAX_VARIANTS_EXAMINED])
        while len(self._table) > MAX_KNOWN_VARIANTS or self._hash_bytes > MAX_VARIANT_HASH_BYTES:
            self._taken(next(iter(self._table)))

    def at(self, group: int, first: bytes) -> list[Variant]:
        """Known chunks that start at a block, newest first."""
        found = self._table.get((group, first[:KEY_BYTES]), ())
        now = self._clock()
        return [v for v in found if v.expires > now]

    def remove(self, group: int, first: bytes, last: bytes) -> None:
        """Forget a chunk."""
        key = (group, first[:KEY_BYTES])
        if left := tuple(v for v in self._taken(key) if v.last != last[:KEY_BYTES]):
            self._put(key, left)

    def clear(self) -> None:
        """Forget everything."""
        self._table.clear()
        self._hash_bytes = 0

    def _taken(self, key: tuple[int, bytes]) -> tuple[Variant, ...]:
        found = self._table.pop(key, ())
        self._hash_bytes -= sum(len(v.hashes) for v in found)
        return found

    def _put(self, key: tuple[int, bytes], found: tuple[Variant, ...]) -> None:
        self._table[key] = found
        self._hash_bytes += sum(len(v.hashes) for v in found)


class ExpiringSet:
    """A bounded set of hash prefixes whose members are forgotten after a while: known misses, damaged chunks."""

    def __init__(self, ttl_s: float, capacity: int = MAX_KNOWN_MISSES, clock: Callable[[], float] = time.monotonic):
        self._ttl_s, self._capacity, self._clock = ttl_s, capacity, clock
        self._members: OrderedDict[tuple[int, bytes], float] = OrderedDict()

    def add(self, group: int, block_hash: bytes) -> None:
        """Remember."""
        key = (group, block_hash[:KEY_BYTES])
        self._members.pop(key, None)
        self._members[key] = self._clock() + self._ttl_s
        while len(self._members) > self._capacity:
            self._members.popitem(last=False)

    def discard(self, group: int, block_hash: bytes) -> None:
        """Forget."""
        self._members.pop((group, block_hash[:KEY_BYTES]), None)

    def __contains__(self, item: tuple[int, bytes]) -> bool:
        group, block_hash = item
        expires = self._members.get((group, block_hash[:KEY_BYTES]))
        return expires is not None and expires > self._clock()

    def clear(self) -> None:
        """Forget everything."""
        self._members.clear()
