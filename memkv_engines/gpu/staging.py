"""Staging for the GPU path: a ring of device slots, and the pinned region of host memory that two processes share.

Order of an end: drain (the mover), deregister the host region, free the slots. Nothing here frees memory that work may
still touch; the mover leaks it on purpose and says so.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from memkv_engines.chunk.layout import align_up
from memkv_engines.errors import GpuError
from memkv_engines.gpu.driver import Driver
from memkv_engines.limits import ALIGN_BYTES, GPU_MAX_SLOTS, LEAF_BYTES, MAX_CHUNK_BYTES

_WORD_BYTES = 16  # an error word, and room that keeps the leaves behind it aligned
_LEAF_DIGEST_BYTES = 8


@dataclass(eq=False)
class DeviceSlot:
    """One slot of device memory with its pinned words.

    Attributes:
        index: in the ring.
        address: device address, a multiple of 4 KiB.
        size_bytes: how much it holds.
        error: address of the u32 that kernels set error bits in.
        leaves: address of pinned room for the leaf digests of a slot's content.
        leaves_bytes: how much room.
    """

    index: int
    address: int
    size_bytes: int
    error: int
    leaves: int
    leaves_bytes: int
    # Tickets whose work touches the slot, and whether its holder has let it go: free when 0 and True.
    pending: int = field(default=0, repr=False)
    released: bool = field(default=True, repr=False)

    def clear_error(self) -> None:
        """Reset the error word; only while no ticket is pending."""
        ctypes.c_uint32.from_address(self.error).value = 0

    def read_error(self) -> int:
        """The error word; final once the ticket's event has completed."""
        return ctypes.c_uint32.from_address(self.error).value

    def read_leaves(self, blocks: int, leaves: int) -> npt.NDArray[np.uint64]:
        """A copy of the digests, ``[blocks, leaves]``."""
        count = blocks * leaves
        return np.ctypeslib.as_array((ctypes.c_uint64 * count).from_address(self.leaves)).reshape(blocks, leaves).copy()


class DeviceRing:
    """A fixed number of equal device slots in one allocation. Not thread-safe: the mover's lock guards it.

    Args:
        driver: with its context current.
        slot_bytes: what a slot must hold: header and payload of a chunk; rounded up to 4 KiB.
        slots: how many.

    Raises:
        GpuError: no device memory, or impossible sizes.
    """

    def __init__(self, driver: Driver, slot_bytes: int, slots: int) -> None:
        if not 1 <= slots <= GPU_MAX_SLOTS:
            raise GpuError(f"slots={slots} must be 1..{GPU_MAX_SLOTS}")
        if not ALIGN_BYTES <= slot_bytes <= MAX_CHUNK_BYTES:
            raise GpuError(f"slot_bytes={slot_bytes} must be {ALIGN_BYTES}..{MAX_CHUNK_BYTES}")
        self._driver = driver
        self.slot_bytes = align_up(slot_bytes)
        # Blocks are at least 4 KiB apart, and each may end in a short leaf.
        leaves_bytes = (self.slot_bytes // LEAF_BYTES + self.slot_bytes // ALIGN_BYTES) * _LEAF_DIGEST_BYTES
        words_bytes = _WORD_BYTES + leaves_bytes
        self._words = driver.alloc_pinned(slots * words_bytes)
        try:
            self._memory = driver.alloc(slots * self.slot_bytes + ALIGN_BYTES)
        except GpuError:
            driver.free_pinned(self._words)
            raise
        base = align_up(self._memory)
        self.slots = [
            DeviceSlot(
                i,
                base + i * self.slot_bytes,
                self.slot_bytes,
                self._words + i * words_bytes,
                self._words + i * words_bytes + _WORD_BYTES,
                leaves_bytes,
            )
            for i in range(slots)
        ]
        self._free = self.slots[::-1]

    @property
    def free_slots(self) -> int:
        """Slots that nobody holds and no work touches."""
        return len(self._free)

    def try_acquire(self) -> DeviceSlot | None:
        """A slot that no work touches any more, or None at once."""
        if not self._free:
            return None
        slot = self._free.pop()
        assert not slot.pending, "a slot in the free list has work pending"
        slot.released = False
        return slot

    def begin(self, slot: DeviceSlot) -> None:
        """A ticket's work will touch the slot."""
        slot.pending += 1

    def end(self, slot: DeviceSlot) -> None:
        """A ticket's work is known to have ended."""
        slot.pending -= 1
        self._free_if_idle(slot)

    def release(self, slot: DeviceSlot) -> None:
        """The holder needs the slot no more; it is reused once no work is pending."""
        if slot.released:
            raise GpuError(f"device slot {slot.index} released twice")
        slot.released = True
        self._free_if_idle(slot)

    @property
    def freed(self) -> bool:
        """Whether all memory was given back."""
        return not (self._memory or self._words)

    def free_memory(self) -> None:
        """Give the device memory back, once; every slot must be free."""
        assert self.free_slots == len(self.slots), "slots are in use"
        if self._memory:
            self._driver.free(self._memory)
            self._memory = 0

    def free_words(self) -> None:
        """Give the pinned words back, once; every slot must be free."""
        if self._words:
            self._driver.free_pinned(self._words)
            self._words = 0

    def _free_if_idle(self, slot: DeviceSlot) -> None:
        if slot.released and not slot.pending:
            self._free.append(slot)


class HostRegion:
    """Host memory of this process (a shared memfd mapping), pinned for the copy engines.

    Args:
        driver: with its context current.
        address: start, a multiple of 4 KiB.
        size_bytes: length; stays mapped until ``close`` has returned.

    Raises:
        GpuError: misaligned, or the driver cannot pin it (the locked-memory limit of a container, mostly).
    """

    def __init__(self, driver: Driver, address: int, size_bytes: int) -> None:
        if address <= 0 or address % ALIGN_BYTES or size_bytes <= 0:
            raise GpuError(f"host region at {address:#x} of {size_bytes} B must start at a multiple of {ALIGN_BYTES}")
        self._driver, self.address, self.size_bytes = driver, address, size_bytes
        driver.register_host(address, size_bytes)

    def holds(self, address: int, size_bytes: int) -> bool:
        """Whether a piece lies inside."""
        return self.address <= address and address + size_bytes <= self.address + self.size_bytes

    def close(self) -> None:
        """Unpin; nothing may be under way."""
        self._driver.unregister_host(self.address)
