"""What is known to be stored: a bounded, compact hash table probed by the thousand in a few NumPy calls.

A chunk is keyed by the chain hash of its last block (bytes 0-7 choose the bucket, 8-15 are compared), its length and
its group: a chain hash fixes everything before it, so the first block need not be asked for. Chunks that start at a
block but end elsewhere (variants) are kept apart, in ``variants.py``.

Back of the envelope, a prompt of 100,000 tokens in blocks of 16, 2 blocks a chunk: 3,125 keys. A dictionary costs
about 150 ns a key on fresh hash objects in a table that does not fit the cache (hash, slot, key, value), so 470 us.
Here: one join (25 ns a key), one gather of a 64-byte row (30 ns), one comparison of 8 ways.
"""

from __future__ import annotations

import functools
import mmap
import time
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from memkv_engines.limits import HASH_BYTES, INDEX_WAYS, KEY_BYTES, MAX_BLOCKS_PER_CHUNK, MIB

_U64 = np.uint64
_MIX_COUNT, _MIX_GROUP = 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9
_HOLES_BITS = 13
_SWEEP_BUCKETS = 512

assert INDEX_WAYS == 8, "a row of matches is read as one 64-bit word"
assert MAX_BLOCKS_PER_CHUNK < 1 << _HOLES_BITS

# Signed, since that is what NumPy indexes with.
Words = npt.NDArray[np.int64]


