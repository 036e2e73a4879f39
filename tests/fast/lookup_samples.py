"""A look-up beside a tier that really holds chunks, and brute force that knows what the look-up should say."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from memkv_engines.keys import ChunkKey, ChunkName, Shard
from memkv_engines.limits import KEY_BYTES
from memkv_engines.metrics import Counters
from memkv_engines.offload.lookup import GroupView, Hit, PrefixLookup, Run
from memkv_engines.offload.messages import Probe, ProbeDone
from memkv_engines.offload.probing import ChainWalk
from memkv_engines.tier.memory import MemoryTier
from tests.fast.samples import NAMESPACE, SHARD, aligned, chain_hash, make_chunk
from tests.fast.test_index import Clock

N, TOKENS = 4, 16
GROUP = GroupView(0, TOKENS, N, (SHARD,))


class World:
    """A look-up, the tier it asks, and a prober that answers when told.

    Args:
        groups: KV groups.
        options: changes to the look-up's settings.
    """

    def __init__(self, groups: Sequence[GroupView] = (GROUP,), **options: Any) -> None:
        self.clock, self.counters, self.tier = Clock(), Counters(), MemoryTier()
        self.groups = tuple(groups)
        self.sent: list[Probe] = []
        self._next = 0
        settings: dict[str, Any] = {
            "align_tokens": max(g.block_tokens for g in groups),
            "index_entries": 1024,
            "hit_ttl_s": 100.0,
            "miss_ttl_s": 2.0,
            "probe_timeout_s": 0.25,
        }
        self.lookup = PrefixLookup(
            groups, send=self.sent.append, counters=self.counters, clock=self.clock, **{**settings, **options}
        )

    def put(self, hashes: Sequence[bytes], *, holes: int = 0, group: int = 0, shard: Shard = SHARD) -> ChunkName:
        """Store a chunk of these blocks, with a header that says so."""
        key = ChunkKey(NAMESPACE.digest, hashes[0], hashes[-1], len(hashes), group, shard, holes)
        header, _ = make_chunk(len(hashes), 64)
        rows = tuple(
            type(row)(own, row.digest if i >= holes else bytes(16), i >= holes)
            for i, (row, own) in enumerate(zip(header.blocks, hashes, strict=True))
        )
        view = aligned(type(header)(key, header.geometry, 0, rows).encode())
        self.tier.put(NAMESPACE.folder, key.name, [view])
        return key.name

    def answer(self) -> int:
        """Answer the probes that are under way; returns how many there were."""
        probes, self.sent[:] = list(self.sent), []
        for probe in probes:
            self.lookup.take_probe(ProbeDone(probe.probe_id, tuple(ChainWalk(probe, self.tier).run()), 1))
        return len(probes)

    def ask(self, *hashes: Sequence[bytes], computed: int = 0, request: str = "") -> Hit:
        """Ask until there is an answer, as a scheduler does."""
        self._next += 1
        name = request or f"request {self._next}"
        for _ in range(100):
            hit = self.ask_once(*hashes, computed=computed, request=name)
            if hit is not None:
                return hit
            assert self.answer(), "told to ask again, but nothing is under way"
        pytest.fail("never answered")

    def ask_once(self, *hashes: Sequence[bytes], computed: int = 0, request: str = "r") -> Hit | None:
        return self.lookup.ask(request, hashes, computed, NAMESPACE.digest)


def covered(hit: Hit, group: GroupView, hashes: Sequence[bytes], tier: MemoryTier) -> set[int]:
    """Blocks a hit gives, each checked to be in the tier with the same chain hash."""
    blocks: set[int] = set()
    for run in hit.runs.get(group.group, ()):
        blocks |= check_run(run, group, hashes, tier)
    return blocks


def check_run(run: Run, group: GroupView, hashes: Sequence[bytes], tier: MemoryTier) -> set[int]:
    assert 0 < run.take <= run.block_count * run.chunk_count
    if run.last:
        assert run.chunk_count == 1
    else:
        assert run.take == run.block_count * run.chunk_count
    blocks = set()
    for number in range(run.chunk_count):
        start = run.position + number * run.block_count
        own = hashes[start : min(start + run.block_count, run.position + run.take)]
        last = run.last or own[-1][:KEY_BYTES]
        holes = run.holes if not number else 0
        for shard in group.shards:
            name = ChunkName(own[0][:KEY_BYTES], last, run.block_count, holes, group.group, shard.text)
            with tier.open(NAMESPACE.folder, name) as reader:
                view = aligned(bytes(reader.object_bytes))
                reader.read([view], 0)
            stored = [bytes(view[512 + 96 * i : 544 + 96 * i]) for i in range(run.block_count)]
            assert stored[: len(own)] == list(own)
        blocks |= set(range(start + holes, start + len(own)))
    return blocks


def check(world: World, hit: Hit, hashes: Sequence[bytes], computed: int) -> int:
    """The hit is made of stored blocks without a gap; returns the first block it does not reach."""
    assert hit.tokens % TOKENS == 0
    have = covered(hit, GROUP, hashes, world.tier)
    first, end = computed // TOKENS, max(hit.tokens, computed) // TOKENS
    assert set(range(first, end)) <= have
    return end


def reachable(names: set[tuple[int, tuple[bytes, ...]]], hashes: Sequence[bytes], start: int = 0) -> int:
    """Where a walk over all chunks that start where another ends may end at most: brute force."""
    best, starts, seen = start, [start], {start}
    while starts:
        start = starts.pop()
        for position, blocks in names:
            if position != start:
                continue
            shared = shared_blocks(blocks, hashes[start:])
            best = max(best, start + shared)
            if shared == len(blocks) and start + shared not in seen:
                seen.add(start + shared)
                starts.append(start + shared)
    return best


def greedy_ends(names: set[tuple[int, tuple[bytes, ...]]], hashes: Sequence[bytes], start: int = 0) -> set[int]:
    """Where a walk may end that takes the full chunk, or else what shares most blocks: brute force over ties."""
    here = [blocks for position, blocks in names if position == start]
    full = [blocks for blocks in here if len(blocks) == N and list(blocks) == hashes[start : start + N]]
    shared = {blocks: shared_blocks(blocks, hashes[start:]) for blocks in full or here}
    most = max(shared.values(), default=0)
    if not most:
        return {start}
    ends: set[int] = set()
    for blocks, count in shared.items():
        if count == most:
            ends |= greedy_ends(names, hashes, start + most) if most == len(blocks) else {start + most}
    return ends


def shared_blocks(blocks: Sequence[bytes], own: Sequence[bytes]) -> int:
    return next((i for i, (a, b) in enumerate(zip(blocks, own, strict=False)) if a != b), min(len(blocks), len(own)))


def prompt(path: str) -> list[bytes]:
    """Hashes of a prompt whose blocks are letters: a hash tells all letters up to it."""
    return [chain_hash(i, path[: i + 1]) for i in range(len(path))]
