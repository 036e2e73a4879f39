"""One chunk from the tier into pages, in two steps: read (the drive works), then verify and scatter.

``ChunkLoad`` has what does not depend on where the chunk is staged. ``host_loads`` stages in host memory, verifies
there and scatters into pages of the host; ``direct_loads`` does it in device memory.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from memkv_engines.chunk.codec import (
    ChunkHeader,
    Geometry,
    check_header,
    decode_header,
)
from memkv_engines.chunk.protection import Protection
from memkv_engines.errors import ChunkDamaged, ChunkError, ChunkForeign, ChunkTruncated, IoServiceError
from memkv_engines.keys import ChunkName, namespace_folder
from memkv_engines.limits import KEY_BYTES
from memkv_engines.offload.groups import Group
from memkv_engines.offload.messages import LoadRun, split_hashes
from memkv_engines.tier.base import ChunkReader, Tier
from memkv_engines.transports.base import View


class Staging(Protocol):
    """Slots of staging memory, of whatever kind the loads take."""

    def acquire(self) -> Any:
        """A free slot; blocks until there is one."""

    def release(self, slot: Any, why: BaseException | None = None) -> None:
        """Give it back, with what its use ended with."""


REMOVABLE_KINDS = frozenset({"truncated", "damaged", "foreign", "unauthenticated", "forged"})
"""What stands where a right chunk could. A chunk of another key or a later format is somebody's, and stays."""


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
    """What became of one chunk.

    Attributes:
        good_blocks: verified and in place.
        kind: what stopped the rest; empty: nothing.
        read_bytes: from the tier.
        reread: it took a second reading.
        memory_bytes: from the level of memory before the tier.
    """

    good_blocks: int
    kind: str
    read_bytes: int
    reread: bool = False
    memory_bytes: int = 0


def place_of(chunk: LoadChunk, group: Group) -> tuple[str, ChunkName]:
    """Folder and name of the chunk.

    Raises:
        IoServiceError: hashes are missing.
    """
    if not len(chunk.block_ids) or len(chunk.hashes) < chunk.take_first + len(chunk.block_ids):
        raise IoServiceError("a load needs the hashes of the blocks it takes")
    if len(chunk.last) != KEY_BYTES:
        raise IoServiceError("a chunk is named by a 16-byte prefix of its last hash")
    name = ChunkName(
        chunk.hashes[0][:KEY_BYTES], chunk.last, chunk.block_count, chunk.holes, chunk.group, group.shard.text
    )
    return namespace_folder(chunk.namespace), name


