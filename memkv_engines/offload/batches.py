"""Batches of consecutive blocks for doors whose chunks start at any block: how to cut, what is missing, what to load.

Back of the envelope (pages of 1.4 MiB, 3 a chunk, a node of 97 pages): 33 chunks instead of 97 objects, all but the
last of full size; the last takes what would otherwise be an object below 2 MiB.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from memkv_engines.chunk.layout import align_up
from memkv_engines.limits import MIN_CHUNK_TARGET_BYTES
from memkv_engines.offload.messages import LoadRun, Segment, StoreChunk


def largest_chunk_blocks(blocks_per_chunk: int, block_bytes: int) -> int:
    """Blocks of the largest chunk that ``chunk_sizes`` makes: a full one and a remainder below 2 MiB."""
    return blocks_per_chunk + max(0, -(-MIN_CHUNK_TARGET_BYTES // align_up(block_bytes)) - 1)


def chunk_sizes(blocks: int, blocks_per_chunk: int, block_bytes: int) -> list[int]:
    """Cut a run of consecutive blocks into chunks.

    All are full but the last. A remainder below 2 MiB joins the full chunk before it, so that a block never becomes a
    small object of its own while it has neighbours; only a run that is smaller as a whole makes a small object.

    Args:
        blocks: blocks in the run.
        blocks_per_chunk: blocks of a full chunk.
        block_bytes: payload of a block.
    """
    full, rest = divmod(blocks, blocks_per_chunk)
    sizes = [blocks_per_chunk] * full
    if rest and full and rest * align_up(block_bytes) < MIN_CHUNK_TARGET_BYTES:
        sizes[-1] += rest
    elif rest:
        sizes.append(rest)
    return sizes


def covered(segments: Sequence[Segment], first: int, stop: int) -> list[bool]:
    """Which of the blocks [first, stop) are stored, by the segments of a probe."""
    present = [False] * (stop - first)
    for segment in segments:
        for block in range(max(segment.position, first), min(segment.position + segment.take, stop)):
            present[block - first] = True
    return present


def missing_runs(present: Sequence[bool]) -> list[tuple[int, int]]:
    """Maximal runs [start, stop) of blocks that are not stored."""
    runs: list[tuple[int, int]] = []
    for block, stored in enumerate(present):
        if stored:
            continue
        if runs and runs[-1][1] == block:
            runs[-1] = (runs[-1][0], block + 1)
        else:
            runs.append((block, block + 1))
    return runs


def store_chunks(
    namespace: bytes,
    group: int,
    hashes: Sequence[bytes],
    pages: Sequence[int],
    runs: Sequence[tuple[int, int]],
    first_position: int,
    sizes: tuple[int, int],
) -> list[tuple[int, StoreChunk]]:
    """The chunks for some runs of a batch.

    Args:
        namespace: its digest.
        group: the KV group.
        hashes: chain hashes of the batch's blocks.
        pages: their pages.
        runs: what to store, as ``missing_runs`` gives it.
        first_position: index of the batch's first block in its prefix.
        sizes: blocks of a full chunk and payload bytes of a block.

    Returns:
        Pairs of the index of a chunk's first block in the batch and the chunk.
    """
    chunks = []
    for start, stop in runs:
        for size in chunk_sizes(stop - start, *sizes):
            own = b"".join(hashes[start : start + size])
            ids = tuple(pages[start : start + size])
            chunks.append((start, StoreChunk(namespace, group, first_position + start, 0, own, ids)))
            start += size
    return chunks


def load_runs(
    namespace: bytes,
    group: int,
    hashes: Sequence[bytes],
    wanted: int,
    segments: Sequence[Segment],
    pages: Sequence[int],
) -> list[tuple[int, LoadRun]]:
    """What to load for the blocks from ``wanted`` on, without gaps.

    Args:
        namespace: its digest.
        group: the KV group.
        hashes: chain hashes from before the wanted blocks (chunks may begin there) up to the last one wanted.
        wanted: index of the first block wanted.
        segments: what a probe of these hashes found.
        pages: the page of each wanted block.

    Returns:
        Pairs of the index, among the wanted blocks, of the first block a run brings, and the run.
    """
    runs = []
    at = wanted
    for segment in segments:
        stop = min(segment.position + segment.take, wanted + len(pages))
        if not segment.position <= at < stop:
            continue
        ids = np.asarray(pages[at - wanted : stop - wanted], dtype="<i4").tobytes()
        own = b"".join(hashes[segment.position : stop])
        take_first = at - segment.position
        runs.append(
            (at - wanted, LoadRun(namespace, group, segment.block_count, 1, 0, segment.last, take_first, own, ids))
        )
        at = stop
    return runs
