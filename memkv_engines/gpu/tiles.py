"""From a ``KVLayout`` to the table of tiles that the kernels read. Pure; planned once per KV pool."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from memkv_engines.chunk.layout import KVLayout
from memkv_engines.errors import LayoutError
from memkv_engines.limits import ALIGN_BYTES, GPU_TILE_BYTES

WIDEST_ACCESS_BYTES = 16

# The ABI of kernels/README.md; a tile is 48 bytes and 16-aligned.
TILE = np.dtype(
    [
        ("base", "<u8"),
        ("block_stride_bytes", "<i8"),
        ("chunk_offset_bytes", "<u8"),
        ("chunk_stride_bytes", "<i8"),
        ("length_bytes", "<u4"),
        ("log2_access", "<u4"),
        ("reserved", "<u8"),
    ]
)
assert TILE.itemsize == 48

Tiles = npt.NDArray[Any]


def plan_tiles(layout: KVLayout, chunk_stride_bytes: int, tile_bytes: int = GPU_TILE_BYTES) -> Tiles:
    """The tile table of a pool: pieces of at most ``tile_bytes``, in payload order.

    Offsets count from where block index 0 lies in the chunk, so one table serves chunks of any header length.

    Args:
        layout: the pool.
        chunk_stride_bytes: ``Geometry.block_stride_bytes``, a multiple of 4 KiB.
        tile_bytes: a multiple of 16.

    Returns:
        Array of shape ``[pieces]``, dtype ``TILE``. ``log2_access`` is the widest access that all addresses of the
        piece allow, in pages and in a chunk that begins at a multiple of 16.

    Raises:
        LayoutError: the stride is shorter than a block or not aligned.
    """
    if chunk_stride_bytes < layout.block_bytes or chunk_stride_bytes % ALIGN_BYTES:
        raise LayoutError(
            f"chunk_stride_bytes={chunk_stride_bytes} must be a multiple of {ALIGN_BYTES} and hold a block of "
            f"{layout.block_bytes} B"
        )
    rows = []
    chunk_offset = 0
    for tile in layout.tiles:
        addresses = tile.base | tile.block_stride_bytes | chunk_offset | chunk_stride_bytes | WIDEST_ACCESS_BYTES
        access = (addresses & -addresses).bit_length() - 1
        for offset in range(0, tile.length_bytes, tile_bytes):
            length = min(tile_bytes, tile.length_bytes - offset)
            rows.append(
                (
                    tile.base + offset,
                    tile.block_stride_bytes,
                    chunk_offset + offset,
                    chunk_stride_bytes,
                    length,
                    access,
                    0,
                )
            )
        chunk_offset += tile.length_bytes
    return np.array(rows, dtype=TILE)


def fit_for_bulk(tiles: Tiles) -> bool:
    """Whether the kernels' bulk variant (sm_90+) can move every tile: addresses and lengths are multiples of 16."""
    return bool((tiles["log2_access"] == 4).all() and (tiles["length_bytes"] % WIDEST_ACCESS_BYTES == 0).all())
