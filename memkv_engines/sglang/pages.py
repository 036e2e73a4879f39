"""Pages of one pool in the tier: which are stored, load them, store them. Blocking; any thread."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from memkv_engines.config import Config
from memkv_engines.keys import Namespace
from memkv_engines.limits import HASH_BYTES, MAX_REMEMBERED_WALKS
from memkv_engines.log import Throttle, get_logger
from memkv_engines.offload import batches
from memkv_engines.offload.blocking import BlockingClient
from memkv_engines.offload.memory_level import resident_key
from memkv_engines.offload.messages import IN_TIER, LoadRun, Probe, Segment, split_hashes
from memkv_engines.offload.results import LoadResult
from memkv_engines.offload.service import staging_slots
from memkv_engines.sglang.chain import ChainMemory
from memkv_engines.sglang.gating import NO_PAGES, PageGate, PagesInMemory
from memkv_engines.sglang.pools import PagedPool

log = get_logger(__name__)


@dataclass(frozen=True)
class _Walk:
    hashes: bytes
    wanted: int
    segments: tuple[Segment, ...]


class PageStore:
    """One pool's pages.

    Args:
        pool: the pool.
        namespace: what its bytes are valid for.
        client: the started I/O service.
        config: ours.
    """

    def __init__(self, pool: PagedPool, namespace: Namespace, client: BlockingClient, config: Config) -> None:
        self._pool, self._namespace, self._client = pool, namespace.digest, client
        self._chain = ChainMemory()
        # What a look-up found, until the load that follows it: from the first page asked for to the walk.
        self._walks: OrderedDict[bytes, _Walk] = OrderedDict()
        self._walks_lock = threading.Lock()
        # One for each of the controller's threads: a throttle is not thread-safe.
        self._load_lines, self._store_lines = Throttle(), Throttle()
        self.gate: PageGate | None = None
        self._probe_timeout_s = config.lookup.probe_timeout_ms / 1000
        # A store that finds no staging is shed; so no call submits more than half of what there is.
        slot_bytes = (pool.largest_chunk + 1) * pool.block_bytes
        slots = staging_slots(config.io.staging_bytes, slot_bytes, config.io.io_threads)[1]
        self._chunks_at_once = max(1, slots // 2)

    def leading(self, keys: Sequence[str], prefix: Sequence[str]) -> int:
        """How many leading pages are stored.

        Args:
            keys: chain hashes of the pages, hexadecimal.
            prefix: those of the pages before.
        """
        hashes, wanted = self._hashes(keys, prefix)
        segments = self._walk(hashes, wanted, survey=False)
        if segments:
            with self._walks_lock:
                self._walks[hashes[wanted]] = _Walk(b"".join(hashes), wanted, segments)
                while len(self._walks) > MAX_REMEMBERED_WALKS:
                    self._walks.popitem(last=False)
        present = batches.covered(segments, wanted, len(hashes))
        return present.index(False) if False in present else len(present)

    def present(self, keys: Sequence[str], prefix: Sequence[str]) -> list[bool]:
        """Which pages are stored."""
        hashes, wanted = self._hashes(keys, prefix)
        return batches.covered(self._walk(hashes, wanted, survey=True), wanted, len(hashes))

    def load(self, keys: Sequence[str], prefix: Sequence[str], indices: Any) -> list[bool] | None:
        """Load pages into the pool.

        Args:
            keys: chain hashes of the pages.
            prefix: those of the pages before.
            indices: the slots of the pages.

        Returns:
            Per page whether it is in place and verified; None if the slots do not fit the keys.
        """
        pages = self._pool.pages_of(len(keys), indices)
        if pages is None:
            self._report(self._load_lines, "slots", "slots that are not %d whole pages: not loaded", len(keys))
            return None
        hashes, wanted = self._hashes(keys, prefix)
        segments = self._remembered(hashes, wanted) or self._walk(hashes, wanted, survey=False)
        runs = batches.load_runs(self._namespace, self._pool.group, hashes, wanted, segments, pages)
        good = [False] * len(keys)
        if runs:
            in_memory = self._in_memory(segments, wanted, len(hashes))
            result = self._gated_load([run for _, run in runs], len(prefix), len(keys), in_memory)
            for (first, _), count in zip(runs, result.good_blocks, strict=True):
                good[first : first + count] = [True] * count
            bad = sorted({kind for kind in result.kinds if kind})
            if bad:
                text = "%d pages are not used and will be recomputed: %s"
                self._report(self._load_lines, "load", text, len(keys) - sum(good), ", ".join(bad))
        return good

    def in_memory(self, keys: Sequence[str], prefix: Sequence[str]) -> PagesInMemory:
        """What of the pages that ``leading`` has just found lies in the I/O service's memory; arguments as there."""
        hashes, wanted = self._hashes(keys, prefix)
        with self._walks_lock:
            walk = self._walks.get(hashes[wanted]) if keys else None
        return self._in_memory(walk.segments, wanted, len(hashes)) if walk is not None else NO_PAGES

    def _in_memory(self, segments: Sequence[Segment], wanted: int, stop: int) -> PagesInMemory:
        there = self._client.in_memory([resident_key(self._pool.group, segment.last) for segment in segments])
        if not any(there):
            return NO_PAGES
        resident = [segment for segment, is_there in zip(segments, there, strict=True) if is_there]
        present = batches.covered(resident, wanted, stop)
        return PagesInMemory(present.index(False) if False in present else len(present), sum(present))

    def _gated_load(self, runs: list[LoadRun], before: int, pages: int, in_memory: PagesInMemory) -> LoadResult:
        if self.gate is None:
            return self._client.load(runs)
        ticket, result = self.gate.load_began(before, pages, in_memory), None
        try:
            result = self._client.load(runs, ticket.stop_s)
        finally:
            self.gate.load_ended(ticket, result)
        return result

    def store(self, keys: Sequence[str], prefix: Sequence[str], indices: Any) -> list[bool] | None:
        """Store the pages that are not stored yet; arguments and answer as in ``load``."""
        pages = self._pool.pages_of(len(keys), indices)
        if pages is None:
            self._report(self._store_lines, "slots", "slots that are not %d whole pages: not stored", len(keys))
            return None
        hashes, wanted = self._hashes(keys, prefix)
        self._chain.learn(hashes)
        done = batches.covered(self._walk(hashes, wanted, survey=True), wanted, len(hashes))
        sizes = (self._pool.blocks_per_chunk, self._pool.block_bytes)
        chunks = batches.store_chunks(
            self._namespace,
            self._pool.group,
            hashes[wanted:],
            pages,
            batches.missing_runs(done),
            len(prefix),
            sizes,
        )
        for start in range(0, len(chunks), self._chunks_at_once):
            part = chunks[start : start + self._chunks_at_once]
            result = self._client.store([chunk for _, chunk in part])
            for (first, chunk), outcome in zip(part, result.outcomes, strict=True):
                stored = outcome in IN_TIER
                done[first : first + len(chunk.block_ids)] = [stored] * len(chunk.block_ids)
            if result.lost:
                text, kinds = "%d chunks were not stored: %s", ", ".join(sorted(set(result.lost)))
                self._report(self._store_lines, "store", text, len(result.lost), kinds)
        return done

    def _report(self, lines: Throttle, kind: str, text: str, *values: object) -> None:
        held = lines.admit(kind)
        if held is not None:
            log.warning("pool %s: " + text + " (%d more such lines held back)", self._pool.name, *values, held)

    def _remembered(self, hashes: Sequence[bytes], wanted: int) -> tuple[Segment, ...]:
        """The walk of the look-up just before, once: what changed since then shows as a load that fails."""
        if not hashes:
            return ()
        with self._walks_lock:
            walk = self._walks.pop(hashes[wanted], None)
        if walk is None or walk.wanted != wanted or not walk.hashes.startswith(b"".join(hashes)):
            return ()
        return walk.segments

    def _hashes(self, keys: Sequence[str], prefix: Sequence[str]) -> tuple[list[bytes], int]:
        """Hashes from as far back as a chunk could begin that covers the first key, and the index of that key."""
        reach = self._pool.largest_chunk - 1
        own = [_digest(key) for key in keys]
        # Of a long prompt's pages only those within reach, and a chunk more to find the link to what was seen.
        passed = [_digest(key) for key in prefix[-2 * reach :]] if reach else []
        earlier = self._chain.context(own[0], passed, reach) if own else []
        return [*earlier, *own], len(earlier)

    def _walk(self, hashes: Sequence[bytes], wanted: int, *, survey: bool) -> tuple[Segment, ...]:
        pool = self._pool
        probe = Probe(
            0,
            self._namespace,
            pool.group,
            pool.blocks_per_chunk,
            0,
            0,
            b"".join(hashes),
            (pool.shard.as_tuple(),),
            anywhere=True,
            wanted=wanted,
            largest_chunk=pool.largest_chunk,
            survey=survey,
        )
        segments = self._client.probe(probe, self._probe_timeout_s)
        for segment in segments:
            own = hashes[segment.position : segment.position + segment.take]
            self._chain.learn(split_hashes(segment.hashes) or own)
        return segments


def _digest(key: str) -> bytes:
    digest = bytes.fromhex(key)
    if len(digest) != HASH_BYTES:
        raise ValueError(f"page hash {key[:80]!r} has {len(digest)} bytes instead of {HASH_BYTES}")
    return digest
