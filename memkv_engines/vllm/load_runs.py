"""From the runs of a hit to what the I/O service is told to load, and back from a load that failed to the bad chunk."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from memkv_engines.offload.lookup import GroupView, Hit, Run
from memkv_engines.offload.messages import STOPPED, LoadRun


@dataclass(frozen=True)
class BadChunk:
    """A chunk that could not be loaded: hashes of its first and last block, the latter maybe a prefix."""

    group: int
    first: bytes
    last: bytes
    block_count: int
    kind: str
    good_blocks: int


@dataclass(frozen=True)
class LoadPlan:
    """Which chunks a load job reads.

    Attributes:
        request_id: who waits for it.
        messages: one per run, as they are sent.
    """

    request_id: str
    messages: tuple[LoadRun, ...]
    _runs: tuple[tuple[int, Run, int, tuple[bytes, ...]], ...]
    """Per message: group, the run, its first block taken, hashes from the run's position on."""

    def bad_chunks(self, outcomes: Sequence[tuple[int, str]]) -> Iterator[BadChunk]:
        """Chunks with which something is wrong.

        Args:
            outcomes: per run its good leading blocks, and why it ended there; empty: it did not.
        """
        for (group, run, first, hashes), (good, kind) in zip(self._runs, outcomes, strict=True):
            if kind in ("", "io_service", STOPPED):
                continue  # nothing is wrong with the chunk
            chunk = (first + good - run.position) // run.block_count
            start = chunk * run.block_count
            last = run.last or hashes[min(start + run.block_count, len(hashes)) - 1]
            yield BadChunk(group, hashes[start], last, run.block_count, kind, good)


def plan_load(
    request_id: str,
    namespace: bytes,
    hit: Hit,
    views: Sequence[GroupView],
    hashes: Sequence[Sequence[bytes]],
    block_ids: Sequence[Sequence[int]],
    start: int,
    stop: int,
) -> LoadPlan:
    """Plan the load of tokens [start, stop) of a hit.

    Args:
        request_id: who waits for it.
        namespace: digest of the request's namespace.
        hit: what is stored.
        views: the KV groups.
        hashes: the prompt's chain hashes, by group.
        block_ids: pages of the whole prompt, by the engine's number of the group; 0 where a window needs none.
        start, stop: tokens.
    """
    messages: list[LoadRun] = []
    planned: list[tuple[int, Run, int, tuple[bytes, ...]]] = []
    for view, own in zip(views, hashes, strict=True):
        ids = block_ids[view.group]
        low, high = start // view.block_tokens, stop // view.block_tokens
        while low < high and not ids[low]:
            low += 1  # outside the sliding window: no page, nothing to load
        for run in clip(hit.runs.get(view.group, ()), low, high):
            first = max(low, run.position)
            messages.append(load_run(namespace, view.group, run, first, own, ids))
            planned.append((view.group, run, first, tuple(own[run.position : run.position + run.take])))
    return LoadPlan(request_id, tuple(messages), tuple(planned))


def clip(runs: Sequence[Run], low: int, high: int) -> list[Run]:
    """Cut runs to the blocks [low, high); a run that ends inside a chunk is split before it."""
    clipped: list[Run] = []
    for run in runs:
        start, stop = max(low, run.position), min(high, run.position + run.take)
        if start >= stop:
            continue
        n = run.block_count
        if run.chunk_count == 1:
            take = stop - run.position
            clipped.append(Run(run.position, n, 1, run.holes, run.last, take))
            continue
        first = (start - run.position) // n
        full = (stop - run.position) // n
        position = run.position + first * n
        if full > first:
            holes = run.holes if first == 0 else 0
            clipped.append(Run(position, n, full - first, holes, b"", (full - first) * n))
        rest = stop - run.position - full * n
        if rest:
            holes = run.holes if full == 0 else 0
            clipped.append(Run(run.position + full * n, n, 1, holes, b"", rest))
    return clipped


def load_run(
    namespace: bytes, group: int, run: Run, first: int, hashes: Sequence[bytes], block_ids: Sequence[int]
) -> LoadRun:
    """The message for one clipped run; ``first`` is its first block that is wanted."""
    stop = run.position + run.take
    last = run.last
    if not last and run.take < run.block_count * run.chunk_count:
        last = hashes[run.position + run.block_count - 1][:16]  # a full chunk of which only the front is wanted
    return LoadRun(
        namespace,
        group,
        run.block_count,
        run.chunk_count,
        run.holes,
        last,
        first - run.position,
        b"".join(hashes[run.position : stop]),
        np.array(block_ids[first:stop], dtype="<i4").tobytes(),
    )
