"""Slots that are late, drains, sleep mode and ends."""

from __future__ import annotations

import numpy as np
import pytest

from memkv_engines.errors import GpuError, GpuLost, GpuOverdue
from memkv_engines.gpu import resources
from memkv_engines.gpu.mover import DeviceMover
from tests.kernels.driver.rig import FUSED, HEADER_BYTES, LAYOUTS, Engine, Pool


@pytest.fixture
def pool(engine: Engine) -> Pool:
    return engine.pool(FUSED, 4)


@pytest.fixture
def mover(engine: Engine, pool: Pool) -> DeviceMover:
    mover = engine.mover(slots=2)
    mover.add_group(0, pool.layout)
    return mover


def gathers(mover: DeviceMover, engine: Engine, pool: Pool) -> None:
    """One gather, right to the byte."""
    ticket = mover.gather(0, [1], engine.region_address + HEADER_BYTES, after_stream=engine.stream)
    assert ticket is not None
    ticket.wait(5)
    found = engine.host[HEADER_BYTES : HEADER_BYTES + pool.stride_bytes]
    assert np.array_equal(found, pool.payload([1]))


def test_a_slot_whose_copy_is_overdue_is_not_reused(engine: Engine, pool: Pool, mover: DeviceMover) -> None:
    copy_out = mover._resources.streams["copy_out"]
    engine.fake.stall(copy_out)
    late = [mover.gather(0, [0], engine.region_address, after_stream=engine.stream) for _ in range(2)]
    for ticket in late:
        assert ticket is not None
        with pytest.raises(GpuOverdue, match="has not ended after 0"):
            ticket.wait(0.01)
    assert mover.gather(0, [1], engine.region_address, after_stream=engine.stream) is None
    assert mover.scatter(0, engine.region_address, [1], after_stream=engine.stream) is None
    assert mover.acquire_slot() is None
    stats = mover.stats()
    assert (stats.overdue, stats.in_flight, stats.free_slots) == (2, 2, 0)
    engine.fake.unstall(copy_out)
    engine.settle()
    gathers(mover, engine, pool)
    stats = mover.stats()
    assert (stats.overdue, stats.in_flight, stats.free_slots) == (0, 0, 2)
    mover.close()


def test_a_ticket_may_be_dropped(engine: Engine, pool: Pool, mover: DeviceMover) -> None:
    for _ in range(2):
        assert mover.gather(0, [0], engine.region_address, after_stream=engine.stream) is not None
    engine.settle()
    assert mover.poll() == 0
    gathers(mover, engine, pool)
    mover.close()


def test_a_failed_submission_is_the_tickets_until_its_work_has_ended(
    engine: Engine, pool: Pool, mover: DeviceMover
) -> None:
    """The kernel is queued, the copy out is not: pages and slot are in use all the same."""
    gather = mover._resources.streams["gather"]
    engine.fake.stall(gather)
    engine.fake.fail("cuMemcpyDtoHAsync", 1)
    ticket = mover.gather(0, [0], engine.region_address, after_stream=engine.stream)
    assert ticket is not None
    assert not ticket.done()
    ticket.hold(engine.stream)
    assert mover.stats().free_slots == 1
    engine.fake.unstall(gather)
    engine.settle()
    assert ticket.done()
    with pytest.raises(GpuError, match="cuMemcpyDtoHAsync"):
        ticket.check()
    ticket.hold(engine.stream)
    assert mover.stats().free_slots == 2
    gathers(mover, engine, pool)
    mover.close()


@pytest.mark.parametrize(("way", "stream", "record"), [("gather", "copy_out", 3), ("scatter", "copy_in", 1)])
def test_a_failed_submission_ends_when_all_its_streams_are_through(
    engine: Engine, pool: Pool, mover: DeviceMover, way: str, stream: str, record: int
) -> None:
    """The copy is queued, the event behind it is not; the ticket's other stream has nothing left to do."""
    handle = mover._resources.streams[stream]
    engine.fake.stall(handle)
    engine.fake.fail("cuEventRecord", 1, nth=record)
    if way == "gather":
        ticket = mover.gather(0, [0], engine.region_address, after_stream=engine.stream)
    else:
        engine.host[: pool.stride_bytes] = 0
        ticket = mover.scatter(0, engine.region_address, [0], after_stream=engine.stream)
    assert ticket is not None
    for _ in range(20):
        assert not ticket.done(), "the host slot is still read or written"
    engine.fake.unstall(handle)
    with pytest.raises(GpuError, match="cuEventRecord"):
        ticket.wait(5)
    assert pool.device_matches(), "no kernel was queued"
    mover.close()


