"""Scheduler side: which chunks to store when, and what came of them.

A full chunk is stored once, in the step that completes it; the tail of a request once, when the request ends. What is
known to be stored, or on its way, is not stored again. A chunk that was shed is offered again while its request lives,
and afterwards while its pages still hold it (``leftovers``).
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from memkv_engines.limits import KEY_BYTES, LEFTOVER_S, MAX_PENDING_STORE_CHUNKS
from memkv_engines.offload.leftovers import Holds, Leftovers, SentChunk
from memkv_engines.offload.lookup import GroupView, PrefixLookup
from memkv_engines.offload.messages import IN_TIER, StoreChunk

_MAX_OFFERS_AGAIN = 64
"""Of one chunk by its request; then it is a leftover although the request lives."""
OUTCOMES_WORST_FIRST = ("failed", "full", "shed", "present", "stored")

Plan = tuple[int, tuple[StoreChunk, ...]]
"""Job id, chunks."""


@dataclass
class _Progress:
    """How far a request's chunks have been handed out, per group, and which were shed."""

    next_chunk: dict[int, int] = field(default_factory=dict)
    # Nothing can be complete before this many tokens: most steps of most requests end at one comparison.
    wake_tokens: int = 0
    shed: dict[int, list[int]] = field(default_factory=dict)
    offers_again: Counter[tuple[int, int]] = field(default_factory=Counter)


