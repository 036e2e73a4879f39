"""One chunk from pages to the tier: gather (the engine waits), digest (a core works), write (the drive works).

``ChunkStore`` is what does not depend on where the chunk is staged; ``HostStore`` stages in host memory, and
``direct_stores`` in device memory.
"""

from __future__ import annotations

from collections.abc import Sequence

from memkv_engines.chunk.codec import Geometry, build_header
from memkv_engines.chunk.protection import Protection
from memkv_engines.errors import IoServiceError, TierError, TierFull, TransferOverdue, TransportError
from memkv_engines.keys import ChunkKey, namespace_folder
from memkv_engines.offload.groups import Group
from memkv_engines.offload.messages import StoreChunk, split_hashes
from memkv_engines.offload.pages import Pages
from memkv_engines.offload.staging import Slot
from memkv_engines.tier.base import Tier
from memkv_engines.transports.base import View


class ChunkStore:
    """What a store makes of its chunk: key, name and geometry; and how it publishes it.

    Args:
        chunk: what to store and from where.
        group: geometry of its KV group in this worker.

    Raises:
        IoServiceError: the chunk contradicts itself.
    """

    def __init__(self, chunk: StoreChunk, group: Group) -> None:
        self._chunk, self._group = chunk, group
        self._hashes = split_hashes(chunk.hashes)
        if not chunk.block_ids or len(self._hashes) != chunk.holes + len(chunk.block_ids):
            raise IoServiceError("a store needs blocks, and one hash for each")
        if not 0 <= chunk.first_position < 1 << 64:
            raise IoServiceError(f"first_position={chunk.first_position} is no position")
        self._key = ChunkKey(
            chunk.namespace,
            self._hashes[0],
            self._hashes[-1],
            len(self._hashes),
            chunk.group,
            group.shard,
            chunk.holes,
        )
        self._geometry = Geometry(len(self._hashes), group.block_bytes, group.block_tokens)
        self.folder, self.name = namespace_folder(chunk.namespace), self._key.name

    @property
    def object_bytes(self) -> int:
        """Header and payload."""
        return self._geometry.object_bytes

    @property
    def payload_bytes(self) -> int:
        """Payload bytes that a write submits."""
        return self._geometry.payload_bytes

    def is_needed(self, tier: Tier) -> bool:
        """Whether the tier lacks the chunk, or is to get it anew."""
        return self._chunk.replace or not tier.exists(self.folder, [self.name])[0]

    def publish(self, tier: Tier, views: Sequence[View]) -> tuple[str, int]:
        """Put header and payload. Blocking; raises nothing else for trouble with the tier.

        Returns:
            The outcome (``stored | present | full | failed``) and the bytes submitted to the device.

        Raises:
            TransferOverdue: the device may still read the views.
        """
        try:
            result = tier.put(self.folder, self.name, views, replace=self._chunk.replace)
        except TransferOverdue:
            raise
        except TierFull:
            return "full", 0
        except (TierError, TransportError):
            return "failed", 0
        return ("present" if result.already_present else "stored"), result.written_bytes


class HostStore(ChunkStore):
    """Stores one chunk: ``gather``, ``digest`` and ``write``, once each, maybe on different threads.

    Args:
        chunk: what to store and from where.
        group: geometry of its KV group in this worker.
        slot: staging memory, owned until ``write`` returns.
        protection: what protects the chunk, if anything does.
    """

    def __init__(self, chunk: StoreChunk, group: Group, slot: Slot, protection: Protection | None = None) -> None:
        super().__init__(chunk, group)
        self.slot, self._protection = slot, protection
        if self._geometry.object_bytes > slot.view.nbytes:
            raise IoServiceError("a store larger than a staging slot")

    def gather(self, pages: Pages) -> None:
        """Copy the pages into staging. What the slot held before never reaches the tier.

        Raises:
            IoServiceError: the engine's memory cannot be read.
        """
        g = self._geometry
        layout = self._group.layout
        payload = self.slot.view[g.header_bytes : g.object_bytes]
        padding = g.block_stride_bytes - g.block_bytes
        if padding:
            for index in range(g.block_count):
                end = (index + 1) * g.block_stride_bytes
                payload[end - padding : end] = bytes(padding)
        if self._chunk.holes:
            payload[: self._chunk.holes * g.block_stride_bytes] = bytes(self._chunk.holes * g.block_stride_bytes)
        pages.gather(
            layout.iovecs(self._chunk.block_ids),
            len(layout.tiles),
            self.slot.address + g.block_offset(self._chunk.holes),
            g.block_bytes,
            g.block_stride_bytes,
        )

    def digest(self, tier: Tier) -> bool:
        """Encrypt in staging if that is wanted, and make the header; nothing where the tier holds the chunk already.

        Returns:
            Whether there is something to write.
        """
        g = self._geometry
        if not self.is_needed(tier):
            return False
        header = build_header(
            self._key,
            g.block_tokens,
            g.block_bytes,
            self._hashes,
            self._chunk.first_position,
            self.slot.view[g.header_bytes : g.object_bytes],
            self._protection,
        )
        self.slot.view[: g.header_bytes] = header.encode()
        return True

    def write(self, tier: Tier) -> tuple[str, int]:
        """As ``publish``, out of the slot."""
        return self.publish(tier, [self.slot.view[: self._geometry.object_bytes]])
