"""Paged memory as engines lay it out, and a client to move it with."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt

from memkv_engines.keys import ChunkName, Namespace
from memkv_engines.limits import KEY_BYTES
from memkv_engines.metrics import Counters
from memkv_engines.offload.client import IoClient
from memkv_engines.offload.device_client import DeviceIoClient
from memkv_engines.offload.job_client import JobClient
from memkv_engines.offload.messages import GroupSpec, LoadRun, Probe, ProbeDone, Setup, StoreChunk, TileSpec
from memkv_engines.offload.pinned import PinnedStaging
from memkv_engines.offload.results import LoadResult, StoreResult
from tests.fast.late_mover import STREAM, LateMover
from tests.fast.samples import NAMESPACE, SHARD

BLOCK_TOKENS = 16
BLOCKS_PER_CHUNK = 4
_GUARD_BYTES = 4096
Result = LoadResult | StoreResult | ProbeDone


class Pool:
    """The pages of one KV group, between guards, filled with noise.

    Args:
        group: number of the group.
        num_blocks: pages.
        tiles: offset, stride and length of each piece of a block.
    """

    def __init__(self, group: int, num_blocks: int, tiles: Sequence[tuple[int, int, int]]) -> None:
        self.group, self.num_blocks, self._tiles = group, num_blocks, tuple(tiles)
        size = max(offset + num_blocks * stride for offset, stride, _ in tiles)
        generator = np.random.default_rng(group)
        self.memory = generator.integers(0, 256, size + 2 * _GUARD_BYTES, dtype=np.uint8)
        self._base = self.memory.ctypes.data + _GUARD_BYTES

    @property
    def block_bytes(self) -> int:
        return sum(length for _, _, length in self._tiles)

    def spec(self, blocks_per_chunk: int = BLOCKS_PER_CHUNK) -> GroupSpec:
        tiles = tuple(TileSpec(self._base + offset, stride, length) for offset, stride, length in self._tiles)
        return GroupSpec(
            self.group, SHARD.as_tuple(), BLOCK_TOKENS, self.block_bytes, blocks_per_chunk, self.num_blocks, tiles
        )

    def block(self, page: int) -> bytes:
        """What a page holds, in payload order."""
        return b"".join(self._piece(self.memory, page, tile).tobytes() for tile in self._tiles)

    def with_copies(self, memory: npt.NDArray[np.uint8], copies: dict[int, int]) -> npt.NDArray[np.uint8]:
        """The memory as it should be after pages (keys) got the content of others (values)."""
        expected = memory.copy()
        for target, source in copies.items():
            for tile in self._tiles:
                self._piece(expected, target, tile)[:] = self._piece(memory, source, tile)
        return expected

    @staticmethod
    def _piece(memory: npt.NDArray[np.uint8], page: int, tile: tuple[int, int, int]) -> npt.NDArray[np.uint8]:
        offset, stride, length = tile
        start = _GUARD_BYTES + offset + page * stride
        return memory[start : start + length]


def layer_outermost(group: int, num_blocks: int, pieces: int, piece_bytes: int, gap_bytes: int = 0) -> Pool:
    """One array per layer (and per K and V): a block is many pieces."""
    stride = piece_bytes + gap_bytes
    return Pool(group, num_blocks, [(i * num_blocks * stride, stride, piece_bytes) for i in range(pieces)])


def block_outermost(group: int, num_blocks: int, block_bytes: int) -> Pool:
    """All layers of a block side by side: one piece."""
    return Pool(group, num_blocks, [(0, block_bytes, block_bytes)])


@contextmanager
def quick_folder() -> Iterator[Path]:
    """A folder in memory where there is one: each start of a service writes and syncs a probe file several times."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as folder:
        yield Path(folder)


def setup_for(path: Path, pools: Sequence[Pool], **options: object) -> Setup:
    """Small and quick: one megabyte of staging, no timing of direct I/O."""
    values: dict[str, object] = {
        "direct_io": "off",
        "capacity_bytes": 0,
        "read_only": False,
        "io_threads": 2,
        "staging_bytes": 16 << 20,
        "groups": tuple(p.spec() for p in pools),
    }
    return Setup(str(path), **{**values, **options})  # type: ignore[arg-type]


