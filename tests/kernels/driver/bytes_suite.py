"""What the mover must do with bytes, wherever it runs: on the fake driver and on a real device.

Every byte is compared with an oracle that knows no tiles (`rig.Pool`).
"""

from __future__ import annotations

import numpy as np
import pytest

from memkv_engines.chunk.checksum import block_digest, block_digest_of_leaves
from memkv_engines.gpu.mover import DeviceMover
from memkv_engines.gpu.tickets import Ticket
from tests.kernels.driver.rig import CROSS_LAYER, HEADER_BYTES, LAYOUTS, LONG_POOL, ODD, Engine, Pool

IDS = [4, 0, 7]


def ended(ticket: Ticket | None) -> Ticket:
    """The ticket, once its work has ended well."""
    assert ticket is not None
    ticket.wait(5)
    return ticket


def stored(engine: Engine, pool: Pool, mover: DeviceMover, ids: list[int], holes: int = 0) -> None:
    """Gathers and compares every byte of the region."""
    engine.host[:] = 0xA5
    address = engine.region_address + HEADER_BYTES
    ticket = ended(mover.gather(0, ids, address, after_stream=engine.stream, holes=holes))
    assert ticket.size_bytes == len(ids) * pool.block_bytes
    end = HEADER_BYTES + (holes + len(ids)) * pool.stride_bytes
    assert np.array_equal(engine.host[HEADER_BYTES:end], pool.payload(ids, holes))
    assert (engine.host[:HEADER_BYTES] == 0xA5).all()
    assert (engine.host[end:] == 0xA5).all()
    assert pool.device_matches()


def loaded(engine: Engine, pool: Pool, mover: DeviceMover, ids: list[int]) -> None:
    """Scatters and compares every byte of the pool."""
    size = len(ids) * pool.stride_bytes
    engine.host[HEADER_BYTES : HEADER_BYTES + size] = engine.random.integers(0, 256, size, dtype=np.uint8)
    rows = engine.host[HEADER_BYTES : HEADER_BYTES + size].reshape(len(ids), pool.stride_bytes).copy()
    ended(mover.scatter(0, engine.region_address + HEADER_BYTES, ids, after_stream=engine.stream))
    for block, row in zip(ids, rows, strict=True):
        pool.set_block(block, row[: pool.block_bytes])
    assert pool.device_matches()


class MoverBytes:
    """Inherit as `Test...` and give a fixture `engine`."""

    @pytest.mark.parametrize("name", LAYOUTS)
    def test_stores_and_loads(self, engine: Engine, name: str) -> None:
        pool = engine.pool(LAYOUTS[name])
        mover = engine.mover()
        mover.add_group(0, pool.layout)
        stored(engine, pool, mover, IDS)
        stored(engine, pool, mover, [8], holes=2)
        loaded(engine, pool, mover, IDS)
        stored(engine, pool, mover, [0, 4, 8])
        mover.close()

    @pytest.mark.parametrize("name", ["fused", "cross-layer", "mla", "odd"])
    def test_the_bulk_kernels_where_the_layout_allows_them(self, engine: Engine, name: str) -> None:
        pool = engine.pool(LAYOUTS[name])
        mover = engine.mover(bulk=True)
        mover.add_group(0, pool.layout)
        stored(engine, pool, mover, IDS, holes=1)
        loaded(engine, pool, mover, IDS)
        mover.close()

    def test_more_blocks_than_one_launch_takes(self, engine: Engine) -> None:
        pool = engine.pool(LONG_POOL, 700)
        mover = engine.mover(slot_bytes=600 * 4096)
        mover.add_group(0, pool.layout)
        ids = [int(i) for i in engine.random.permutation(700)[:500]]
        stored(engine, pool, mover, ids, holes=3)
        loaded(engine, pool, mover, ids)
        mover.close()

    def test_several_groups_and_several_chunks_in_flight(self, engine: Engine) -> None:
        pools = [engine.pool(ODD), engine.pool(CROSS_LAYER), engine.pool(LAYOUTS["large"])]
        mover = engine.mover(slots=4)
        for number, pool in enumerate(pools):
            mover.add_group(number, pool.layout)
        tickets = []
        for turn in range(2):
            for number, pool in enumerate(pools):
                at = engine.region_address + (turn * 3 + number) * 100 * 4096
                ids = [turn, 8 - turn]
                tickets.append((mover.gather(number, ids, at, after_stream=engine.stream), at, pool, ids))
        for ticket, at, pool, ids in tickets:
            ended(ticket)
            start = at - engine.region_address
            assert np.array_equal(engine.host[start : start + 2 * pool.stride_bytes], pool.payload(ids))
        assert mover.stats().gathers == 6
        assert mover.stats().in_flight == 0
        mover.close()

    @pytest.mark.parametrize("name", ["mla-odd", "cross-layer", "odd"])
    def test_device_staging_and_digests(self, engine: Engine, name: str) -> None:
        pool = engine.pool(LAYOUTS[name])
        mover = engine.mover(medium="gpu")
        mover.add_group(0, pool.layout)
        slot = mover.acquire_slot()
        assert slot is not None
        gathered = mover.gather_to_device(0, IDS, slot, HEADER_BYTES, after_stream=engine.stream, holes=1)
        digests = mover.leaf_digests(0, slot, HEADER_BYTES + pool.stride_bytes, len(IDS), loading=False)
        ended(digests)
        ended(gathered)
        at = slot.address + HEADER_BYTES
        assert np.array_equal(engine.get(at, 4 * pool.stride_bytes), pool.payload(IDS, holes=1))
        for row, block in enumerate(IDS):
            wanted = block_digest(memoryview(pool.block(block)), bytes(range(32)), row)
            made = block_digest_of_leaves(digests.leaf_bytes(row), pool.block_bytes, bytes(range(32)), row)
            assert made == wanted
        # What a transport has read into the slot goes back to other pages.
        loading = mover.leaf_digests(0, slot, HEADER_BYTES + pool.stride_bytes, len(IDS), loading=True)
        ended(loading)
        assert loading.leaf_bytes(0) == digests.leaf_bytes(0)
        moved = [1, 2, 3]
        ended(mover.scatter_from_device(0, slot, HEADER_BYTES + pool.stride_bytes, moved, after_stream=engine.stream))
        for to, source in zip(moved, IDS, strict=True):
            pool.set_block(to, pool.block(source))
        assert pool.device_matches()
        mover.release_slot(slot)
        mover.close()
