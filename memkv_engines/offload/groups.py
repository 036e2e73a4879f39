"""A KV group as the I/O service sees it: geometry, layout and the staging it needs."""

from __future__ import annotations

from dataclasses import dataclass

from memkv_engines.chunk.codec import Geometry
from memkv_engines.chunk.layout import KVLayout, Tile, align_up
from memkv_engines.errors import LayoutError
from memkv_engines.keys import Shard
from memkv_engines.limits import MAX_BLOCKS_PER_CHUNK
from memkv_engines.offload.messages import GroupSpec


@dataclass(frozen=True)
class Group:
    """Geometry of one KV group in one worker."""

    group: int
    shard: Shard
    block_tokens: int
    block_bytes: int
    blocks_per_chunk: int
    layout: KVLayout

    @classmethod
    def from_spec(cls, spec: GroupSpec) -> Group:
        """Build and check.

        Raises:
            LayoutError: tiles do not add up to the block.
        """
        tiles = [Tile(t.base, t.block_stride_bytes, t.length_bytes, t.in_arena) for t in spec.tiles]
        layout = KVLayout.plan(spec.num_blocks, tiles)
        if layout.block_bytes != spec.block_bytes:
            raise LayoutError(f"tiles hold {layout.block_bytes} B, the block {spec.block_bytes} B")
        return cls(spec.group, Shard(*spec.shard), spec.block_tokens, spec.block_bytes, spec.blocks_per_chunk, layout)

    @property
    def slot_bytes(self) -> int:
        """Staging for one load or store of up to ``blocks_per_chunk`` blocks out of a chunk of any length."""
        largest_header = Geometry(MAX_BLOCKS_PER_CHUNK, 1, self.block_tokens).header_bytes
        return largest_header + self.blocks_per_chunk * align_up(self.block_bytes)
