"""From the runs of a hit to what the I/O service is told to load."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from memkv_engines.offload.lookup import Run
from memkv_engines.offload.messages import LoadRun


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
