"""The I/O service with a level of memory: chunks come from there, verified, and from the tier where it fails."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from memkv_engines.errors import ChunkMissing
from memkv_engines.keys import ChunkName
from memkv_engines.limits import KEY_BYTES
from memkv_engines.offload.client import IoClient
from memkv_engines.offload.memory_level import Held, MemoryLevel, resident_key
from memkv_engines.offload.messages import InMemory, Load, LoadDone, ProtectionSpec, Reply, Setup, Store, StoreDone
from memkv_engines.offload.pages import MappedPages
from memkv_engines.offload.service import IoService
from memkv_engines.tier.base import ChunkReader
from memkv_engines.tier.memory import MemoryTier
from tests.fast.io_samples import (
    JobClient,
    block_outermost,
    make_run,
    make_store,
    name_of,
    path_of,
    quick_folder,
    setup_for,
    started,
    started_device,
    store,
    until,
)
from tests.fast.protected_samples import KEY
from tests.fast.samples import NAMESPACE, chain
from tests.fast.service_samples import GEOMETRY, POOL, POOLS, N, Service, check_load

ENCRYPTED, AUTHENTICATED = ProtectionSpec(True, KEY), ProtectionSpec(False, KEY)
WAYS: dict[str, tuple[str, ProtectionSpec | None]] = {
    "process": ("on", None),
    "threads": ("off", None),
    "device": ("device", None),
    "process, authenticated": ("on", AUTHENTICATED),
    "threads, encrypted": ("off", ENCRYPTED),
}
KEPT = 6


def with_memory(told: Setup, kept: int = KEPT) -> Setup:
    """With a level of memory for so many chunks."""
    service = IoService(told, MemoryTier(), MappedPages(), lambda reply: None)
    return msgspec.structs.replace(told, memory_bytes=kept * service._staging[0].slot_bytes)


def setup(root: Path, protection: ProtectionSpec | None = None) -> Setup:
    return with_memory(setup_for(root, list(POOLS.values()), protection=protection))


@pytest.fixture(scope="module", params=WAYS)
def kept(request: pytest.FixtureRequest) -> Iterator[Service]:
    mode, protection = WAYS[request.param]
    with quick_folder() as root:
        told = setup(root, protection)
        client: JobClient = started_device(told)[0] if mode == "device" else started(told, mode)
        service = Service(client, root, mode)
        # Its slots come one by one.
        until(lambda: (stored(service), len(client.residents) == KEPT)[1])
        yield service
        client.close()


def stored(service: Service, pool: Any = POOL, pages: range = range(N)) -> list[bytes]:
    """A chunk that was stored, and is right in memory only."""
    hashes = service.prompt()
    assert store(service.client, make_store(pool, hashes, pages)) == ("stored",)
    empty(service, pool, hashes)
    return hashes


def empty(service: Service, pool: Any, hashes: list[bytes], holes: int = 0) -> None:
    """Of the chunk in the tier nothing is left but its name."""
    os.truncate(path_of(service.root, pool, hashes, holes=holes), 0)


def bytes_of(client: JobClient) -> tuple[int, int]:
    """What came from the tier, and from memory, so far."""
    return client.counters["load_bytes"], client.counters["load_memory_bytes"]


# ------------------------------------------------------------------------------------------------ there and back again


@pytest.mark.parametrize("layout", POOLS)
def test_any_blocks_come_from_memory(kept: Service, layout: str) -> None:
    pool = POOLS[layout]
    hashes = stored(kept, pool)
    before = bytes_of(kept.client)
    for first in range(N):
        for stop in range(first + 1, N + 1):
            target = range(12 + first, 12 + stop)
            run = make_run(pool, hashes[:stop], target, take_first=first, last=hashes[-1])
            check_load(kept.client, pool, run, dict(zip(target, range(first, stop), strict=True)))
    from_tier, from_memory = (now - then for now, then in zip(bytes_of(kept.client), before, strict=True))
    assert from_tier == 0 and from_memory >= 20 * pool.block_bytes


def test_what_was_loaded_stays_unless_it_was_decrypted(kept: Service, request: pytest.FixtureRequest) -> None:
    hashes = kept.prompt()
    assert store(kept.client, make_store(POOL, hashes, range(N))) == ("stored",)
    for _ in range(KEPT):
        stored(kept)
    run = make_run(POOL, hashes, range(12, 16))
    copies = {12 + i: i for i in range(N)}
    before = bytes_of(kept.client)
    check_load(kept.client, POOL, run, copies)
    assert bytes_of(kept.client)[0] > before[0], "others have taken its place"
    empty(kept, POOL, hashes)
    if "encrypted" in request.node.callspec.id:
        check_load(kept.client, POOL, run, {}, kind="truncated")
    else:
        check_load(kept.client, POOL, run, copies)


def test_a_part_of_a_chunk_does_not_stay(kept: Service) -> None:
    hashes = kept.prompt()
    store(kept.client, make_store(POOL, hashes, range(N)))
    for _ in range(KEPT):
        stored(kept)
    part = make_run(POOL, hashes[: N - 1], range(12, 12 + N - 1), last=hashes[-1])
    check_load(kept.client, POOL, part, {12 + i: i for i in range(N - 1)})
    empty(kept, POOL, hashes)
    check_load(kept.client, POOL, part, {}, kind="truncated")


def test_holes_stay_holes(kept: Service) -> None:
    hashes = kept.prompt()
    store(kept.client, make_store(POOL, hashes, [2, 3], holes=2))
    empty(kept, POOL, hashes, holes=2)
    run = make_run(POOL, hashes, [10, 11], take_first=2, holes=2)
    check_load(kept.client, POOL, run, {10: 2, 11: 3})
    check_load(kept.client, POOL, make_run(POOL, hashes, [12, 13, 14], take_first=1, holes=2), {}, kind="truncated")


def test_the_least_recently_used_chunks_go(kept: Service) -> None:
    prompts = [stored(kept) for _ in range(KEPT + 2)]
    for hashes in prompts[:2]:
        check_load(kept.client, POOL, make_run(POOL, hashes, range(12, 16)), {}, kind="truncated")
    for hashes in prompts[2:]:
        check_load(kept.client, POOL, make_run(POOL, hashes, range(12, 16)), {12 + i: i for i in range(N)})


def test_one_load_may_take_some_from_memory_and_some_from_the_tier(kept: Service) -> None:
    hashes = kept.prompt(3 * N)
    chunks = [make_store(POOL, hashes[i : i + N], range(i, i + N)) for i in (0, N, 2 * N)]
    store(kept.client, chunks[0])
    for _ in range(KEPT):
        stored(kept)
    store(kept.client, *chunks[1:])
    empty(kept, POOL, hashes[2 * N :])
    target = range(2 * N, 2 * N + 3 * N)
    run = make_run(POOL, hashes, target, chunk_count=3)
    before = bytes_of(kept.client)
    check_load(kept.client, POOL, run, dict(zip(target, range(3 * N), strict=True)))
    assert all(now > then for now, then in zip(bytes_of(kept.client), before, strict=True))


def test_what_is_stored_anew_is_what_is_loaded(kept: Service) -> None:
    hashes = stored(kept)
    assert store(kept.client, make_store(POOL, hashes, range(4, 4 + N), replace=True)) == ("stored",)
    empty(kept, POOL, hashes)
    check_load(kept.client, POOL, make_run(POOL, hashes, range(12, 16)), {12 + i: 4 + i for i in range(N)})


def test_what_the_tier_refused_does_not_stay(quick: Path) -> None:
    client = threads(quick)
    hashes = chain(N)
    (quick / NAMESPACE.folder).write_text("a file where the folder should be")
    assert store(client, make_store(POOL, hashes, range(N))) == ("failed",)
    check_load(client, POOL, make_run(POOL, hashes, range(12, 16)), {}, kind="foreign")
    assert len(client.residents) == 0
    client.close()


# ------------------------------------------------------------------------------------------------------------- news


def test_the_engine_knows_what_lies_in_memory(kept: Service) -> None:
    prompts = [stored(kept) for _ in range(KEPT + 1)]
    keys = [resident_key(POOL.group, hashes[-1][:KEY_BYTES]) for hashes in prompts]
    residents = kept.client.residents
    assert [key in residents for key in keys] == [False, *[True] * KEPT] and len(residents) == KEPT
    assert {key for key, change in residents.take_changes().items() if change > 0} >= set(keys[1:])


def test_with_the_service_its_memory_is_gone(quick: Path) -> None:
    client = started(setup(quick), "on", load_timeout_ms=2000)
    hashes, pid = chain(N), client.child_pid
    store(client, make_store(POOL, hashes, range(N)))
    until(lambda: (store(client, make_store(POOL, hashes, range(N), replace=True)), len(client.residents))[1])
    client.abandon("a test")
    assert len(client.residents) == 0 and sum(client.residents.take_changes().values()) == 0
    until(lambda: (client.poll(), client.child_pid not in (None, pid))[1], 30)
    before = bytes_of(client)
    check_load(client, POOL, make_run(POOL, hashes, range(12, 16)), {12 + i: i for i in range(N)})
    assert bytes_of(client)[0] > before[0] and bytes_of(client)[1] == before[1]
    client.close()


# ----------------------------------------------------------------------------------------------------------- damage


def threads(root: Path, protection: ProtectionSpec | None = None) -> IoClient:
    """A client on threads, that has all its slots."""
    client = started(setup(root, protection), "off")
    until(lambda: len(level_of(client)._free) == KEPT)
    return client


def service_of(client: IoClient) -> IoService:
    service: IoService = client._backend._service  # type: ignore[union-attr]
    return service


def level_of(client: IoClient) -> MemoryLevel:
    keeper = service_of(client)._memory
    assert keeper is not None
    return keeper.level


def held_by(client: IoClient, hashes: list[bytes]) -> Held:
    return level_of(client)._held[NAMESPACE.folder, name_of(POOL, hashes)]


PLACES = {
    "magic": 0,
    "key": 40,
    "block table": 512 + 20,
    "header digest": 500,
    **{f"block {i}": GEOMETRY.block_offset(i) + 17 * i for i in range(N)},
    "last byte of a block": GEOMETRY.block_offset(N - 1) + POOL.block_bytes - 1,
}


@pytest.mark.parametrize("protection", [None, AUTHENTICATED, ENCRYPTED], ids=["plain", "authenticated", "encrypted"])
@pytest.mark.parametrize("place", PLACES)
def test_what_is_damaged_in_memory_comes_from_the_tier(
    quick: Path, place: str, protection: ProtectionSpec | None
) -> None:
    client = threads(quick, protection)
    hashes = chain(N)
    store(client, make_store(POOL, hashes, range(N)))
    held_by(client, hashes).slot.view[PLACES[place]] ^= 1
    before = bytes_of(client)
    check_load(client, POOL, make_run(POOL, hashes, range(12, 16)), {12 + i: i for i in range(N)})
    assert bytes_of(client)[0] > before[0]
    assert path_of(quick, POOL, hashes).exists(), "the tier's copy was right"
    assert not client.counters["load_jobs_failed"]
    client.close()


@pytest.mark.parametrize("protection", [None, AUTHENTICATED, ENCRYPTED], ids=["plain", "authenticated", "encrypted"])
def test_damage_in_memory_and_in_the_tier_is_a_counted_miss(quick: Path, protection: ProtectionSpec | None) -> None:
    client = threads(quick, protection)
    hashes = chain(N)
    store(client, make_store(POOL, hashes, range(N)))
    at = GEOMETRY.block_offset(2)
    held_by(client, hashes).slot.view[at] ^= 1
    path = path_of(quick, POOL, hashes)
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)
    check_load(client, POOL, make_run(POOL, hashes, range(12, 16)), {12: 0, 13: 1}, kind="damaged")
    assert client.counters["miss_damaged"] == 1 and not path.exists()
    assert len(level_of(client)) == 0
    client.close()


def test_another_object_under_the_name_is_not_used(quick: Path) -> None:
    client = threads(quick)
    one, other = chain(N), chain(N, "b")
    for hashes, pages in ((one, range(N)), (other, range(4, 4 + N))):
        store(client, make_store(POOL, hashes, pages))
    held, wrong = held_by(client, one), held_by(client, other)
    held.slot.view[:] = wrong.slot.view
    check_load(client, POOL, make_run(POOL, one, range(12, 16)), {12 + i: i for i in range(N)})
    held_by(client, other).object_bytes -= 4096
    check_load(client, POOL, make_run(POOL, other, range(12, 16)), {12 + i: 4 + i for i in range(N)})
    client.close()


# ----------------------------------------------------------------------------------------------- beside the tier


def test_a_chunk_that_is_gone_from_the_tier_leaves_memory_when_it_is_used(quick: Path) -> None:
    client = threads(quick)
    hashes = chain(N)
    store(client, make_store(POOL, hashes, range(N)))
    path = path_of(quick, POOL, hashes)
    written = path.stat().st_mtime_ns
    os.utime(path, ns=(0, written))
    run, copies = make_run(POOL, hashes, range(12, 16)), {12 + i: i for i in range(N)}
    check_load(client, POOL, run, copies)
    until(lambda: path.stat().st_atime_ns > written)
    path.unlink()
    held_by(client, hashes).noted_at = -1e9
    check_load(client, POOL, run, copies)
    until(lambda: not len(level_of(client)))
    check_load(client, POOL, run, {}, kind="missing")
    client.close()


class HangingTier(MemoryTier):
    """Whose reads hang until the test says so."""

    def __init__(self) -> None:
        super().__init__()
        self.goes_on = threading.Event()
        self.opened: list[ChunkName] = []

    def open(self, folder: str, name: ChunkName) -> ChunkReader:
        self.opened.append(name)
        self.goes_on.wait()
        return super().open(folder, name)


class Bench:
    """A service over a tier in memory."""

    def __init__(self, tier: MemoryTier, kept: int = KEPT) -> None:
        self.pool = block_outermost(0, 64, 8192)
        self.replies: list[Reply] = []
        told = with_memory(Setup("", "off", 0, False, 2, 16 << 20, (self.pool.spec(),)), kept)
        self.service = IoService(told, tier, MappedPages(), self.replies.append)
        self.service.start()
        assert self.service._memory is not None
        self.level = self.service._memory.level
        until(lambda: len(self.level._free) == kept)

    def answer(self, kind: Callable[[Reply], bool]) -> Reply:
        until(lambda: any(map(kind, self.replies)))
        return next(filter(kind, self.replies))

    def store(self, job: int, hashes: list[bytes]) -> None:
        self.service.submit(Store(job, (make_store(self.pool, hashes, range(N)),)))
        self.answer(lambda reply: isinstance(reply, StoreDone) and reply.job_id == job)

    def load(self, job: int, hashes: list[bytes], stop_us: int = 0) -> LoadDone:
        count = len(hashes) // N
        run = make_run(self.pool, hashes, range(8, 8 + len(hashes)), chunk_count=count)
        self.service.submit(Load(job, (run,), stop_us))
        reply = self.answer(lambda reply: isinstance(reply, LoadDone) and reply.job_id == job)
        assert isinstance(reply, LoadDone)
        return reply


def test_a_tier_that_hangs_does_not_hold_up_what_lies_in_memory() -> None:
    tier = HangingTier()
    bench = Bench(tier)
    inside, outside = chain(N), chain(N, "b")
    bench.store(1, inside)
    bench.level.drop(NAMESPACE.folder, name_of(bench.pool, outside))
    for job in range(2, 8):
        run = make_run(bench.pool, outside, range(8, 8 + N))
        bench.service.submit(Load(job, (run,)))
    until(lambda: tier.opened)
    done = bench.load(20, inside)
    assert done.kinds == ("",) and done.memory_bytes > 0 == done.read_bytes
    tier.goes_on.set()
    bench.service.stop(10)


class SlowTier(MemoryTier):
    """Whose chunks take a while, once the test says so."""

    pause_s = 0.0

    def open(self, folder: str, name: ChunkName) -> ChunkReader:
        time.sleep(self.pause_s)
        return super().open(folder, name)


def test_a_load_is_stopped_by_the_rate_of_the_tier_and_not_by_that_of_memory() -> None:
    """Of twelve chunks eight lie in memory; of the others two would take longer than is granted."""
    tier = SlowTier()
    bench = Bench(tier, kept=8)
    hashes = chain(12 * N)
    for job in range(12):
        bench.store(1 + job, hashes[job * N : (job + 1) * N])
    assert len(bench.level) == 8
    tier.pause_s = 0.2
    done = bench.load(30, hashes, stop_us=700_000)
    # The first one may be read before the second is asked for; with memory's rate a third one would be.
    assert done.kinds == ("stopped",) and done.good_blocks[0] <= 2 * N and done.memory_bytes > 0
    last = hashes[-N:]
    assert bench.level.pin(NAMESPACE.folder, name_of(bench.pool, last)) and bench.load(31, last, stop_us=1).kinds == (
        "",
    )
    bench.service.stop(10)


def test_no_memory_is_taken_where_nothing_is_asked_for() -> None:
    pool = block_outermost(0, 8, 8192)
    service = IoService(
        Setup("", "off", 0, False, 2, 16 << 20, (pool.spec(),)), MemoryTier(), MappedPages(), lambda reply: None
    )
    assert service._memory is None and len(service._staging) == 2


def test_news_come_before_the_answer() -> None:
    bench = Bench(MemoryTier())
    hashes = chain(N)
    bench.store(1, hashes)
    kinds = [type(reply) for reply in bench.replies]
    assert kinds.index(InMemory) < kinds.index(StoreDone)
    (news,) = [reply for reply in bench.replies if isinstance(reply, InMemory)]
    assert news == InMemory((resident_key(0, hashes[-1][:KEY_BYTES]),), ())
    bench.service.stop(10)


def test_a_missing_chunk_is_no_trouble_for_the_keeper() -> None:
    tier = MemoryTier()
    bench = Bench(tier)
    hashes = chain(N)
    bench.store(1, hashes)
    tier.remove(NAMESPACE.folder, name_of(bench.pool, hashes))
    with pytest.raises(ChunkMissing):
        tier.open(NAMESPACE.folder, name_of(bench.pool, hashes))
    assert bench.load(2, hashes).kinds == ("",)
    until(lambda: not len(bench.level))
    bench.store(3, hashes)
    assert bench.load(4, hashes).memory_bytes > 0
    bench.service.stop(10)
