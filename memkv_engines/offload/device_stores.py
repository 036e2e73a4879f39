"""Store jobs out of device memory: the mover gathers pages into pinned slots, the I/O service writes them.

The engine need not wait for gathers: its own stream does, on the device (``fence``).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec

from memkv_engines.errors import GpuError
from memkv_engines.log import get_logger
from memkv_engines.metrics import Counters
from memkv_engines.offload.client import IoClient
from memkv_engines.offload.messages import StoreChunk
from memkv_engines.offload.moving import Mover, Moving
from memkv_engines.offload.outcomes import StoreTally
from memkv_engines.offload.pinned import PinnedSlot, PinnedStaging
from memkv_engines.offload.results import StoreResult

log = get_logger(__name__)


@dataclass
class _Part:
    """One chunk of a job. ``spoilt``: its pages may have changed while they were read."""

    job: StoreTally
    index: int
    chunk: StoreChunk
    moving: Moving
    held: bool = False
    spoilt: bool = False


@dataclass(frozen=True)
class _Unstarted:
    """One chunk of a job that found no room yet, on the device or in the staging."""

    job: StoreTally
    index: int
    chunk: StoreChunk


@dataclass
class _Sent:
    """Chunks that the I/O service has, in one message; the slots are its until it has gathered them."""

    parts: list[_Part]
    slots: list[PinnedSlot] = field(default_factory=list)


class DeviceStores:
    """Stores of one worker. Not thread-safe; only ``fence`` may block, and only after a failed submission.

    Args:
        client: the I/O service, whose paged memory is the staging.
        mover: between staging and pages.
        staging: pinned slots; a chunk that finds none until the fence is shed.
        stream: the engine's compute stream of the calling thread, as a number.
        counters: where to count what never reaches the I/O service.
        next_id: numbers for jobs of the I/O service.
    """

    def __init__(
        self,
        client: IoClient,
        mover: Mover,
        staging: PinnedStaging,
        stream: Callable[[], int],
        counters: Counters,
        next_id: Callable[[], int],
    ) -> None:
        self._client, self._mover, self._staging, self._stream = client, mover, staging, stream
        self._counters, self._next_id = counters, next_id
        self._unstarted: deque[_Unstarted] = deque()
        self._gathering: list[_Part] = []
        self._writing: dict[int, _Sent] = {}
        self._results: list[StoreResult] = []
        self.pending = 0

    def submit(self, job_id: int, chunks: tuple[StoreChunk, ...]) -> None:
        """Queue the gathers behind what the engine's stream has been given so far."""
        self.pending += 1
        if not chunks:
            self._finish(StoreResult(job_id, ()))
        job = StoreTally(job_id, len(chunks))
        for index, chunk in enumerate(chunks):
            if 0 < len(chunk.block_ids) <= self._staging.blocks_per_slot(chunk.group):
                self._unstarted.append(_Unstarted(job, index, chunk))
            else:
                log.warning("store refused: group %d, %d blocks", chunk.group, len(chunk.block_ids))
                self._lose(job, index, "failed")
        self._start()

    def owns(self, job_id: int) -> bool:
        """Whether a result of the I/O service is for chunks of ours."""
        return job_id in self._writing

    def take(self, result: StoreResult) -> None:
        """A message of the I/O service: these chunks are in the tier, or lost."""
        sent = self._writing.pop(result.job_id)
        self._free(sent)
        for part, outcome in zip(sent.parts, result.outcomes, strict=True):
            self._settle(part.job, part.index, outcome)

    def fence(self, timeout_s: float) -> bool:
        """From here on the engine's stream may write the pages: it waits on the device for what still reads them.

        What has found no room until now is shed. Blocks only for gathers that no event stands behind, since the
        driver failed.

        Returns:
            False if one of those did not end in time; its chunk is not stored.
        """
        self._start()
        self._shed()
        good = True
        for part in self._gathering:
            if part.held:
                continue
            try:
                part.moving.ticket.hold(self._stream())
                part.held = True
            except GpuError as error:
                log.warning("a gather must be waited for: %s", error)
                if not part.moving.wait(timeout_s):
                    part.spoilt = True
                    good = False
        return good

    def poll(self) -> list[StoreResult]:
        """Send on what has been gathered, start what there is room for; results of jobs that have ended."""
        self._start()
        gathered = [part for part in self._gathering if part.moving.ticket.done()]
        ready = []
        for part in gathered:
            self._gathering.remove(part)
            if part.spoilt or not part.moving.succeeded():
                self._staging.give_back(part.moving.slot)
                self._lose(part.job, part.index, "failed")
            else:
                ready.append(part)
        if ready:
            self._send(ready)
        for job_id, sent in self._writing.items():
            if sent.slots and self._client.is_gathered(job_id):
                self._free(sent)
        results, self._results = self._results, []
        return results

    @property
    def moving(self) -> bool:
        """Whether the device is at work, so that polling soon is worth while."""
        return bool(self._gathering or self._unstarted)

    def drain(self, timeout_s: float) -> None:
        """Wait until no page is read any more. What does not end in time, or was not started, is not stored."""
        self._shed()
        deadline = time.monotonic() + timeout_s
        for part in self._gathering:
            if not part.moving.wait(max(0.0, deadline - time.monotonic())):
                part.spoilt = True

    # --- inside --------------------------------------------------------------

    def _start(self) -> None:
        """Queue the gathers that there is room for, behind what the engine's stream has been given so far."""
        while self._unstarted:
            wanted = self._unstarted[0]
            slot = self._staging.take(wanted.chunk.group, for_loads=False)
            if slot is None:
                return
            try:
                ticket = self._mover.gather(
                    wanted.chunk.group, wanted.chunk.block_ids, slot.address, after_stream=self._stream()
                )
            except GpuError as error:
                log.warning("a chunk cannot be gathered: %s", error)
                self._staging.give_back(slot)
                self._lose(wanted.job, wanted.index, "failed")
            else:
                if ticket is None:
                    self._staging.give_back(slot)
                    return
                self._gathering.append(_Part(wanted.job, wanted.index, wanted.chunk, Moving(ticket, slot)))
            self._unstarted.popleft()

    def _shed(self) -> None:
        for wanted in self._unstarted:
            self._lose(wanted.job, wanted.index, "shed")
        self._unstarted.clear()

    def _send(self, parts: list[_Part]) -> None:
        job_id = self._next_id()
        self._writing[job_id] = _Sent(parts, [part.moving.slot for part in parts])
        self._client.submit_store(
            job_id,
            tuple(
                msgspec.structs.replace(p.chunk, block_ids=tuple(p.moving.slot.numbers(len(p.chunk.block_ids))))
                for p in parts
            ),
        )

    def _free(self, sent: _Sent) -> None:
        for slot in sent.slots:
            self._staging.give_back(slot)
        sent.slots = []

    def _lose(self, job: StoreTally, index: int, outcome: str) -> None:
        """A chunk that never reached the I/O service, which counts the others."""
        self._counters.add(f"store_{outcome}")
        self._settle(job, index, outcome)

    def _settle(self, job: StoreTally, index: int, outcome: str) -> None:
        answer = job.settle(index, outcome)
        if answer is not None:
            self._finish(StoreResult(answer.job_id, answer.outcomes))

    def _finish(self, result: StoreResult) -> None:
        self.pending -= 1
        self._results.append(result)
