"""Scheduler side: how much of a prompt is stored. Answers from memory; asks the prober for what is not known.

No call blocks, sleeps or touches a file system. An unknown prefix is probed in the background once; until the answer
is in (or its deadline has passed) the caller is told to ask again.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from memkv_engines.keys import Shard
from memkv_engines.limits import (
    HASH_BYTES,
    KEY_BYTES,
    MAX_BAD_CHUNKS,
    MAX_PROBES_IN_FLIGHT,
    MAX_SLIDING_WINDOW_CANDIDATES,
    MILESTONE_CHUNKS,
    PROBE_SILENCE_MAX_S,
    PROBE_SILENCE_S,
)
from memkv_engines.metrics import Counters
from memkv_engines.offload.breaker import Breaker
from memkv_engines.offload.index import ChunkIndex
from memkv_engines.offload.messages import Probe, ProbeDone, Segment, split_hashes
from memkv_engines.offload.milestones import Milestones
from memkv_engines.offload.variants import ExpiringSet, VariantTable


@dataclass(frozen=True)
class GroupView:
    """A KV group as the scheduler sees it.

    Attributes:
        group: number of the group.
        block_tokens: tokens per block.
        blocks_per_chunk: blocks of a full chunk.
        shards: all shards a chunk consists of; a hit needs every one.
        window_tokens: sliding window, 0 for full attention.
    """

    group: int
    block_tokens: int
    blocks_per_chunk: int
    shards: tuple[Shard, ...]
    window_tokens: int = 0


@dataclass(frozen=True)
class Run:
    """Known chunks that follow each other: ``chunk_count`` of ``block_count`` blocks from block ``position`` on.

    ``take`` blocks in all are the prompt's (fewer than the chunks hold only in a single last variant); ``last`` is
    empty where the prompt's own hashes name the chunks.
    """

    position: int
    block_count: int
    chunk_count: int
    holes: int
    last: bytes
    take: int


@dataclass(frozen=True)
class Hit:
    """What is stored: ``tokens`` of the prompt from its start, and the runs of each group that hold them."""

    tokens: int
    runs: dict[int, tuple[Run, ...]]


@dataclass
class _Asked:
    """Probes of one request: per group the one under way, and where from it has been answered."""

    deadline: float
    waiting: dict[int, int] = field(default_factory=dict)
    answered: set[tuple[int, int]] = field(default_factory=set)


class PrefixLookup:
    """Answers how much of a prompt is stored.

    Args:
        groups: the KV groups; at least one.
        align_tokens: hits end on multiples of this.
        index_entries: size of the index.
        hit_ttl_s: how long a known chunk is believed.
        miss_ttl_s: how long a known miss is believed.
        probe_timeout_s: how long a request waits for probes in all.
        send: hands a probe to the service.
        counters: where to count.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        groups: Sequence[GroupView],
        *,
        align_tokens: int,
        index_entries: int,
        hit_ttl_s: float,
        miss_ttl_s: float,
        probe_timeout_s: float,
        send: Callable[[Probe], None],
        counters: Counters,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._groups = tuple(groups)
        self._full = tuple(g for g in groups if not g.window_tokens)
        self._windows = tuple(g for g in groups if g.window_tokens)
        self._align_tokens = align_tokens
        self._probe_timeout_s = probe_timeout_s
        self._send, self._counters, self._clock = send, counters, clock
        self.index = ChunkIndex(index_entries, hit_ttl_s, clock)
        self.variants = VariantTable(hit_ttl_s, clock)
        # Half the time, since the chunks may be known for a while already when their prefix is.
        self._milestones = Milestones(index_entries // MILESTONE_CHUNKS, hit_ttl_s / 2, clock)
        self.bad = ExpiringSet(hit_ttl_s, MAX_BAD_CHUNKS, clock)
        self._misses = ExpiringSet(miss_ttl_s, clock=clock)
        self._asked: dict[str, _Asked] = {}
        self._probes: dict[int, tuple[str, int, Sequence[bytes], int]] = {}
        # Given up, but a reply may still come and is worth learning from.
        self._late: OrderedDict[int, tuple[str, int, Sequence[bytes], int]] = OrderedDict()
        self._next_probe = 0
        # A tier that does not answer costs each request one deadline; after the first ones nobody waits for it.
        self._breaker = Breaker(PROBE_SILENCE_S, PROBE_SILENCE_MAX_S, clock)

    def ask(
        self, request_id: str, hashes: Sequence[Sequence[bytes]], computed_tokens: int, namespace: bytes
    ) -> Hit | None:
        """How much is stored beyond what the engine has.

        Args:
            request_id: the engine's id.
            hashes: per group (in the order given to the constructor) the prompt's chain hashes.
            computed_tokens: what the engine has itself, a multiple of every block size.
            namespace: digest of the request's namespace.

        Returns:
            The hit (``tokens`` is at most ``computed_tokens`` where nothing is gained), or None: ask again.
        """
        tokens = min(len(h) * g.block_tokens for g, h in zip(self._groups, hashes, strict=True))
        runs: dict[int, tuple[Run, ...]] = {}
        pending = False
        for group, own in zip(self._groups, hashes, strict=True):
            if group.window_tokens:
                continue
            found, end, asked = self._cover(request_id, group, own, computed_tokens, 0, namespace)
            pending |= asked
            runs[group.group] = found
            tokens = min(tokens, end * group.block_tokens)
        if pending:
            return None
        tokens = self._align(tokens)
        for _ in range(MAX_SLIDING_WINDOW_CANDIDATES):
            if tokens <= computed_tokens or not self._windows:
                break
            reach = tokens
            for group, own in zip(self._groups, hashes, strict=True):
                if not group.window_tokens:
                    continue
                covered = self._cover_window(request_id, group, own, tokens, namespace)
                if covered is None:
                    return None
                runs[group.group], end_tokens = covered
                reach = min(reach, end_tokens)
            if reach >= tokens:
                break
            tokens = self._align(reach)
        else:
            tokens = computed_tokens
        return Hit(max(tokens, 0), runs)

    def _align(self, tokens: int) -> int:
        return tokens - tokens % self._align_tokens

    # --- one group -----------------------------------------------------------

    def _cover(
        self,
        request_id: str,
        group: GroupView,
        hashes: Sequence[bytes],
        computed_tokens: int,
        need_from: int,
        namespace: bytes,
    ) -> tuple[tuple[Run, ...], int, bool]:
        """Runs of a full-attention group, the block they reach, and whether a probe is under way."""
        computed = computed_tokens // group.block_tokens
        if computed >= len(hashes):
            return (), computed, False
        start = computed - computed % group.blocks_per_chunk
        runs, end, ask_from = self._walk(group, hashes, start, need_from)
        asked = self._probe(request_id, group, hashes, ask_from, end, need_from, namespace)
        if end <= computed and start and not asked:
            # Chunks of another length may straddle the grid (other settings wrote them): walk from the beginning.
            runs, end, ask_from = self._walk(group, hashes, 0, need_from)
            asked = self._probe(request_id, group, hashes, ask_from, end, need_from, namespace)
        return runs, max(end, computed), asked

    def _cover_window(
        self, request_id: str, group: GroupView, hashes: Sequence[bytes], tokens: int, namespace: bytes
    ) -> tuple[tuple[Run, ...], int] | None:
        """Runs of a sliding-window group for a hit of ``tokens``, and the tokens they reach; None: ask again."""
        stop = tokens // group.block_tokens
        need_from = max(0, tokens - group.window_tokens + 1) // group.block_tokens
        start = need_from - need_from % group.blocks_per_chunk
        own = hashes[:stop]
        runs, end, ask_from = self._walk(group, own, start, need_from)
        if self._probe(request_id, group, own, ask_from, end, need_from, namespace):
            return None
        # Below the window's first block nothing is gained: step down to the chunk before.
        reach = end if end > need_from else start
        return runs, reach * group.block_tokens

    def _walk(
        self, group: GroupView, hashes: Sequence[bytes], start: int, need_from: int
    ) -> tuple[tuple[Run, ...], int, int | None]:
        """Known runs from a block on, the block they reach, and the block from which the tier may know more."""
        runs: list[Run] = []
        position = start
        while position < len(hashes):
            count = self._full_chunks(group, hashes, position, need_from)
            if count:
                take = count * group.blocks_per_chunk
                holes = 0
                if group.window_tokens:
                    last = hashes[position + group.blocks_per_chunk - 1]
                    holes = self.index.holes_of(last, group.blocks_per_chunk, group.group) or 0
                runs.append(Run(position, group.blocks_per_chunk, count, holes, b"", take))
                position += take
            variant = self._best_variant(group, hashes, position, need_from)
            if variant is None:
                return tuple(runs), position, position if position < len(hashes) else None
            runs.append(variant)
            position += variant.take
            if variant.take < variant.block_count:
                # Another variant, or blocks of this one that no prompt has had so far, may share more.
                return tuple(runs), position, variant.position if position < len(hashes) else None
        return tuple(runs), position, None

    def _full_chunks(self, group: GroupView, hashes: Sequence[bytes], position: int, need_from: int) -> int:
        n = group.blocks_per_chunk
        if not group.window_tokens:
            return self._leading_chunks(group, hashes, position)
        count = 0
        while position + n <= len(hashes):
            holes = self.index.holes_of(hashes[position + n - 1], n, group.group)
            if holes is None or holes > max(0, need_from - position) or (holes and count):
                break
            count += 1
            position += n
        return count

    def _leading_chunks(self, group: GroupView, hashes: Sequence[bytes], position: int) -> int:
        """Known full chunks of a full-attention group: by milestone, then a few one by one, then the rest at once."""
        n, number = group.blocks_per_chunk, group.group
        first = position // n
        on_grid = position % n == 0
        known = self._milestones.known_chunks(hashes, n, number) if on_grid else 0
        count = max(0, known - first)
        few = min(count + MILESTONE_CHUNKS, (len(hashes) - position) // n)
        while count < few:
            if self.index.holes_of(hashes[position + (count + 1) * n - 1], n, number) is None:
                return count
            count += 1
        if position + (count + 1) * n <= len(hashes):
            count += self.index.leading_chunks(hashes, position + count * n, n, number)
        if on_grid and known >= first and first + count >= known + MILESTONE_CHUNKS:
            self._milestones.extend(hashes, n, number, first + count)
        return count

    def _best_variant(self, group: GroupView, hashes: Sequence[bytes], position: int, need_from: int) -> Run | None:
        if position >= len(hashes):
            return None
        best: Run | None = None
        for variant in self.variants.at(group.group, hashes[position]):
            if variant.holes > max(0, need_from - position):
                continue
            take = variant.shared_blocks(hashes, position)
            if take > (best.take if best else variant.holes):
                best = Run(position, variant.block_count, 1, variant.holes, variant.last, take)
        return best

    # --- probing -------------------------------------------------------------

    def _probe(
        self,
        request_id: str,
        group: GroupView,
        hashes: Sequence[bytes],
        start: int | None,
        end: int,
        need_from: int,
        namespace: bytes,
    ) -> bool:
        """Whether to wait: a probe from ``start`` on (None: no need) is under way or has just been sent.

        ``end`` is the block that is reached without it.
        """
        if start is None:
            return False
        now = self._clock()
        asked = self._asked.get(request_id)
        if asked is None:
            asked = self._asked[request_id] = _Asked(now + self._probe_timeout_s)
        if group.group in asked.waiting:
            if now < asked.deadline:
                return True
            self._give_up(asked.waiting.pop(group.group))
            asked.answered.add((group.group, start))
            self._counters.add("probe_timeouts")
            self._breaker.failed()
            return False
        if asked.answered & {(group.group, start), (group.group, end)}:
            return False
        if now >= asked.deadline or len(self._probes) >= MAX_PROBES_IN_FLIGHT:
            return False
        if (group.group, hashes[end]) in self._misses or not self._breaker.admits():
            return False
        self._next_probe += 1
        asked.waiting[group.group] = self._next_probe
        asked.answered.add((group.group, start))
        self._probes[self._next_probe] = (request_id, group.group, hashes, start)
        self._counters.add("probe_requests")
        shards = tuple(s.as_tuple() for s in group.shards)
        self._send(
            Probe(
                self._next_probe,
                namespace,
                group.group,
                group.blocks_per_chunk,
                start,
                need_from,
                b"".join(hashes[start:]),
                shards,
            )
        )
        return True

    def lose_service(self) -> None:
        """Whoever was to answer has gone: nobody need wait for what was asked."""
        now = self._clock()
        for asked in self._asked.values():
            if asked.waiting:
                asked.deadline = min(asked.deadline, now)

    def _give_up(self, probe_id: int) -> None:
        probe = self._probes.pop(probe_id, None)
        if probe is not None:
            self._late[probe_id] = probe
            if len(self._late) > MAX_PROBES_IN_FLIGHT:
                self._late.popitem(last=False)

    def take_probe(self, reply: ProbeDone) -> None:
        """Learn what a probe found; a reply that comes too late still feeds the index."""
        self._breaker.succeeded()
        probe = self._probes.pop(reply.probe_id, None) or self._late.pop(reply.probe_id, None)
        if probe is None:
            return
        request_id, number, hashes, start = probe
        asked = self._asked.get(request_id)
        if asked is not None and asked.waiting.get(number) == reply.probe_id:
            del asked.waiting[number]
        group = next(g for g in self._groups if g.group == number)
        end = start
        whole: list[Segment] = []
        for s in reply.segments:
            own = hashes[s.position : s.position + s.take]
            if s.position != end or not 0 < s.take <= s.block_count or len(own) != s.take or len(s.last) != KEY_BYTES:
                break
            if (number, s.last) in self.bad:
                break
            end = s.position + s.take
            if s.block_count == s.take and own[-1][:KEY_BYTES] == s.last:
                # Tails too: what is known to be stored is not stored again.
                whole.append(s)
            if s.block_count != s.take or s.take != group.blocks_per_chunk:
                self.variants.add(number, _blocks_of(s, own), s.last, s.block_count, s.holes)
        self.index.insert([s.last for s in whole], [s.take for s in whole], [s.holes for s in whole], number)
        if not group.window_tokens and start % group.blocks_per_chunk == 0:
            self._learn_prefix(group, hashes, start, whole)
        if asked is not None:
            asked.answered.add((number, end))
        if end < len(hashes) and not group.window_tokens:
            # In a window's group it may have been there, but with the wrong holes for this prompt only.
            self._misses.add(number, hashes[end])

    def _learn_prefix(self, group: GroupView, hashes: Sequence[bytes], start: int, whole: Sequence[Segment]) -> None:
        n = group.blocks_per_chunk
        full = next((i for i, s in enumerate(whole) if s.take != n), len(whole))
        if full >= MILESTONE_CHUNKS and self._milestones.known_chunks(hashes, n, group.group) * n >= start:
            self._milestones.extend(hashes, n, group.group, start // n + full)

    def learn(self, group: int, hashes: Sequence[bytes], holes: int) -> None:
        """A chunk with these blocks has just been stored by this engine."""
        last = hashes[-1]
        self.bad.discard(group, last)
        self._misses.discard(group, hashes[0])
        self.index.insert([last], [len(hashes)], [holes], group)
        self.variants.add(group, hashes, last, len(hashes), holes)

    def forget_chunk(self, group: int, first: bytes, last: bytes, block_count: int) -> None:
        """A chunk could not be loaded: do not advertise it until it is written again."""
        self.bad.add(group, last)
        self.index.remove(last, block_count, group)
        self._milestones.clear()
        self.variants.remove(group, first, last)

    def forget_request(self, request_id: str) -> None:
        """The request is over."""
        asked = self._asked.pop(request_id, None)
        if asked is not None:
            for probe_id in asked.waiting.values():
                self._give_up(probe_id)

    def clear(self) -> None:
        """Forget everything that is known."""
        self.index.clear()
        self._milestones.clear()
        self.variants.clear()
        self.bad.clear()
        self._misses.clear()
        self._probes.clear()
        self._late.clear()
        self._asked.clear()


def _blocks_of(segment: Segment, own: Sequence[bytes]) -> Sequence[bytes]:
    """Chain hashes of a chunk's blocks as far as they are known: the prompt's own, and those behind them."""
    joined = segment.hashes
    if len(joined) != segment.block_count * HASH_BYTES or not joined.startswith(b"".join(own)):
        return own
    return split_hashes(joined)
