"""Engine side: which chunks lie in the memory of I/O services, as those tell, and what of a hit that is.

For predictions, never for identity.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from memkv_engines.limits import KEY_BYTES, MAX_RESIDENTS
from memkv_engines.offload.lookup import GroupView, Hit, Run
from memkv_engines.offload.memory_level import resident_key

Changes = dict[bytes, int]
"""By ``resident_key``: in how many services more a chunk lies now, or less."""


class Residents:
    """Chunks in the memory of one service. Not thread-safe."""

    def __init__(self) -> None:
        self._keys: set[bytes] = set()
        self._changes: Changes = {}

    def __contains__(self, key: object) -> bool:
        return key in self._keys

    def __len__(self) -> int:
        return len(self._keys)

    def take_news(self, came: Iterable[bytes], went: Iterable[bytes]) -> None:
        """What the service told; beyond ``MAX_RESIDENTS`` nothing more is noted."""
        for key in went:
            if key in self._keys:
                self._keys.remove(key)
                self._change(key, -1)
        for key in came:
            if key not in self._keys and len(self._keys) < MAX_RESIDENTS:
                self._keys.add(key)
                self._change(key, 1)

    def clear(self) -> None:
        """The service is gone, and its memory."""
        self.take_news((), tuple(self._keys))

    def take_changes(self) -> Changes:
        """What has changed since this was asked last."""
        changes, self._changes = self._changes, {}
        return {key: change for key, change in changes.items() if change}

    def _change(self, key: bytes, change: int) -> None:
        self._changes[key] = self._changes.get(key, 0) + change


class RankResidents:
    """Chunks in the memory of several ranks' services, each of which has its own shard. Not thread-safe.

    Args:
        ranks: how many.
    """

    def __init__(self, ranks: int) -> None:
        self._ranks = ranks
        self._counts: dict[bytes, int] = {}

    def __contains__(self, key: object) -> bool:
        return isinstance(key, bytes) and self._counts.get(key, 0) >= self._ranks

    def __len__(self) -> int:
        return len(self._counts)

    def take_changes(self, changes: Mapping[bytes, int]) -> None:
        """The sum of all ranks' changes since the last time."""
        for key, change in changes.items():
            count = self._counts.get(key, 0) + change
            if count > 0:
                self._counts[key] = count
            else:
                self._counts.pop(key, None)


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
