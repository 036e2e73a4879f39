"""Gather and scatter in NumPy: the oracle for the kernels, and the path for pages that this process has mapped."""

from __future__ import annotations

import ctypes

import numpy as np
import numpy.typing as npt

from memkv_engines.chunk.layout import KVLayout, Tile

Bytes = npt.NDArray[np.uint8]


def gather(layout: KVLayout, block_ids: npt.ArrayLike, payload: Bytes, stride_bytes: int, first_index: int = 0) -> None:
    """Copy blocks out of host-addressable pages.

    Args:
        layout: the pages; its addresses must be valid in this process.
        block_ids: one id per block, repetitions allowed.
        payload: writable, contiguous uint8; block i goes to ``(first_index + i) * stride_bytes``.
        stride_bytes: distance of blocks in the payload.
        first_index: index of the first block. Bytes between and before blocks are left alone.
    """
    _move(layout, block_ids, payload, stride_bytes, first_index, to_payload=True)


def scatter(
    layout: KVLayout, block_ids: npt.ArrayLike, payload: Bytes, stride_bytes: int, first_index: int = 0
) -> None:
    """Copy blocks into host-addressable pages; arguments as for ``gather``, ids must be distinct."""
    _move(layout, block_ids, payload, stride_bytes, first_index, to_payload=False)


def _move(
    layout: KVLayout, block_ids: npt.ArrayLike, payload: Bytes, stride_bytes: int, first_index: int, *, to_payload: bool
) -> None:
    ids = np.asarray(block_ids, dtype=np.int64)
    rows = payload[first_index * stride_bytes : (first_index + ids.size) * stride_bytes].reshape(ids.size, stride_bytes)
    offset = 0
    for tile in layout.tiles:
        pages = _pages(tile, layout.num_blocks)
        part = rows[:, offset : offset + tile.length_bytes]
        if to_payload:
            part[:] = pages[ids]
        else:
            pages[ids] = part
        offset += tile.length_bytes


def _pages(tile: Tile, num_blocks: int) -> Bytes:
    """One tile of all blocks, ``[num_blocks, length_bytes]``, over the memory itself."""
    span = (num_blocks - 1) * tile.block_stride_bytes + tile.length_bytes
    flat = np.ctypeslib.as_array((ctypes.c_uint8 * span).from_address(tile.base))
    return np.lib.stride_tricks.as_strided(
        flat, (num_blocks, tile.length_bytes), (tile.block_stride_bytes, 1), writeable=True
    )
