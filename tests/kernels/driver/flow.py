"""One busy stretch of an engine with offload: what the tests of ordering run with the shipped code and with mutants."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from memkv_engines.errors import GpuError
from memkv_engines.gpu.mover import DeviceMover
from memkv_engines.gpu.tickets import Ticket
from tests.kernels.driver.rig import HEADER_BYTES, Engine, EngineFailed, Pool, Shape, view

SMALL = (Shape(1, 1000, 1000), Shape(1, 4096, 4096))
LONG = (Shape(2, 32768, 32768),)


def flow(engine: Engine, shapes: tuple[Shape, ...], *, hold: bool = True, slots: int = 1) -> list[str]:
    """Stores and loads behind a forward pass that keeps writing; returns what came out wrong.

    Args:
        engine: fresh.
        shapes: of the pool.
        hold: whether the engine lets its stream wait for ours, as the contract asks.
        slots: device slots.
    """
    pool, problems = engine.pool(shapes, 6), []
    mover = engine.mover(slots=slots)
    mover.add_group(0, pool.layout)
    engine.host[:] = 0xEE
    for number, step in enumerate((_store, _store, _load, _store, _load)):
        try:
            problems += [f"step {number}: {text}" for text in step(engine, pool, mover, hold)]
        except GpuError as error:
            problems.append(f"step {number}: {error}")
    try:
        mover.close(timeout_s=0.5)
    except GpuError as error:
        problems.append(f"close: {error}")
    engine.settle()
    if not pool.device_matches():
        problems.append("pages differ at the end")
    return problems


def outcome(
    make: Callable[[], Engine], shapes: tuple[Shape, ...], *, leaks: bool = True, hold: bool = True, slots: int = 1
) -> list[str]:
    """As ``flow``, with what the fake driver itself has seen, and with ``leaks`` what was left on the device."""
    engine = make()
    try:
        problems = flow(engine, shapes, hold=hold, slots=slots)
    except EngineFailed as error:
        problems = [str(error)]
    engine.fake.run()
    report = engine.fake.report()
    if not report.sticky:
        engine.close()
        live = {kind: count for kind, count in engine.fake.report().live.items() if count}
        problems += [f"left on the device: {live}"] if live and leaks else []
    if problems or report.violations:
        engine.keep()
    return problems + report.violations


def _submitted(mover: DeviceMover, submit: Callable[[], Ticket | None]) -> Ticket:
    for _ in range(1000):
        ticket = submit()
        if ticket is not None:
            return ticket
        mover.poll()
    raise GpuError("no slot comes free")


def _store(engine: Engine, pool: Pool, mover: DeviceMover, hold: bool) -> list[str]:
    """A pass writes two blocks, they are stored, the next pass overwrites them."""
    address = engine.region_address + HEADER_BYTES
    ids = [int(i) for i in engine.random.permutation(pool.num_blocks)[:2]]
    for block in ids:
        pool.overwrite_late(block)
    wanted = [pool.payload(ids, holes=1)]
    ticket = _submitted(mover, lambda: mover.gather(0, ids, address, after_stream=engine.stream, holes=1))
    if hold:
        ticket.hold(engine.stream)
    for block in ids:
        pool.overwrite_late(block)
    # A second chunk, which must wait for a slot if there is but one.
    second_address = address + 4 * pool.stride_bytes
    second = _submitted(mover, lambda: mover.gather(0, ids, second_address, after_stream=engine.stream))
    wanted.append(pool.payload(ids))
    ticket.wait(5)
    second.wait(5)
    size = wanted[0].size
    problems = []
    if not np.array_equal(engine.host[HEADER_BYTES : HEADER_BYTES + size], wanted[0]):
        problems.append("the first chunk differs")
    start = HEADER_BYTES + 4 * pool.stride_bytes
    if not np.array_equal(engine.host[start : start + wanted[1].size], wanted[1]):
        problems.append("the second chunk differs")
    engine.host[:] = 0xEE
    return problems


def _load(engine: Engine, pool: Pool, mover: DeviceMover, hold: bool) -> list[str]:
    """A pass still writes two pages; then they are loaded, and the next pass reads them."""
    address = engine.region_address + HEADER_BYTES
    ids = [int(i) for i in engine.random.permutation(pool.num_blocks)[:2]]
    for block in ids:
        pool.overwrite_late(block)
    payload = engine.random.integers(0, 256, (2, pool.stride_bytes), dtype=np.uint8)
    engine.host[HEADER_BYTES : HEADER_BYTES + payload.size] = payload.reshape(-1)
    ticket = _submitted(mover, lambda: mover.scatter(0, address, ids, after_stream=engine.stream))
    for row, block in enumerate(ids):
        pool.set_block(block, payload[row, : pool.block_bytes])
    if hold:
        ticket.hold(engine.stream)
    tile = pool.layout.tiles[0]
    read = engine.read_late(tile.base + ids[0] * tile.block_stride_bytes, tile.length_bytes)
    ticket.wait(5)
    engine.host[:] = 0xEE  # the slot is free again: another chunk may come in
    engine.ok("cuStreamSynchronize", engine.stream)
    if not np.array_equal(view(read, tile.length_bytes), payload[0, : tile.length_bytes]):
        return ["the next pass read old bytes"]
    return []
