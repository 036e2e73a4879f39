"""The shipped mover on the fake driver, with the real PTX: every byte against an oracle that knows no tiles."""

from __future__ import annotations

import numpy as np
import pytest

from tests.kernels.driver.rig import HEADER_BYTES, LAYOUTS, Engine


@pytest.mark.parametrize("name", LAYOUTS)
def test_gather(engine: Engine, name: str) -> None:
    pool = engine.pool(LAYOUTS[name])
    mover = engine.mover()
    mover.add_group(0, pool.layout)
    engine.host[:] = 0xA5
    ids = [4, 0, 7]
    ticket = mover.gather(0, ids, engine.region_address + HEADER_BYTES, after_stream=engine.stream, holes=1)
    assert ticket is not None
    ticket.wait(5)
    size = 4 * pool.stride_bytes
    assert np.array_equal(engine.host[HEADER_BYTES : HEADER_BYTES + size], pool.payload(ids, holes=1))
    assert (engine.host[:HEADER_BYTES] == 0xA5).all()
    assert (engine.host[HEADER_BYTES + size :] == 0xA5).all()
    assert pool.device_matches()
    mover.close()