class ChunkIndex:
    """Known chunks. Not thread-safe; no call blocks.

    Args:
        capacity: chunks it can hold, rounded up to a power of two; about 24 bytes each at half load.
        ttl_s: how long an entry is believed; expired ones are swept a few at a time, so this is approximate.
        clock: monotonic seconds.
    """

    def __init__(self, capacity: int, ttl_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        buckets = 1
        # Half load: a bucket of 8 then overflows for under 1% of the entries, which become misses.
        while buckets * INDEX_WAYS < 2 * capacity:
            buckets *= 2
        self._buckets = buckets
        self._bits = buckets - 1
        self._tags = _huge_zeros(buckets * INDEX_WAYS * 8).view(np.int64).reshape(buckets, INDEX_WAYS)
        # Expiry in seconds since the start, and the leading holes.
        self._values = np.zeros((buckets, INDEX_WAYS), dtype=_U64)
        self._clock = clock
        self._origin = clock()
        self._ttl_s = ttl_s
        self._cursor = 0

    def __len__(self) -> int:
        return int(np.count_nonzero(self._tags))

    # --- asking --------------------------------------------------------------

    def leading_chunks(self, hashes: Sequence[bytes], start: int, blocks_per_chunk: int, group: int) -> int:
        """How many full chunks without holes from block ``start`` on are known, up to the first that is not.

        Args:
            hashes: the prompt's chain hashes (32 bytes each) at the group's block size.
            start: first block of the first chunk.
            blocks_per_chunk: blocks of a full chunk.
            group: KV group.
        """
        lasts = hashes[start + blocks_per_chunk - 1 :: blocks_per_chunk]
        if not lasts:
            return 0
        words = np.frombuffer(b"".join(lasts), dtype="<i8").reshape(-1, HASH_BYTES // 8)
        buckets, tags = self._place_of(words, _salt(blocks_per_chunk, group))
        rows = self._tags.take(buckets, axis=0, mode="clip").ravel()
        # Repeating each tag is cheaper than broadcasting it over 8 ways, and eight booleans are one word: 15 times
        # faster than any(axis=1).
        found = (rows == tags.repeat(INDEX_WAYS)).view(np.int64)
        return len(lasts) if found.all() else int((found != 0).argmin())

    def holes_of(self, last: bytes, block_count: int, group: int) -> int | None:
        """Leading holes of a known chunk (0: whole), or None if it is not known."""
        bucket, way = self._locate(last, block_count, group)
        if way is None:
            return None
        value = int(self._values[bucket, way])
        if value >> _HOLES_BITS <= self._now():
            return None
        return value & ((1 << _HOLES_BITS) - 1)

    # --- telling -------------------------------------------------------------

    def insert(self, lasts: Sequence[bytes], block_counts: Sequence[int], holes: Sequence[int], group: int) -> None:
        """Learn chunks. A full bucket forgets the entry that would expire first.

        Args:
            lasts: hashes of last blocks, at least 16 bytes each.
            block_counts: blocks of each chunk.
            holes: leading absent blocks of each chunk.
            group: KV group.
        """
        if not lasts:
            return
        words = np.frombuffer(b"".join([h[:KEY_BYTES] for h in lasts]), dtype="<i8").reshape(-1, KEY_BYTES // 8)
        salts = np.array([_salt(count, group) for count in block_counts], dtype=np.int64)
        buckets, tags = self._place_of(words, salts)
        expiry = self._now() + max(1, int(self._ttl_s))
        values = np.array(holes, dtype=_U64) | _U64(expiry << _HOLES_BITS)
        todo = np.arange(len(lasts))
        while todo.size:
            # One entry per bucket and round, so that entries of one bucket do not overwrite each other.
            _, unique = np.unique(buckets[todo], return_index=True)
            chosen = todo[unique]
            self._put(buckets[chosen], tags[chosen], values[chosen])
            todo = np.delete(todo, unique)

    def _put(self, buckets: Words, tags: Words, values: npt.NDArray[np.uint64]) -> None:
        held = self._tags[buckets]
        same = held == tags[:, None]
        # An empty way has value 0 and so is the oldest.
        way = np.where(same.any(axis=1), same.argmax(axis=1), self._values[buckets].argmin(axis=1))
        self._tags[buckets, way] = tags
        self._values[buckets, way] = values

    def remove(self, last: bytes, block_count: int, group: int) -> None:
        """Forget a chunk."""
        bucket, way = self._locate(last, block_count, group)
        if way is not None:
            self._tags[bucket, way] = 0
            self._values[bucket, way] = 0

    def sweep(self) -> None:
        """Forget what has expired in the next few buckets; call once a step."""
        stop = self._cursor + _SWEEP_BUCKETS
        values = self._values[self._cursor : stop]
        expired = (values >> _U64(_HOLES_BITS) <= _U64(self._now())) & (values != 0)
        if expired.any():
            self._tags[self._cursor : stop][expired] = 0
            values[expired] = 0
        self._cursor = stop if stop < self._buckets else 0

    def clear(self) -> None:
        """Forget everything."""
        self._tags[:] = 0
        self._values[:] = 0

    # --- inside --------------------------------------------------------------

    def _place_of(self, words: Words, salt: Words | int) -> tuple[Words, Words]:
        # A chain hash is cryptographic, so its words need no mixing; a tag of 0 (one in 2**64) is never found.
        return words[:, 0] & self._bits, words[:, 1] ^ salt

    def _locate(self, last: bytes, block_count: int, group: int) -> tuple[int, int | None]:
        bucket = int.from_bytes(last[:8], "little") & self._bits
        tag = int.from_bytes(last[8:16], "little", signed=True) ^ _salt(block_count, group)
        row = self._tags[bucket].tolist()
        return bucket, (row.index(tag) if tag and tag in row else None)

    def _now(self) -> int:
        return int(self._clock() - self._origin) + 1


@functools.lru_cache
def _salt(block_count: int, group: int) -> int:
    mixed = (block_count * _MIX_COUNT ^ group * _MIX_GROUP) % 2**64
    return mixed - 2**64 if mixed >= 2**63 else mixed


def _huge_zeros(length: int) -> npt.NDArray[np.uint8]:
    # Thousands of random rows of a table on 4 KiB pages cost more in address translation than in cache misses.
    huge = 2 * MIB
    memory = mmap.mmap(-1, length + huge, flags=mmap.MAP_PRIVATE)
    try:
        memory.madvise(mmap.MADV_HUGEPAGE)
    except OSError:
        pass
    whole = np.frombuffer(memory, dtype=np.uint8)
    start = -whole.ctypes.data % huge
    return whole[start : start + length]
