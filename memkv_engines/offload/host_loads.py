"""One chunk through host memory into pages of the host: staged and read, or where it lies in the level of memory."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from memkv_engines.chunk.codec import ChunkHeader, kind_of_bad_block, verify_blocks
from memkv_engines.chunk.protection import Protection
from memkv_engines.errors import ChunkForeign, ChunkTruncated
from memkv_engines.offload.groups import Group
from memkv_engines.offload.loading import ChunkLoad, LoadChunk, Staging
from memkv_engines.offload.memory_level import Held, MemoryLevel
from memkv_engines.offload.pages import Pages
from memkv_engines.offload.staging import Slot
from memkv_engines.tier.base import ChunkReader, Tier
from memkv_engines.transports.base import View
from memkv_engines.transports.files import address_of


class HostLoad(ChunkLoad):
    """Loads one chunk through host memory: its header, and behind it the blocks.

    Args:
        chunk, group, tier, protection: as for ``ChunkLoad``.
        pages: where to.
        slot: staging memory; encrypted blocks are decrypted in it.
        memory: where a chunk may lie already, and stays.
    """

    def __init__(
        self,
        chunk: LoadChunk,
        group: Group,
        tier: Tier,
        pages: Pages,
        slot: Slot,
        protection: Protection | None = None,
        memory: MemoryLevel | None = None,
    ) -> None:
        super().__init__(chunk, group, tier, slot, protection)
        self._pages, self._view, self._address = pages, slot.view, slot.address
        self._memory = memory

    def give_back(self, staging: Staging, failure: BaseException | None = None) -> None:
        slot = self.slot
        if self._memory is not None and failure is None and self._is_whole and not self._is_from_memory:
            slot = self._memory.swap(self.folder, self.name, slot, self._geometry.object_bytes, used=True)
        staging.release(slot, failure)

    @property
    def _is_whole(self) -> bool:
        """Whether the slot holds the object from its start to its end, every block verified, and as it is stored."""
        g = self._geometry
        is_decrypted = self._protection is not None and self._protection.encrypt
        return self._good == g.block_count and g.object_bytes <= self._view.nbytes and not is_decrypted

    def forget(self) -> None:
        if self._memory is not None:
            self._memory.drop(self.folder, self.name)

    def _open(self) -> ChunkReader:
        # What is encrypted is decrypted where it lies: out of memory it is copied first.
        held = self._memory.pin(self.folder, self.name) if self._memory is not None else None
        if held is None or self._memory is None:
            return super()._open()
        self._is_from_memory = True
        return _HeldReader(held, self._memory)

    def _room_bytes(self) -> int:
        return self._view.nbytes - self._geometry.header_bytes

    def _header_view(self) -> memoryview:
        return self._view[: self._geometry.header_bytes]

    def _views(self, blocks: int, *, header: bool) -> list[View]:
        g = self._geometry
        start = 0 if header else g.header_bytes
        return [self._view[start : g.header_bytes + blocks * g.block_stride_bytes]]

    def _first_bad(self, header: ChunkHeader, first: int, stop: int) -> int | None:
        return verify_blocks(header, first, stop, self._payload(stop - first))

    def _kind_of_bad(self, header: ChunkHeader, bad: int, first: int) -> str:
        return kind_of_bad_block(header, bad, first, self._payload(bad + 1 - first))

    def _payload(self, blocks: int) -> memoryview:
        start = self._payload_offset
        return self._view[start : start + blocks * self._geometry.block_stride_bytes]

    @property
    def _payload_offset(self) -> int:
        """Where in the slot the piece begins."""
        return self._geometry.header_bytes

    def _scatter(self, block_ids: npt.NDArray[np.int32]) -> None:
        g, layout = self._geometry, self._group.layout
        address = self._address + self._payload_offset
        self._pages.scatter(layout.iovecs(block_ids), len(layout.tiles), address, g.block_bytes, g.block_stride_bytes)


class ResidentLoad(HostLoad):
    """Loads one chunk that lies in memory as it is stored: nothing is read or staged.

    Args:
        chunk, group, tier, protection: as for ``ChunkLoad``; encrypted chunks cannot be loaded so.
        pages: where to.
        memory: where the chunk lies.
        held: the chunk, pinned there; unpinned by ``give_back``.
    """

    def __init__(
        self,
        chunk: LoadChunk,
        group: Group,
        tier: Tier,
        pages: Pages,
        memory: MemoryLevel,
        held: Held,
        protection: Protection | None = None,
    ) -> None:
        assert protection is None or not protection.encrypt, "it would be decrypted where it lies"
        super().__init__(chunk, group, tier, pages, held.slot, protection, memory)
        self._level, self._held = memory, held

    def read(self) -> None:
        g = self._geometry
        if self._held.object_bytes != g.object_bytes:
            self._kind = ChunkForeign.kind
            return
        self._piece_stop = self._stop
        self._memory_bytes = self._take * g.block_stride_bytes + g.header_bytes

    @property
    def is_resident(self) -> bool:
        return True

    def give_back(self, staging: Staging, failure: BaseException | None = None) -> None:
        self._level.unpin(self._held)

    @property
    def _payload_offset(self) -> int:
        return self._geometry.block_offset(self._piece_first)


class _HeldReader(ChunkReader):
    """A chunk in memory as if it were in the tier."""

    def __init__(self, held: Held, memory: MemoryLevel) -> None:
        self._held: Held | None = held
        self._memory, self.object_bytes = memory, held.object_bytes

    def read(self, views: Sequence[View], offset: int) -> None:
        assert self._held is not None, "read after close"
        if offset + sum(view.nbytes for view in views) > self.object_bytes:
            raise ChunkTruncated(f"the object has {self.object_bytes} B")
        source = self._held.slot.address + offset
        for view in views:
            assert isinstance(view, memoryview)
            # Not by a slice: that would keep the interpreter for the time of the copy.
            ctypes.memmove(address_of(view), source, view.nbytes)
            source += view.nbytes

    def close(self) -> None:
        held, self._held = self._held, None
        if held is not None:
            self._memory.unpin(held)
