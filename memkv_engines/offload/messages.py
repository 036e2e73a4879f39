"""What engine side and I/O service say to each other: typed msgpack, checked on arrival, never unpickled."""

from __future__ import annotations

from typing import Union

import msgspec

from memkv_engines.errors import IoServiceError
from memkv_engines.limits import HASH_BYTES, MIB

STOPPED = "stopped"
"""Why a load ended early: nothing was wrong, it was too slow (``Load.stop_us``)."""


class TileSpec(msgspec.Struct, frozen=True, array_like=True):
    """One tile of a group's pages, see ``chunk.layout.Tile``."""

    base: int
    block_stride_bytes: int
    length_bytes: int
    in_arena: bool = False


class GroupSpec(msgspec.Struct, frozen=True):
    """Geometry of one KV group in this worker.

    ``tiles`` is empty in a process that only probes.
    """

    group: int
    shard: tuple[int, int, int, int, int, int]
    block_tokens: int
    block_bytes: int
    blocks_per_chunk: int
    num_blocks: int = 0
    tiles: tuple[TileSpec, ...] = ()


class ProtectionSpec(msgspec.Struct, frozen=True):
    """The user's key, on its way to the process that uses it; ``repr`` does not show it."""

    encrypt: bool
    key: bytes

    def __repr__(self) -> str:
        return f"ProtectionSpec(encrypt={self.encrypt}, key=set)"


class Setup(msgspec.Struct, frozen=True, tag="setup"):
    """First message: what to serve. ``canary_address`` lets the child prove that it can read the engine's memory.

    ``transport`` to ``staging_medium`` are the policy of ``transports.select``; ``kv_on_gpu`` tells where the engine's
    pages are. A service that only probes reads headers, for which posix is as good as any.
    ``protection`` is None where chunks are neither authenticated nor encrypted. Chunks stay in ``memory_bytes`` of
    memory after they were stored or loaded; 0: none do.
    ``mount_points`` is empty at the first start. Later ones must find the directories where they were (``places``).
    """

    tier_path: str
    direct_io: str
    capacity_bytes: int
    read_only: bool
    io_threads: int
    staging_bytes: int
    groups: tuple[GroupSpec, ...] = ()
    engine_pid: int = 0
    canary_address: int = 0
    canary: bytes = b""
    eviction: str = "off"
    transport: str = "posix"
    gds: str = "auto"
    nixl_plugin: str = "POSIX"
    staging_medium: str = "auto"
    kv_on_gpu: bool = False
    mount_points: tuple[str, ...] = ()
    protection: ProtectionSpec | None = None
    memory_bytes: int = 0


class StoreChunk(msgspec.Struct, frozen=True, array_like=True):
    """One chunk to gather and write. ``hashes`` are the chain hashes of all its blocks, joined."""

    namespace: bytes
    group: int
    first_position: int
    holes: int
    hashes: bytes
    block_ids: tuple[int, ...]
    replace: bool = False


class LoadRun(msgspec.Struct, frozen=True, array_like=True):
    """Consecutive blocks of one prefix that lie in ``chunk_count`` chunks of ``block_count`` blocks each.

    ``hashes`` are the reader's own chain hashes, joined, from block 0 of the first chunk up to the last block taken.
    The blocks taken are those from ``take_first`` on; ``block_ids`` are their pages, little-endian int32, joined.
    ``last`` is empty where each chunk's last hash is among ``hashes``, else the 16-byte prefix of the last hash of the
    only chunk (a variant may end beyond the reader's prompt).
    """

    namespace: bytes
    group: int
    block_count: int
    chunk_count: int
    holes: int
    last: bytes
    take_first: int
    hashes: bytes
    block_ids: bytes


class Store(msgspec.Struct, frozen=True, tag="store"):
    """Gather, then write."""

    job_id: int
    chunks: tuple[StoreChunk, ...]


class Load(msgspec.Struct, frozen=True, tag="load"):
    """Read, verify, scatter; runs of a group are in chain order.

    With ``stop_us`` no more chunks are read once the whole, from its first chunk on, is seen to take longer; 0: never.
    """

    job_id: int
    runs: tuple[LoadRun, ...]
    stop_us: int = 0


class Probe(msgspec.Struct, frozen=True, tag="probe"):
    """Walk the chain of one group from block ``start`` on. ``hashes`` are the prompt's from there on, joined.

    Every shard in ``shards`` must hold what is reported. Blocks before ``need_from`` may be holes (sliding windows).

    With ``anywhere`` chunks may start at any block, not only on the engine's grid: the first ``wanted`` hashes come
    before what is asked for, only because a chunk that covers it may begin there (at most ``largest_chunk`` blocks
    back), and a walk goes on behind a chunk it diverges from. With ``survey`` it also goes on behind a missing block.
    With ``exact`` only full chunks count, which costs no listing.
    """

    probe_id: int
    namespace: bytes
    group: int
    blocks_per_chunk: int
    start: int
    need_from: int
    hashes: bytes
    shards: tuple[tuple[int, int, int, int, int, int], ...]
    anywhere: bool = False
    wanted: int = 0
    largest_chunk: int = 0
    survey: bool = False
    exact: bool = False

    def numbered(self, probe_id: int) -> Probe:
        """The same with another id."""
        return msgspec.structs.replace(self, probe_id=probe_id)


