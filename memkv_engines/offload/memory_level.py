"""The level of memory before the tier: chunks that were stored or loaded last, each in a slot of its own.

A chunk gets here without a copy: the slot it was staged in stays with it, and another one goes back to staging in its
place. It is kept as it is stored, header and payload, and verified at every load like one that was read.

The tier holds every chunk that is here (``memory_keeper`` sees to that), so that nothing is lost with this memory, and
look-ups need not know of it. What is told about it (``take_changes``) is for predictions.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from math import inf

from memkv_engines.keys import ChunkName
from memkv_engines.limits import NOTE_USE_EVERY_S
from memkv_engines.offload.staging import Slot


def resident_key(group: int, last: bytes) -> bytes:
    """What a chunk is called in news of what lies in memory: good enough for predictions, not for identity."""
    return group.to_bytes(2, "little") + last


@dataclass(eq=False)
class Held:
    """A chunk in memory.

    Attributes:
        folder, name: of the chunk.
        slot: holds the object from its start on.
        object_bytes: how long the object is.
    """

    folder: str
    name: ChunkName
    slot: Slot
    object_bytes: int
    pins: int = field(default=0, repr=False)
    noted_at: float = field(default=-inf, repr=False)


class MemoryLevel:
    """Chunks by name, the least recently used of them go first. Thread-safe; nothing blocks.

    It begins without slots; ``add`` brings them.

    Args:
        note_use: called, with no lock held, with a chunk whose use the tier has not been told of for a while.
        clock: monotonic seconds.
    """

    def __init__(self, note_use: Callable[[str, ChunkName], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._note_use, self._clock = note_use, clock
        self._free: list[Slot] = []
        self._held: OrderedDict[tuple[str, ChunkName], Held] = OrderedDict()
        self._changes: dict[bytes, bool] = {}
        self._lock = threading.Lock()

    def add(self, slot: Slot) -> None:
        """One slot more to keep chunks in."""
        with self._lock:
            self._free.append(slot)

    def __len__(self) -> int:
        return len(self._held)

    def pin(self, folder: str, name: ChunkName) -> Held | None:
        """A chunk that stays where it is until ``unpin``; None if it is not here."""
        now = self._clock()
        with self._lock:
            held = self._held.get((folder, name))
            if held is None:
                return None
            self._held.move_to_end((folder, name))
            held.pins += 1
            notes = now >= held.noted_at + NOTE_USE_EVERY_S
            if notes:
                held.noted_at = now
        if notes:
            self._note_use(folder, name)
        return held

    def unpin(self, held: Held) -> None:
        """It is not read any more; once for each ``pin``."""
        with self._lock:
            held.pins -= 1
            if not held.pins and self._held.get((held.folder, held.name)) is not held:
                self._free.append(held.slot)

    def swap(self, folder: str, name: ChunkName, slot: Slot, object_bytes: int, *, used: bool) -> Slot:
        """Keep a chunk that the tier holds, in the slot it was staged in.

        Args:
            folder: of the chunk.
            name: of the chunk.
            slot: holds the object as it is stored; from now on ours, unless it is what is returned.
            object_bytes: how long the object is.
            used: the tier knows of a use of it, just now.

        Returns:
            The slot to go on with: another one, or the same where there is no room or the chunk is here already.
        """
        with self._lock:
            known = self._held.get((folder, name))
            if known is not None:
                if known.pins:
                    return slot
                self._forget(known)
            other = self._free.pop() if self._free else self._evict()
            if other is None:
                return slot
            self._held[folder, name] = Held(folder, name, slot, object_bytes, noted_at=self._clock() if used else -inf)
            self._changes[resident_key(name.group, name.last)] = True
            return other

    def drop(self, folder: str, name: ChunkName) -> None:
        """Forget a chunk, if it is here; who has pinned it may go on."""
        with self._lock:
            held = self._held.get((folder, name))
            if held is not None:
                self._forget(held)

    def take_changes(self) -> tuple[tuple[bytes, ...], tuple[bytes, ...]]:
        """Keys of the chunks that have come, and of those that have gone, since this was asked last."""
        with self._lock:
            changes, self._changes = self._changes, {}
        return tuple(k for k, here in changes.items() if here), tuple(k for k, here in changes.items() if not here)

    # --- inside, with the lock held ----------------------------------------------

    def _evict(self) -> Slot | None:
        held = next((h for h in self._held.values() if not h.pins), None)
        if held is None:
            return None
        self._forget(held)
        return self._free.pop()

    def _forget(self, held: Held) -> None:
        del self._held[held.folder, held.name]
        self._changes[resident_key(held.name.group, held.name.last)] = False
        if not held.pins:
            self._free.append(held.slot)
