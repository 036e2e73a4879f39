"""Hypothesis drives mover and ring through any order of calls, and compares with a model that moves bytes at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from memkv_engines.errors import GpuError
from memkv_engines.gpu.tickets import Ticket
from tests.fake_cuda.control import load
from tests.kernels.driver.rig import Engine, Pool, Shape
from tests.kernels.routes import build_route

POOLS = ((Shape(1, 1000, 1000), Shape(2, 2048, 2048)), (Shape(2, 28672, 28672),))
BLOCKS, PLACES, PLACE_BYTES, MAX_IDS = 5, 6, 3 * 61440, 2
GROUP = st.integers(0, len(POOLS) - 1)
IDS = st.lists(st.integers(0, BLOCKS - 1), min_size=1, max_size=MAX_IDS, unique=True)
PLACE = st.integers(0, PLACES - 1)


@dataclass
class Flight:
    """A ticket and what must be true when it has ended."""

    ticket: Ticket
    place: int
    wanted: Any = None
    broken: bool = False


class MoverMachine(RuleBasedStateMachine):
    """Places are host slots; a place is in use while a ticket on it is in flight, as the contract asks."""

    @initialize(seed=st.integers(0, 2**16), slots=st.integers(1, 3))
    def start(self, seed: int, slots: int) -> None:
        self.fake = load()
        self.fake.set_kernels(build_route("sm_90"))
        self.engine = Engine(self.fake, seed)
        self.pools: list[Pool] = [self.engine.pool(shapes, BLOCKS) for shapes in POOLS]
        self.mover = self.engine.mover(slots=slots, slot_bytes=PLACE_BYTES)
        for group, pool in enumerate(self.pools):
            self.mover.add_group(group, pool.layout)
        self.slots = slots
        self.flights: list[Flight] = []
        self.held: list[Any] = []
        self.stalled: list[int] = []
        self.paused = False

    def _address(self, place: int) -> int:
        return self.engine.region_address + place * PLACE_BYTES

    def _bytes(self, place: int, size: int) -> Any:
        start = place * PLACE_BYTES
        return self.engine.host[start : start + size]

    def _busy(self, place: int) -> bool:
        return any(flight.place == place for flight in self.flights)

    @precondition(lambda self: not self.paused)
    @rule(
        group=GROUP, ids=IDS, place=PLACE, holes=st.integers(0, 1), fail=st.sampled_from(["", "", "", "launch", "copy"])
    )
    def gather(self, group: int, ids: list[int], place: int, holes: int, fail: str) -> None:
        if self._busy(place):
            return
        pool = self.pools[group]
        self._bytes(place, PLACE_BYTES)[:] = 0xEE
        wanted = pool.payload(ids, holes)
        failed = self._arm(group, fail, "cuMemcpyDtoHAsync")
        ticket = self.mover.gather(group, ids, self._address(place), after_stream=self.engine.stream, holes=holes)
        self._disarm(failed)
        if ticket is None:
            return
        if not failed:
            ticket.hold(self.engine.stream)
        self.flights.append(Flight(ticket, place, wanted, bool(failed)))
        if failed:
            self._end(self.flights[-1])  # A careful engine does not go on before the pages are quiet.

    @precondition(lambda self: not self.paused)
    @rule(group=GROUP, ids=IDS, place=PLACE, fail=st.sampled_from(["", "", "", "launch", "copy"]))
    def scatter(self, group: int, ids: list[int], place: int, fail: str) -> None:
        if self._busy(place):
            return
        pool = self.pools[group]
        size = len(ids) * pool.stride_bytes
        self._bytes(place, size)[:] = self.engine.random.integers(0, 256, size, dtype=np.uint8)
        rows = self._bytes(place, size).reshape(len(ids), -1).copy()
        failed = self._arm(group, fail, "cuMemcpyHtoDAsync")
        ticket = self.mover.scatter(group, self._address(place), ids, after_stream=self.engine.stream)
        self._disarm(failed)
        if ticket is None:
            return
        self.flights.append(Flight(ticket, place, None, bool(failed)))
        if failed:
            self._end(self.flights[-1])
            for block in ids:  # The engine recomputes pages whose load failed.
                pool.overwrite_late(block)
            return
        ticket.hold(self.engine.stream)
        for block, row in zip(ids, rows, strict=True):
            pool.set_block(block, row[: pool.block_bytes])

    @precondition(lambda self: not self.stalled)
    @rule(group=GROUP, block=st.integers(0, BLOCKS - 1))
    def forward_pass(self, group: int, block: int) -> None:
        self.pools[group].overwrite_late(block)

    @precondition(lambda self: not self.paused)
    @rule()
    def take_a_device_slot(self) -> None:
        slot = self.mover.acquire_slot()
        if slot is not None:
            assert all(slot is not other for other in self.held)
            self.held.append(slot)

    @precondition(lambda self: self.held)
    @rule()
    def give_a_device_slot_back(self) -> None:
        self.mover.release_slot(self.held.pop())

    @rule(count=st.integers(1, 5))
    def device_works(self, count: int) -> None:
        self.fake.run(count)

    @rule(name=st.sampled_from(["gather", "scatter", "copy_out", "copy_in"]))
    def stream_stands_still(self, name: str) -> None:
        stream = self.mover._resources.streams[name]
        self.fake.stall(stream)
        self.stalled.append(stream)

    @rule()
    def streams_go_on(self) -> None:
        while self.stalled:
            self.fake.unstall(self.stalled.pop())

    @rule()
    def poll(self) -> None:
        self.mover.poll()
        self._look()

    @precondition(lambda self: not self.held)
    @rule()
    def sleep(self) -> None:
        self.streams_go_on()
        self.mover.pause(5)
        self.paused = True
        self._look()

    @precondition(lambda self: self.paused)
    @rule()
    def wake(self) -> None:
        self.streams_go_on()  # Waking up waits for the upload of tile tables.
        self.mover.resume()
        self.paused = False

    def _arm(self, group: int, fail: str, copy: str) -> str:
        direct = group == 1
        name = {"": "", "launch": "cuLaunchKernel", "copy": copy}[fail] if not direct else fail and "cuMemcpyBatchAsync"
        if name:
            self.fake.fail(name, 1)
        return name

    def _disarm(self, name: str) -> None:
        if name:
            self.fake.unfail(name)

    def _end(self, flight: Flight) -> None:
        self.streams_go_on()
        try:
            flight.ticket.wait(5)
            assert not flight.broken, "a failure was not told"
        except GpuError:
            # A call that had no slot to use never came to the failing call; then the ticket would not exist.
            assert flight.broken
        self._look()

    def _look(self) -> None:
        """What has ended must be right, and is taken off the list."""
        for flight in list(self.flights):
            if not flight.ticket.done():
                continue
            self.flights.remove(flight)
            if flight.wanted is not None and not flight.broken:
                assert np.array_equal(self._bytes(flight.place, flight.wanted.size), flight.wanted)

    @invariant()
    def nothing_was_done_wrong(self) -> None:
        if not hasattr(self, "mover"):
            return
        assert self.fake.report().violations == []
        assert self.mover.stats().free_slots + len(self.held) <= self.slots

    def teardown(self) -> None:
        if not hasattr(self, "mover"):
            return
        self.streams_go_on()
        for slot in self.held:
            self.mover.release_slot(slot)
        self.mover.close(5)
        self._look()
        assert not self.flights
        self.engine.settle()
        assert all(pool.device_matches() for pool in self.pools)
        self.engine.close()
        report = self.fake.report()
        assert report.violations == []
        assert not any(report.live.values()), report.live


TestMover = MoverMachine.TestCase
TestMover.settings = settings(
    max_examples=25,
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    # A late stream costs real seconds per attempt: shrinking would take longer than reading the sequence.
    phases=(Phase.explicit, Phase.reuse, Phase.generate),
)
