"""The client for device memory: what orders its copies, and what becomes of them when the device or the service fails.

That blocks come back byte for byte is shown by ``test_io_service.py``, which this client passes too.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from memkv_engines.errors import ConfigError, GpuOverdue
from memkv_engines.limits import MIB
from memkv_engines.offload.device_client import DeviceIoClient
from memkv_engines.offload.pinned import PinnedSlot, PinnedStaging
from memkv_engines.offload.results import LoadResult, StoreResult
from tests.fast.io_samples import (
    block_outermost,
    layer_outermost,
    load,
    make_run,
    make_store,
    results_of,
    setup_for,
    started_device,
    store,
)
from tests.fast.late_mover import LateMover
from tests.fast.samples import chain
from tests.fast.service_samples import N

POOL = layer_outermost(0, 64, 6, 1000, gap_bytes=24)
WIDE = block_outermost(1, 64, MIB)


@pytest.fixture
def served(quick: Path) -> Iterator[tuple[DeviceIoClient, LateMover]]:
    client, mover = started_device(setup_for(quick, [POOL]), fence_timeout_ms=300, load_timeout_ms=5_000)
    yield client, mover
    client.close()
    assert mover.closed


def busy_slots(client: DeviceIoClient) -> list[PinnedSlot]:
    """Slots that loads and stores think they have."""
    loads, stores = client._loads, client._stores
    return [
        *(slot for parts in loads._reading.values() for part in parts for slot in part.slots),
        *(move.slot for part in loads._placing for move in part.moving),
        *(slot for part in loads._placing for slot, _, _ in part.unscattered),
        *(part.moving.slot for part in stores._gathering),
        *(slot for sent in stores._writing.values() for slot in sent.slots),
    ]


def all_slots_are_free(client: DeviceIoClient) -> bool:
    staging = client._staging
    return not busy_slots(client) and all(
        staging.free(spec.group, for_loads=way) == staging.slots(spec.group, for_loads=way)
        for spec in staging.specs
        for way in (True, False)
    )


Served = tuple[DeviceIoClient, LateMover]


def test_behind_the_fence_pages_may_be_overwritten(served: Served) -> None:
    client, mover = served
    mover.looks = 1_000
    hashes, before = chain(N, "fence"), [POOL.block(page) for page in range(N)]
    client.submit_store(1, (make_store(POOL, hashes, range(N)),))
    assert client.fence()
    POOL.memory[:] ^= 0xFF
    (result,) = results_of(client)
    assert isinstance(result, StoreResult) and result.outcomes == ("stored",)
    assert load(client, make_run(POOL, hashes, range(8, 8 + N))).kinds == ("",)
    assert [POOL.block(8 + i) for i in range(N)] == before
    assert all_slots_are_free(client)


def test_without_the_fence_they_may_not(served: Served) -> None:
    """The counterpart: the mover is really late."""
    client, mover = served
    mover.looks = 5
    hashes, before = chain(N, "no fence"), [POOL.block(page) for page in range(N)]
    client.submit_store(1, (make_store(POOL, hashes, range(N)),))
    POOL.memory[:] ^= 0xFF
    results_of(client)
    assert load(client, make_run(POOL, hashes, range(8, 8 + N))).kinds == ("",)
    assert [POOL.block(8 + i) for i in range(N)] != before


def test_a_gather_that_cannot_be_ordered_is_waited_for(served: Served) -> None:
    client, mover = served
    mover.fail, mover.looks = "no event", 1_000
    client.submit_store(1, (make_store(POOL, chain(N, "wait"), range(N)),))
    assert client.fence()
    (result,) = results_of(client)
    assert isinstance(result, StoreResult) and result.outcomes == ("failed",)
    assert client.counters["store_failed"] == 1
    assert all_slots_are_free(client)


def test_a_gather_that_hangs_past_the_fence_is_never_stored(served: Served, quick: Path) -> None:
    client, mover = served
    mover.fail, mover.looks = "no event", 100_000
    client.submit_store(1, (make_store(POOL, chain(N, "hang"), range(N)),))
    assert not client.fence()
    for ticket in mover._tickets:  # the device comes back
        ticket._error, ticket._looks = "", 0
    (result,) = results_of(client)
    assert isinstance(result, StoreResult) and result.outcomes == ("failed",)
    assert not list(quick.rglob("*.kv"))
    assert all_slots_are_free(client)


def test_a_device_without_room_sheds_stores_but_not_loads(served: Served) -> None:
    client, mover = served
    chunks = [make_store(POOL, chain(N, f"room{i}"), range(N)) for i in range(3)]
    for chunk in chunks:
        assert store(client, chunk) == ("stored",)
    mover.slots, mover.looks = 1, 50
    more = tuple(make_store(POOL, chain(N, f"more{i}"), range(N)) for i in range(4))
    client.submit_store(1, more)
    assert client.fence()
    (result,) = results_of(client)
    assert isinstance(result, StoreResult)
    assert set(result.outcomes) == {"shed", "stored"}
    assert client.counters["store_shed"] == result.outcomes.count("shed")
    # Whoever polls before the fence gives the device time.
    client.submit_store(2, tuple(make_store(POOL, chain(N, f"again{i}"), range(N)) for i in range(4)))
    (result,) = results_of(client)
    assert isinstance(result, StoreResult) and result.outcomes == ("stored",) * 4
    runs = [make_run(POOL, chain(N, f"room{i}"), range(20 + N * i, 20 + N * i + N)) for i in range(3)]
    assert load(client, *runs).kinds == ("", "", "")
    assert [POOL.block(20 + i) for i in range(3 * N)] == [POOL.block(i % N) for i in range(3 * N)]
    assert all_slots_are_free(client)


@pytest.mark.parametrize("how", ["refuse", "fail"])
def test_a_device_that_fails_is_a_failed_load_and_a_lost_store(served: Served, how: str) -> None:
    client, mover = served
    hashes = chain(2 * N, how)
    chunks = [make_store(POOL, hashes[i : i + N], range(i, i + N)) for i in (0, N)]
    assert store(client, *chunks) == ("stored", "stored")
    setattr(mover, how, "an error of the driver")
    result = load(client, make_run(POOL, hashes, range(20, 20 + 2 * N), chunk_count=2))
    assert (result.good_blocks, result.kinds) == ((0,), ("io_error",))
    client.submit_store(9, (make_store(POOL, chain(N, how + "2"), range(N)),))
    client.fence()
    (stored,) = results_of(client)
    assert isinstance(stored, StoreResult) and stored.outcomes == ("failed",)
    setattr(mover, how, "")
    assert load(client, make_run(POOL, hashes, range(20, 20 + 2 * N), chunk_count=2)).kinds == ("",)
    assert all_slots_are_free(client)


def test_a_load_larger_than_all_staging_comes_in_turns(quick: Path) -> None:
    client, mover = started_device(setup_for(quick, [WIDE], staging_bytes=32 * MIB))
    staged = client._staging.slots(WIDE.group, for_loads=True)
    chunks = 2 * staged + 1
    hashes = chain(chunks * N, "large")
    for index in range(chunks):
        own = hashes[index * N : (index + 1) * N]
        assert store(client, make_store(WIDE, own, range(4 * (index % 4), 4 * (index % 4) + N))) == ("stored",)
    mover.looks = 5
    target = [16 + i % 48 for i in range(chunks * N)]
    assert len(set(target)) == len(target)
    result = load(client, make_run(WIDE, hashes, target, chunk_count=chunks))
    assert (result.good_blocks, result.kinds) == ((chunks * N,), ("",))
    assert all(WIDE.block(16 + i) == WIDE.block(i % 16) for i in range(chunks * N))
    assert all_slots_are_free(client)
    client.close()


def test_the_service_dies_under_loads_and_stores(served: Served) -> None:
    client, _ = served
    hashes = chain(N, "dies")
    store(client, make_store(POOL, hashes, range(N)))
    os.kill(client.child_pid or 0, signal.SIGSTOP)
    client.submit_load(50, (make_run(POOL, hashes, range(20, 20 + N)),))
    client.submit_store(51, (make_store(POOL, chain(N, "dies2"), range(N)),))
    client.fence()
    os.kill(client.child_pid or 0, signal.SIGKILL)
    answers = {r.job_id: r for r in results_of(client, 2) if isinstance(r, (LoadResult, StoreResult))}
    assert isinstance(answers[50], LoadResult) and answers[50].kinds == ("io_service",)
    assert isinstance(answers[51], StoreResult) and answers[51].outcomes == ("failed",)
    assert all_slots_are_free(client)


def test_abandon_leaves_no_copy_under_way(served: Served) -> None:
    client, mover = served
    hashes = chain(N, "abandon")
    store(client, make_store(POOL, hashes, range(N)))
    mover.looks = 1_000
    client.submit_store(60, (make_store(POOL, chain(N, "abandon2"), range(N)),))
    client.submit_load(61, (make_run(POOL, hashes, range(20, 20 + N)),))
    client.abandon("a test")
    assert all(ticket.ended for ticket in mover._tickets)
    assert len(results_of(client, 2)) == 2
    assert all_slots_are_free(client)


def test_staging_too_small_for_the_model_names_the_key(quick: Path) -> None:
    with pytest.raises(ConfigError, match=r"'staging_bytes' has value 8388608: this model needs at least 16777216"):
        PinnedStaging([WIDE.spec()], 8 * MIB)


def test_slots_of_groups_do_not_meet() -> None:
    staging = PinnedStaging([POOL.spec(), WIDE.spec()], 64 * MIB)
    taken = []
    for spec in staging.specs:
        stride = spec.tiles[0].block_stride_bytes
        for way in (True, False):
            while (slot := staging.take(spec.group, for_loads=way)) is not None:
                assert slot.address == spec.tiles[0].base + slot.first_block * stride
                assert slot.first_block + slot.blocks <= spec.num_blocks
                taken.append(range(slot.address, slot.address + slot.blocks * stride))
    taken.sort(key=lambda r: r.start)
    assert all(one.stop <= other.start for one, other in pairwise(taken))
    assert taken[0].start >= staging.address and taken[-1].stop <= staging.address + staging.size_bytes


# ---------------------------------------------------------------------------------------------------------------- sleep


def test_while_the_engine_sleeps_no_page_is_touched_and_then_all_is_as_before(served: Served) -> None:
    client, mover = served
    kept, hashes = chain(N, "kept"), chain(N, "gathered")
    assert store(client, make_store(POOL, kept, range(N))) == ("stored",)
    mover.looks, before = 1_000, [POOL.block(page) for page in range(N)]
    client.submit_store(1, (make_store(POOL, hashes, range(N)),))
    client.suspend()
    POOL.memory[:] ^= 0xFF  # other memory altogether
    asleep = POOL.memory.copy()
    (result,) = results_of(client)
    assert isinstance(result, StoreResult) and result.outcomes == ("stored",), "it was gathered before"
    assert store(client, make_store(POOL, chain(N, "asleep"), range(N))) == ("failed",)
    (load_kind,) = load(client, make_run(POOL, kept, range(40, 44))).kinds
    assert load_kind == "io_error"
    assert (POOL.memory == asleep).all()
    client.suspend()  # once more is no harm
    client.wake()
    mover.looks = 3
    for prompt in (kept, hashes):
        assert load(client, make_run(POOL, prompt, range(8, 8 + N))).kinds == ("",)
        assert [POOL.block(8 + i) for i in range(N)] == before
    assert all_slots_are_free(client)


def test_a_copy_that_does_not_end_keeps_the_engine_awake(served: Served) -> None:
    client, mover = served
    mover.looks = 100_000
    client.submit_store(1, (make_store(POOL, chain(N, "hangs"), range(N)),))
    with pytest.raises(GpuOverdue):
        client.suspend()
    for ticket in mover._tickets:
        ticket._looks = 0
    client.wake()
    mover.looks = 3
    assert [r.outcomes for r in results_of(client) if isinstance(r, StoreResult)] == [("failed",)]
    assert store(client, make_store(POOL, chain(N, "after"), range(N))) == ("stored",)
    assert all_slots_are_free(client)


def test_no_memory_at_wake_up_leaves_an_engine_that_misses(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    client, mover = served
    client.suspend()
    mover.no_memory = "out of memory"
    client.wake()
    assert "nothing is stored or loaded any more: out of memory" in caplog.text
    assert store(client, make_store(POOL, chain(N, "none"), range(N))) == ("failed",)
    mover.no_memory = ""
    client.wake()
    assert store(client, make_store(POOL, chain(N, "some"), range(N))) == ("stored",)
