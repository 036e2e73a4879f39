"""What lies in a tier's directory, seen from outside: chunk files, their sizes, which blocks they hold, a raw read."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import harness
from benchmarks.raw_limit import THREADS, huge_buffer, timed
from memkv_engines.chunk.codec import ChunkHeader, read_header
from memkv_engines.errors import ChunkForeign
from memkv_engines.keys import ChunkName
from memkv_engines.limits import MIB

POLL_S = 0.05
RAW_ROUNDS = 3
MAX_HEADER_BYTES = MIB


@dataclass(frozen=True)
class ChunkFile:
    """One chunk in a tier's directory."""

    path: Path
    name: ChunkName
    size_bytes: int

    def header(self) -> ChunkHeader:
        """Returns the chunk's decoded header."""
        with self.path.open("rb") as file:
            return read_header(file.read(MAX_HEADER_BYTES))


@dataclass(frozen=True)
class TierContents:
    """The chunks of a tier's directory at one moment.

    Attributes:
        chunks: All chunks, sorted by path.
    """

    chunks: tuple[ChunkFile, ...]

    @property
    def stored_bytes(self) -> int:
        """Bytes of all files, headers and padding included."""
        return sum(chunk.size_bytes for chunk in self.chunks)

    @property
    def blocks(self) -> int:
        """Blocks in all chunks; a block that lies in two chunks counts twice."""
        return sum(chunk.name.block_count - chunk.name.holes for chunk in self.chunks)

    @property
    def blocks_per_chunk(self) -> int:
        """Blocks of a full chunk; 0 where there is none."""
        return max((chunk.name.block_count for chunk in self.chunks), default=0)

    @property
    def full(self) -> tuple[ChunkFile, ...]:
        """The chunks with as many blocks as any has."""
        return tuple(chunk for chunk in self.chunks if chunk.name.block_count == self.blocks_per_chunk)

    @property
    def tails(self) -> tuple[ChunkFile, ...]:
        """The chunks that are shorter than a full one."""
        return tuple(chunk for chunk in self.chunks if chunk.name.block_count < self.blocks_per_chunk)

    @property
    def chunk_bytes(self) -> int:
        """File size of a full chunk; 0 where there is none."""
        return max((chunk.size_bytes for chunk in self.full), default=0)

    @property
    def paths(self) -> list[Path]:
        """Paths of all chunks."""
        return [chunk.path for chunk in self.chunks]

    def without(self, earlier: TierContents) -> TierContents:
        """Returns the chunks that an earlier look did not see."""
        known = set(earlier.paths)
        return TierContents(tuple(chunk for chunk in self.chunks if chunk.path not in known))

    def payload(self) -> PayloadBytes:
        """Reads every header and returns the payload sizes."""
        written, distinct = 0, {}
        for chunk in self.chunks:
            header = chunk.header()
            for block in header.blocks:
                if block.present:
                    written += header.geometry.block_stride_bytes
                    identity = (header.key.namespace_digest, header.key.group, header.key.shard, block.chain_hash)
                    distinct[identity] = header.geometry.block_stride_bytes
        return PayloadBytes(written, sum(distinct.values()))


@dataclass(frozen=True)
class PayloadBytes:
    """Payload in a tier: as written, and with every (block, shard) counted once."""

    written: int
    distinct: int


def contents_of(root: Path) -> TierContents:
    """Lists the chunks below a tier's directory; unfinished and foreign files are passed over."""
    return TierContents(tuple(_chunks(sorted(root.glob("*/*/*.kv")))))


def _chunks(paths: Iterable[Path]) -> Iterable[ChunkFile]:
    for path in paths:
        try:
            yield ChunkFile(path, ChunkName.parse(path.name), path.stat().st_size)
        except (ChunkForeign, FileNotFoundError):
            continue


def wait_for_blocks(root: Path, earlier: TierContents, blocks: int, timeout_s: float = 20.0) -> TierContents:
    """Waits until the tier holds at least this many blocks more than before and no more are coming.

    Stores go on after the answer is out, so there is nothing to wait for but the files.

    Args:
        root: The tier's directory.
        earlier: What was there before.
        blocks: Blocks that should arrive.
        timeout_s: Return what there is after this long.

    Returns:
        The chunks that are new since `earlier`.
    """
    deadline = time.monotonic() + timeout_s
    previous = -1
    while True:
        new = contents_of(root).without(earlier)
        if new.blocks >= blocks and new.blocks == previous:
            return new
        if time.monotonic() > deadline:
            return new
        previous = new.blocks
        time.sleep(POLL_S)


class RawReader:
    """Reads chunk files without any engine: direct I/O into huge pages, as many threads as do best.

    Args:
        files: What each prompt left in the tier; the first is read to find the number of threads.
    """

    def __init__(self, files: Sequence[TierContents]) -> None:
        largest = max(chunk.size_bytes for contents in files for chunk in contents.chunks)
        self._buffers = [huge_buffer(largest, seed) for seed in range(max(THREADS))]
        self.threads = 1
        times = {n: [self._read_s(files[0], n) for _ in range(RAW_ROUNDS)] for n in THREADS}
        self.threads = min(times, key=lambda n: harness.median(times[n]))

    def read_s(self, files: TierContents) -> float:
        """Returns the seconds that reading these files takes, from a cold page cache."""
        return self._read_s(files, self.threads)

    def _read_s(self, files: TierContents, threads: int) -> float:
        harness.drop_from_page_cache(files.paths)

        def read(index: int, buffer: memoryview) -> None:
            chunk = files.chunks[index]
            fd = os.open(chunk.path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
            try:
                if os.preadv(fd, [buffer[: chunk.size_bytes]], 0) != chunk.size_bytes:
                    raise OSError(f"short read of {chunk.path.name}")
            finally:
                os.close(fd)

        return timed(len(files.chunks), self._buffers[:threads], read)
