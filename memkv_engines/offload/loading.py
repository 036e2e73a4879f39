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
    if (run.last and run.chunk_count != 1) or (not run.last and len(hashes) != run.chunk_count * run.block_count):
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

    def run(self) -> LoadOutcome:
        """Blocking. Data problems come back as an outcome; only errors of the service itself are raised."""
        try:
            with self._tier.open(self.folder, self.name) as reader:
                self._check_size(reader)
                header, payload, read_bytes = self._read(reader)
        except ChunkError as error:
            return LoadOutcome(0, error.kind, 0)
        iovecs = self._group.layout.iovecs(self._chunk.block_ids)
        bad = verify_blocks(header, self._chunk.take_first, self._stop, payload)
        good = self._take if bad is None else bad - self._chunk.take_first
        if good:
            tiles = len(self._group.layout.tiles)
            self._pages.scatter(
                iovecs[: good * tiles],
                tiles,
                self._payload_address,
                self._geometry.block_bytes,
                self._geometry.block_stride_bytes,
            )
        return LoadOutcome(good, "" if bad is None else ChunkDamaged.kind, read_bytes)

    def _check_size(self, reader: ChunkReader) -> None:
        if reader.object_bytes < self._geometry.object_bytes:
            raise ChunkTruncated(f"{reader.object_bytes} B instead of {self._geometry.object_bytes} B")
        if reader.object_bytes > self._geometry.object_bytes:
            raise ChunkForeign(f"{reader.object_bytes} B instead of {self._geometry.object_bytes} B")
        if self._geometry.header_bytes + self._take * self._geometry.block_stride_bytes > self._slot.view.nbytes:
            raise IoServiceError("a load larger than a staging slot")

    def _read(self, reader: ChunkReader) -> tuple[ChunkHeader, memoryview, int]:
        header_bytes = self._geometry.header_bytes
        payload_bytes = self._take * self._geometry.block_stride_bytes
        view = self._slot.view
        payload = view[header_bytes : header_bytes + payload_bytes]
        self._payload_address = self._slot.address + header_bytes
        if self._chunk.take_first == 0:
            reader.read([view[: header_bytes + payload_bytes]], 0)
        else:
            reader.read([view[:header_bytes]], 0)
            reader.read([payload], self._geometry.block_offset(self._chunk.take_first))
        header = decode_header(view[:header_bytes])
        check_header(header, self._chunk.namespace, self.name, self._geometry, self._hashes[: self._stop])
        return header, payload, header_bytes + payload_bytes
