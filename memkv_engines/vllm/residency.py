"""What of a hit lies in the workers' memory, by what they have told."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from memkv_engines.limits import KEY_BYTES
from memkv_engines.offload.lookup import GroupView, Hit, Run
from memkv_engines.offload.memory_level import resident_key


@dataclass(frozen=True)
class MemoryShare:
    """What of a hit lies in memory.

    Attributes:
        leading_tokens: from the hit's start on, without a gap, in every group.
        blocks: how many blocks in all, by group.
    """

    leading_tokens: int = 0
    blocks: Mapping[int, int] = field(default_factory=dict)


NOTHING = MemoryShare()


def memory_share(
    hit: Hit, start: int, views: Sequence[GroupView], hashes: Sequence[Sequence[bytes]], residents: Container[bytes]
) -> MemoryShare:
    """Look every chunk of a hit up: a set's look-up for each.

    Args:
        hit: what is stored of the prompt.
        start: tokens that the engine has itself.
        views: the KV groups.
        hashes: the prompt's chain hashes, by group.
        residents: keys of the chunks that lie in memory on every rank.
    """
    blocks: dict[int, int] = {}
    leading, windows_there = hit.tokens, True
    for view, own in zip(views, hashes, strict=True):
        low, high = start // view.block_tokens, hit.tokens // view.block_tokens
        if view.window_tokens:
            low = max(low, (hit.tokens - view.window_tokens + 1) // view.block_tokens)
        reached, count = low, 0
        for first, stop, last in _chunks(hit.runs.get(view.group, ()), own):
            begin, end = max(low, first), min(high, stop)
            if begin < end and resident_key(view.group, last) in residents:
                count += end - begin
                reached = end if begin <= reached else reached
        blocks[view.group] = count
        if view.window_tokens:
            windows_there = windows_there and count >= high - low
        else:
            leading = min(leading, reached * view.block_tokens)
    if not windows_there or (leading < hit.tokens and any(view.window_tokens for view in views)):
        leading = start  # a part of the hit would need another window
    return MemoryShare(max(0, leading - start), blocks)


def _chunks(runs: Sequence[Run], hashes: Sequence[bytes]) -> Iterator[tuple[int, int, bytes]]:
    """First block, one past the last block that is the prompt's, and name of every chunk."""
    for run in runs:
        for first in range(run.position, run.position + run.take, run.block_count):
            stop = min(first + run.block_count, run.position + run.take)
            yield first, stop, run.last or hashes[first + run.block_count - 1][:KEY_BYTES]
