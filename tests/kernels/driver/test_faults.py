"""Every driver call fails once, at every place: the right error, nothing left behind, and the mover goes on."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from memkv_engines.errors import GpuError, GpuLost
from memkv_engines.gpu.mover import DeviceMover
from tests.fake_cuda.control import FakeCuda
from tests.kernels.driver.rig import HEADER_BYTES, Engine, Pool, Shape, view

KERNEL = (Shape(1, 1000, 1000), Shape(1, 4096, 4096))
DIRECT = (Shape(2, 131072, 131072),)
INVALID_VALUE, OUT_OF_MEMORY, LAUNCH_FAILED, ILLEGAL_ADDRESS = 1, 2, 719, 700
# What a failed call of these cannot give back stays, and nothing else does.
KEEPS = {
    "cuMemFree": {"device"},
    "cuMemFreeHost": {"pinned"},
    "cuMemHostUnregister": {"registered", "device", "pinned"},
    "cuStreamDestroy": {"streams"},
    "cuEventDestroy": {"events"},
    "cuModuleUnload": {"modules"},
    "cuDevicePrimaryCtxRelease": {"contexts"},
    # Without a context nothing can be given back at all.
    "cuCtxPushCurrent": {"device", "pinned", "registered", "streams", "events", "modules", "contexts"},
}


def work(engine: Engine, pools: list[Pool], mover: DeviceMover) -> list[GpuError]:
    """Stores and loads of each group; what succeeds must be right, what fails is returned."""
    errors: list[GpuError] = []
    address = engine.region_address + HEADER_BYTES
    for group, pool in enumerate(pools):
        engine.host[:] = 0x5A
        try:
            ticket = mover.gather(group, [2, 0], address, after_stream=engine.stream, holes=1)
            assert ticket is not None
            ticket.wait(5)
            found = engine.host[HEADER_BYTES : HEADER_BYTES + 3 * pool.stride_bytes]
            assert np.array_equal(found, pool.payload([2, 0], holes=1))
        except GpuError as error:
            errors.append(error)
        finally:
            engine.settle()
        payload = engine.random.integers(0, 256, (1, pool.stride_bytes), dtype=np.uint8)
        engine.host[HEADER_BYTES : HEADER_BYTES + payload.size] = payload.reshape(-1)
        try:
            ticket = mover.scatter(group, address, [1], after_stream=engine.stream)
            assert ticket is not None
            ticket.wait(5)
            pool.set_block(1, payload[0, : pool.block_bytes])
            assert pool.device_matches()
        except GpuError as error:
            errors.append(error)
            engine.settle()
            rewrite(engine, pool)
    return errors


def rewrite(engine: Engine, pool: Pool) -> None:
    """A page whose load failed holds anything: the engine recomputes it."""
    for address, tensor in zip(pool.addresses, pool.tensors, strict=True):
        engine.put(address, tensor.reshape(-1))


def life(engine: Engine, pools: list[Pool], **settings: Any) -> list[GpuError]:
    """A mover from start to end, with a sleep in between."""
    errors = []
    mover = DeviceMover(0, slot_bytes=512 * 1024, slots=1, **settings)
    for step in (
        lambda: mover.register_host(engine.region_address, engine.region_bytes),
        *(lambda group=group, pool=pool: mover.add_group(group, pool.layout) for group, pool in enumerate(pools)),
        lambda: errors.extend(work(engine, pools, mover)),
        lambda: mover.pause(1),
        lambda: mover.resume(),
        lambda: errors.extend(work(engine, pools, mover)),
    ):
        try:
            step()
        except GpuError as error:
            errors.append(error)
    for step in (
        lambda: mover.pause(1),
        lambda: mover.resume(),
    ):
        # Whatever has failed, a second try finds the device as it should be.
        try:
            step()
        except GpuError as error:
            errors.append(error)
    mover.close(1)
    return errors


def calls_of_a_life(fake: FakeCuda) -> dict[str, int]:
    """How often a life calls what."""
    engine = Engine(fake, 1)
    pools = [engine.pool(KERNEL, 3), engine.pool(DIRECT, 3)]
    before = fake.report().calls
    assert life(engine, pools) == []
    calls = {name: count - before.get(name, 0) for name, count in fake.report().calls.items()}
    engine.close()
    return {name: count for name, count in calls.items() if count}


def test_every_driver_call_may_fail_once(fake: FakeCuda) -> None:
    calls = calls_of_a_life(fake)
    assert len(calls) > 25, "a life makes fewer calls than expected: this test has lost its object"
    silent = []
    for name, count in calls.items():
        for nth in {1, 2, (count + 1) // 2, count}:
            if not 1 <= nth <= count:
                continue
            engine = Engine(fake, 1)
            pools = [engine.pool(KERNEL, 3), engine.pool(DIRECT, 3)]
            own = fake.report().live
            fake.fail(name, OUT_OF_MEMORY, nth=nth)
            try:
                errors = life(engine, pools)
            except GpuError as error:
                errors = [error]
            fake.unfail(name)
            where = f"{name}, call {nth}"
            if not errors:
                silent.append(name)
            report = fake.report()
            assert report.violations == [], where
            extra = {kind for kind, live in report.live.items() if live != own[kind]}
            assert extra <= KEEPS.get(name, set()), where
            engine.settle()
            if "registered" in extra:
                engine.unpin()
            # A new life in the same process finds nothing in its way.
            assert life(engine, pools) == [], where
            engine.close()
    # Only calls whose failure changes nothing may pass without a word.
    assert set(silent) <= {
        "cuCtxPopCurrent", "cuThreadExchangeStreamCaptureMode", "cuFuncGetParamInfo", "cuEventQuery", "cuEventDestroy",
        "cuModuleLoadData", "cuStreamDestroy", "cuModuleUnload", "cuDevicePrimaryCtxRelease", "cuMemFree",
        "cuMemFreeHost", "cuMemHostUnregister", "cuCtxPushCurrent",
    }, silent  # fmt: skip


@pytest.mark.parametrize("nth", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("shapes", [KERNEL, DIRECT], ids=["kernel", "direct"])
def test_a_broken_context_ends_everything_and_says_so(
    fake: FakeCuda, shapes: tuple[Shape, ...], nth: int, caplog: pytest.LogCaptureFixture
) -> None:
    engine = Engine(fake, 2)
    pool = engine.pool(shapes, 3)
    mover = engine.mover()
    mover.add_group(0, pool.layout)
    address = engine.region_address + HEADER_BYTES
    fake.fail_operation(ILLEGAL_ADDRESS, nth=nth)
    with pytest.raises(GpuLost):
        for _ in range(20):
            ticket = mover.gather(0, [0], address, after_stream=engine.stream)
            assert ticket is not None
            ticket.wait(2)
    with pytest.raises(GpuLost):
        mover.gather(0, [0], address, after_stream=engine.stream)
    with pytest.raises(GpuLost):
        mover.scatter(0, address, [0], after_stream=engine.stream)
    with pytest.raises(GpuLost):
        mover.pause(1)
    assert mover.poll() == 0
    assert "context is broken" in caplog.text
    mover.close(1)
    engine.keep()


def test_a_launch_that_breaks_the_context(fake: FakeCuda) -> None:
    engine = Engine(fake, 2)
    pool = engine.pool(KERNEL, 3)
    mover = engine.mover()
    mover.add_group(0, pool.layout)
    fake.fail("cuLaunchKernel", LAUNCH_FAILED)
    ticket = mover.gather(0, [0], engine.region_address, after_stream=engine.stream)
    assert ticket is not None
    assert ticket.done()
    with pytest.raises(GpuLost, match="cuLaunchKernel"):
        ticket.check()
    with pytest.raises(GpuLost):
        mover.acquire_slot()
    mover.close(1)
    engine.keep()


@pytest.mark.parametrize(
    ("bit", "text"), [(1, "out of range"), (2, "too small"), (4, "not fit"), (8, "unknown bits 0x8")]
)
def test_a_kernels_error_word_becomes_an_exception(engine: Engine, bit: int, text: str) -> None:
    pool = engine.pool(KERNEL, 3)
    mover = engine.mover(slots=1)
    mover.add_group(0, pool.layout)
    ticket = mover.gather(0, [0], engine.region_address, after_stream=engine.stream)
    assert ticket is not None
    assert ticket.work.slot is not None
    view(ticket.work.slot.error, 4)[0] |= bit
    with pytest.raises(GpuError, match=text):
        ticket.wait(5)
    assert mover.stats().failed == 1
    again = mover.gather(0, [0], engine.region_address, after_stream=engine.stream)
    assert again is not None
    again.wait(5)
    mover.close()


def test_the_device_sees_what_the_host_let_through(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Were the host's checks gone, the kernel would still refuse: nothing is written, and the ticket says why."""
    from memkv_engines.gpu import kernels
    from memkv_engines.gpu import mover as mover_module

    pool = engine.pool(KERNEL, 3)
    mover = engine.mover()
    mover.add_group(0, pool.layout)
    unchecked = lambda ids, num_blocks, distinct: np.asarray(ids, dtype=np.int64)  # noqa: E731
    monkeypatch.setattr(mover_module, "check_ids", unchecked)
    monkeypatch.setattr(kernels, "check_ids", unchecked)
    ticket = mover.scatter(0, engine.region_address, [3], after_stream=engine.stream)
    assert ticket is not None
    with pytest.raises(GpuError, match="id out of range"):
        ticket.wait(5)
    assert pool.device_matches()
    mover.close()
