"""Scheduler side: which chunks to store when, and what came of them.

A full chunk is stored once, in the step that completes it; the tail of a request once, when the request ends. What is
known to be stored, or on its way, is not stored again. A chunk that was shed is offered again while its request lives.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from memkv_engines.limits import KEY_BYTES, MAX_PENDING_STORE_CHUNKS
from memkv_engines.offload.lookup import GroupView, PrefixLookup
from memkv_engines.offload.messages import IN_TIER, StoreChunk

_MAX_SHED_RETRIES = 64
OUTCOMES_WORST_FIRST = ("failed", "full", "shed", "present", "stored")


@dataclass
class _Progress:
    """How far a request's chunks have been handed out, per group, and which were shed."""

    next_chunk: dict[int, int] = field(default_factory=dict)
    # Nothing can be complete before this many tokens: most steps of most requests end at one comparison.
    wake_tokens: int = 0
    shed: dict[int, list[int]] = field(default_factory=dict)
    retries: int = 0


@dataclass(frozen=True)
class _Sent:
    request_id: str
    group: int
    chunk: int
    hashes: tuple[bytes, ...]
    holes: int
    namespace: bytes


class StorePlanner:
    """Decides what to store.

    Args:
        groups: the KV groups.
        lookup: what is known to be stored; learns from results.
    """

    def __init__(self, groups: Sequence[GroupView], lookup: PrefixLookup) -> None:
        self._groups = tuple(groups)
        self._lookup = lookup
        self._progress: dict[str, _Progress] = {}
        self._sent: dict[int, list[_Sent]] = {}
        self._partial: dict[int, tuple[int, tuple[str, ...]]] = {}
        self._in_flight: set[tuple[int, bytes, int]] = set()
        self._next_job = 0

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
    ) -> tuple[int, tuple[StoreChunk, ...]] | None:
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
        chosen: list[tuple[GroupView, int, int]] = []
        for group, own, ids in zip(self._groups, hashes, block_ids, strict=True):
            n = group.blocks_per_chunk
            full = min(computed_tokens // group.block_tokens, len(own), len(ids)) // n
            retry, progress.shed[group.group] = progress.shed.get(group.group, []), []
            start = progress.next_chunk.get(group.group, 0)
            chosen += [(group, c * n, (c + 1) * n) for c in (*retry, *range(start, full)) if c < full]
            progress.next_chunk[group.group] = max(start, full)
        progress.wake_tokens = min(
            (progress.next_chunk[g.group] + 1) * g.blocks_per_chunk * g.block_tokens for g in self._groups
        )
        return self._send(request_id, chosen, hashes, block_ids, namespace)

    def plan_tail(
        self,
        request_id: str,
        hashes: Sequence[Sequence[bytes]],
        block_ids: Sequence[Sequence[int]],
        computed_tokens: int,
        namespace: bytes,
    ) -> tuple[int, tuple[StoreChunk, ...]] | None:
        """What is left when the request ends: chunks that were shed and its unfinished last chunk. Ends the request."""
        progress = self._progress.pop(request_id, _Progress())
        chosen: list[tuple[GroupView, int, int]] = []
        for group, own, ids in zip(self._groups, hashes, block_ids, strict=True):
            n = group.blocks_per_chunk
            blocks = min(computed_tokens // group.block_tokens, len(own), len(ids))
            start = progress.next_chunk.get(group.group, 0)
            chosen += [(group, c * n, (c + 1) * n) for c in progress.shed.get(group.group, []) if (c + 1) * n <= blocks]
            chosen += [(group, c * n, min((c + 1) * n, blocks)) for c in range(start, -(-blocks // n))]
        return self._send(request_id, chosen, hashes, block_ids, namespace)

    def _send(
        self,
        request_id: str,
        chosen: Sequence[tuple[GroupView, int, int]],
        hashes: Sequence[Sequence[bytes]],
        block_ids: Sequence[Sequence[int]],
        namespace: bytes,
    ) -> tuple[int, tuple[StoreChunk, ...]] | None:
        own = {g.group: h for g, h in zip(self._groups, hashes, strict=True)}
        pages = {g.group: b for g, b in zip(self._groups, block_ids, strict=True)}
        sent: list[_Sent] = []
        chunks: list[StoreChunk] = []
        for group, start, stop in chosen:
            if len(self._in_flight) >= MAX_PENDING_STORE_CHUNKS:
                self._postpone(request_id, group, start // group.blocks_per_chunk)
                continue
            made = self._chunk(group, start, own[group.group][start:stop], pages[group.group][start:stop], namespace)
            if made is None:
                continue
            chunks.append(made)
            names = tuple(own[group.group][start:stop])
            sent.append(_Sent(request_id, group.group, start // group.blocks_per_chunk, names, made.holes, namespace))
            self._in_flight.add((group.group, names[-1][:KEY_BYTES], len(names)))
        if not chunks:
            return None
        self._next_job += 1
        self._sent[self._next_job] = sent
        return self._next_job, tuple(chunks)

    def _chunk(
        self, group: GroupView, start: int, hashes: Sequence[bytes], block_ids: Sequence[int], namespace: bytes
    ) -> StoreChunk | None:
        """The store of one chunk, or None: nothing to store, stored already, or under way."""
        holes = next((i for i, b in enumerate(block_ids) if b), len(block_ids))
        present = block_ids[holes:]
        if not present or 0 in present or (holes and not group.window_tokens):
            return None
        last = hashes[-1]
        if (group.group, last[:KEY_BYTES], len(hashes)) in self._in_flight:
            return None
        known = self._lookup.index.holes_of(last, len(hashes), group.group)
        if known is not None and known <= holes:
            return None
        replace = (group.group, last) in self._lookup.bad
        return StoreChunk(namespace, group.group, start, holes, b"".join(hashes), tuple(present), replace)

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
        for sent, outcome in zip(self._sent.pop(job_id, ()), worst, strict=False):
            self._in_flight.discard((sent.group, sent.hashes[-1][:KEY_BYTES], len(sent.hashes)))
            if outcome in IN_TIER:
                self._lookup.learn(sent.group, sent.hashes, sent.holes)
            elif outcome == "shed":
                self._offer_again(sent)

    def _offer_again(self, sent: _Sent) -> None:
        progress = self._progress.get(sent.request_id)
        if progress is not None and progress.retries < _MAX_SHED_RETRIES:
            progress.retries += 1
            progress.shed.setdefault(sent.group, []).append(sent.chunk)
            progress.wake_tokens = 0

    def _postpone(self, request_id: str, group: GroupView, chunk: int) -> None:
        progress = self._progress.get(request_id)
        if progress is not None:
            progress.shed.setdefault(group.group, []).append(chunk)
            progress.wake_tokens = 0

    def forget_request(self, request_id: str) -> None:
        """The request ended without a tail to store."""
        self._progress.pop(request_id, None)

    def clear(self) -> None:
        """Forget what is under way, after a reset: results of older jobs teach nothing."""
        self._sent.clear()
        self._partial.clear()
        self._in_flight.clear()
        for progress in self._progress.values():
            progress.shed.clear()
