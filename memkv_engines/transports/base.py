"""The transport contract: move bytes between memory views and one open object.

A transport knows nothing of keys, folders or checksums; a tier opens objects and hands them over. Every transport
passes ``tests/fast/test_transports.py``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Generic, TypeVar

Handle = TypeVar("Handle")


class Transport(ABC, Generic[Handle]):
    """Moves bytes; blocking; thread-safe for different handles.

    Attributes:
        name: what is reported, e.g. ``posix/direct``. Never names a path that was not really taken.
        align_bytes: what memory addresses, offsets and lengths must be multiples of (1: anything goes).
    """

    name: str
    align_bytes: int = 1

    @abstractmethod
    def write(self, handle: Handle, views: Sequence[memoryview], offset: int) -> int:
        """Write all views one after the other from ``offset`` on.

        Returns:
            Bytes submitted to the device.

        Raises:
            TierFull: no room.
            TransportError: any other failure, a short write included.
        """

    @abstractmethod
    def read(self, handle: Handle, views: Sequence[memoryview], offset: int) -> None:
        """Fill all views one after the other from ``offset`` on.

        Raises:
            ChunkTruncated: the object ends before the views are full.
            ChunkMissing: the object vanished under the reader (ESTALE).
            TransportError: any other failure.
        """