class ChunkLoad(ABC):
    """Loads one chunk: ``read`` once, then ``finish`` once, maybe on another thread.

    Args:
        chunk: what to load and where to.
        group: geometry of its KV group in this worker.
        tier: where from.
        slot: staging memory, whose kind the subclass knows.
        protection: the reader's; only what is protected so is taken.
    """

    def __init__(
        self, chunk: LoadChunk, group: Group, tier: Tier, slot: Any, protection: Protection | None = None
    ) -> None:
        self._chunk, self._group, self._tier, self.slot, self._protection = chunk, group, tier, slot, protection
        self._hashes = chunk.hashes
        self._take = len(chunk.block_ids)
        self._stop = chunk.take_first + self._take
        self.folder, self.name = place_of(chunk, group)
        self._geometry = Geometry(chunk.block_count, group.block_bytes, group.block_tokens)
        self._good = self._read_bytes = self._memory_bytes = 0
        self._kind = ""
        self._reader: ChunkReader | None = None
        self._header: ChunkHeader | None = None
        self._has_header = self._is_from_memory = False
        # The piece in the slot: blocks [first, stop) of the chunk; empty once it is in the pages.
        self._piece_first = self._piece_stop = chunk.take_first

    def read(self) -> None:
        """Open the chunk and read what fits in the slot. Blocking; trouble with the chunk is kept for ``finish``."""
        try:
            reader = self._open()
        except ChunkError as error:
            self._kind = error.kind
            return
        self._reader = reader
        try:
            self._check_size(reader)
            self._read_piece(reader)
        except ChunkError as error:
            self._kind = error.kind
        except BaseException:
            self.close()
            raise
        if self._kind or self._piece_stop == self._stop:
            self.close()

    def finish(self) -> LoadOutcome:
        """Verify and scatter; reads on where a chunk of other settings is larger than a slot.

        Data problems come back as an outcome; only errors of the service itself are raised.
        """
        try:
            while not self._kind and self._good < self._take:
                if self._piece_stop == self._piece_first and self._reader is not None:
                    self._read_piece(self._reader)
                self._kind = self._place_piece()
        except ChunkError as error:
            self._kind = error.kind
        finally:
            self.close()
        return LoadOutcome(self._good, self._kind, self._read_bytes, memory_bytes=self._memory_bytes)

    def close(self) -> None:
        """Close the chunk; may be called again."""
        if self._reader is not None:
            self._reader.close()
            self._reader = None

    @property
    def is_resident(self) -> bool:
        """Whether it takes the chunk from memory where others may take it from, too, and has no slot of its own."""
        return False

    def give_back(self, staging: Staging, failure: BaseException | None = None) -> None:
        """Let go of the slot, with what its use ended with; once, after ``close``."""
        staging.release(self.slot, failure)

    def forget(self) -> None:  # noqa: B027 - optional
        """The chunk was wrong: whatever copy of it is kept outside the tier is not to be used again."""

    def _open(self) -> ChunkReader:
        return self._tier.open(self.folder, self.name)

    def _check_size(self, reader: ChunkReader) -> None:
        if reader.object_bytes < self._geometry.object_bytes:
            raise ChunkTruncated(f"{reader.object_bytes} B instead of {self._geometry.object_bytes} B")
        if reader.object_bytes > self._geometry.object_bytes:
            raise ChunkForeign(f"{reader.object_bytes} B instead of {self._geometry.object_bytes} B")

    def _read_piece(self, reader: ChunkReader) -> None:
        """The next blocks into the slot, behind the header; the header too if it is the first piece."""
        g, room = self._geometry, self._room_bytes() // self._geometry.block_stride_bytes
        if room < 1:
            raise IoServiceError("a block larger than a staging slot")
        first = self._piece_stop
        stop = min(first + room, self._stop)
        with_header, self._has_header = not self._has_header, True
        if with_header and first == 0:
            reader.read(self._views(stop, header=True), 0)
        else:
            if with_header:
                reader.read(self._views(0, header=True), 0)
            reader.read(self._views(stop - first, header=False), g.block_offset(first))
        moved_bytes = (stop - first) * g.block_stride_bytes + (g.header_bytes if with_header else 0)
        if self._is_from_memory:
            self._memory_bytes += moved_bytes
        else:
            self._read_bytes += moved_bytes
        self._piece_first, self._piece_stop = first, stop

    def _place_piece(self) -> str:
        """Verify and scatter the piece in the slot. Returns what is wrong with it, empty for nothing."""
        first, stop = self._piece_first, self._piece_stop
        if self._header is None:
            self._header = decode_header(self._header_view(), self._protection)
            check_header(self._header, self._chunk.namespace, self.name, self._geometry, self._hashes[: self._stop])
        header = self._header
        bad = self._first_bad(header, first, stop)
        good = (stop if bad is None else bad) - first
        if good:
            self._scatter(self._chunk.block_ids[self._good : self._good + good])
        self._good += good
        self._piece_first = stop
        return "" if bad is None else self._kind_of_bad(header, bad, first)

    # --- where it is staged ----------------------------------------------------

    @abstractmethod
    def _room_bytes(self) -> int:
        """Room for blocks."""

    @abstractmethod
    def _header_view(self) -> memoryview:
        """Where the header is read to."""

    @abstractmethod
    def _views(self, blocks: int, *, header: bool) -> list[View]:
        """Where to read some blocks that follow each other, and the header before them; both from their start on."""

    @abstractmethod
    def _first_bad(self, header: ChunkHeader, first: int, stop: int) -> int | None:
        """Verify the staged blocks, which are [first, stop) of the chunk; as ``verify_blocks``."""

    def _kind_of_bad(self, header: ChunkHeader, bad: int, first: int) -> str:
        """What is wrong with the block that ``_first_bad`` found; as ``kind_of_bad_block``."""
        return ChunkDamaged.kind

    @abstractmethod
    def _scatter(self, block_ids: npt.NDArray[np.int32]) -> None:
        """Copy the first staged blocks into these pages."""
