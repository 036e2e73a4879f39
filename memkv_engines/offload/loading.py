"""One chunk from the tier into pages: read, verify, scatter."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from memkv_engines.chunk.codec import ChunkHeader, Geometry, check_header, decode_header, verify_blocks
from memkv_engines.errors import ChunkDamaged, ChunkError, ChunkForeign, ChunkTruncated, IoServiceError
from memkv_engines.keys import ChunkName, namespace_folder
from memkv_engines.limits import KEY_BYTES
from memkv_engines.offload.groups import Group
from memkv_engines.offload.messages import LoadRun, split_hashes
from memkv_engines.offload.pages import Pages
from memkv_engines.offload.staging import Slot
from memkv_engines.tier.base import ChunkReader, Tier

REMOVABLE_KINDS = frozenset({"truncated", "damaged", "foreign"})


@dataclass(frozen=True)
class LoadChunk:
    """Blocks ``[take_first, take_first + len(block_ids))`` of one chunk.

    ``hashes`` are the reader's own chain hashes of the chunk's blocks 0 up to the last one taken; ``last`` is the
    16-byte prefix of the chunk's last hash.
    """

    namespace: bytes
    group: int
    last: bytes
    block_count: int
    holes: int
    take_first: int
    hashes: list[bytes]
    block_ids: npt.NDArray[np.int32]


def expand_run(run: LoadRun) -> list[LoadChunk]:
    """Cut a run into its chunks.

    Raises:
        IoServiceError: the run contradicts itself.
    """
    hashes = split_hashes(run.hashes)
    ids = np.frombuffer(run.block_ids, dtype="<i4") if len(run.block_ids) % 4 == 0 else np.empty(0, np.int32)
    if len(ids) != len(hashes) - run.take_first or not 0 <= run.take_first < run.block_count or run.chunk_count < 1:
        raise IoServiceError("malformed load run")
    if run.last and (run.chunk_count != 1 or len(hashes) > run.block_count):
        raise IoServiceError("a chunk that is named stands alone and holds all blocks taken")
    if not run.last and len(hashes) != run.chunk_count * run.block_count:
        raise IoServiceError("a run of full chunks needs the hashes of all their blocks")
    chunks = []
    for index in range(run.chunk_count):
        start = index * run.block_count
        own = hashes[start : start + run.block_count]
        skip = run.take_first if index == 0 else 0
        chunks.append(
            LoadChunk(
                run.namespace,
                run.group,
                run.last or own[-1][:KEY_BYTES],
                run.block_count,
                run.holes if index == 0 else 0,
                skip,
                own,
                ids[start + skip - run.take_first : start + len(own) - run.take_first],
            )
        )
    return chunks


@dataclass(frozen=True)
class LoadOutcome:
    """Blocks that are good and in place, what stopped the rest (empty: nothing) and the bytes read."""

    good_blocks: int
    kind: str
    read_bytes: int


class ChunkLoad:
    """Loads one chunk. Not reusable.

    Args:
        chunk: what to load and where to.
        group: geometry of its KV group in this worker.
        tier: where from.
        pages: where to.
        slot: staging memory.
    """

    def __init__(self, chunk: LoadChunk, group: Group, tier: Tier, pages: Pages, slot: Slot) -> None:
        self._chunk, self._group, self._tier, self._pages, self._slot = chunk, group, tier, pages, slot
        self._hashes = chunk.hashes
        self._take = len(chunk.block_ids)
        self._stop = chunk.take_first + self._take
        if not self._take or len(self._hashes) < self._stop or len(chunk.last) != KEY_BYTES:
            raise IoServiceError("a load needs the hashes of the blocks it takes")
        self.name = ChunkName(
            self._hashes[0][:KEY_BYTES],
            chunk.last,
            chunk.block_count,
            chunk.holes,
            chunk.group,
            group.shard.text,
        )
        self.folder = namespace_folder(chunk.namespace)
        self._geometry = Geometry(chunk.block_count, group.block_bytes, group.block_tokens)
        self._good = self._read_bytes = 0

    def run(self) -> LoadOutcome:
        """Blocking. Data problems come back as an outcome; only errors of the service itself are raised."""
        try:
            with self._tier.open(self.folder, self.name) as reader:
                self._check_size(reader)
                kind = self._load(reader)
        except ChunkError as error:
            kind = error.kind
        return LoadOutcome(self._good, kind, self._read_bytes)

    def _check_size(self, reader: ChunkReader) -> None:
        if reader.object_bytes < self._geometry.object_bytes:
            raise ChunkTruncated(f"{reader.object_bytes} B instead of {self._geometry.object_bytes} B")
        if reader.object_bytes > self._geometry.object_bytes:
            raise ChunkForeign(f"{reader.object_bytes} B instead of {self._geometry.object_bytes} B")

    def _load(self, reader: ChunkReader) -> str:
        """Read, verify and scatter; in pieces where a chunk of other settings is larger than a slot. Returns a kind."""
        g, layout = self._geometry, self._group.layout
        room = (self._slot.view.nbytes - g.header_bytes) // g.block_stride_bytes
        if room < 1:
            raise IoServiceError("a block larger than a staging slot")
        iovecs, tiles = layout.iovecs(self._chunk.block_ids), len(layout.tiles)
        header: ChunkHeader | None = None
        while self._good < self._take:
            first = self._chunk.take_first + self._good
            stop = min(first + room, self._stop)
            payload = self._read(reader, first, stop, with_header=header is None)
            if header is None:
                header = decode_header(self._slot.view[: g.header_bytes])
                check_header(header, self._chunk.namespace, self.name, g, self._hashes[: self._stop])
            bad = verify_blocks(header, first, stop, payload)
            good = (stop if bad is None else bad) - first
            if good:
                part = iovecs[self._good * tiles : (self._good + good) * tiles]
                address = self._slot.address + g.header_bytes
                self._pages.scatter(part, tiles, address, g.block_bytes, g.block_stride_bytes)
            self._good += good
            if bad is not None:
                return ChunkDamaged.kind
        return ""

    def _read(self, reader: ChunkReader, first: int, stop: int, *, with_header: bool) -> memoryview:
        """Blocks [first, stop) into the slot, behind the header; the header too if it is wanted."""
        g, view = self._geometry, self._slot.view
        payload_end = g.header_bytes + (stop - first) * g.block_stride_bytes
        payload = view[g.header_bytes : payload_end]
        if with_header and first == 0:
            reader.read([view[:payload_end]], 0)
        else:
            if with_header:
                reader.read([view[: g.header_bytes]], 0)
            reader.read([payload], g.block_offset(first))
        self._read_bytes += payload.nbytes + (g.header_bytes if with_header else 0)
        return payload
