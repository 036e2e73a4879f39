"""Staging memory: slots come and go, and one that the device may still touch does not come back."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

from memkv_engines.errors import TransferOverdue, TransportError
from memkv_engines.keys import ChunkName
from memkv_engines.limits import ALIGN_BYTES
from memkv_engines.offload.messages import Gathered, Load, LoadDone, Reply, Setup, Store, StoreDone
from memkv_engines.offload.pages import MappedPages
from memkv_engines.offload.service import IoService
from memkv_engines.offload.staging import StagingPool
from memkv_engines.tier.base import ChunkReader, PutResult
from memkv_engines.tier.memory import MemoryTier
from memkv_engines.transports.files import address_of
from tests.fast.io_samples import block_outermost, make_run, make_store, until
from tests.fast.samples import chain

N = 4


class Hung:
    """A transfer that ends when the test says so."""

    def __init__(self) -> None:
        self.over = False

    def error(self) -> TransferOverdue:
        return TransferOverdue("not done", lambda: self.over)


def test_slots_lie_where_the_pool_says() -> None:
    pool = StagingPool(3 * ALIGN_BYTES + 1, 4)
    slots = [pool.acquire() for _ in range(4)]
    assert pool.try_acquire() is None
    assert sorted(slot.address for slot in slots) == [pool.address + i * pool.slot_bytes for i in range(4)]
    assert pool.nbytes == 4 * pool.slot_bytes
    assert all(address_of(slot.view) == slot.address for slot in slots)


def test_a_slot_comes_back_after_its_transfer_has_ended_and_not_before() -> None:
    pool, hung = StagingPool(ALIGN_BYTES, 2), Hung()
    held, other = pool.acquire(), pool.acquire()
    pool.release(held, hung.error())
    assert pool.try_acquire() is None
    pool.release(other, TransportError("failed, and over"))
    assert pool.try_acquire() is other
    assert pool.try_acquire() is None
    hung.over = True
    assert pool.try_acquire() is held


def test_waiting_for_a_slot_notices_that_a_transfer_has_ended() -> None:
    pool, hung, got = StagingPool(ALIGN_BYTES, 1), Hung(), []
    held = pool.acquire()
    pool.release(held, hung.error())
    thread = threading.Thread(target=lambda: got.append(pool.acquire()))
    thread.start()
    time.sleep(0.1)
    assert not got
    hung.over = True
    thread.join(5.0)
    assert got == [held]


class HangingTier(MemoryTier):
    """Its transfers hang while a transfer is given; late bytes land when the test says so."""

    def __init__(self) -> None:
        super().__init__()
        self.hung: Hung | None = None
        self.passes = 0
        self.seen: list[int] = []
        self.registered: list[tuple[int, int]] = []

    def register_memory(self, address: int, length_bytes: int, *, device: int | None = None) -> None:
        self.registered.append((address, length_bytes))

    def _pass(self, views: Sequence[memoryview]) -> None:
        self.seen.append(address_of(views[0]))
        if self.hung is not None and len(self.seen) > self.passes:
            raise self.hung.error()

    def put(self, folder: str, name: ChunkName, views: Sequence[memoryview], *, replace: bool = False) -> PutResult:
        self._pass(views)
        return super().put(folder, name, views, replace=replace)

    def open(self, folder: str, name: ChunkName) -> ChunkReader:
        reader, tier = super().open(folder, name), self

        class Reader(ChunkReader):
            object_bytes = reader.object_bytes

            def read(self, views: Sequence[memoryview], offset: int) -> None:
                tier._pass(views)
                reader.read(views, offset)

            def close(self) -> None:
                reader.close()

        return Reader()


def test_so_do_loads_in_pieces() -> None:
    """A chunk longer than a slot is read on while it is placed: there a read may hang too."""
    pool, tier, replies = block_outermost(0, 40, 200_000), HangingTier(), list[Reply]()
    hashes = chain(16)
    writer = IoService(
        Setup("", "off", 0, False, 1, 16 << 20, (pool.spec(blocks_per_chunk=16),)), tier, MappedPages(), replies.append
    )
    writer.start()
    writer.submit(Store(1, (make_store(pool, hashes, range(16)),)))
    until(lambda: any(isinstance(reply, StoreDone) for reply in replies))
    writer.stop(20)
    replies.clear()
    tier.seen.clear()
    reader = IoService(
        Setup("", "off", 0, False, 1, 16 << 20, (pool.spec(blocks_per_chunk=1),)), tier, MappedPages(), replies.append
    )
    reader.start()
    assert reader._loads is not None
    staging = reader._loads._staging
    tier.hung, tier.passes = Hung(), 1
    reader.submit(Load(2, (make_run(pool, hashes, range(20, 36), block_count=16),)))
    until(lambda: replies)
    (loaded,) = replies
    assert isinstance(loaded, LoadDone) and loaded.kinds == ("io_error",)
    assert len(staging._withheld) == 1
    assert len([slot for slot in iter(staging.try_acquire, None)]) == staging.slots - 1
    reader.stop(20)


def test_jobs_withhold_the_slot_of_an_overdue_transfer() -> None:
    pool, tier, replies = block_outermost(0, 24, ALIGN_BYTES), HangingTier(), list[Reply]()
    setup = Setup("", "off", 0, False, 1, 16 << 20, (pool.spec(),))
    service = IoService(setup, tier, MappedPages(), replies.append)
    service.start()
    assert service._loads is not None and service._stores is not None
    load_staging, store_staging = service._loads._staging, service._stores._staging
    assert tier.registered == [(s.address, s.nbytes) for s in (load_staging, store_staging)]
    hashes, hung = chain(N), Hung()

    def answer(kind: type[Reply]) -> Reply:
        until(lambda: any(isinstance(r, kind) for r in replies))
        found = next(r for r in replies if isinstance(r, kind))
        replies.remove(found)
        return found

    tier.hung = hung
    service.submit(Store(1, (make_store(pool, hashes, range(N)),)))
    answer(Gathered)
    done = answer(StoreDone)
    assert isinstance(done, StoreDone) and done.outcomes == ("failed",)
    assert len(store_staging._withheld) == 1
    tier.hung = None
    service.submit(Store(2, (make_store(pool, hashes, range(N)),)))
    answer(Gathered)
    answer(StoreDone)
    assert tier.seen[0] != tier.seen[1], "the slot was used again while the device may still read from it"

    tier.seen.clear()
    tier.hung = hung
    before = pool.memory.copy()
    service.submit(Load(3, (make_run(pool, hashes, range(12, 16)),)))
    loaded = answer(LoadDone)
    assert isinstance(loaded, LoadDone) and (loaded.good_blocks, loaded.kinds) == ((0,), ("io_error",))
    assert (pool.memory == before).all()
    assert len(load_staging._withheld) == 1
    tier.hung = None
    for job in range(4, 8):
        service.submit(Load(job, (make_run(pool, hashes, range(12, 16)),)))
        loaded = answer(LoadDone)
        assert isinstance(loaded, LoadDone) and loaded.kinds == ("",)
    assert tier.seen[0] not in tier.seen[1:], "the slot was used again while the device may still write into it"
    hung.over = True
    free = [load_staging.acquire() for _ in range(load_staging.slots)]
    assert len(free) == load_staging.slots
    service.stop(20)
