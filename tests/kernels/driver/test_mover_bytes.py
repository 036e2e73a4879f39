"""The shipped mover on the fake driver, with the real PTX: every byte against an oracle that knows no tiles."""

from __future__ import annotations

import numpy as np
import pytest

from memkv_engines.gpu import reference
from tests.fake_cuda.control import FakeCuda
from tests.kernels.driver.bytes_suite import IDS, MoverBytes, loaded, stored
from tests.kernels.driver.rig import LAYOUTS, LONG_POOL, MLA_ODD, Engine, Shape
from tests.kernels.routes import build_route


class TestMoverBytes(MoverBytes):
    """On the fake driver."""


@pytest.mark.parametrize("target", ["sm_80", "sm_100", "sm_120"])
def test_the_ptx_of_other_devices(engine: Engine, fake: FakeCuda, target: str) -> None:
    try:
        fake.set_kernels(build_route(target))
        pool = engine.pool(MLA_ODD)
        mover = engine.mover()
        mover.add_group(0, pool.layout)
        stored(engine, pool, mover, IDS)
        loaded(engine, pool, mover, IDS)
        mover.close()
    finally:
        fake.set_kernels(build_route("sm_90"))


@pytest.mark.parametrize(("version", "batches"), [(13000, 1), (12070, 0)])
def test_copies_of_long_tiles_go_in_one_call_if_the_driver_can(
    engine: Engine, fake: FakeCuda, version: int, batches: int
) -> None:
    fake.set_driver_version(version)
    pool = engine.pool((Shape(2, 131072, 131072),), 3)
    mover = engine.mover()
    group = mover.add_group(0, pool.layout)
    assert group.route.kind == "copy_engine"
    launches = fake.report().launches
    stored(engine, pool, mover, [2, 0])
    calls = fake.report().calls
    assert calls.get("cuMemcpyBatchAsync", 0) == batches
    assert calls.get("cuMemcpyAsync", 0) == (0 if batches else 4)
    loaded(engine, pool, mover, [1, 2])
    assert fake.report().launches == launches
    mover.close()


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_host_path_moves_the_same_bytes(engine: Engine, name: str) -> None:
    pool = engine.pool(LAYOUTS[name])
    payload = np.zeros(4 * pool.stride_bytes, dtype=np.uint8)
    reference.gather(pool.layout, IDS, payload, pool.stride_bytes, first_index=1)
    assert np.array_equal(payload, pool.payload(IDS, holes=1))
    payload[:] = engine.random.integers(0, 256, payload.size, dtype=np.uint8)
    reference.scatter(pool.layout, IDS, payload, pool.stride_bytes, first_index=1)
    for row, block in enumerate(IDS, start=1):
        pool.set_block(block, payload[row * pool.stride_bytes :][: pool.block_bytes])
    assert pool.device_matches()


def test_a_launch_takes_448_blocks(engine: Engine, fake: FakeCuda) -> None:
    pool = engine.pool(LONG_POOL, 500)
    mover = engine.mover(slot_bytes=450 * 4096)
    mover.add_group(0, pool.layout)
    stored(engine, pool, mover, list(range(448)))
    assert fake.report().launches == 1
    stored(engine, pool, mover, list(range(449)))
    assert fake.report().launches == 3
    mover.close()
