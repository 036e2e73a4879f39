"""Staging memory: allocated once, on transparent huge pages, cut into equal slots."""

from __future__ import annotations

import mmap
import threading
from collections.abc import Callable
from dataclasses import dataclass

from memkv_engines.chunk.layout import align_up
from memkv_engines.errors import TransferOverdue
from memkv_engines.offload.huge_pages import address_of, map_huge

_LOOK_EVERY_S = 0.05


@dataclass(frozen=True)
class Slot:
    """One slot: its memory as a view and as an address."""

    index: int
    view: memoryview
    address: int


class StagingPool:
    """A fixed number of equal slots.

    Huge pages are worth up to half of the device's speed: 4 MiB then reach the driver as 2 segments instead of 1,024.

    Args:
        slot_bytes: bytes a slot must hold; rounded up to 4 KiB.
        slots: how many.

    Attributes:
        address, nbytes: where the slots lie, all together.
    """

    def __init__(self, slot_bytes: int, slots: int) -> None:
        self.slot_bytes = align_up(slot_bytes)
        self.slots = slots
        self._map, start = map_huge(self.slot_bytes * slots)
        base = address_of(self._map)
        self.address, self.nbytes = base + start, self.slot_bytes * slots
        view = memoryview(self._map)
        self._free = [
            Slot(i, view[o : o + self.slot_bytes], base + o)
            for i, o in ((i, start + i * self.slot_bytes) for i in range(slots))
        ]
        self._free.reverse()
        self._withheld: list[tuple[Slot, Callable[[], bool]]] = []
        self._condition = threading.Condition()

    def try_acquire(self) -> Slot | None:
        """A free slot, or None at once. Its content is what the last user left."""
        with self._condition:
            self._take_back()
            return self._free.pop() if self._free else None

    def acquire(self) -> Slot:
        """A free slot; blocks until there is one."""
        with self._condition:
            self._take_back()
            while not self._free:
                self._condition.wait(_LOOK_EVERY_S if self._withheld else None)
                self._take_back()
            return self._free.pop()

    def release(self, slot: Slot, why: BaseException | None = None) -> None:
        """Give a slot back.

        Args:
            slot: the slot.
            why: what its use ended with. After a ``TransferOverdue`` the slot is withheld until the transfer is seen to
                end: the device may still write into it, or read from it.
        """
        with self._condition:
            if isinstance(why, TransferOverdue):
                self._withheld.append((slot, why.ended))
            else:
                self._free.append(slot)
            self._condition.notify()

    def _take_back(self) -> None:
        if self._withheld:
            ended = [(slot, has_ended()) for slot, has_ended in self._withheld]
            self._withheld = [pair for pair, (_, over) in zip(self._withheld, ended, strict=True) if not over]
            self._free += [slot for slot, over in ended if over]

    def touch(self) -> None:
        """Fault all pages in now, so that no load pays for it."""
        view = memoryview(self._map)
        for offset in range(0, len(view), mmap.PAGESIZE):
            view[offset] = 0