class Manifest(msgspec.Struct, frozen=True, tag="manifest"):
    """Record what a namespace stands for."""

    fields_json: bytes


class Stop(msgspec.Struct, frozen=True, tag="stop"):
    """Finish the writes that were gathered, then exit."""


class MemorySize(msgspec.Struct, frozen=True, array_like=True):
    """Of a level of memory: so many chunks of at most so many bytes."""

    chunks: int = 0
    chunk_bytes: int = 0


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """The service runs (``error`` empty) or cannot. ``mount_points`` are those of the tier's directories."""

    tier_name: str = ""
    mode_reason: str = ""
    mount_points: tuple[str, ...] = ()
    error: str = ""
    error_kind: str = ""
    memory: MemorySize = MemorySize()

    @property
    def text(self) -> str:
        """For the log: the tier, why it is used so, and what is before it."""
        told = f"{self.tier_name} ({self.mode_reason})"
        if self.memory.chunks:
            told += f", behind {self.memory.chunks} chunks of at most {self.memory.chunk_bytes / MIB:.2f} MiB in memory"
        return told


class Gathered(msgspec.Struct, frozen=True, tag="gathered"):
    """All pages of a store job have been read (or shed); the engine may overwrite them."""

    job_id: int


# Outcomes of chunks that are in the tier afterwards.
IN_TIER = ("stored", "present")


class StoreDone(msgspec.Struct, frozen=True, tag="store_done"):
    """Per chunk: ``stored | present | shed | full | failed``; bytes are what was submitted to the device."""

    job_id: int
    outcomes: tuple[str, ...]
    written_bytes: int
    payload_bytes: int


class LoadDone(msgspec.Struct, frozen=True, tag="load_done"):
    """Per run: how many of its leading blocks are good and in place, and why it stopped there (empty: all are).

    ``reread`` chunks were right only when they were read a second time. ``read_bytes`` come from the tier and
    ``memory_bytes`` from the level of memory before it.
    """

    job_id: int
    good_blocks: tuple[int, ...]
    kinds: tuple[str, ...]
    chunks: int
    read_bytes: int
    elapsed_us: int
    reread: int = 0
    memory_bytes: int = 0


class InMemory(msgspec.Struct, frozen=True, tag="in_memory"):
    """News of the service's level of memory: ``memory_level.resident_key`` of chunks that came, and of those that went.

    For predictions only.
    """

    came: tuple[bytes, ...]
    went: tuple[bytes, ...]


class Segment(msgspec.Struct, frozen=True, array_like=True):
    """A stored chunk that covers blocks of the probed prompt: ``take`` of them from its block 0 on match.

    Where those are not all, ``hashes`` are the chain hashes of all its blocks, joined: another prompt may share more.
    """

    position: int
    last: bytes
    block_count: int
    holes: int
    take: int
    hashes: bytes = b""


class ProbeDone(msgspec.Struct, frozen=True, tag="probe_done"):
    """What the tier holds of the probed chain, in order."""

    probe_id: int
    segments: tuple[Segment, ...]
    elapsed_us: int


Request = Union[Setup, Store, Load, Probe, Manifest, Stop]  # noqa: UP007 - msgspec needs the runtime union on 3.10
Reply = Union[Ready, Gathered, StoreDone, LoadDone, ProbeDone, InMemory]  # noqa: UP007

# A text that is no UTF-8 is not among msgspec's own errors.
_MALFORMED = (msgspec.MsgspecError, UnicodeDecodeError)
_encoder = msgspec.msgpack.Encoder()
_request_decoder = msgspec.msgpack.Decoder(Request)
_reply_decoder = msgspec.msgpack.Decoder(Reply)


def encode(message: Request | Reply) -> bytes:
    """Serialise one message."""
    return _encoder.encode(message)


def decode_request(data: bytes | memoryview) -> Request:
    """Decode on the service's side.

    Raises:
        IoServiceError: not a request.
    """
    try:
        message: Request = _request_decoder.decode(data)
        return message
    except _MALFORMED as error:
        raise IoServiceError(f"malformed request: {error}") from error


def decode_reply(data: bytes | memoryview) -> Reply:
    """Decode on the engine's side.

    Raises:
        IoServiceError: not a reply.
    """
    try:
        message: Reply = _reply_decoder.decode(data)
        return message
    except _MALFORMED as error:
        raise IoServiceError(f"malformed reply: {error}") from error


def split_hashes(joined: bytes) -> list[bytes]:
    """Split joined 32-byte hashes.

    Raises:
        IoServiceError: not a multiple of the hash width.
    """
    if len(joined) % HASH_BYTES:
        raise IoServiceError(f"{len(joined)} B are no whole number of {HASH_BYTES}-byte hashes")
    return [joined[i : i + HASH_BYTES] for i in range(0, len(joined), HASH_BYTES)]