def test_nothing_to_hold_behind_a_submission_that_failed_early(engine: Engine, pool: Pool, mover: DeviceMover) -> None:
    engine.fake.stall(mover._resources.streams["gather"])
    engine.fake.fail("cuLaunchKernel", 1)
    ticket = mover.gather(0, [0], engine.region_address, after_stream=engine.stream)
    assert ticket is not None
    with pytest.raises(GpuError, match="wait until it is done"):
        ticket.hold(engine.stream)
    engine.fake.unstall(mover._resources.streams["gather"])
    engine.settle()
    with pytest.raises(GpuError, match="cuLaunchKernel"):
        ticket.wait(5)
    mover.close()


def test_the_end_of_a_failed_submission_is_looked_for_again(engine: Engine, pool: Pool, mover: DeviceMover) -> None:
    engine.fake.fail("cuLaunchKernel", 1)
    engine.fake.fail("cuEventRecord", 1, nth=2, forever=True)
    ticket = mover.gather(0, [0], engine.region_address, after_stream=engine.stream)
    assert ticket is not None
    engine.settle()
    assert not ticket.done()
    engine.fake.unfail("cuEventRecord")
    with pytest.raises(GpuError, match="cuLaunchKernel"):
        ticket.wait(5)
    mover.close()


def test_a_query_that_fails_is_no_answer(engine: Engine, pool: Pool, mover: DeviceMover) -> None:
    ticket = mover.gather(0, [0], engine.region_address, after_stream=engine.stream)
    assert ticket is not None
    engine.settle()
    engine.fake.fail("cuEventQuery", 1, forever=True)
    assert not ticket.done()
    engine.fake.unfail("cuEventQuery")
    ticket.wait(5)
    mover.close()


def test_a_context_that_cannot_be_made_current_is_no_answer(engine: Engine, pool: Pool, mover: DeviceMover) -> None:
    ticket = mover.gather(0, [0], engine.region_address, after_stream=engine.stream)
    assert ticket is not None
    engine.settle()
    engine.fake.fail("cuCtxPushCurrent", 1)
    assert not ticket.done()
    engine.fake.fail("cuCtxPushCurrent", 700)
    assert ticket.done()
    with pytest.raises(GpuError):
        ticket.check()
    mover.close()
    engine.abandon()


def test_sleep_and_wake(engine: Engine, pool: Pool, mover: DeviceMover) -> None:
    gathers(mover, engine, pool)
    before = engine.fake.report().live
    mover.pause(5)
    live = engine.fake.report().live
    assert live["registered"] == 0
    assert live["device"] == before["device"] - 2, "slots and tile table are freed"
    with pytest.raises(GpuError, match="paused"):
        mover.gather(0, [0], engine.region_address, after_stream=engine.stream)
    assert mover.stats().free_slots == 0
    mover.pause(5)
    mover.resume()
    mover.resume()
    assert engine.fake.report().live == before
    gathers(mover, engine, pool)
    mover.close()


def test_a_sleep_waits_for_what_is_under_way(engine: Engine, pool: Pool, mover: DeviceMover) -> None:
    stream = mover._resources.streams["copy_out"]
    engine.fake.stall(stream)
    ticket = mover.gather(0, [3], engine.region_address, after_stream=engine.stream)
    assert ticket is not None
    before = engine.fake.report().live
    with pytest.raises(GpuOverdue, match="1 copies have not ended"):
        mover.pause(0.01)
    assert engine.fake.report().live == before, "nothing may be freed"
    engine.fake.unstall(stream)
    mover.pause(5)
    assert ticket.done()
    assert np.array_equal(engine.host[: pool.stride_bytes], pool.payload([3]))
    mover.resume()
    gathers(mover, engine, pool)
    mover.close()


def test_a_drain_goes_on_behind_a_call_that_fails_once(engine: Engine, pool: Pool, mover: DeviceMover) -> None:
    gathers(mover, engine, pool)
    engine.fake.fail("cuCtxPushCurrent", 2)
    mover.pause(5)
    mover.resume()
    mover.close()


def test_a_held_slot_keeps_the_engine_awake(engine: Engine, pool: Pool, mover: DeviceMover) -> None:
    slot = mover.acquire_slot()
    assert slot is not None
    with pytest.raises(GpuError, match="1 device slots are held"):
        mover.pause(5)
    mover.release_slot(slot)
    mover.pause(5)
    mover.close()


def test_a_slot_is_free_when_its_holder_and_its_work_are_done(engine: Engine, pool: Pool, mover: DeviceMover) -> None:
    slot = mover.acquire_slot()
    assert slot is not None
    engine.fake.stall(mover._resources.streams["gather"])
    ticket = mover.gather_to_device(0, [0], slot, 0, after_stream=engine.stream)
    mover.release_slot(slot)
    assert mover.stats().free_slots == 1
    engine.fake.unstall(mover._resources.streams["gather"])
    ticket.wait(5)
    assert mover.stats().free_slots == 2
    mover.close()


