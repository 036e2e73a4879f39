"""What a gather and a scatter must do, by indexing arrays. Uses neither tiles nor addresses."""

from __future__ import annotations

from collections.abc import Sequence

from tests.kernels.layouts import Bytes, Paged, Placement


def gather(paged: Paged, placement: Placement, ids: Sequence[int], chunk: Bytes, first_index: int = 0) -> Bytes:
    """The chunk after a gather; what a hole or nobody owns stays as it was."""
    out = chunk.copy()
    count = first_index + len(ids)
    for number, piece in enumerate(paged.pieces):
        for index, block in enumerate(ids):
            if 0 <= block < paged.num_blocks:
                at = placement.offset(paged, number, first_index + index, count)
                row = paged.caches[piece.cache][block]
                out[at : at + piece.length] = row[piece.offset : piece.offset + piece.length]
    return out


def scatter(paged: Paged, placement: Placement, ids: Sequence[int], chunk: Bytes, first_index: int = 0) -> list[Bytes]:
    """The caches after a scatter."""
    caches = [cache.copy() for cache in paged.caches]
    count = first_index + len(ids)
    for number, piece in enumerate(paged.pieces):
        for index, block in enumerate(ids):
            if 0 <= block < paged.num_blocks:
                at = placement.offset(paged, number, first_index + index, count)
                row = caches[piece.cache][block]
                row[piece.offset : piece.offset + piece.length] = chunk[at : at + piece.length]
    return caches
