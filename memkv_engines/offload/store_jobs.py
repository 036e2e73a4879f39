"""Store jobs: chunks of one engine step, gathered at once, then digested and written in the background.

Three stages: some threads gather (the engine's next step waits for them, so they never touch the tier), some digest,
some write. Digesting and writing stand back while loads are pending.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from memkv_engines.chunk.protection import Protection
from memkv_engines.log import get_logger
from memkv_engines.offload.groups import Group
from memkv_engines.offload.memory_level import MemoryLevel
from memkv_engines.offload.messages import IN_TIER, Gathered, Store, StoreDone
from memkv_engines.offload.outcomes import StoreTally
from memkv_engines.offload.pages import Pages
from memkv_engines.offload.staging import StagingPool
from memkv_engines.offload.storing import HostStore
from memkv_engines.offload.threads import JOB_ERRORS, ThreadGroup
from memkv_engines.tier.base import Tier

log = get_logger(__name__)

YIELD_TO_LOADS_S = 1.0


@dataclass
class _Job:
    message: Store
    tally: StoreTally
    ungathered: int
    ready: list[_Item] = field(default_factory=list)
    lost: list[tuple[int, str]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)


@dataclass(frozen=True)
class _Item:
    """One gathered chunk of a job."""

    job: _Job
    index: int
    store: HostStore


@dataclass(frozen=True)
class _Wanted:
    """One chunk that is to be gathered."""

    job: _Job
    index: int


class StoreJobs:
    """Executes store jobs.

    Args:
        groups: the KV groups by number.
        tier: where chunks go.
        pages: where blocks come from.
        staging: slots; a chunk that finds none is shed.
        gatherers: threads that gather.
        digesters: threads that digest.
        writers: threads that write.
        yield_to_loads: blocks, for at most the given seconds, while loads are pending.
        reply: called from any thread with each answer; must be thread-safe.
        protection: what protects the chunks, if anything does.
        memory: where chunks stay that are in the tier.
    """

    def __init__(
        self,
        groups: dict[int, Group],
        tier: Tier,
        pages: Pages,
        staging: StagingPool,
        *,
        gatherers: int,
        digesters: int,
        writers: int,
        yield_to_loads: Callable[[float], None],
        reply: Callable[[Gathered | StoreDone], None],
        protection: Protection | None = None,
        memory: MemoryLevel | None = None,
    ) -> None:
        self._groups, self._tier, self._pages, self._staging, self._reply = groups, tier, pages, staging, reply
        self._yield_to_loads, self._protection, self._memory = yield_to_loads, protection, memory
        self._submitted: queue.SimpleQueue[_Wanted | None] = queue.SimpleQueue()
        self._gathered: queue.SimpleQueue[_Item | None] = queue.SimpleQueue()
        self._digested: queue.SimpleQueue[_Item | None] = queue.SimpleQueue()
        self._gatherers: ThreadGroup[_Wanted] = ThreadGroup("gather", gatherers, self._submitted, self._gather)
        self._finishers: tuple[ThreadGroup[_Item], ...] = (
            ThreadGroup("digest", digesters, self._gathered, self._digest),
            ThreadGroup("write", writers, self._digested, self._write),
        )

    def start(self) -> None:
        """Start the threads."""
        self._gatherers.start()
        for stage in self._finishers:
            stage.start()

    def stop(self, deadline: float) -> None:
        """Write what was submitted and end the threads; gives up waiting at the deadline (monotonic clock)."""
        self._gatherers.stop(deadline)
        for stage in self._finishers:
            stage.stop(deadline)

    def submit(self, message: Store) -> None:
        """Queue a job; does not block."""
        count = len(message.chunks)
        if not count:
            self._reply(Gathered(message.job_id))
            self._reply(StoreDone(message.job_id, (), 0, 0))
            return
        job = _Job(message, StoreTally(message.job_id, count), count)
        for index in range(count):
            self._submitted.put(_Wanted(job, index))

    def _gather(self, wanted: _Wanted) -> None:
        job = wanted.job
        store = self._gather_one(job, wanted.index)
        with job.lock:
            if isinstance(store, str):
                job.lost.append((wanted.index, store))
            else:
                job.ready.append(_Item(job, wanted.index, store))
            job.ungathered -= 1
            if job.ungathered:
                return
        self._all_gathered(job)

    def _all_gathered(self, job: _Job) -> None:
        self._reply(Gathered(job.message.job_id))
        ready, job.ready = job.ready, []
        for item in ready:
            self._gathered.put(item)
        for index, outcome in job.lost:
            self._tell(job.tally.settle(index, outcome))

    def _gather_one(self, job: _Job, index: int) -> HostStore | str:
        """The chunk in a slot, or what became of it."""
        chunk = job.message.chunks[index]
        slot = self._staging.try_acquire()
        if slot is None:
            return "shed"
        try:
            store = HostStore(chunk, self._groups[chunk.group], slot, self._protection)
            store.gather(self._pages)
            return store
        except JOB_ERRORS as error:
            log.warning("gather failed: %s", error)
            self._staging.release(slot)
            return "failed"

    def _digest(self, item: _Item) -> None:
        self._yield_to_loads(YIELD_TO_LOADS_S)
        try:
            needed = item.store.digest(self._tier)
        except JOB_ERRORS as error:
            log.warning("store failed: %s", error)
            self._settle(item, "failed", 0)
            return
        if needed:
            self._digested.put(item)
        else:
            self._settle(item, "present", 0)

    def _write(self, item: _Item) -> None:
        self._yield_to_loads(YIELD_TO_LOADS_S)
        failure: Exception | None = None
        try:
            outcome, written = item.store.write(self._tier)
        except JOB_ERRORS as error:
            log.warning("store failed: %s", error)
            failure, outcome, written = error, "failed", 0
        store = item.store
        if self._memory is not None and outcome in IN_TIER:
            store.slot = self._memory.swap(store.folder, store.name, store.slot, store.object_bytes, used=False)
        self._settle(item, outcome, written, failure)

    def _settle(self, item: _Item, outcome: str, written_bytes: int, failure: Exception | None = None) -> None:
        self._staging.release(item.store.slot, failure)
        payload_bytes = item.store.payload_bytes if written_bytes else 0
        self._tell(item.job.tally.settle(item.index, outcome, written_bytes, payload_bytes))

    def _tell(self, answer: StoreDone | None) -> None:
        if answer is not None:
            self._reply(answer)
