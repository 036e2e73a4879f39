"""Where the bytes of a block lie in paged memory: tiles, and the choice of blocks per chunk. Pure.

A *tile* is one contiguous piece inside a page that moves as a unit. A block's payload is the concatenation of its
tiles in the order given. The host plans tiles once per KV pool; transports and kernels only see (address, length).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from memkv_engines.errors import LayoutError
from memkv_engines.limits import (
    ALIGN_BYTES,
    MAX_BLOCK_BYTES,
    MAX_BLOCKS_PER_CHUNK,
    MAX_CHUNK_TARGET_BYTES,
    MIN_CHUNK_TARGET_BYTES,
)


def align_up(value_bytes: int, align_bytes: int = ALIGN_BYTES) -> int:
    """Round up to a multiple of ``align_bytes``."""
    return -(-value_bytes // align_bytes) * align_bytes


@dataclass(frozen=True)
class Tile:
    """One contiguous piece of every block.

    Attributes:
        base: address of the piece of block 0, in bytes.
        block_stride_bytes: distance from block b to block b + 1.
        length_bytes: bytes that move.
        in_arena: the ids of blocks are places in memory that an allocator hands out, ``block_stride_bytes`` apart; it
            keeps blocks that are in use from overlapping, so that the length may exceed the stride.
    """

    base: int
    block_stride_bytes: int
    length_bytes: int
    in_arena: bool = False

    def __post_init__(self) -> None:
        if self.base < 0 or self.length_bytes <= 0:
            raise LayoutError(f"impossible tile: base={self.base} length_bytes={self.length_bytes}")
        if self.block_stride_bytes < (1 if self.in_arena else self.length_bytes):
            raise LayoutError(
                f"tile of {self.length_bytes} B overlaps the next block: block_stride_bytes={self.block_stride_bytes}"
            )


@dataclass(frozen=True)
class KVLayout:
    """The pages of one KV group: how many blocks there are and which tiles make up each.

    Attributes:
        num_blocks: blocks in the pool; valid ids are ``0 <= id < num_blocks``.
        tiles: pieces of a block in payload order; neighbours that are contiguous have been merged.
    """

    num_blocks: int
    tiles: tuple[Tile, ...]

    @classmethod
    def plan(cls, num_blocks: int, tiles: Sequence[Tile]) -> KVLayout:
        """Build a layout; merges tiles that follow each other in memory (block-outermost layouts become one tile).

        Raises:
            LayoutError: no blocks, no tiles, or two tiles of one block overlap.
        """
        if num_blocks <= 0 or not tiles:
            raise LayoutError(f"a layout needs blocks and tiles: num_blocks={num_blocks} tiles={len(tiles)}")
        merged: list[Tile] = []
        for tile in tiles:
            if merged and _follows(merged[-1], tile):
                last = merged[-1]
                merged[-1] = Tile(last.base, last.block_stride_bytes, last.length_bytes + tile.length_bytes)
            else:
                merged.append(tile)
        layout = cls(num_blocks, tuple(merged))
        if layout.block_bytes > MAX_BLOCK_BYTES:
            raise LayoutError(f"a block of {layout.block_bytes} B is larger than the bound of {MAX_BLOCK_BYTES} B")
        _reject_overlap(layout)
        return layout

    @property
    def block_bytes(self) -> int:
        """Payload bytes of one block."""
        return sum(tile.length_bytes for tile in self.tiles)

    def iovecs(self, block_ids: Sequence[int] | npt.NDArray[np.int32]) -> npt.NDArray[np.uint64]:
        """Addresses and lengths of the given blocks, block-major.

        Args:
            block_ids: ids into the pool, repetitions allowed (a gather may read a page twice).

        Returns:
            Array of shape ``[len(block_ids) * len(tiles), 2]``, dtype uint64: (address, length in bytes).

        Raises:
            LayoutError: an id is outside the pool.
        """
        ids = np.asarray(block_ids, dtype=np.int64)
        if ids.size and (int(ids.min()) < 0 or int(ids.max()) >= self.num_blocks):
            raise LayoutError(f"block id outside 0..{self.num_blocks - 1}: {int(ids.min())}..{int(ids.max())}")
        base = np.array([t.base for t in self.tiles], dtype=np.int64)
        stride = np.array([t.block_stride_bytes for t in self.tiles], dtype=np.int64)
        out = np.empty((ids.size, len(self.tiles), 2), dtype=np.uint64)
        out[:, :, 0] = base[None, :] + ids[:, None] * stride[None, :]
        out[:, :, 1] = np.array([t.length_bytes for t in self.tiles], dtype=np.uint64)[None, :]
        return out.reshape(-1, 2)


def _follows(first: Tile, second: Tile) -> bool:
    return (
        first.block_stride_bytes == second.block_stride_bytes
        and not (first.in_arena or second.in_arena)
        and first.base + first.length_bytes == second.base
        and first.length_bytes + second.length_bytes <= first.block_stride_bytes
    )


def _reject_overlap(layout: KVLayout) -> None:
    tiles = sorted(layout.tiles, key=lambda tile: tile.base)
    for position, first in enumerate(tiles):
        end = first.base + (layout.num_blocks - 1) * first.block_stride_bytes + first.length_bytes
        for second in tiles[position + 1 :]:
            if second.base >= end:
                break
            if _overlap(first, second, layout.num_blocks):
                raise LayoutError(f"tiles overlap: {first} and {second} in a pool of {layout.num_blocks} blocks")


def _overlap(first: Tile, second: Tile, num_blocks: int) -> bool:
    """Whether any block's piece of ``first`` shares a byte with any block's piece of ``second``."""
    # With equal strides only the difference of the block ids counts, so the first and the last block of one side stand
    # for all; else every block of `first` is compared with the two blocks of `second` that begin nearest to it.
    stride = second.block_stride_bytes
    last = num_blocks - 1
    ids = np.array([0, last]) if first.block_stride_bytes == stride else np.arange(num_blocks, dtype=np.int64)
    starts = first.base - second.base + ids * first.block_stride_bytes
    for nearest in (starts // stride, starts // stride + 1):
        distance = np.clip(nearest, 0, last) * stride - starts
        if bool(((distance < first.length_bytes) & (-distance < second.length_bytes)).any()):
            return True
    return False


def choose_blocks_per_chunk(block_bytes: int, target_bytes: int) -> int:
    """Number of whole blocks whose chunk comes nearest to the target, inside 2-16 MiB.

    A block larger than 16 MiB is a chunk of its own; if no multiple lies inside the range the nearest below
    16 MiB is taken.

    Args:
        block_bytes: payload bytes of one block of this shard (before padding to the block stride).
        target_bytes: wanted payload of a chunk, 2-16 MiB.

    Returns:
        At least 1.
    """
    if block_bytes <= 0:
        raise LayoutError(f"block_bytes={block_bytes} must be positive")
    stride = align_up(block_bytes)
    most = max(1, MAX_CHUNK_TARGET_BYTES // stride)
    least = min(most, -(-MIN_CHUNK_TARGET_BYTES // stride))
    below = max(1, target_bytes // stride)
    nearest = below if target_bytes - below * stride <= (below + 1) * stride - target_bytes else below + 1
    return min(max(nearest, least), most, MAX_BLOCKS_PER_CHUNK)
