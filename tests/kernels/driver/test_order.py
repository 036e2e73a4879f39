"""Orderings: the shipped code passes with every seed; each ordering that is taken out of it is caught by some seed."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from memkv_engines.gpu import driver as driver_module
from memkv_engines.gpu import submissions
from memkv_engines.gpu.book import TicketBook
from memkv_engines.gpu.driver import Driver
from memkv_engines.gpu.mover import DeviceMover
from memkv_engines.gpu.staging import DeviceRing
from memkv_engines.gpu.submissions import Submissions
from memkv_engines.gpu.tickets import Ticket
from tests.fake_cuda.control import LATE, RANDOM, FakeCuda
from tests.kernels.driver.flow import LONG, SMALL, outcome
from tests.kernels.driver.rig import Engine

SEEDS = 12
Patch = pytest.MonkeyPatch


@pytest.mark.parametrize("shapes", [SMALL, LONG], ids=["kernel", "copy-engine"])
@pytest.mark.parametrize("lateness", [RANDOM, LATE], ids=["random", "late"])
@pytest.mark.parametrize("slots", [1, 3])
def test_the_shipped_code_is_right_with_every_seed(fake: FakeCuda, shapes: Any, lateness: int, slots: int) -> None:
    for seed in range(SEEDS):
        problems = outcome(lambda seed=seed: Engine(fake, seed, lateness=lateness), shapes, slots=slots)
        assert problems == [], f"seed {seed}"


def no_wait_for_the_engine(patch: Patch) -> None:
    patch.setattr(Submissions, "_wait_for_engine", lambda *_: None)


def no_wait_of(stream_name: str) -> Callable[[Patch], None]:
    """Our own streams do not wait for each other."""

    def mutate(patch: Patch) -> None:
        wait = Driver.wait
        ours: dict[str, int] = {}
        make = Submissions.__init__

        def remember(self: Submissions, resources: Any, *rest: Any) -> None:
            ours.update(resources.streams)
            make(self, resources, *rest)

        patch.setattr(Submissions, "__init__", remember)
        patch.setattr(
            Driver,
            "wait",
            lambda self, stream, event: None if stream == ours[stream_name] else wait(self, stream, event),
        )

    mutate.__name__ = f"no_wait_of_{stream_name}"
    return mutate


def copy_out_on_another_stream(patch: Patch) -> None:
    copy, make = Driver.copy_to_host, Submissions.__init__
    ours: dict[str, int] = {}

    def remember(self: Submissions, resources: Any, *rest: Any) -> None:
        ours.update(resources.streams)
        make(self, resources, *rest)

    patch.setattr(Submissions, "__init__", remember)
    patch.setattr(
        Driver, "copy_to_host", lambda self, to, source, size, _: copy(self, to, source, size, ours["copy_in"])
    )


def host_reads_without_waiting(patch: Patch) -> None:
    patch.setattr(Ticket, "done", lambda self: True)


def event_before_the_work(patch: Patch) -> None:
    """The fence is recorded on a stream that has nothing to do with the work."""
    fence = Submissions._fence

    def wrong(self: Submissions, work: Any, stream: int) -> int:
        other = next(s for s in self._resources.streams.values() if s != stream)
        return fence(self, work, other)

    patch.setattr(Submissions, "_fence", wrong)


def slot_reused_before_its_event(patch: Patch) -> None:
    def begin(self: DeviceRing, slot: Any) -> None:
        self._free.append(slot)

    patch.setattr(DeviceRing, "begin", begin)
    patch.setattr(DeviceRing, "end", lambda self, slot: None)
    patch.setattr(DeviceRing, "release", lambda self, slot: None)


def ids_overwritten_after_the_launch(patch: Patch) -> None:
    """Ids by pointer instead of by value, in a buffer that is used for something else at once."""
    launch = Driver.launch

    def by_pointer(self: Driver, function: int, ctas: int, threads: int, shared: int, stream: int, args: Any) -> None:
        if "ids" not in args.dtype.names:
            return launch(self, function, ctas, threads, shared, stream, args)
        count = int(args["block_count"])
        buffer = self.alloc_pinned(count * 8)
        ids = np.ctypeslib.as_array((ctypes.c_int64 * count).from_address(buffer))
        ids[:] = args["ids"][:count]
        args["external_ids"] = buffer
        launch(self, function, ctas, threads, shared, stream, args)
        ids[:] = ids[::-1].copy()
        return None

    patch.setattr(Driver, "launch", by_pointer)


def gaps_not_zeroed(patch: Patch) -> None:
    patch.setattr(Submissions, "_zero_between", lambda *_: None)
    patch.setattr(submissions, "zero_between", lambda *_: None)


def sources_read_whenever(patch: Patch) -> None:
    patch.setattr(driver_module, "_SOURCE_IN_STREAM_ORDER", 3)


def closed_without_draining(patch: Patch) -> None:
    patch.setattr(Ticket, "wait", lambda self, timeout_s: None)
    patch.setattr(DeviceMover, "_drain", lambda self, timeout_s: self._book.in_flight.clear())


def ended_when_any_fence_is_reached(patch: Patch) -> None:
    patch.setattr(TicketBook, "advance", lambda self, ticket: not ticket.work.complete and (self._end(ticket), True)[1])


BOTH = ("kernel", "copy-engine")
MUTANTS: list[tuple[Callable[[Patch], None], tuple[str, ...]]] = [
    (no_wait_for_the_engine, BOTH),
    (no_wait_of("copy_out"), ("kernel",)),
    (no_wait_of("scatter"), ("kernel",)),
    (copy_out_on_another_stream, ("kernel",)),
    (host_reads_without_waiting, BOTH),
    (event_before_the_work, BOTH),
    (slot_reused_before_its_event, ("kernel",)),
    (ids_overwritten_after_the_launch, ("kernel",)),
    (gaps_not_zeroed, BOTH),
    (sources_read_whenever, ("copy-engine",)),
    (closed_without_draining, BOTH),
    (ended_when_any_fence_is_reached, BOTH),
]


@pytest.mark.parametrize(
    ("mutate", "way"),
    [
        pytest.param(mutate, way, id=f"{number}-{mutate.__name__}-{way}")
        for number, (mutate, ways) in enumerate(MUTANTS)
        for way in ways
    ],
)
def test_a_forgotten_order_is_caught(
    fake: FakeCuda, monkeypatch: Patch, mutate: Callable[[Patch], None], way: str
) -> None:
    mutate(monkeypatch)
    shapes = SMALL if way == "kernel" else LONG
    leaks = mutate is closed_without_draining
    assert any(outcome(lambda seed=seed: Engine(fake, seed), shapes, slots=2, leaks=leaks) for seed in range(40))


def test_an_engine_that_does_not_hold_its_stream_is_caught(fake: FakeCuda) -> None:
    assert any(outcome(lambda seed=seed: Engine(fake, seed), SMALL, hold=False) for seed in range(40))


def test_nothing_waits_for_the_whole_device(fake: FakeCuda) -> None:
    outcome(lambda: Engine(fake), SMALL)
    calls = fake.report().calls
    assert "cuCtxSynchronize" not in calls
    assert "cuStreamSynchronize" not in calls or calls["cuStreamSynchronize"] <= 2, "only the engine's own"
    assert not {"cuMemcpy", "cuMemcpyHtoD", "cuMemcpyDtoH"} & calls.keys()