def test_no_memory_when_waking_up(engine: Engine, pool: Pool, mover: DeviceMover) -> None:
    mover.pause(5)
    engine.fake.fail("cuMemAlloc", 2)
    with pytest.raises(GpuError, match="OUT_OF_MEMORY"):
        mover.resume()
    with pytest.raises(GpuError, match="paused"):
        mover.acquire_slot()
    mover.resume()
    gathers(mover, engine, pool)
    mover.close()


def test_an_end_that_does_not_drain_leaks_on_purpose(
    engine: Engine, pool: Pool, mover: DeviceMover, caplog: pytest.LogCaptureFixture
) -> None:
    stream = mover._resources.streams["copy_out"]
    engine.fake.stall(stream)
    ticket = mover.gather(0, [0], engine.region_address, after_stream=engine.stream)
    assert ticket is not None
    mover.close(0.01)
    assert "left allocated" in caplog.text
    assert engine.fake.report().live["registered"] == 1
    assert not ticket.done()
    with pytest.raises(GpuOverdue):
        ticket.wait(0.01)
    engine.fake.unstall(stream)
    engine.settle()
    assert engine.fake.report().violations == [], "the late copy found its memory"
    engine.abandon()


def test_an_end_behind_a_broken_context(engine: Engine, pool: Pool, mover: DeviceMover) -> None:
    tickets = [mover.gather(0, [0], engine.region_address, after_stream=engine.stream) for _ in range(2)]
    engine.fake.fail("cuCtxPushCurrent", 700)
    mover.close()
    for ticket in tickets:
        assert ticket is not None
        assert ticket.done()
        with pytest.raises(GpuLost):
            ticket.check()
    engine.abandon()


def test_all_tickets_end_when_the_context_breaks(engine: Engine, pool: Pool, mover: DeviceMover) -> None:
    for _ in range(2):
        assert mover.gather(0, [0], engine.region_address, after_stream=engine.stream) is not None
    engine.fake.fail_operation(700)
    engine.settle()
    assert mover.poll() == 0
    assert mover.stats().failed == 2
    mover.close()
    engine.abandon()


def test_an_upload_that_does_not_end_is_left_alone(
    engine: Engine, pool: Pool, mover: DeviceMover, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(resources, "GPU_DRAIN_TIMEOUT_S", 0.01)
    stream = mover._resources.streams["copy_in"]
    engine.fake.stall(stream)
    with pytest.raises(GpuOverdue, match="tile table"):
        mover.add_group(1, pool.layout)
    assert "left on the device" in caplog.text
    with pytest.raises(GpuError, match="group 1 is unknown"):
        mover.gather(1, [0], engine.region_address, after_stream=engine.stream)
    engine.fake.unstall(stream)
    engine.settle()
    assert engine.fake.report().violations == [], "the late upload found its memory"
    gathers(mover, engine, pool)
    mover.close()
    engine.abandon()


def test_loads_do_not_stand_behind_stores(engine: Engine, pool: Pool, mover: DeviceMover) -> None:
    for name in ("gather", "copy_out"):
        engine.fake.stall(mover._resources.streams[name])
    store = mover.gather(0, [0], engine.region_address, after_stream=engine.stream)
    load = mover.scatter(0, engine.region_address + 64 * 4096, [1], after_stream=engine.stream)
    assert load is not None
    assert store is not None
    load.wait(5)
    assert not store.done()
    pool.set_block(1, np.zeros(pool.block_bytes, dtype=np.uint8))
    for name in ("gather", "copy_out"):
        engine.fake.unstall(mover._resources.streams[name])
    store.wait(5)
    assert pool.device_matches()
    mover.close()


def test_our_streams_have_the_highest_priority_and_do_not_wait_for_the_default_stream(
    engine: Engine, mover: DeviceMover
) -> None:
    for stream in mover._resources.streams.values():
        assert engine.ok("cuStreamGetPriority", stream) == -5
        assert int(engine.ok("cuStreamGetFlags", stream)) == 1
    mover.close()


def test_the_engines_context_is_as_it_was(engine: Engine, pool: Pool, mover: DeviceMover) -> None:
    gathers(mover, engine, pool)
    assert engine.fake.report().current == 1
    mover.close()
    assert engine.fake.report().current == 1


@pytest.mark.parametrize("name", ["large", "large-padded"])
def test_a_direct_copy_needs_no_slot(engine: Engine, name: str) -> None:
    pool = engine.pool(LAYOUTS[name], 4)
    mover = engine.mover(slots=1)
    mover.add_group(0, pool.layout)
    slot = mover.acquire_slot()
    assert slot is not None
    gathers(mover, engine, pool)
    mover.release_slot(slot)
    mover.close()
