"""Host staging for a KV cache in device memory: slots that the device copies to and from, and the I/O service reads.

To the I/O service the slots of a group are its paged memory: a slot is a row of blocks, side by side, and a block's
number is its place in the region.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from memkv_engines.chunk.layout import align_up
from memkv_engines.errors import ConfigError
from memkv_engines.limits import MIN_STAGING_SLOTS
from memkv_engines.offload.huge_pages import address_of, map_huge
from memkv_engines.offload.messages import GroupSpec, TileSpec


@dataclass(frozen=True)
class PinnedSlot:
    """Room for the blocks of one chunk.

    Attributes:
        group: the KV group it is for.
        address: of its first block.
        first_block: number of that block to the I/O service.
        blocks: how many blocks it holds.
        for_loads: whose share it is of.
    """

    group: int
    address: int
    first_block: int
    blocks: int
    for_loads: bool

    def numbers(self, count: int) -> range:
        """The numbers of its first blocks to the I/O service."""
        return range(self.first_block, self.first_block + count)


class PinnedStaging:
    """A region of host memory, cut into slots for each group; a part of them for loads, the rest for stores.

    Not thread-safe. The region is mapped here and pinned by whoever moves; it lives until ``close``.

    Args:
        groups: the KV groups, with their tiles in device memory.
        staging_bytes: about how large it may be.

    Raises:
        ConfigError: too small for two chunks of each group each way.
    """

    def __init__(self, groups: Sequence[GroupSpec], staging_bytes: int) -> None:
        strides = {g.group: align_up(g.block_bytes) for g in groups}
        row_bytes = {g.group: g.blocks_per_chunk * strides[g.group] for g in groups}
        slots = staging_bytes // sum(row_bytes.values())
        if slots < 2 * MIN_STAGING_SLOTS:
            need = 2 * MIN_STAGING_SLOTS * sum(row_bytes.values())
            raise ConfigError(f"key 'staging_bytes' has value {staging_bytes}: this model needs at least {need}")
        self.size_bytes = slots * sum(row_bytes.values())
        self._map, start = map_huge(self.size_bytes)
        self.address = address_of(self._map) + start
        self.specs: tuple[GroupSpec, ...] = ()
        self._free: dict[tuple[int, bool], list[PinnedSlot]] = {}
        self._counts: dict[int, int] = {}
        base = self.address
        for group in groups:
            self._cut(group, base, strides[group.group], slots)
            base += slots * row_bytes[group.group]

    def _cut(self, group: GroupSpec, base: int, stride_bytes: int, slots: int) -> None:
        per_slot = group.blocks_per_chunk
        for index in range(slots):
            first = index * per_slot
            slot = PinnedSlot(group.group, base + first * stride_bytes, first, per_slot, for_loads=index % 2 == 0)
            self._free.setdefault((group.group, slot.for_loads), []).append(slot)
        self._counts[group.group] = slots
        tile = TileSpec(base, stride_bytes, group.block_bytes)
        self.specs += (msgspec.structs.replace(group, num_blocks=slots * per_slot, tiles=(tile,)),)

    def blocks_per_slot(self, group: int) -> int:
        """How many blocks of a group a slot holds; 0 for a group that is not known."""
        return next((spec.blocks_per_chunk for spec in self.specs if spec.group == group), 0)

    def slots(self, group: int, *, for_loads: bool) -> int:
        """How many slots there are, free or not."""
        return (self._counts.get(group, 0) + for_loads) // 2

    def free(self, group: int, *, for_loads: bool) -> int:
        """How many slots are free."""
        return len(self._free[group, for_loads])

    def take(self, group: int, *, for_loads: bool) -> PinnedSlot | None:
        """A free slot, or None. Its content is what the last user left."""
        free = self._free[group, for_loads]
        return free.pop() if free else None

    def give_back(self, slot: PinnedSlot) -> None:
        """Neither device nor I/O service touches it any more."""
        self._free[slot.group, slot.for_loads].append(slot)
