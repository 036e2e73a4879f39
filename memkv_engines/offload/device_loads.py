"""Load jobs into device memory: the I/O service fills pinned slots, the mover scatters them into the pages.

A job is cut into chunks; as many as there are slots go to the I/O service in one message. What comes back good is
scattered at once, and its slots serve the next chunks.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from memkv_engines.errors import GpuError, IoServiceError
from memkv_engines.log import get_logger
from memkv_engines.offload.client import IoClient
from memkv_engines.offload.loading import LoadChunk, LoadOutcome
from memkv_engines.offload.messages import STOPPED, LoadRun
from memkv_engines.offload.moving import Mover, Moving
from memkv_engines.offload.outcomes import LoadTally
from memkv_engines.offload.pinned import PinnedSlot, PinnedStaging
from memkv_engines.offload.results import LoadResult

log = get_logger(__name__)

_TELLING_CHUNKS = 4
"""The rate of fewer chunks, which were asked for together, tells nothing."""


@dataclass(frozen=True)
class _Job:
    """One load of the engine."""

    job_id: int
    deadline: float
    tally: LoadTally


@dataclass
class _Part:
    """One chunk of a job, and where it is on its way."""

    job: _Job
    run: int
    index: int
    slots: list[PinnedSlot] = field(default_factory=list)
    good: int = 0
    kind: str = ""
    from_memory: bool = False
    unscattered: list[tuple[PinnedSlot, int, int]] = field(default_factory=list)
    moving: list[Moving] = field(default_factory=list)

    @property
    def chunk(self) -> LoadChunk:
        return self.job.tally.chunks[self.run][self.index]

    @property
    def is_pointless(self) -> bool:
        return self.job.tally.is_pointless(self.run, self.index)


class DeviceLoads:
    """Loads of one worker. Not thread-safe; nothing here blocks but ``drain``.

    Args:
        client: the I/O service, whose paged memory is the staging.
        mover: between staging and pages.
        staging: pinned slots.
        stream: the engine's compute stream of the calling thread, as a number.
        timeout_s: age at which a job is given up.
        next_id: numbers for jobs of the I/O service.
    """

    def __init__(
        self,
        client: IoClient,
        mover: Mover,
        staging: PinnedStaging,
        stream: Callable[[], int],
        timeout_s: float,
        next_id: Callable[[], int],
    ) -> None:
        self._client, self._mover, self._staging, self._stream = client, mover, staging, stream
        self._timeout_s, self._next_id = timeout_s, next_id
        self._block_bytes = {spec.group: spec.block_bytes for spec in staging.specs}
        self._waiting: deque[_Part] = deque()
        self._reading: dict[int, list[_Part]] = {}
        self._placing: list[_Part] = []
        self._results: list[LoadResult] = []
        self.pending = 0

    def submit(self, job_id: int, runs: tuple[LoadRun, ...], stop_s: float = 0.0) -> None:
        """Queue a job; its result will come from ``poll``. Stopped once it is seen to take longer than ``stop_s``."""
        job = _Job(job_id, time.monotonic() + self._timeout_s, LoadTally(runs, stop_s))
        self.pending += 1
        if not job.tally.open_chunks:
            self._finish(job)
        self._waiting += [_Part(job, run, index) for run, index in job.tally.places()]
        self._send()

    def owns(self, job_id: int) -> bool:
        """Whether a result of the I/O service is for a part of ours."""
        return job_id in self._reading

    def take(self, result: LoadResult) -> None:
        """A message of the I/O service: what is good goes on into the pages."""
        # Of chunks that were asked for together it is only known how much of all came from memory.
        from_memory = result.memory_bytes > result.read_bytes
        for part, good, kind in zip(self._reading.pop(result.job_id), result.good_blocks, result.kinds, strict=True):
            part.good, part.kind, part.from_memory = good, kind, from_memory
            part.job.tally.need_no_reading(int(from_memory))
            start = 0
            for slot in part.slots:
                count = max(0, min(slot.blocks, good - start))
                if count and not part.is_pointless:
                    part.unscattered.append((slot, start, count))
                else:
                    self._staging.give_back(slot)
                start += slot.blocks
            self._placing.append(part)

    def poll(self) -> list[LoadResult]:
        """Move on what can; results of jobs that have ended, whose pages nothing touches any more."""
        placing, self._placing = self._placing, []
        for part in placing:
            self._scatter(part)
            self._end_moves(part)
            if part.unscattered or part.moving:
                self._placing.append(part)
            else:
                self._settle(part)
        self._send()
        results, self._results = self._results, []
        return results

    @property
    def moving(self) -> bool:
        """Whether the device is at work, so that polling soon is worth while."""
        return bool(self._placing)

    def drain(self, timeout_s: float) -> None:
        """Wait until no page is written any more. What has not been given to the device is lost."""
        deadline = time.monotonic() + timeout_s
        for part in self._placing:
            for slot, start, _ in part.unscattered:
                self._fail(part, start)
                self._staging.give_back(slot)
            part.unscattered.clear()
            for move in part.moving:
                move.wait(max(0.0, deadline - time.monotonic()))

    # --- inside --------------------------------------------------------------

    def _send(self) -> None:
        """Hand as many chunks as there are slots for to the I/O service, in one message."""
        batch: list[_Part] = []
        while self._waiting and self._admit(self._waiting[0]):
            part = self._waiting.popleft()
            if part.slots:
                batch.append(part)
        if batch:
            job_id = self._next_id()
            self._reading[job_id] = batch
            self._client.submit_load(job_id, tuple(self._run_of(part) for part in batch))

    def _admit(self, part: _Part) -> bool:
        """Give the first part in the queue its slots, or end it where it is of no use; False: it must wait."""
        chunk = part.chunk
        late = time.monotonic() >= part.job.deadline
        if late or part.is_pointless:
            part.kind = IoServiceError.kind if late else "skipped"
            self._settle(part)
            return True
        if part.job.tally.must_stop(_TELLING_CHUNKS):
            part.kind = STOPPED
            self._settle(part)
            return True
        per_slot = self._staging.blocks_per_slot(chunk.group)
        if not per_slot or not len(chunk.block_ids):
            log.warning("load refused: group %d, %d blocks", chunk.group, len(chunk.block_ids))
            part.kind = IoServiceError.kind
            self._settle(part)
            return True
        need = -(-len(chunk.block_ids) // per_slot)
        if need > self._staging.slots(chunk.group, for_loads=True):
            log.warning("a chunk of %d blocks needs more than all staging: raise staging_bytes", len(chunk.block_ids))
            part.kind = IoServiceError.kind
            self._settle(part)
            return True
        if need > self._staging.free(chunk.group, for_loads=True):
            return False
        taken = [self._staging.take(chunk.group, for_loads=True) for _ in range(need)]
        part.slots = [slot for slot in taken if slot is not None]
        return True

    def _run_of(self, part: _Part) -> LoadRun:
        """The chunk alone, into the slots."""
        chunk = part.chunk
        numbers: list[int] = []
        for slot in part.slots:
            numbers += slot.numbers(min(slot.blocks, len(chunk.block_ids) - len(numbers)))
        return LoadRun(
            chunk.namespace,
            chunk.group,
            chunk.block_count,
            1,
            chunk.holes,
            chunk.last,
            chunk.take_first,
            b"".join(chunk.hashes),
            np.array(numbers, dtype="<i4").tobytes(),
        )

    def _scatter(self, part: _Part) -> None:
        while part.unscattered:
            slot, start, count = part.unscattered[0]
            ids = part.chunk.block_ids[start : start + count]
            try:
                ticket = self._mover.scatter(slot.group, slot.address, ids, after_stream=self._stream())
            except GpuError as error:
                log.warning("a load cannot be placed: %s", error)
                self._fail(part, start)
                self._staging.give_back(slot)
            else:
                if ticket is None:
                    return
                part.moving.append(Moving(ticket, slot, start))
            part.unscattered.pop(0)

    def _end_moves(self, part: _Part) -> None:
        for move in [m for m in part.moving if m.ticket.done()]:
            part.moving.remove(move)
            self._staging.give_back(move.slot)
            if not move.succeeded():
                self._fail(part, move.start)

    @staticmethod
    def _fail(part: _Part, start: int) -> None:
        """Blocks from ``start`` on are not in place."""
        part.good, part.kind = min(part.good, start), "io_error"

    def _settle(self, part: _Part) -> None:
        moved_bytes = part.good * self._block_bytes.get(part.chunk.group, 0)
        read_bytes, memory_bytes = (0, moved_bytes) if part.from_memory else (moved_bytes, 0)
        outcome = LoadOutcome(part.good, part.kind, read_bytes, memory_bytes=memory_bytes)
        if part.job.tally.settle(part.run, part.index, outcome):
            self._finish(part.job)

    def _finish(self, job: _Job) -> None:
        self.pending -= 1
        good_blocks, kinds = job.tally.answer()
        if STOPPED in kinds:
            self._client.counters.add("load_stopped")
        settled = job.tally.settled()
        read_bytes, memory_bytes = sum(o.read_bytes for o in settled), sum(o.memory_bytes for o in settled)
        elapsed_s = job.tally.elapsed_s
        self._results.append(LoadResult(job.job_id, good_blocks, kinds, read_bytes, elapsed_s, memory_bytes))
