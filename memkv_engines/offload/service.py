"""The I/O service: executes load, store and probe jobs on its own threads.

It runs in a child process (outside the engine's GIL) or, where that is not possible, on threads of the engine. One
thread gathers (the engine's step waits for it, so it never touches the tier), some load, some write, one probes;
writers stand back while loads are pending.
"""

from __future__ import annotations

import contextlib
import json
import queue
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from memkv_engines.errors import IoServiceError, MemKVError
from memkv_engines.keys import Namespace
from memkv_engines.limits import MAX_STAGING_SLOTS, MIN_STAGING_SLOTS
from memkv_engines.log import get_logger
from memkv_engines.offload.groups import Group
from memkv_engines.offload.loading import REMOVABLE_KINDS, ChunkLoad, LoadChunk, LoadOutcome, expand_run
from memkv_engines.offload.messages import (
    Gathered,
    Load,
    LoadDone,
    Manifest,
    Probe,
    ProbeDone,
    Reply,
    Request,
    Setup,
    Store,
    StoreDone,
)
from memkv_engines.offload.pages import Pages
from memkv_engines.offload.probing import ChainWalk
from memkv_engines.offload.staging import StagingPool
from memkv_engines.offload.storing import ChunkStore
from memkv_engines.tier.base import Tier

log = get_logger(__name__)

_WRITER_YIELD_S = 1.0
# What a job can end with, messages that contradict themselves included. It fails the job, never the thread.
_JOB_ERRORS = (MemKVError, OSError, LookupError, ValueError, TypeError, ArithmeticError, MemoryError, struct.error)


@dataclass
class _LoadJob:
    job_id: int
    started: float
    runs: list[list[LoadChunk]]
    outcomes: list[list[LoadOutcome | None]]
    remaining: int
    malformed: frozenset[int]
    # First bad chunk per run: what follows it in the chain is of no use.
    first_bad: dict[int, int] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)


@dataclass
class _StoreJob:
    message: Store
    outcomes: list[str]
    remaining: int
    written_bytes: int = 0
    payload_bytes: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