class StorePlanner:
    """Decides what to store.

    Args:
        groups: the KV groups.
        lookup: what is known to be stored; learns from results.
        room_chunks: about as many chunks find staging at a time; of more, some will be shed.
        clock: seconds.
    """

    def __init__(
        self,
        groups: Sequence[GroupView],
        lookup: PrefixLookup,
        *,
        room_chunks: int = MAX_PENDING_STORE_CHUNKS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._groups = {group.group: group for group in groups}
        self._lookup = lookup
        self._room_chunks = room_chunks
        self._clock = clock
        self._progress: dict[str, _Progress] = {}
        self._sent: dict[int, list[SentChunk]] = {}
        self._partial: dict[int, tuple[int, tuple[str, ...]]] = {}
        self._in_flight: set[tuple[int, bytes, int]] = set()
        self._next_job = 0
        self._leftovers = Leftovers(clock)
        self._leftovers_job = 0
        self._watch_until = 0.0

    def may_plan(self, request_id: str, computed_tokens: int) -> bool:
        """Whether ``plan_step`` could find anything: one comparison for most steps of most requests."""
        progress = self._progress.get(request_id)
        return progress is None or computed_tokens >= progress.wake_tokens

    def plan_step(
        self,
        request_id: str,
        hashes: Sequence[Sequence[bytes]],
        block_ids: Sequence[Sequence[int]],
        computed_tokens: int,
        namespace: bytes,
    ) -> Plan | None:
        """Full chunks that will be complete after this step and are not known to be stored.

        Args:
            request_id: the engine's id.
            hashes: per group the chain hashes of the request's full blocks.
            block_ids: per group the request's pages; 0 is the null block.
            computed_tokens: tokens whose KV will be in the pages after the step.
            namespace: digest of the request's namespace.

        Returns:
            Job id and chunks, or None if there is nothing to do.
        """
        progress = self._progress.setdefault(request_id, _Progress())
        if len(self._in_flight) >= MAX_PENDING_STORE_CHUNKS:
            return None  # nothing is lost: the next step finds the same chunks
        chosen: list[SentChunk] = []
        for group, own, ids in zip(self._groups.values(), hashes, block_ids, strict=True):
            n = group.blocks_per_chunk
            full = min(computed_tokens // group.block_tokens, len(own), len(ids)) // n
            retry, progress.shed[group.group] = progress.shed.get(group.group, []), []
            start = progress.next_chunk.get(group.group, 0)
            chunks = [c for c in (*retry, *range(start, full)) if c < full]
            chosen += [_cut(request_id, group, c, own, ids, (c + 1) * n, namespace) for c in chunks]
            progress.next_chunk[group.group] = max(start, full)
        progress.wake_tokens = min(
            (progress.next_chunk[g.group] + 1) * g.blocks_per_chunk * g.block_tokens for g in self._groups.values()
        )
        return self._send(chosen)

    def plan_tail(
        self,
        request_id: str,
        hashes: Sequence[Sequence[bytes]],
        block_ids: Sequence[Sequence[int]],
        computed_tokens: int,
        namespace: bytes,
    ) -> Plan | None:
        """What is left when the request ends: chunks that were shed and its unfinished last chunk. Ends the request."""
        progress = self._progress.pop(request_id, _Progress())
        chosen: list[SentChunk] = []
        for group, own, ids in zip(self._groups.values(), hashes, block_ids, strict=True):
            n = group.blocks_per_chunk
            blocks = min(computed_tokens // group.block_tokens, len(own), len(ids))
            start = progress.next_chunk.get(group.group, 0)
            shed = [c for c in progress.shed.get(group.group, []) if (c + 1) * n <= blocks]
            chunks = [*shed, *range(start, -(-blocks // n))]
            chosen += [_cut(request_id, group, c, own, ids, min((c + 1) * n, blocks), namespace) for c in chunks]
        plan = self._send(chosen)
        if len(self._in_flight) > self._room_chunks:
            self._watch_until = self._clock() + LEFTOVER_S
        return plan

    def plan_leftovers(self, holds: Holds) -> Plan | None:
        """Chunks that requests could not get rid of before they ended, as far as their pages still hold them.

        Args:
            holds: what the pages will hold after this step; asked in the step that gathers them.

        Returns:
            As ``plan_step``; to be gathered after the step's forward.
        """
        batch = self._leftovers.take(holds)
        if not batch:
            return None
        plan = self._send(batch)
        if plan is None:
            self._leftovers.answered(())  # stored or under way by now
        else:
            self._leftovers_job = plan[0]
        return plan

    @property
    def awaits_results(self) -> bool:
        """Whether an engine without requests should step on: chunks of requests that have ended need another offer."""
        if self._leftovers.pending:
            return True
        return len(self._in_flight) > self._room_chunks and self._clock() < self._watch_until

    def take_lost(self) -> int:
        """How many shed chunks were given up since the last call."""
        return self._leftovers.take_lost()

    def _send(self, chosen: Sequence[SentChunk]) -> Plan | None:
        sent: list[SentChunk] = []
        for chunk in chosen:
            if not self._is_wanted(chunk):
                continue
            if len(self._in_flight) >= MAX_PENDING_STORE_CHUNKS:
                self._offer_again(chunk)
                continue
            sent.append(chunk)
            self._in_flight.add(_place(chunk))
        if not sent:
            return None
        self._next_job += 1
        self._sent[self._next_job] = sent
        return self._next_job, tuple(self._message(chunk) for chunk in sent)

    def _is_wanted(self, chunk: SentChunk) -> bool:
        """Whether there is something to store that is neither stored already nor under way."""
        present = chunk.block_ids[chunk.holes :]
        if not present or 0 in present or (chunk.holes and not self._groups[chunk.group].window_tokens):
            return False
        if _place(chunk) in self._in_flight:
            return False
        known = self._lookup.index.holes_of(chunk.hashes[-1], len(chunk.hashes), chunk.group)
        return known is None or known > chunk.holes

    def _message(self, chunk: SentChunk) -> StoreChunk:
        start = chunk.chunk * self._groups[chunk.group].blocks_per_chunk
        replace = (chunk.group, chunk.hashes[-1]) in self._lookup.bad
        present, joined = chunk.block_ids[chunk.holes :], b"".join(chunk.hashes)
        return StoreChunk(chunk.namespace, chunk.group, start, chunk.holes, joined, present, replace)

    def take_rank_results(self, job_id: int, ranks: int, world_size: int, outcomes: Sequence[str]) -> None:
        """Learn what some ranks made of a job; a chunk is stored when every rank has stored its shard.

        Args:
            job_id: the job.
            ranks: how many ranks answered.
            world_size: how many there are.
            outcomes: per chunk the worst outcome of those ranks.
        """
        seen, worst = self._partial.pop(job_id, (0, tuple(outcomes)))
        worst = tuple(min(a, b, key=OUTCOMES_WORST_FIRST.index) for a, b in zip(worst, outcomes, strict=True))
        if seen + ranks < world_size:
            self._partial[job_id] = (seen + ranks, worst)
            return
        shed: list[SentChunk] = []
        for sent, outcome in zip(self._sent.pop(job_id, ()), worst, strict=False):
            self._in_flight.discard(_place(sent))
            if outcome in IN_TIER:
                self._lookup.learn(sent.group, sent.hashes, sent.holes)
            elif outcome == "shed":
                shed.append(sent)
        if job_id == self._leftovers_job:
            self._leftovers.answered(shed)
            return
        for sent in shed:
            self._offer_again(sent)

    def _offer_again(self, sent: SentChunk) -> None:
        progress, chunk = self._progress.get(sent.request_id), (sent.group, sent.chunk)
        if progress is None or progress.offers_again[chunk] >= _MAX_OFFERS_AGAIN:
            self._leftovers.add(sent)
            return
        progress.offers_again[chunk] += 1
        progress.shed.setdefault(sent.group, []).append(sent.chunk)
        progress.wake_tokens = 0

    def forget_request(self, request_id: str) -> None:
        """The request ended without a tail to store."""
        self._progress.pop(request_id, None)

    def clear(self) -> None:
        """Forget what is under way, after a reset: results of older jobs teach nothing."""
        self._sent.clear()
        self._partial.clear()
        self._in_flight.clear()
        self._leftovers.clear()
        self._leftovers_job = 0
        for progress in self._progress.values():
            progress.shed.clear()


def _place(chunk: SentChunk) -> tuple[int, bytes, int]:
    return chunk.group, chunk.hashes[-1][:KEY_BYTES], len(chunk.hashes)


def _cut(
    request_id: str,
    group: GroupView,
    chunk: int,
    hashes: Sequence[bytes],
    block_ids: Sequence[int],
    stop: int,
    namespace: bytes,
) -> SentChunk:
    """A chunk out of a request's blocks, up to block ``stop``."""
    start = chunk * group.blocks_per_chunk
    ids = tuple(block_ids[start:stop])
    holes = next((i for i, b in enumerate(ids) if b), len(ids))
    return SentChunk(request_id, group.group, chunk, tuple(hashes[start:stop]), ids, holes, namespace)
