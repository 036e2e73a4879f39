"""The transport contract: move bytes between memory and one open object.

A transport knows nothing of keys, folders or checksums; a tier opens objects and hands them over. Every transport
passes the suite in ``tests/fast/transport_contract.py``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, Union

Handle = TypeVar("Handle")


@dataclass(frozen=True)
class DeviceView:
    """A piece of CUDA memory: address and length in bytes. Whoever makes one keeps the memory allocated.

    Transports whose ``moves_device_memory`` is true take it wherever a memoryview is taken.
    """

    address: int
    nbytes: int
    device: int = 0

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {
            "shape": (self.nbytes,),
            "strides": None,
            "typestr": "|u1",
            "data": (self.address, False),
            "version": 3,
        }


View = Union[memoryview, DeviceView]  # noqa: UP007 - an alias is evaluated, also on Python 3.10


class Transport(ABC, Generic[Handle]):
    """Moves bytes; blocking; thread-safe for different handles, and for reads of one.

    Attributes:
        name: what is reported, e.g. ``posix/direct``. Never names a path that was not really taken.
        align_bytes: what memory addresses, offsets and lengths must be multiples of (1: anything goes).
        moves_device_memory: whether views may be ``DeviceView``.
    """

    name: str
    align_bytes: int = 1
    moves_device_memory: bool = False

    @abstractmethod
    def write(self, handle: Handle, views: Sequence[memoryview], offset: int) -> int:
        """Write all views one after the other from ``offset`` on.

        Returns:
            Bytes submitted to the device.

        Raises:
            TierFull: no room.
            TransferOverdue: it did not end in time; see there for what may not be reused.
            TransportError: any other failure, a short write included.
        """

    @abstractmethod
    def read(self, handle: Handle, views: Sequence[memoryview], offset: int) -> None:
        """Fill all views one after the other from ``offset`` on. After an error they may hold anything.

        Raises:
            ChunkTruncated: the object ends before the views are full.
            ChunkMissing: the object vanished under the reader (ESTALE).
            TransferOverdue: it did not end in time; see there for what may not be reused.
            TransportError: any other failure.
        """

    def register(self, address: int, length_bytes: int, *, device: int | None = None) -> None:
        """Announce memory that will be read into and written from again and again, once, by its owner.

        Other memory works too, at the price of a copy or of a registration per transfer. The owner calls
        ``deregister`` before it frees the memory, and after its transfers have ended.

        Args:
            address: where it begins.
            length_bytes: its length.
            device: ordinal of the CUDA device it is on; None for host memory.

        Raises:
            TransportError: the device refuses.
        """

    def deregister(self, address: int) -> None:
        """Take back what was registered at an address; nothing happens if nothing was.

        Raises:
            TransportError: the device refuses.
        """

    def close(self) -> None:
        """Wait for what is under way, bounded, and release what the transport holds. Idempotent."""


class FileTransport(Transport[Handle]):
    """A transport whose objects are files that a tier opens.

    Attributes:
        open_flags: flags a tier adds when it opens a file for this transport.
    """

    open_flags: int = 0

    @abstractmethod
    def attach(self, fd: int, *, writable: bool = False) -> Handle:
        """Make a handle of an open file and take the descriptor over: from here on only ``detach`` closes it.

        Args:
            fd: the descriptor; still the caller's if this raises.
            writable: whether it will be written to.

        Raises:
            TransportError: the device refuses the file.
        """

    @abstractmethod
    def detach(self, handle: Handle) -> None:
        """Close a handle and its file. The descriptor's number is not free before every transfer on it has ended."""