class IoService:
    """Serves one worker (loads, stores) or one scheduler (probes).

    Args:
        setup: sizes and groups.
        tier: where chunks live.
        pages: how to reach the engine's pages; None for a service that only probes.
        reply: called from any service thread with each reply; must be thread-safe.
    """

    def __init__(self, setup: Setup, tier: Tier, pages: Pages | None, reply: Callable[[Reply], None]) -> None:
        self._tier, self._pages, self._reply = tier, pages, reply
        self._groups = {g.group: Group.from_spec(g) for g in setup.groups if g.tiles}
        self._gathers: queue.SimpleQueue[Store | None] = queue.SimpleQueue()
        self._loads: queue.SimpleQueue[tuple[_LoadJob, int, int] | None] = queue.SimpleQueue()
        self._writes: queue.SimpleQueue[tuple[_StoreJob, int, ChunkStore] | None] = queue.SimpleQueue()
        self._probes: queue.SimpleQueue[Probe | Manifest | None] = queue.SimpleQueue()
        self._loads_pending = 0
        self._idle_loads = threading.Condition()
        self._threads: list[threading.Thread] = []
        self._load_threads = setup.io_threads
        self._write_threads = max(1, setup.io_threads // 2)
        if self._groups:
            if pages is None:
                raise IoServiceError("a service with groups needs pages")
            self._make_staging(setup)

    def _make_staging(self, setup: Setup) -> None:
        slot_bytes = max(g.slot_bytes for g in self._groups.values())
        loads = max(self._load_threads, MIN_STAGING_SLOTS)
        left = setup.staging_bytes - loads * slot_bytes
        stores = min(max(left // slot_bytes, MIN_STAGING_SLOTS), MAX_STAGING_SLOTS)
        self._load_staging = StagingPool(slot_bytes, loads)
        self._store_staging = StagingPool(slot_bytes, stores)
        self._load_staging.touch()

    def start(self) -> None:
        """Start the threads."""
        plan = [("probe", 1, self._probe_loop)]
        if self._groups:
            plan += [
                ("gather", 1, self._gather_loop),
                ("load", self._load_threads, self._load_loop),
                ("write", self._write_threads, self._write_loop),
            ]
        for name, count, loop in plan:
            for index in range(count):
                thread = threading.Thread(target=loop, name=f"memkv-{name}-{index}", daemon=True)
                self._threads.append(thread)
                thread.start()

    def submit(self, message: Request) -> None:
        """Queue a job; does not block."""
        if isinstance(message, Store):
            self._gathers.put(message)
        elif isinstance(message, Load):
            self._submit_load(message)
        elif isinstance(message, (Probe, Manifest)):
            self._probes.put(message)
        else:
            raise IoServiceError(f"unexpected message {type(message).__name__}")

    def stop(self, timeout_s: float) -> None:
        """Finish what was gathered, then end the threads; gives up waiting after ``timeout_s``."""
        deadline = time.monotonic() + timeout_s
        stages = (("gather", self._gathers), ("load", self._loads), ("write", self._writes), ("probe", self._probes))
        for name, jobs in stages:
            threads = [t for t in self._threads if t.name.startswith(f"memkv-{name}-")]
            for _ in threads:
                jobs.put(None)
            for thread in threads:
                thread.join(max(0.0, deadline - time.monotonic()))

    # --- loads ---------------------------------------------------------------

    def _submit_load(self, message: Load) -> None:
        runs: list[list[LoadChunk]] = []
        malformed = set()
        for number, run in enumerate(message.runs):
            try:
                runs.append(expand_run(run))
            except _JOB_ERRORS as error:
                log.warning("load refused: %s", error)
                malformed.add(number)
                runs.append([])
        count = sum(map(len, runs))
        outcomes: list[list[LoadOutcome | None]] = [[None] * len(r) for r in runs]
        job = _LoadJob(message.job_id, time.perf_counter(), runs, outcomes, count, frozenset(malformed))
        if not count:
            self._finish_load(job)
            return
        with self._idle_loads:
            self._loads_pending += count
        for number, chunks in enumerate(runs):
            for index in range(len(chunks)):
                self._loads.put((job, number, index))

    def _load_loop(self) -> None:
        while (item := self._loads.get()) is not None:
            job, run, index = item
            outcome = self._load_one(job, run, index)
            with job.lock:
                job.outcomes[run][index] = outcome
                if outcome.kind:
                    job.first_bad[run] = min(index, job.first_bad.get(run, index))
                job.remaining -= 1
                finished = job.remaining == 0
            with self._idle_loads:
                self._loads_pending -= 1
                if not self._loads_pending:
                    self._idle_loads.notify_all()
            if finished:
                self._finish_load(job)

    def _load_one(self, job: _LoadJob, run: int, index: int) -> LoadOutcome:
        chunk = job.runs[run][index]
        if job.first_bad.get(run, index) < index:
            return LoadOutcome(0, "skipped", 0)
        slot = self._load_staging.acquire()
        try:
            load = ChunkLoad(chunk, self._groups[chunk.group], self._tier, self._require_pages(), slot)
            outcome = load.run()
            if outcome.kind in REMOVABLE_KINDS:
                with contextlib.suppress(MemKVError, OSError):
                    self._tier.remove(load.folder, load.name)
        except _JOB_ERRORS as error:
            log.warning("load failed: %s", error)
            return LoadOutcome(0, getattr(error, "kind", "io_error"), 0)
        finally:
            self._load_staging.release(slot)
        return outcome

    def _finish_load(self, job: _LoadJob) -> None:
        good_blocks, kinds = [], []
        done = [o for outcomes in job.outcomes for o in outcomes if o is not None]
        for number, outcomes in enumerate(job.outcomes):
            good, kind = 0, IoServiceError.kind if number in job.malformed else ""
            for outcome in outcomes:
                good += outcome.good_blocks if outcome else 0
                kind = outcome.kind if outcome else "io_error"
                if kind:
                    break
            good_blocks.append(good)
            kinds.append(kind)
        self._reply(
            LoadDone(
                job.job_id,
                tuple(good_blocks),
                tuple(kinds),
                sum(not o.kind for o in done),
                sum(o.read_bytes for o in done),
                int((time.perf_counter() - job.started) * 1e6),
            )
        )

    def _require_pages(self) -> Pages:
        if self._pages is None:
            raise IoServiceError("this service has no pages")
        return self._pages

    # --- stores --------------------------------------------------------------

    def _gather_loop(self) -> None:
        while (message := self._gathers.get()) is not None:
            job = _StoreJob(message, ["shed"] * len(message.chunks), len(message.chunks))
            ready = []
            for index in range(len(message.chunks)):
                store = self._gather_one(job, index)
                if store is not None:
                    ready.append((job, index, store))
            self._reply(Gathered(message.job_id))
            dropped = len(message.chunks) - len(ready)
            for item in ready:
                self._writes.put(item)
            if dropped or not message.chunks:
                self._account(job, dropped)

    def _gather_one(self, job: _StoreJob, index: int) -> ChunkStore | None:
        chunk = job.message.chunks[index]
        slot = self._store_staging.try_acquire()
        if slot is None:
            return None
        try:
            store = ChunkStore(chunk, self._groups[chunk.group], slot)
            store.gather(self._require_pages())
            return store
        except _JOB_ERRORS as error:
            log.warning("gather failed: %s", error)
            job.outcomes[index] = "failed"
            self._store_staging.release(slot)
            return None

    def _write_loop(self) -> None:
        while (item := self._writes.get()) is not None:
            job, index, store = item
            self._let_loads_pass()
            try:
                outcome, written = store.write(self._tier)
            except _JOB_ERRORS as error:
                log.warning("store failed: %s", error)
                outcome, written = "failed", 0
            finally:
                self._store_staging.release(store.slot)
            with job.lock:
                job.outcomes[index] = outcome
                job.written_bytes += written
                job.payload_bytes += store.payload_bytes if written else 0
            self._account(job, 1)

    def _let_loads_pass(self) -> None:
        with self._idle_loads:
            self._idle_loads.wait_for(lambda: not self._loads_pending, _WRITER_YIELD_S)

    def _account(self, job: _StoreJob, count: int) -> None:
        with job.lock:
            job.remaining -= count
            if job.remaining:
                return
        self._reply(StoreDone(job.message.job_id, tuple(job.outcomes), job.written_bytes, job.payload_bytes))

    # --- probes --------------------------------------------------------------

    def _probe_loop(self) -> None:
        while (message := self._probes.get()) is not None:
            if isinstance(message, Manifest):
                self._write_manifest(message)
                continue
            start = time.perf_counter()
            try:
                segments = tuple(ChainWalk(message, self._tier).run())
            except _JOB_ERRORS as error:
                log.warning("probe failed: %s", error)
                segments = ()
            self._reply(ProbeDone(message.probe_id, segments, int((time.perf_counter() - start) * 1e6)))

    def _write_manifest(self, message: Manifest) -> None:
        try:
            fields = json.loads(message.fields_json)
            self._tier.write_manifest(Namespace(fields))
        except _JOB_ERRORS as error:
            log.warning("cannot write the namespace manifest: %s", error)