def started(setup: Setup, io_process: str, **options: int) -> IoClient:
    """A client whose service runs."""
    client = IoClient(setup, io_process=io_process, counters=Counters(), **options)
    client.start()
    return client


def started_device(setup: Setup, **options: int) -> tuple[DeviceIoClient, LateMover]:
    """A client for pools "in device memory", with a process for its service; and its mover."""
    movers: list[LateMover] = []

    def make_mover(staging: PinnedStaging) -> LateMover:
        movers.append(LateMover(setup.groups, staging))
        return movers[0]

    client = DeviceIoClient(
        lambda specs: IoClient(msgspec.structs.replace(setup, groups=tuple(specs)), io_process="on", **options),
        make_mover,
        setup.groups,
        staging_bytes=setup.staging_bytes,
        stream=lambda: STREAM,
        **options,
    )
    client.start()
    return client, movers[0]


def results_of(client: JobClient, count: int = 1, timeout_s: float = 20.0) -> list[Result]:
    """The next results, as many as wanted."""
    found: list[Result] = []
    deadline = time.monotonic() + timeout_s
    while len(found) < count:
        assert time.monotonic() < deadline, f"{len(found)} of {count} results after {timeout_s} s"
        client.wait(0.05)
        found += client.poll()
    return found


def until(condition: Callable[[], object], timeout_s: float = 10.0) -> None:
    """Wait for something to become true."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.005)


_next_job = iter(range(1, 1 << 30))


def store(client: JobClient, *chunks: StoreChunk) -> tuple[str, ...]:
    """Store and wait."""
    job = next(_next_job)
    client.submit_store(job, chunks)
    assert client.fence()
    (result,) = results_of(client)
    assert isinstance(result, StoreResult) and result.job_id == job
    return result.outcomes


def load(client: JobClient, *runs: LoadRun) -> LoadResult:
    """Load and wait."""
    job = next(_next_job)
    client.submit_load(job, runs)
    (result,) = results_of(client)
    assert isinstance(result, LoadResult) and result.job_id == job
    return result


def probe(client: JobClient, message: Probe) -> ProbeDone:
    """Look up and wait."""
    client.submit_probe(message)
    (result,) = results_of(client)
    assert isinstance(result, ProbeDone) and result.probe_id == message.probe_id
    return result


def make_store(
    pool: Pool,
    hashes: Sequence[bytes],
    pages: Sequence[int],
    *,
    holes: int = 0,
    replace: bool = False,
    namespace: Namespace = NAMESPACE,
) -> StoreChunk:
    """One chunk: its blocks' hashes, and the pages of those that are not holes."""
    return StoreChunk(namespace.digest, pool.group, 0, holes, b"".join(hashes), tuple(pages), replace)


def make_run(
    pool: Pool,
    hashes: Sequence[bytes],
    pages: Sequence[int],
    *,
    block_count: int = BLOCKS_PER_CHUNK,
    chunk_count: int = 1,
    take_first: int = 0,
    last: bytes = b"",
    holes: int = 0,
    namespace: Namespace = NAMESPACE,
) -> LoadRun:
    """Blocks from ``take_first`` on of the chunks with these hashes, into pages."""
    ids = np.array(pages, dtype="<i4").tobytes()
    return LoadRun(
        namespace.digest,
        pool.group,
        block_count,
        chunk_count,
        holes,
        last[:KEY_BYTES],
        take_first,
        b"".join(hashes),
        ids,
    )


def name_of(pool: Pool, hashes: Sequence[bytes], *, holes: int = 0) -> ChunkName:
    """Name of the chunk with these blocks."""
    return ChunkName(hashes[0][:KEY_BYTES], hashes[-1][:KEY_BYTES], len(hashes), holes, pool.group, SHARD.text)


def path_of(root: Path, pool: Pool, hashes: Sequence[bytes], *, holes: int = 0) -> Path:
    """File of that chunk."""
    name = name_of(pool, hashes, holes=holes)
    return root / NAMESPACE.folder / name.bucket / name.text
