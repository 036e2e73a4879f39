"""The stages of the load and store pipelines: what runs beside what, and what waits for what."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from memkv_engines.keys import ChunkName
from memkv_engines.offload.messages import Gathered, Load, LoadDone, Reply, Setup, Store, StoreDone
from memkv_engines.offload.pages import Iovecs, MappedPages, Pages
from memkv_engines.offload.service import IoService, staging_slots
from memkv_engines.tier.base import ChunkReader
from memkv_engines.tier.memory import MemoryTier
from memkv_engines.transports.memory import MemoryTransport
from tests.fast.io_samples import BLOCKS_PER_CHUNK as N
from tests.fast.io_samples import block_outermost, make_run, make_store, until
from tests.fast.samples import chain

CHUNKS, IO_THREADS = 12, 3
POOL = block_outermost(0, 2 * N * CHUNKS, 4096)
HASHES = chain(N * CHUNKS, "pipelines")


class HeldPages(Pages):
    """Copies that wait for a gate."""

    def __init__(self) -> None:
        self._pages = MappedPages()
        self.gate = threading.Event()
        self.gate.set()

    def gather(self, iovecs: Iovecs, tiles: int, staging_address: int, block_bytes: int, stride_bytes: int) -> None:
        self._pages.gather(iovecs, tiles, staging_address, block_bytes, stride_bytes)

    def scatter(self, iovecs: Iovecs, tiles: int, staging_address: int, block_bytes: int, stride_bytes: int) -> None:
        assert self.gate.wait(20)
        self._pages.scatter(iovecs, tiles, staging_address, block_bytes, stride_bytes)


class CountingTier(MemoryTier):
    """Counts chunks opened and closed, and how many writes are under way; writes can be held."""

    def __init__(self) -> None:
        super().__init__()
        self.opened = self.writing = self.most_writing = 0
        self.write_gate = threading.Event()
        self.write_gate.set()
        self.may_open: Callable[[ChunkName], bool] = lambda _: True
        self._count = threading.Lock()

    def open(self, folder: str, name: ChunkName) -> ChunkReader:
        until(lambda: self.may_open(name))
        with self._count:
            self.opened += 1
        return super().open(folder, name)

    def put(self, *args: object, **kwargs: object):  # type: ignore[no-untyped-def]
        with self._count:
            self.writing += 1
            self.most_writing = max(self.most_writing, self.writing)
        assert self.write_gate.wait(20)
        try:
            return super().put(*args, **kwargs)  # type: ignore[arg-type]
        finally:
            with self._count:
                self.writing -= 1


class Bench:
    """A service whose parts can be held."""

    def __init__(self) -> None:
        self.tier, self.pages = CountingTier(), HeldPages()
        self.replies: queue.SimpleQueue[Reply] = queue.SimpleQueue()
        setup = Setup("", "off", 0, False, IO_THREADS, 16 << 20, (POOL.spec(),))
        self.service = IoService(setup, self.tier, self.pages, self.replies.put)
        self.service.start()

    def store_all(self) -> None:
        chunks = [
            make_store(POOL, HASHES[i * N : (i + 1) * N], range(i * N, (i + 1) * N), replace=True)
            for i in range(CHUNKS)
        ]
        self.service.submit(Store(1, tuple(chunks)))

    def load_all(self) -> None:
        run = make_run(POOL, HASHES, range(N * CHUNKS, 2 * N * CHUNKS), chunk_count=CHUNKS)
        self.service.submit(Load(2, (run,)))

    def reply(self) -> Reply:
        return self.replies.get(timeout=20)


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench()
    yield made
    made.pages.gate.set()
    made.tier.write_gate.set()
    made.service.stop(20)


def stored(bench: Bench) -> None:
    bench.store_all()
    assert bench.reply() == Gathered(1)
    done = bench.reply()
    assert isinstance(done, StoreDone) and done.outcomes == ("stored",) * CHUNKS


def test_reading_goes_on_while_placing_is_stuck(bench: Bench) -> None:
    stored(bench)
    bench.pages.gate.clear()
    bench.load_all()
    # Every slot is read into: those being placed do not keep the device waiting.
    until(lambda: bench.tier.opened == 2 * IO_THREADS)
    time.sleep(0.05)
    assert bench.tier.opened == 2 * IO_THREADS, "a chunk was read without a slot to read it into"
    bench.pages.gate.set()
    done = bench.reply()
    assert isinstance(done, LoadDone)
    assert (done.good_blocks, done.kinds, done.chunks) == ((N * CHUNKS,), ("",), CHUNKS)
    assert all(POOL.block(page) == POOL.block(page + N * CHUNKS) for page in range(N * CHUNKS))


def test_as_many_writes_at_a_time_as_there_are_io_threads(bench: Bench) -> None:
    bench.tier.write_gate.clear()
    bench.store_all()
    assert bench.reply() == Gathered(1), "gathering waited for the tier"
    until(lambda: bench.tier.writing == IO_THREADS)
    bench.tier.write_gate.set()
    done = bench.reply()
    assert isinstance(done, StoreDone) and done.outcomes == ("stored",) * CHUNKS
    assert bench.tier.most_writing == IO_THREADS


def test_writes_stand_back_while_a_load_is_pending(bench: Bench) -> None:
    stored(bench)
    before = bench.tier.most_writing
    bench.tier.most_writing = 0
    bench.pages.gate.clear()
    bench.load_all()
    until(lambda: bench.tier.opened == 2 * IO_THREADS)
    bench.store_all()
    assert bench.reply() == Gathered(1)
    time.sleep(0.1)
    assert bench.tier.most_writing == 0
    bench.pages.gate.set()
    kinds = {type(bench.reply()) for _ in range(2)}
    assert kinds == {LoadDone, StoreDone} and before > 0 < bench.tier.most_writing


def test_a_bad_chunk_spares_reading_and_placing_what_follows(bench: Bench) -> None:
    stored(bench)
    # By name: writers finish in any order.
    folder, name = next(key for key in bench.tier._objects if key[1].first == HASHES[0][:16])
    bench.tier._objects[(folder, name)][4096 + 5] ^= 1  # first chunk, payload
    bench.tier.opened = 0
    # However the threads are scheduled, the others are read no sooner than the first one is known to be bad.
    loads = bench.service._loads
    assert loads is not None
    bench.tier.may_open = lambda asked: asked == name or loads._pending < CHUNKS
    bench.load_all()
    done = bench.reply()
    assert isinstance(done, LoadDone)
    assert (done.good_blocks, done.kinds) == ((0,), ("damaged",))
    # Twice the bad one, and one for each reader that was at it.
    assert bench.tier.opened <= 4
    bench.tier.may_open = lambda _: True
    assert (folder, name) not in bench.tier._objects
    # Every slot came back: the next job finds them all.
    run = make_run(POOL, HASHES[N:], range(N * CHUNKS, 2 * N * CHUNKS - N), chunk_count=CHUNKS - 1)
    bench.service.submit(Load(3, (run,)))
    done = bench.reply()
    assert isinstance(done, LoadDone) and done.good_blocks == (N * (CHUNKS - 1),)


def test_what_was_submitted_is_finished_at_the_end(bench: Bench) -> None:
    bench.store_all()
    bench.service.stop(20)
    assert bench.reply() == Gathered(1)
    done = bench.reply()
    assert isinstance(done, StoreDone) and done.outcomes == ("stored",) * CHUNKS


@pytest.mark.parametrize(
    ("staging_mib", "slot_mib", "io_threads", "expected"),
    [
        (256, 4, 8, (16, 48)),
        (256, 16, 8, (8, 8)),  # half of the memory, although 16 would be wanted
        (8, 16, 8, (2, 2)),  # less than a slot: what a service cannot do without
        (64, 1, 1, (2, 62)),
        (1 << 14, 1, 4, (8, 1024)),
    ],
)
def test_staging_is_shared_out(staging_mib: int, slot_mib: int, io_threads: int, expected: tuple[int, int]) -> None:
    assert staging_slots(staging_mib << 20, slot_mib << 20, io_threads) == expected


def test_what_is_right_when_read_once_more_is_a_hit_and_stays(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory, bus and network err too; the chunk may be good for everybody else."""
    stored(bench)
    read, bad = MemoryTransport.read, threading.Lock()

    def read_wrong_once(self: MemoryTransport, handle: bytearray, views: list[memoryview], offset: int) -> None:
        read(self, handle, views, offset)
        if bad.acquire(blocking=False):
            views[-1][-1] ^= 1

    monkeypatch.setattr(MemoryTransport, "read", read_wrong_once)
    kept = len(bench.tier._objects)
    bench.load_all()
    done = bench.reply()
    assert isinstance(done, LoadDone)
    assert (done.good_blocks, done.kinds, done.reread) == ((N * CHUNKS,), ("",), 1)
    assert len(bench.tier._objects) == kept
