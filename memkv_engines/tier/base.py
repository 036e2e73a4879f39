"""The tier contract: whole, immutable objects under self-describing names.

Every tier passes ``tests/fast/test_tiers.py``, which also reaches behind the tier's back.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

from memkv_engines.keys import ChunkName, Namespace
from memkv_engines.transports.base import View


@dataclass(frozen=True)
class PutResult:
    """What a put did: bytes submitted to the device, 0 where the object was already there."""

    written_bytes: int
    already_present: bool


class ChunkReader(AbstractContextManager["ChunkReader"]):
    """An open chunk. Stays readable when the chunk is evicted or replaced meanwhile (except on NFS: ESTALE)."""

    object_bytes: int

    @abstractmethod
    def read(self, views: Sequence[View], offset: int) -> None:
        """Fill the views from ``offset`` on; errors as in ``Transport.read``."""

    @abstractmethod
    def close(self) -> None:
        """Release the object."""

    def __exit__(self, *_: object) -> None:
        self.close()


class Tier(ABC):
    """A place for chunks. All methods block and are thread-safe; none may be called on an engine's scheduler thread.

    Attributes:
        name: tier and transport, e.g. ``directory(posix/direct)``.
        align_bytes: alignment that views, offsets and lengths need.
        moves_device_memory: whether views may be ``DeviceView``.
    """

    name: str
    align_bytes: int = 1
    moves_device_memory: bool = False

    @abstractmethod
    def put(self, folder: str, name: ChunkName, views: Sequence[View], *, replace: bool = False) -> PutResult:
        """Store an object whole; it appears at once or not at all.

        Args:
            folder: namespace folder.
            name: the chunk's name.
            views: header and payload, one after the other.
            replace: write even if an object of that name exists.

        Raises:
            TierFull: no room (capacity bound, or the device is full).
            TierUnavailable, TransportError: any other failure; nothing was published.
        """

    @abstractmethod
    def open(self, folder: str, name: ChunkName) -> ChunkReader:
        """Open an object.

        Raises:
            ChunkMissing: there is none.
            ChunkForeign: it is not a regular file of ours.
            TransportError: the open failed.
        """

    @abstractmethod
    def exists(self, folder: str, names: Iterable[ChunkName]) -> list[bool]:
        """Which of these objects exist (nothing is said of their content)."""

    @abstractmethod
    def variants(self, folder: str, first: bytes, group: int, shard_text: str) -> list[ChunkName]:
        """Names of chunks that start at a block, newest first, at most ``MAX_VARIANTS_EXAMINED``.

        Args:
            folder: namespace folder.
            first: 16-byte prefix of the first block's hash.
            group: KV group.
            shard_text: ``Shard.text``.
        """

    @abstractmethod
    def remove(self, folder: str, name: ChunkName) -> bool:
        """Remove an object; False if there was none, or if the tier is read-only."""

    @abstractmethod
    def names(self, folder: str) -> Iterator[ChunkName]:
        """All chunk names of a namespace, in no order; foreign files are passed over."""

    @abstractmethod
    def write_manifest(self, namespace: Namespace) -> None:
        """Record what a namespace folder stands for, for people and quotas; nothing reads it for identity."""

    @abstractmethod
    def used_bytes(self) -> int | None:
        """Bytes held, or None while they are still being counted."""

    def register_memory(  # noqa: B027 - optional
        self, address: int, length_bytes: int, *, device: int | None = None
    ) -> None:
        """Announce staging memory to the transport; see ``Transport.register``. Its owner calls this once."""

    def deregister_memory(self, address: int) -> None:  # noqa: B027 - optional
        """Take it back before it is freed."""

    def close(self) -> None:  # noqa: B027 - optional
        """Release what the tier holds open."""
