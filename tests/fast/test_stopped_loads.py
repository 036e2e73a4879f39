"""Loads that turn out slower than what they save: the leading chunks stay, and nothing counts as a failure."""

from __future__ import annotations

import queue
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from memkv_engines.offload.messages import STOPPED, Load, LoadDone, Reply, Setup, Store
from memkv_engines.offload.pages import MappedPages
from memkv_engines.offload.results import LoadResult
from memkv_engines.offload.service import IoService
from memkv_engines.tier.base import ChunkReader
from memkv_engines.tier.memory import MemoryTier
from tests.fast.io_samples import block_outermost, load, make_run, make_store, path_of, results_of, store
from tests.fast.samples import chain
from tests.fast.service_samples import POOL as SERVED
from tests.fast.service_samples import N, Service

CHUNKS, READERS, IO_THREADS = 12, 2, 3
OPEN_S = 0.03
POOL = block_outermost(0, 2 * N * CHUNKS, 4096)


class SlowTier(MemoryTier):
    """Each chunk takes its time to be opened, beside others."""

    delay_s = OPEN_S

    def open(self, *args: object, **kwargs: object) -> ChunkReader:
        time.sleep(self.delay_s)
        return super().open(*args, **kwargs)  # type: ignore[arg-type]


class Bench:
    """A service over a slow tier that holds a prompt."""

    def __init__(self, hashes: list[bytes]) -> None:
        self.hashes, self.tier = hashes, SlowTier()
        self._replies: queue.SimpleQueue[Reply] = queue.SimpleQueue()
        setup = Setup("", "off", 0, False, IO_THREADS, 16 << 20, (POOL.spec(),))
        self.service = IoService(setup, self.tier, MappedPages(), self._replies.put)
        self.service.start()
        chunks = [make_store(POOL, hashes[i : i + N], range(i, i + N), replace=True) for i in range(0, N * CHUNKS, N)]
        self.service.submit(Store(1, tuple(chunks)))
        for _ in range(2):
            self._replies.get(timeout=20)

    def load(self, stop_s: float) -> LoadDone:
        run = make_run(POOL, self.hashes, range(N * CHUNKS, 2 * N * CHUNKS), chunk_count=CHUNKS)
        self.service.submit(Load(2, (run,), int(stop_s * 1e6)))
        return self.reply()

    def reply(self) -> LoadDone:
        reply = self._replies.get(timeout=20)
        assert isinstance(reply, LoadDone)
        return reply


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench(chain(N * CHUNKS, "stopped loads"))
    yield made
    made.service.stop(20)


def test_a_load_that_is_worth_it_is_not_stopped(bench: Bench) -> None:
    for stop_s in (0.0, 20.0):
        done = bench.load(stop_s)
        assert (done.kinds, done.good_blocks, done.chunks) == (("",), (N * CHUNKS,), CHUNKS)


def test_a_slow_load_ends_as_soon_as_that_can_be_seen(bench: Bench) -> None:
    """All of it would take six times the time of a chunk; what was read at once tells that."""
    done = bench.load(3 * OPEN_S)
    assert done.kinds == (STOPPED,)
    assert READERS <= done.chunks <= 2 * READERS
    assert done.good_blocks == (N * done.chunks,)
    assert done.elapsed_us < 1e6 * OPEN_S * CHUNKS / READERS * 0.9
    pages = [POOL.block(page) for page in range(N * done.chunks)]
    assert [POOL.block(N * CHUNKS + page) for page in range(N * done.chunks)] == pages


def test_a_load_that_waits_behind_others_is_not_stopped_for_it(bench: Bench) -> None:
    """Twelve chunks before it take six times as long as it may."""
    run = make_run(POOL, bench.hashes, range(N * CHUNKS, 2 * N * CHUNKS), chunk_count=CHUNKS)
    one = make_run(POOL, bench.hashes[:N], range(N * CHUNKS, N * CHUNKS + N))
    bench.service.submit(Load(3, (run,)))
    bench.service.submit(Load(4, (one,), int(1e6 * 3 * OPEN_S)))
    done = {reply.job_id: reply.kinds for reply in (bench.reply(), bench.reply())}
    assert done == {3: ("",), 4: ("",)}


def test_a_load_that_waits_for_its_first_chunk_is_stopped_by_the_clock(bench: Bench) -> None:
    bench.tier.delay_s = 10 * OPEN_S
    done = bench.load(OPEN_S)
    assert (done.kinds, done.chunks) == ((STOPPED,), READERS)


def test_every_client_says_what_was_stopped(service: Service) -> None:
    hashes = service.prompt(2 * N)
    store(service.client, *(make_store(SERVED, hashes[i : i + N], range(i, i + N)) for i in (0, N)))
    run = make_run(SERVED, hashes, range(12, 12 + 2 * N), chunk_count=2)
    service.client.submit_load(90, (run,), 1e-6)
    (result,) = results_of(service.client)
    assert isinstance(result, LoadResult) and result.kinds == (STOPPED,)
    assert result.good_blocks[0] <= N, "one chunk at most had begun"
    counted = service.client.counters
    assert (counted["load_stopped"], counted["load_jobs_failed"], counted["miss_io_error"]) == (1, 0, 0)
    whole = load(service.client, run)
    assert whole.kinds == ("",)
    assert whole.measures and whole.read_bytes >= 2 * N * SERVED.block_bytes and whole.seconds > 0


def test_what_failed_does_not_measure_the_tier(service: Service) -> None:
    hashes = service.prompt(2 * N)
    store(service.client, *(make_store(SERVED, hashes[i : i + N], range(i, i + N)) for i in (0, N)))
    Path(path_of(service.root, SERVED, hashes[N:])).unlink()
    result = load(service.client, make_run(SERVED, hashes, range(12, 12 + 2 * N), chunk_count=2))
    assert result.kinds == ("missing",)
    assert result.read_bytes > 0 and not result.measures
