"""Engine side: which chunks lie in the memory of I/O services, as those tell. For predictions, never for identity."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from memkv_engines.limits import MAX_RESIDENTS

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
