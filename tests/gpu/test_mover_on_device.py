"""The suite of the fake driver on a real device, and what only a real one can show. Not run on a GPU yet."""

from __future__ import annotations

import numpy as np
import pytest

from memkv_engines.gpu.driver import Driver
from memkv_engines.gpu.image import SOURCES, compile_source, load_kernels
from tests.gpu.device import DeviceEngine
from tests.kernels.driver.bytes_suite import MoverBytes, loaded, stored
from tests.kernels.driver.flow import LONG, SMALL, flow
from tests.kernels.driver.rig import FUSED, HEADER_BYTES, LAYOUTS, Shape

pytestmark = pytest.mark.gpu


class TestMoverBytes(MoverBytes):
    """On the device, by the shipped fatbin."""


@pytest.mark.parametrize("shapes", [SMALL, LONG], ids=["kernel", "copy-engine"])
@pytest.mark.parametrize("slots", [1, 3])
def test_ordering(engine: DeviceEngine, shapes: tuple[Shape, ...], slots: int) -> None:
    assert flow(engine, shapes, slots=slots) == []


@pytest.mark.parametrize("name", ["fused", "large"])
def test_a_gather_waits_for_a_busy_engine(engine: DeviceEngine, name: str) -> None:
    pool = engine.pool(LAYOUTS[name], 4)
    mover = engine.mover()
    mover.add_group(0, pool.layout)
    engine.busy()
    pool.overwrite_late(2)
    ticket = mover.gather(0, [2], engine.region_address + HEADER_BYTES, after_stream=engine.stream)
    assert ticket is not None
    assert not ticket.done(), "the engine's stream is busy for milliseconds"
    wanted = pool.payload([2])
    ticket.hold(engine.stream)
    pool.overwrite_late(2)
    ticket.wait(10)
    assert np.array_equal(engine.host[HEADER_BYTES : HEADER_BYTES + pool.stride_bytes], wanted)
    engine.settle()
    assert pool.device_matches()
    mover.close()


def test_sleep_and_wake(engine: DeviceEngine) -> None:
    pool = engine.pool(FUSED)
    mover = engine.mover()
    mover.add_group(0, pool.layout)
    stored(engine, pool, mover, [1, 2])
    mover.pause()
    mover.resume()
    loaded(engine, pool, mover, [1, 2])
    mover.close()


def test_the_shipped_fatbin_loads_here(engine: DeviceEngine) -> None:
    driver = Driver(0)
    with driver.current():
        module, origin = load_kernels(driver)
        assert origin == "fatbin"
        driver.unload_module(module)
    driver.close()


def test_nvrtc_compiles_for_this_device(engine: DeviceEngine) -> None:
    driver = Driver(0)
    source = next(path for path in SOURCES if path.is_file()).read_bytes()
    with driver.current():
        module = driver.load_module(compile_source(source, driver.capability))
        driver.function(module, "memkv_gather")
        driver.unload_module(module)
    driver.close()
