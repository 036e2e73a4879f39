"""Load jobs: chunks of one request's prefix, read by some threads and placed by others.

Reading and placing (verify, scatter) are separate stages so that the device stays busy: were one thread to do both, all
threads would read at once, finish together and then leave the device idle while they compete for the cores.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from memkv_engines.errors import MemKVError
from memkv_engines.log import get_logger
from memkv_engines.offload.loading import REMOVABLE_KINDS, ChunkLoad, LoadChunk, LoadOutcome, Staging
from memkv_engines.offload.messages import STOPPED, Load, LoadDone
from memkv_engines.offload.outcomes import LoadTally
from memkv_engines.offload.threads import JOB_ERRORS, ThreadGroup
from memkv_engines.tier.base import Tier

log = get_logger(__name__)


@dataclass(frozen=True)
class _Job:
    job_id: int
    tally: LoadTally

    def answer(self) -> LoadDone:
        done = self.tally.settled()
        return LoadDone(
            self.job_id,
            *self.tally.answer(),
            sum(not o.kind for o in done),
            sum(o.read_bytes for o in done),
            int(self.tally.elapsed_s * 1e6),
            sum(o.reread for o in done),
            sum(o.memory_bytes for o in done),
        )


@dataclass(frozen=True)
class _Item:
    """One chunk of a job; ``load`` is there once it was read."""

    job: _Job
    run: int
    index: int
    load: ChunkLoad | None = None

    @property
    def chunk(self) -> LoadChunk:
        return self.job.tally.chunks[self.run][self.index]

    @property
    def is_pointless(self) -> bool:
        return self.job.tally.is_pointless(self.run, self.index)


class LoadJobs:
    """Executes load jobs.

    Args:
        tier: where chunks live.
        staging: slots; more than ``readers``, or placing holds reading up.
        make_load: makes the load of one chunk through a slot.
        find_resident: makes the load of one chunk that lies in memory, and needs neither slot nor reading; None if it
            does not, or nobody places.
        readers: threads that read.
        placers: threads that verify and scatter; 0 where that is no work for a core: then the readers do it.
        reply: called from any of them with each answer; must be thread-safe.
    """

    def __init__(
        self,
        tier: Tier,
        staging: Staging,
        make_load: Callable[[LoadChunk, Any], ChunkLoad],
        *,
        readers: int,
        placers: int,
        reply: Callable[[LoadDone], None],
        find_resident: Callable[[LoadChunk], ChunkLoad | None] = lambda chunk: None,
    ) -> None:
        self._tier, self._staging, self._make_load, self._reply = tier, staging, make_load, reply
        self._find_resident = find_resident
        self._readers, self._readers_place = readers, not placers
        self._wanted: queue.SimpleQueue[_Item | None] = queue.SimpleQueue()
        self._arrived: queue.SimpleQueue[_Item | None] = queue.SimpleQueue()
        self._pending = 0
        self._idle = threading.Condition()
        self._stages: tuple[ThreadGroup[_Item], ...] = (
            ThreadGroup("read", readers, self._wanted, self._read),
            ThreadGroup("place", placers, self._arrived, self._place),
        )

    def start(self) -> None:
        """Start the threads."""
        for stage in self._stages:
            stage.start()

    def stop(self, deadline: float) -> None:
        """Finish what was submitted and end the threads; gives up waiting at the deadline (monotonic clock)."""
        for stage in self._stages:
            stage.stop(deadline)

    @property
    def ended(self) -> bool:
        """Whether every thread has ended."""
        return all(stage.ended for stage in self._stages)

    def wait_idle(self, timeout_s: float) -> None:
        """Block until no load is pending or the time is up."""
        with self._idle:
            self._idle.wait_for(lambda: not self._pending, timeout_s)

    def submit(self, message: Load) -> None:
        """Queue a job; does not block."""
        job = _Job(message.job_id, LoadTally(message.runs, message.stop_us / 1e6))
        places = job.tally.places()
        if not places:
            self._reply(job.answer())
            return
        with self._idle:
            self._pending += len(places)
        items = [_Item(job, run, index) for run, index in places]
        resident = [self._resident(item) for item in items]
        # Before any of them ends: what lies in memory tells nothing of how fast the others come.
        job.tally.need_no_reading(sum(load is not None for load in resident))
        for item, load in zip(items, resident, strict=True):
            if load is None:
                self._wanted.put(item)
            else:
                self._arrived.put(replace(item, load=load))

    def _resident(self, item: _Item) -> ChunkLoad | None:
        try:
            load = self._find_resident(item.chunk)
            if load is not None:
                load.read()
            return load
        except JOB_ERRORS:
            return None  # a reader will say why

    def _read(self, item: _Item) -> None:
        if item.is_pointless:
            self._settle(item, LoadOutcome(0, "skipped", 0))
            return
        if item.job.tally.must_stop(self._readers):
            self._settle(item, LoadOutcome(0, STOPPED, 0))
            return
        slot = None
        try:
            slot = self._staging.acquire()
            load = self._make_load(item.chunk, slot)
            load.read()
        except JOB_ERRORS as error:
            if slot is not None:
                self._staging.release(slot, error)
            self._settle(item, _failed(error))
            return
        arrived = replace(item, load=load)
        if self._readers_place:
            self._place(arrived)
        else:
            self._arrived.put(arrived)

    def _place(self, item: _Item) -> None:
        load = item.load
        if load is None:
            raise AssertionError("an item that was not read")
        failure: Exception | None = None
        try:
            if item.is_pointless:
                load.close()
                outcome = LoadOutcome(0, "skipped", 0)
            else:
                outcome = load.finish()
                if outcome.kind in REMOVABLE_KINDS:
                    load.forget()
                    if load.is_resident:
                        # Wrong in memory, not in the tier: once more, from there.
                        self._wanted.put(replace(item, load=None))
                        return
                    outcome = self._read_again(item, load.slot, outcome)
        except JOB_ERRORS as error:
            failure, outcome = error, _failed(error)
        finally:
            load.give_back(self._staging, failure)
        self._settle(item, outcome)

    def _read_again(self, item: _Item, slot: Any, first: LoadOutcome) -> LoadOutcome:
        """A chunk that was not right, once more: memory, bus and network err too, and others may have use for it.

        One that is wrong again is removed.
        """
        load = self._make_load(item.chunk, slot)
        load.read()
        outcome = load.finish()
        if outcome.kind in REMOVABLE_KINDS:
            with contextlib.suppress(MemKVError, OSError):
                self._tier.remove(load.folder, load.name)
        return LoadOutcome(
            outcome.good_blocks, outcome.kind, first.read_bytes + outcome.read_bytes, reread=not outcome.kind
        )

    def _settle(self, item: _Item, outcome: LoadOutcome) -> None:
        finished = item.job.tally.settle(item.run, item.index, outcome)
        with self._idle:
            self._pending -= 1
            if not self._pending:
                self._idle.notify_all()
        if finished:
            self._reply(item.job.answer())


def _failed(error: Exception) -> LoadOutcome:
    log.warning("load failed: %s", error)
    return LoadOutcome(0, getattr(error, "kind", "io_error"), 0)
