"""The tests' own planner: from pieces to the table of tiles that the kernels take."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from tests.kernels.abi import TILE, address
from tests.kernels.layouts import Paged, Placement

TILE_BYTES = 4096


def log2_access(*values: int) -> int:
    """The widest access, at most 16 bytes, that all these addresses, offsets and strides allow."""
    width = 16
    while any(value % width for value in values):
        width //= 2
    return width.bit_length() - 1


def plan_tiles(
    paged: Paged, placement: Placement, count: int, chunk: int, tile_bytes: int = TILE_BYTES
) -> npt.NDArray[Any]:
    """Tiles of a pool for chunks of `count` blocks at a multiple of what the address `chunk` is a multiple of."""
    rows = []
    for number, piece in enumerate(paged.pieces):
        cache = paged.caches[piece.cache]
        base, stride = address(cache) + piece.offset, int(cache.strides[0])
        at = placement.offset(paged, number, 0, count)
        chunk_stride = placement.block_stride_bytes or piece.length
        for start in range(0, piece.length, tile_bytes):
            length = min(tile_bytes, piece.length - start)
            access = log2_access(base + start, stride, at + start, chunk_stride, chunk)
            rows.append((base + start, stride, at + start, chunk_stride, length, access, 0))
    return np.array(rows, dtype=TILE)
