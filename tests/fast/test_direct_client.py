"""The client of the GPUDirect path: what orders its copies, and what becomes of its memory when something hangs.

That blocks come back byte for byte is shown by ``test_io_service.py``, which this client passes too.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from memkv_engines.chunk.codec import Geometry
from memkv_engines.errors import ConfigError, TransferOverdue, TransportError
from memkv_engines.limits import MIB
from memkv_engines.offload import client as client_module
from memkv_engines.offload.direct_client import DirectIoClient, slots_needed
from memkv_engines.offload.results import LoadResult, StoreResult
from memkv_engines.tier.directory import DirectoryTier
from tests.fast.direct_samples import AddressTransport, LateSlotMover, started_direct
from tests.fast.io_samples import (
    block_outermost,
    layer_outermost,
    load,
    make_run,
    make_store,
    path_of,
    results_of,
    setup_for,
    started,
    store,
    until,
)
from tests.fast.late_mover import STREAM
from tests.fast.samples import chain
from tests.fast.service_samples import N, check_load, flip

POOL = layer_outermost(0, 64, 6, 1000, gap_bytes=24)
IO_THREADS = 2
Served = tuple[DirectIoClient, LateSlotMover, AddressTransport]


@pytest.fixture(autouse=True)
def _restart_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "SERVICE_RESTART_BACKOFF_S", 0.01)


@pytest.fixture
def served(quick: Path) -> Iterator[Served]:
    setup = setup_for(quick, [POOL], io_threads=IO_THREADS)
    client, mover, transport = started_direct(setup, fence_timeout_ms=300, load_timeout_ms=1_000)
    yield client, mover, transport
    transport.gate.set()
    client.close()
    assert mover.closed


def all_slots_are_free(client: DirectIoClient, mover: LateSlotMover) -> bool:
    return client._slots.left == (IO_THREADS, len(mover.all_slots) - IO_THREADS) and mover.free == len(mover.all_slots)


def check_works(client: DirectIoClient, mover: LateSlotMover, prompt: str) -> None:
    """Whatever happened before: stores and loads go on, and every slot is there again."""
    until(lambda: client.poll() == [] and client.mode == "process")
    hashes = chain(N, prompt)
    assert store(client, make_store(POOL, hashes, range(N))) == ("stored",)
    check_load(client, POOL, make_run(POOL, hashes, range(40, 44)), {40 + i: i for i in range(N)})
    until(lambda: all_slots_are_free(client, mover))


# ---------------------------------------------------------------------------------------------------------------- order


def test_behind_the_fence_pages_may_be_overwritten(served: Served) -> None:
    client, mover, _ = served
    mover.lagging = {"gather", "store digests"}
    hashes, before = chain(N, "fence"), [POOL.block(page) for page in range(N)]
    client.submit_store(1, (make_store(POOL, hashes, range(N)),))
    assert client.fence()
    POOL.memory[:] ^= 0xFF
    mover.lagging = set()
    (result,) = results_of(client)
    assert isinstance(result, StoreResult) and result.outcomes == ("stored",)
    assert load(client, make_run(POOL, hashes, range(8, 8 + N))).kinds == ("",)
    assert [POOL.block(8 + i) for i in range(N)] == before
    assert all_slots_are_free(client, mover)


def test_without_the_fence_they_may_not(served: Served) -> None:
    """The counterpart: the mover is really late."""
    client, mover, _ = served
    mover.lagging = {"gather", "store digests"}
    hashes, before = chain(N, "no fence"), [POOL.block(page) for page in range(N)]
    client.submit_store(1, (make_store(POOL, hashes, range(N)),))
    POOL.memory[:] ^= 0xFF
    mover.lagging = set()
    results_of(client)
    assert load(client, make_run(POOL, hashes, range(8, 8 + N))).kinds == ("",)
    assert [POOL.block(8 + i) for i in range(N)] != before


def test_a_gather_that_cannot_be_ordered_is_waited_for(served: Served) -> None:
    client, mover, _ = served
    mover.failing["gather"] = "no event"
    mover.looks = 20
    client.submit_store(1, (make_store(POOL, chain(N, "wait"), range(N)),))
    assert client.fence()
    assert mover.order[0].ended
    (result,) = results_of(client)
    assert isinstance(result, StoreResult) and result.outcomes == ("failed",)
    mover.failing["gather"] = ""
    check_works(client, mover, "wait2")


def test_a_gather_that_hangs_past_the_fence_is_never_stored(served: Served, quick: Path) -> None:
    client, mover, _ = served
    mover.failing["gather"], mover.lagging = "no event", {"gather", "store digests"}
    client.submit_store(1, (make_store(POOL, chain(N, "hang"), range(N)),))
    assert not client.fence()
    for ticket in mover.order:  # the device comes back, and the copy was right after all
        ticket._error = ""
    mover.failing["gather"], mover.lagging = "", set()
    (result,) = results_of(client)
    assert isinstance(result, StoreResult) and result.outcomes == ("failed",)
    until(lambda: all_slots_are_free(client, mover))
    assert not list(quick.rglob("*.kv"))
    check_works(client, mover, "hang2")


def test_stores_without_a_slot_are_shed_at_the_fence_and_loads_have_their_own(served: Served) -> None:
    client, mover, _ = served
    hashes = chain(N, "room")
    assert store(client, make_store(POOL, hashes, range(N))) == ("stored",)
    mover.lagging = {"store digests"}
    room = len(mover.all_slots) - IO_THREADS
    client.submit_store(1, tuple(make_store(POOL, chain(N, f"more{i}"), range(N)) for i in range(room + 3)))
    assert client.fence()
    assert client._slots.left == (IO_THREADS, 0)
    mover.lagging = set()
    (result,) = results_of(client)
    assert isinstance(result, StoreResult)
    assert sorted(result.outcomes) == ["shed"] * 3 + ["stored"] * room
    assert client.counters["store_shed"] == 3
    # Whoever polls before the fence gives slots time to come back.
    client.submit_store(2, tuple(make_store(POOL, chain(N, f"again{i}"), range(N)) for i in range(room + 3)))
    (result,) = results_of(client)
    assert isinstance(result, StoreResult) and result.outcomes == ("stored",) * (room + 3)
    check_works(client, mover, "room2")


def test_loads_find_slots_while_stores_hold_all_of_theirs(served: Served) -> None:
    client, mover, _ = served
    hashes = chain(N, "own")
    store(client, make_store(POOL, hashes, range(N)))
    mover.lagging = {"gather", "store digests"}
    room = len(mover.all_slots) - IO_THREADS
    client.submit_store(1, tuple(make_store(POOL, chain(N, f"held{i}"), range(N)) for i in range(room + 1)))
    assert client._slots.left == (IO_THREADS, 0)
    # Pages that the held gathers do not read.
    check_load(client, POOL, make_run(POOL, hashes, range(40, 44)), {40 + i: i for i in range(N)})
    mover.lagging = set()
    (result,) = results_of(client)
    assert isinstance(result, StoreResult) and result.outcomes == ("stored",) * (room + 1)


# ------------------------------------------------------------------------------------------------------- things fail


@pytest.mark.parametrize("how", ["refuse", "digests", "scatter"])
def test_a_device_that_fails_is_a_failed_load_and_a_lost_store(served: Served, how: str) -> None:
    client, mover, _ = served
    hashes = chain(2 * N, how)
    chunks = [make_store(POOL, hashes[i : i + N], range(i, i + N)) for i in (0, N)]
    assert store(client, *chunks) == ("stored", "stored")
    if how == "refuse":
        mover.refuse = "an error of the driver"
    else:
        mover.failing.update({kind: "an error of the driver" for kind in mover.failing if how in kind})
    result = load(client, make_run(POOL, hashes, range(20, 20 + 2 * N), chunk_count=2))
    assert (result.good_blocks, result.kinds) == ((0,), ("io_error",))
    client.submit_store(9, (make_store(POOL, chain(N, how + "2"), range(N)),))
    client.fence()
    (stored,) = results_of(client)
    assert isinstance(stored, StoreResult)
    assert stored.outcomes == (("stored",) if how == "scatter" else ("failed",))
    mover.refuse = ""
    mover.failing = dict.fromkeys(mover.failing, "")
    check_works(client, mover, how + "3")


def test_a_transfer_that_fails_is_a_failed_load_and_a_lost_store(served: Served, quick: Path) -> None:
    client, mover, transport = served
    hashes = chain(N, "eio")
    store(client, make_store(POOL, hashes, range(N)))
    before = POOL.memory.copy()
    transport.error = TransportError("EIO")
    result = load(client, make_run(POOL, hashes, range(20, 24)))
    assert (result.good_blocks, result.kinds) == ((0,), ("io_error",))
    assert store(client, make_store(POOL, chain(N, "eio2"), range(N))) == ("failed",)
    assert (POOL.memory == before).all() and len(list(quick.rglob("*.kv"))) == 1
    transport.error = None
    check_works(client, mover, "eio3")


@pytest.mark.parametrize("way", ["read", "write"])
def test_the_slot_of_an_overdue_transfer_is_withheld_until_it_ends(served: Served, way: str) -> None:
    client, mover, transport = served
    hashes, over = chain(N, way), []
    store(client, make_store(POOL, hashes, range(N)))
    transport.error = TransferOverdue("not done", lambda: bool(over))
    if way == "read":
        assert load(client, make_run(POOL, hashes, range(20, 24))).kinds == ("io_error",)
    else:
        assert store(client, make_store(POOL, chain(N, "overdue"), range(N))) == ("failed",)
    transport.error = None
    (withheld,) = client._slots.withheld
    assert mover.free == len(mover.all_slots) - 1
    for number in range(8):  # the others serve on, and this one is never among them
        assert store(client, make_store(POOL, chain(N, f"{way}{number}"), range(N))) == ("stored",)
        assert load(client, make_run(POOL, hashes, range(40, 44))).kinds == ("",)
        assert withheld.device.held  # type: ignore[attr-defined]
    over.append(True)
    assert not client._slots.withheld
    check_works(client, mover, way + "again")


# --------------------------------------------------------------------------------------------------- jobs are given up


def test_a_read_that_hangs_is_given_up_and_never_reaches_a_page(served: Served) -> None:
    client, mover, transport = served
    hashes = chain(2 * N, "hung")
    store(client, *(make_store(POOL, hashes[i : i + N], range(i, i + N)) for i in (0, N)))
    transport.gate.clear()
    client.submit_load(5, (make_run(POOL, hashes, range(20, 20 + 2 * N), chunk_count=2),))
    (result,) = results_of(client)
    assert result == LoadResult(5, (0,), ("io_service",))
    assert client.counters["miss_io_service"] == 1
    before, scatters = POOL.memory.copy(), mover.scatters
    # As long as the threads hang no others are started beside them; a job has its answer all the same.
    assert client.poll() == [] and client.mode == "down"
    assert load(client, make_run(POOL, hashes, range(20, 24))).kinds == ("io_service",)
    client.submit_store(6, (make_store(POOL, chain(N, "down"), range(N)),))
    assert results_of(client) == [StoreResult(6, ("failed",))]
    assert mover.free == len(mover.all_slots) - 2
    transport.gate.set()  # the reads end after all: their pages are another request's by now
    until(lambda: all_slots_are_free(client, mover))
    assert mover.scatters == scatters and (POOL.memory == before).all()
    check_works(client, mover, "hung2")


def test_abandon_orders_what_still_writes_pages(served: Served) -> None:
    client, mover, _ = served
    hashes = chain(N, "abandon")
    store(client, make_store(POOL, hashes, range(N)))
    mover.lagging, mover.scatters = {"scatter"}, 0
    client.submit_load(61, (make_run(POOL, hashes, range(20, 20 + N)),))
    until(lambda: mover.scatters == 1)
    client.abandon("a test")
    assert all(ticket.ended for ticket in mover.order if ticket.kind == "scatter")  # type: ignore[attr-defined]
    POOL.memory[:] ^= 0xFF  # the next request's
    after = POOL.memory.copy()
    assert results_of(client) == [LoadResult(61, (0,), ("io_service",))]
    mover.lagging = set()
    until(lambda: all_slots_are_free(client, mover))
    assert (POOL.memory == after).all()
    check_works(client, mover, "abandon2")


def test_abandon_spoils_gathers_that_cannot_be_ordered(served: Served, quick: Path) -> None:
    client, mover, _ = served
    mover.failing["gather"], mover.lagging = "no event", {"gather", "store digests"}
    client.submit_store(60, (make_store(POOL, chain(N, "spoil"), range(N)),))
    client.abandon("a test")
    assert results_of(client) == [StoreResult(60, ("failed",))]
    for ticket in mover.order:
        ticket._error = ""
    mover.failing["gather"], mover.lagging = "", set()
    until(lambda: all_slots_are_free(client, mover))
    assert not list(quick.rglob("*.kv"))


def test_an_overdue_scatter_is_ordered_before_its_job_is_answered(served: Served) -> None:
    client, mover, _ = served
    hashes = chain(N, "overdue")
    store(client, make_store(POOL, hashes, range(N)))
    mover.hang = "scatter"
    result = load(client, make_run(POOL, hashes, range(20, 24)))
    assert (result.good_blocks, result.kinds) == ((0,), ("io_error",))
    assert all(ticket.ended for ticket in mover.order if ticket.kind == "scatter")  # type: ignore[attr-defined]
    mover.hang = ""
    check_works(client, mover, "overdue2")


def test_closing_beside_a_hung_write_is_bounded_and_leaves_its_memory(
    quick: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("memkv_engines.offload.direct_backend.SHUTDOWN_DRAIN_TIMEOUT_S", 0.2)
    client, mover, transport = started_direct(setup_for(quick, [POOL]), fence_timeout_ms=200)
    transport.gate.clear()
    client.submit_store(1, (make_store(POOL, chain(N, "close"), range(N)),))
    client.fence()
    until(lambda: transport.waiting == 1)
    start = time.monotonic()
    client.close()
    client.close()
    assert time.monotonic() - start < 5
    assert mover.closed and sum(slot.held for slot in mover.all_slots) == 1
    assert client._tier._root_fd >= 0, "open: the transfer has a file in it"
    transport.gate.set()
    until(lambda: client._service is not None and client._service.ended)
    assert not any(slot.held for slot in mover.all_slots)
    client._tier.close()


def test_close_writes_what_was_gathered(quick: Path) -> None:
    client, mover, _ = started_direct(setup_for(quick, [POOL]))
    mover.looks = 50
    client.submit_store(1, tuple(make_store(POOL, chain(N, f"end{i}"), range(N)) for i in range(4)))
    client.close()
    assert len(list(quick.rglob("*.kv"))) == 4
    assert not any(slot.held for slot in mover.all_slots)


def test_the_process_that_looks_up_dies_and_loads_go_on(served: Served) -> None:
    client, mover, _ = served
    hashes = chain(N, "dies")
    store(client, make_store(POOL, hashes, range(N)))
    os.kill(client.child_pid or 0, signal.SIGKILL)
    check_load(client, POOL, make_run(POOL, hashes, range(20, 24)), {20 + i: i for i in range(N)})
    check_works(client, mover, "dies2")


# ------------------------------------------------------------------------------------------------- beside the host path


@pytest.mark.parametrize("holes", [0, 2])
def test_files_are_those_of_the_host_path_to_the_last_bit(quick: Path, holes: int) -> None:
    hashes, files = chain(N, "same"), []
    for make in (lambda s: started(s, "off"), lambda s: started_direct(s)[0]):
        client = make(setup_for(quick, [POOL]))
        assert store(client, make_store(POOL, hashes, range(holes, N), holes=holes, replace=True)) == ("stored",)
        files.append(path_of(quick, POOL, hashes, holes=holes).read_bytes())
        client.close()
    assert files[0] == files[1]


def test_a_chunk_longer_than_a_slot_comes_in_pieces(quick: Path) -> None:
    """An engine with longer chunks has written it, on the host path."""
    pool, hashes = block_outermost(0, 40, 200_000), chain(16)
    writer = started(setup_for(quick, [pool], groups=(pool.spec(blocks_per_chunk=16),)), "off")
    assert store(writer, make_store(pool, hashes, range(16))) == ("stored",)
    writer.close()
    reader, _, _ = started_direct(setup_for(quick, [pool], groups=(pool.spec(blocks_per_chunk=3),)))
    for first in (0, 5):
        target = range(20 + first, 36)
        run = make_run(pool, hashes, target, block_count=16, take_first=first)
        check_load(reader, pool, run, dict(zip(target, range(first, 16), strict=True)))
    flip(Geometry(16, 200_000, 16).block_offset(9))(path_of(quick, pool, hashes))
    run = make_run(pool, hashes, range(20, 36), block_count=16)
    check_load(reader, pool, run, dict(zip(range(20, 29), range(9), strict=True)), kind="damaged")
    assert store(reader, make_store(pool, chain(4, "long"), range(4))) == ("failed",), "longer than a slot"
    reader.close()


def test_the_other_process_evicts_what_is_written_here(quick: Path) -> None:
    size = Geometry(N, POOL.block_bytes, 16).object_bytes
    setup = setup_for(quick, [POOL], capacity_bytes=20 * size, eviction="segmented_lru")
    client, _, _ = started_direct(setup)
    stored = 0
    deadline = time.monotonic() + 30
    while stored < 23:
        outcome = store(client, make_store(POOL, chain(N, f"evict{stored}"), range(N)))
        stored += outcome == ("stored",)
        assert len(list(quick.rglob("*.kv"))) <= 20
        assert time.monotonic() < deadline, "no room is made"
        client._tier._full_until = 0.0
        time.sleep(0.01)
    client.close()


def test_a_transport_for_host_memory_is_refused(quick: Path) -> None:
    setup = setup_for(quick, [POOL])
    tier = DirectoryTier(quick, direct_io="off")
    mover = LateSlotMover(setup.groups, 8)
    with pytest.raises(ConfigError, match=r"posix/buffered.* does not move device memory: set staging_medium=host"):
        DirectIoClient(setup, tier, mover, 8, stream=lambda: STREAM)
    tier.close()


def test_a_transport_that_fails_its_proof_is_refused(quick: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise TransportError("cuFile says no")

    monkeypatch.setattr(AddressTransport, "write", fails)
    with pytest.raises(ConfigError, match=r"does not move device memory here: cuFile says no"):
        started_direct(setup_for(quick, [POOL]))


def test_too_few_slots_name_the_key(quick: Path) -> None:
    with pytest.raises(ConfigError, match="io_threads=2"):
        started_direct(setup_for(quick, [POOL]), slots=slots_needed(2) - 1)


def test_a_read_only_tier_is_read(quick: Path) -> None:
    hashes = chain(N, "ro")
    writer, _, _ = started_direct(setup_for(quick, [block_outermost(1, 8, MIB // 4), POOL]))
    store(writer, make_store(POOL, hashes, range(N)))
    writer.close()
    reader, _, _ = started_direct(setup_for(quick, [POOL], read_only=True))
    check_load(reader, POOL, make_run(POOL, hashes, range(20, 24)), {20 + i: i for i in range(N)})
    reader.close()
