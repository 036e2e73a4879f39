"""Device slots of the GPUDirect path: shares for loads and stores, room for headers, and slots that are withheld.

Every slot has a piece of host memory for the header of its chunk: header and payload lie apart, and a transfer that is
overdue keeps both.
"""

from __future__ import annotations

import mmap
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from memkv_engines.chunk.codec import Geometry
from memkv_engines.errors import ConfigError, GpuError, MemKVError, TransferOverdue
from memkv_engines.limits import ALIGN_BYTES, GDS_TASK_BYTES, MAX_BLOCKS_PER_CHUNK, MIN_STAGING_SLOTS
from memkv_engines.offload.moving import DeviceSlot, SlotMover
from memkv_engines.tier.directory import DirectoryTier
from memkv_engines.tier.striped import StripedTier
from memkv_engines.transports.base import DeviceView

_HEADER_BYTES = Geometry(MAX_BLOCKS_PER_CHUNK, 1, 1).header_bytes


@dataclass(frozen=True, eq=False)
class DirectSlot:
    """A device slot for blocks, and host memory for a header.

    Attributes:
        device: the mover's slot; blocks lie from its start on.
        header: room for the largest header, at a multiple of 4 KiB.
        ordinal: of the device.
        for_loads: whose share it is of.
    """

    device: DeviceSlot
    header: memoryview
    ordinal: int
    for_loads: bool

    def blocks(self, size_bytes: int) -> DeviceView:
        """Its first bytes, as transports take them."""
        return DeviceView(self.device.address, size_bytes, self.ordinal)


class DeviceSlots:
    """Hands out the mover's slots. Thread-safe; no call waits.

    Args:
        mover: whose slots, all of which are free.
        slots: how many it has.
        for_loads: the share of loads; stores have the rest.
        device: ordinal of the CUDA device.

    Raises:
        ConfigError: too few slots.
    """

    def __init__(self, mover: SlotMover, slots: int, for_loads: int, device: int = 0) -> None:
        if slots - for_loads < MIN_STAGING_SLOTS:
            raise ConfigError(f"{slots} device slots are too few for io_threads={for_loads}: give fewer threads")
        self._mover, self._device, self._slots = mover, device, slots
        self._left = {True: for_loads, False: slots - for_loads}
        self._map = mmap.mmap(-1, slots * _HEADER_BYTES)
        view = memoryview(self._map)
        self._rooms = [view[i * _HEADER_BYTES : (i + 1) * _HEADER_BYTES] for i in range(slots)]
        self._withheld: list[tuple[DirectSlot, Callable[[], bool]]] = []
        self._lock = threading.Lock()
        self._registered: int | None = None

    def prepare(self, tier: DirectoryTier | StripedTier) -> None:
        """Register the device memory with the tier's transport, and let it prove there that it moves such memory.

        Raises:
            ConfigError: it does not.
        """
        taken = [slot for slot in (self._mover.acquire_slot() for _ in range(self._slots)) if slot is not None]
        try:
            if len(taken) < MIN_STAGING_SLOTS:
                raise GpuError("no device slots")
            start = min(slot.address for slot in taken)
            stop = max(slot.address + slot.size_bytes for slot in taken)
            tier.register_memory(start, stop - start, device=self._device)
            self._registered = start
            piece = min(taken[0].size_bytes, taken[1].size_bytes, GDS_TASK_BYTES) // ALIGN_BYTES * ALIGN_BYTES
            tier.prove([DeviceView(slot.address, piece, self._device) for slot in taken[:2]])
        except (MemKVError, OSError) as error:
            raise ConfigError(
                f"{tier.name} does not move device memory here: {error}. Set staging_medium=host"
            ) from error
        finally:
            for slot in taken:
                self._mover.release_slot(slot)

    def leave(self, tier: DirectoryTier | StripedTier) -> None:
        """Take the device memory back from the tier's transport, so that it may be freed. No slot may be in use.

        Raises:
            TransportError: it is not given back.
        """
        start, self._registered = self._registered, None
        if start is not None:
            tier.deregister_memory(start)

    @property
    def is_prepared(self) -> bool:
        """Whether the transport knows the memory."""
        return self._registered is not None

    @property
    def all_free(self) -> bool:
        """Whether no slot is in use or withheld."""
        return sum(self.left) == self._slots

    def try_acquire(self, *, for_loads: bool) -> DirectSlot | None:
        """A slot that neither device nor transport touches, or None at once. Its content is what the last user left.

        Raises:
            GpuError: the mover has none to give any more.
        """
        with self._lock:
            self._take_back()
            if not self._left[for_loads]:
                return None
            slot = self._mover.acquire_slot()
            if slot is None:
                return None
            self._left[for_loads] -= 1
            return DirectSlot(slot, self._rooms.pop(), self._device, for_loads)

    def release(self, slot: DirectSlot, why: BaseException | None = None) -> None:
        """Give a slot back.

        Args:
            slot: the slot; work of the device on it may still be under way, the mover waits for that.
            why: what its use ended with. After a ``TransferOverdue`` it is withheld until the transfer has ended.
        """
        with self._lock:
            if isinstance(why, TransferOverdue):
                self._withheld.append((slot, why.ended))
            else:
                self._give_back(slot)

    @property
    def withheld(self) -> Sequence[DirectSlot]:
        """Slots that an overdue transfer may still touch."""
        with self._lock:
            self._take_back()
            return [slot for slot, _ in self._withheld]

    @property
    def left(self) -> tuple[int, int]:
        """Slots that loads and stores may still take."""
        with self._lock:
            self._take_back()
            return self._left[True], self._left[False]

    def _take_back(self) -> None:
        if self._withheld:
            asked = [(slot, ended, ended()) for slot, ended in self._withheld]
            self._withheld = [(slot, ended) for slot, ended, over in asked if not over]
            for slot, _, over in asked:
                if over:
                    self._give_back(slot)

    def _give_back(self, slot: DirectSlot) -> None:
        self._rooms.append(slot.header)
        self._left[slot.for_loads] += 1
        try:
            self._mover.release_slot(slot.device)
        except GpuError:
            self._left[slot.for_loads] -= 1  # A mover that is broken or closed: none comes back.
