"""Reference transport: an object is a ``bytearray``."""

from __future__ import annotations

from collections.abc import Sequence

from memkv_engines.errors import ChunkTruncated
from memkv_engines.transports.base import Transport


class MemoryTransport(Transport[bytearray]):
    """Copies between views and a growing ``bytearray``. What every other transport must be equal to."""

    name = "memory"

    def write(self, handle: bytearray, views: Sequence[memoryview], offset: int) -> int:
        end = offset + sum(v.nbytes for v in views)
        if len(handle) < end:
            handle.extend(bytes(end - len(handle)))
        position = offset
        for view in views:
            handle[position : position + view.nbytes] = view
            position += view.nbytes
        return end - offset

    def read(self, handle: bytearray, views: Sequence[memoryview], offset: int) -> None:
        position = offset
        for view in views:
            piece = memoryview(handle)[position : position + view.nbytes]
            if piece.nbytes < view.nbytes:
                raise ChunkTruncated(f"object of {len(handle)} B ends before {position + view.nbytes} B")
            view[:] = piece
            position += view.nbytes
