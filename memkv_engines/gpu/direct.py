"""Copies straight between pages and a host slot, for pieces that are long enough. Pure but for ``zero_between``."""

from __future__ import annotations

import ctypes

import numpy as np

from memkv_engines.chunk.layout import KVLayout
from memkv_engines.gpu.driver import Addresses
from memkv_engines.gpu.kernels import Ids


def copy_list(
    layout: KVLayout, ids: Ids, stride_bytes: int, payload_address: int, first_index: int
) -> tuple[Addresses, Addresses, Addresses]:
    """Page address, slot address and length of every tile of every block, block-major, uint64."""
    pieces = layout.iovecs(ids.astype(np.int32)).reshape(ids.size, len(layout.tiles), 2)
    lengths = pieces[0, :, 1]
    offsets = np.cumsum(lengths) - lengths
    starts = np.uint64(payload_address) + np.arange(first_index, first_index + ids.size, dtype=np.uint64) * np.uint64(
        stride_bytes
    )
    slots = starts[:, None] + offsets[None, :]
    return (
        np.ascontiguousarray(pieces[..., 0]).reshape(-1),
        slots.reshape(-1),
        np.ascontiguousarray(pieces[..., 1]).reshape(-1),
    )


def zero_between(payload_address: int, holes: int, blocks: int, block_bytes: int, stride_bytes: int) -> None:
    """Zero the holes and the padding behind each block of a host slot that nothing else touches."""
    if holes:
        ctypes.memset(payload_address, 0, holes * stride_bytes)
    if stride_bytes > block_bytes:
        first = payload_address + holes * stride_bytes
        memory = (ctypes.c_uint8 * (blocks * stride_bytes)).from_address(first)
        np.ctypeslib.as_array(memory).reshape(blocks, stride_bytes)[:, block_bytes:] = 0
