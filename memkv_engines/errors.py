"""The package's exception tree.

::

    MemKVError
    ├── ConfigError            a key or value the user gave is wrong: refuse to start
    ├── IdentityError          what the bytes would mean is unknown or unsafe: refuse to start
    ├── LayoutError            a KV geometry we cannot move
    ├── ChunkError             a stored chunk is unusable: a counted miss, never an engine failure
    │   ├── ChunkMissing       no such object (evicted, or never written)
    │   ├── ChunkTruncated     shorter than its header says
    │   ├── ChunkDamaged       a checksum does not match
    │   ├── ChunkForeign       another namespace, key, geometry, owner or file type
    │   ├── ChunkVersion       a format version, flag or algorithm this build does not know
    │   ├── ChunkUnauthenticated  has no MAC, and the reader has a key
    │   ├── ChunkOtherKey      protected with another key or in another way: nobody's damage, never removed
    │   └── ChunkForged        made or changed by somebody without the key
    ├── TierError              the place where chunks live failed
    │   ├── TierFull           no room (capacity bound or ENOSPC): the store is shed
    │   └── TierUnavailable    cannot be opened, listed or written
    ├── TransportError         moving bytes failed (EIO, short transfer)
    │   └── TransferOverdue    it did not end in time and may still touch its memory
    ├── GpuError               a driver call, or a kernel by its error word, failed; nothing else is affected
    │   ├── GpuUnavailable     no usable driver, device or kernel image: take another path
    │   ├── GpuOverdue         the device did not finish in time; its memory stays in use until it does
    │   └── GpuLost            the CUDA context is broken: nothing moves any more in this process
    ├── PatchError             a patch is damaged, or an engine's file is not what it expects: nothing is written
    └── IoServiceError         the I/O process died, hung or answered nonsense

Every ``ChunkError`` has a short ``kind``, which is also the name of its counter.
"""

from __future__ import annotations

from collections.abc import Callable


class MemKVError(Exception):
    """Base of everything this package raises on purpose."""


class ConfigError(MemKVError):
    """A configuration key or value is wrong. The message names key, value and remedy."""


class IdentityError(MemKVError):
    """The identity of the KV bytes is unknown or unsafe to persist."""


class LayoutError(MemKVError):
    """The KV geometry handed over by the engine cannot be described by tiles."""


class ChunkError(MemKVError):
    """A stored chunk is unusable. Callers count it by ``kind`` and treat it as a miss."""

    kind = "chunk_error"


class ChunkMissing(ChunkError):
    """The object does not exist."""

    kind = "missing"


class ChunkTruncated(ChunkError):
    """The object is shorter than its header promises."""

    kind = "truncated"


class ChunkDamaged(ChunkError):
    """A stored digest does not match the bytes."""

    kind = "damaged"


class ChunkForeign(ChunkError):
    """The object belongs to another namespace, key, geometry or owner."""

    kind = "foreign"


class ChunkVersion(ChunkError):
    """The object was written in a format this build does not understand."""

    kind = "version"


class ChunkUnauthenticated(ChunkError):
    """The object has no MAC, and its reader has a key."""

    kind = "unauthenticated"


class ChunkOtherKey(ChunkError):
    """The object is protected with a key that its reader does not have, or in another way than its reader's."""

    kind = "other_key"


class ChunkForged(ChunkError):
    """The object names the reader's key, its digests are right, and a MAC is wrong."""

    kind = "forged"


class TierError(MemKVError):
    """The tier failed as a whole rather than for one chunk."""

    kind = "tier_error"


class TierFull(TierError):
    """There is no room for another chunk."""

    kind = "full"


class TierUnavailable(TierError):
    """The tier cannot be opened, listed or written."""

    kind = "unavailable"


class TransportError(MemKVError):
    """Moving bytes failed."""

    kind = "io_error"


class TransferOverdue(TransportError):
    """A transfer did not end in time and could not be called back: the device may still read or write its memory.

    Args:
        message: what was waited for.
        ended: whether it has ended by now; may be asked at any time, from any thread. Until then the memory may hold
            nothing of value (a read) or must be expected to be read once more (a write): its owner does not reuse it.
    """

    def __init__(self, message: str, ended: Callable[[], bool]) -> None:
        super().__init__(message)
        self.ended = ended


class IoServiceError(MemKVError):
    """The I/O service died, hung or broke its protocol."""

    kind = "io_service"


class PatchError(MemKVError):
    """A patch is damaged, leads elsewhere, or does not fit an engine's file. Names patch or file, and hunk."""


class GpuError(MemKVError):
    """A CUDA driver call failed, a kernel reported an error, or the arguments of a copy are wrong."""

    kind = "gpu_error"


class GpuUnavailable(GpuError):
    """There is no driver, device or kernel image that could be used."""

    kind = "gpu_unavailable"


class GpuOverdue(GpuError):
    """Work on the device did not end in the time given."""

    kind = "gpu_overdue"


class GpuLost(GpuError):
    """The CUDA context is broken for good; every later call in this process fails as well."""

    kind = "gpu_lost"
