"""Engine pages through the real I/O service: gather, digest, write; read, verify, scatter. For other benchmarks."""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from memkv_engines.chunk.layout import align_up
from memkv_engines.keys import Namespace
from memkv_engines.limits import MIB
from memkv_engines.offload.client import IoClient
from memkv_engines.offload.groups import Group
from memkv_engines.offload.messages import GroupSpec, LoadRun, ProtectionSpec, Setup, StoreChunk, TileSpec
from memkv_engines.offload.results import LoadResult, StoreResult
from memkv_engines.offload.service import staging_slots

LAYERS = 32
BLOCK_TOKENS = 16
_NAMESPACE = Namespace({"benchmark": "through_service"})


@dataclass(frozen=True)
class Shape:
    """How many chunks of how many blocks; a block is ``LAYERS`` pieces, one per layer's tensor."""

    chunk_count: int
    blocks_per_chunk: int
    piece_bytes: int

    @classmethod
    def of(cls, chunk_count: int, chunk_bytes: int) -> Shape:
        """Pieces of 16 KiB per layer (16 tokens, 2 KV heads of 128 in 16 bits), or smaller for tiny chunks."""
        piece = min(16 * 1024, chunk_bytes // LAYERS)
        return cls(chunk_count, chunk_bytes // (LAYERS * piece), piece)

    @property
    def blocks(self) -> int:
        """Blocks of all chunks."""
        return self.chunk_count * self.blocks_per_chunk

    @property
    def block_bytes(self) -> int:
        """Bytes of a block over all layers."""
        return LAYERS * self.piece_bytes


class ServiceBench(AbstractContextManager["ServiceBench"]):
    """An engine's pool of pages beside a running I/O service.

    The pool is laid out as most engines have it, layer by layer, so that a block is scattered over ``LAYERS`` tensors.
    It has room for all blocks twice: stores read the first half, loads fill the second.

    Args:
        root: directory of the tier.
        shape: what to move.
        direct_io: as in the configuration.
        io_threads: as in the configuration.
        staging_bytes: as in the configuration.
        transport: as in the configuration.
        protection: what protects the chunks, if anything does.
    """

    def __init__(
        self,
        root: Path,
        shape: Shape,
        *,
        direct_io: str = "on",
        io_threads: int = 8,
        staging_bytes: int = 256 * MIB,
        transport: str = "posix",
        protection: ProtectionSpec | None = None,
    ) -> None:
        self._root, self._shape = root, shape
        self._job = 0
        self._pool = self._make_pool()
        self._hashes = [index.to_bytes(4, "big") * 8 for index in range(1, shape.blocks + 1)]
        spec = self._group_spec()
        slot_bytes = align_up(Group.from_spec(spec).slot_bytes)
        # A store that finds no staging is shed; an engine's stores are, a benchmark's must not be.
        self._stores_in_flight = max(1, min(staging_slots(staging_bytes, slot_bytes, io_threads)[1], 64))
        setup = Setup(
            *(str(root), direct_io, 0, False, io_threads, staging_bytes, (spec,)),
            transport=transport,
            protection=protection,
        )
        self._client = IoClient(setup, io_process="on", load_timeout_ms=120_000, fence_timeout_ms=60_000)
        self._client.start()

    @property
    def tier_name(self) -> str:
        """The tier, with the transport it took."""
        return self._client.ready.tier_name

    @property
    def mode(self) -> str:
        """Where the service runs and which transport it took."""
        return f"{self._client.mode}, {self._client.ready.tier_name}"

    @property
    def cpu_s(self) -> float:
        """CPU seconds that the service's process has used."""
        assert self._client.child_pid is not None
        fields = Path(f"/proc/{self._client.child_pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def chunk_files(self) -> list[Path]:
        """The files of all chunks."""
        return sorted(self._root.rglob("*.kv"))

    def write(self) -> float:
        """Store every chunk; seconds from the first submission to the last answer."""
        outcomes: list[str] = []

        def take(results: Sequence[object]) -> None:
            for result in results:
                if isinstance(result, StoreResult):
                    outcomes.extend(result.outcomes)

        per_chunk = self._shape.blocks_per_chunk
        start = time.perf_counter()
        for index in range(self._shape.chunk_count):
            while self._client.pending_stores >= self._stores_in_flight:
                self._wait(take)
            blocks = range(index * per_chunk, (index + 1) * per_chunk)
            hashes = b"".join(self._hashes[blocks.start : blocks.stop])
            chunk = StoreChunk(_NAMESPACE.digest, 0, blocks.start, 0, hashes, tuple(blocks))
            self._client.submit_store(self._next_job(), (chunk,))
        while self._client.pending_stores:
            self._wait(take)
        elapsed = time.perf_counter() - start
        take(self._client.poll())
        if outcomes != ["stored"] * self._shape.chunk_count:
            raise RuntimeError(f"not every chunk was stored: {sorted(set(outcomes))}, {len(outcomes)} answers")
        return elapsed

    def read(self) -> float:
        """Load every chunk in one job, as one request's prefix; seconds from submission to answer."""
        shape, answers = self._shape, list[LoadResult]()

        def take(results: Sequence[object]) -> None:
            answers.extend(result for result in results if isinstance(result, LoadResult))

        pages = np.arange(shape.blocks, 2 * shape.blocks, dtype="<i4").tobytes()
        run = LoadRun(
            _NAMESPACE.digest, 0, shape.blocks_per_chunk, shape.chunk_count, 0, b"", 0, b"".join(self._hashes), pages
        )
        start = time.perf_counter()
        self._client.submit_load(self._next_job(), (run,))
        while self._client.pending_loads:
            self._wait(take)
        elapsed = time.perf_counter() - start
        take(self._client.poll())
        if [(a.good_blocks, a.kinds) for a in answers] != [((shape.blocks,), ("",))]:
            raise RuntimeError(f"not every block was loaded: {answers}")
        return elapsed

    def check_loaded(self) -> None:
        """Compare what was loaded with what was stored, then wipe it.

        Raises:
            RuntimeError: a byte differs.
        """
        half = self._shape.blocks
        if not np.array_equal(self._pool[:, :half], self._pool[:, half:]):
            raise RuntimeError("loaded bytes differ from stored ones")
        self._pool[:, half:] = 0

    def close(self) -> None:
        """End the service."""
        self._client.close()

    def __exit__(self, *_: object) -> None:
        self.close()

    def _wait(self, take: Callable[[Sequence[object]], None]) -> None:
        self._client.wait(1.0)
        take(self._client.poll())

    def _next_job(self) -> int:
        self._job += 1
        return self._job

    def _make_pool(self) -> np.ndarray[tuple[int, int, int], np.dtype[np.uint8]]:
        shape = (LAYERS, 2 * self._shape.blocks, self._shape.piece_bytes)
        area = mmap.mmap(-1, int(np.prod(shape)), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        pool = np.frombuffer(area, dtype=np.uint8).reshape(shape)
        generator = np.random.default_rng(1)
        for layer in pool:
            layer[:] = generator.integers(0, 256, layer.shape, dtype=np.uint8)
        pool[:, self._shape.blocks :] = 0
        return pool

    def _group_spec(self) -> GroupSpec:
        piece, layer_bytes = self._shape.piece_bytes, self._pool[0].nbytes
        base = self._pool.ctypes.data
        return GroupSpec(
            group=0,
            shard=(0, 2, 2, 0, LAYERS, LAYERS),
            block_tokens=BLOCK_TOKENS,
            block_bytes=self._shape.block_bytes,
            blocks_per_chunk=self._shape.blocks_per_chunk,
            num_blocks=2 * self._shape.blocks,
            tiles=tuple(TileSpec(base + layer * layer_bytes, piece, piece) for layer in range(LAYERS)),
        )
