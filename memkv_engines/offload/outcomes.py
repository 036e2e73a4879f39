"""What became of the chunks of one job, counted up to its answer."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

from memkv_engines.errors import IoServiceError
from memkv_engines.log import get_logger
from memkv_engines.offload.loading import LoadChunk, LoadOutcome, expand_run
from memkv_engines.offload.messages import LoadRun, StoreDone
from memkv_engines.offload.threads import JOB_ERRORS

log = get_logger(__name__)


class LoadTally:
    """The chunks of a load's runs. Thread-safe.

    Args:
        runs: of the job; one that contradicts itself has no chunks, and fails.
        stop_s: no more chunks shall be read once all of them are seen to take longer, from the first on; 0: never.

    Attributes:
        chunks: of each run.
    """

    def __init__(self, runs: Sequence[LoadRun], stop_s: float = 0.0) -> None:
        self._started, self._stop_s, self._stopped = time.perf_counter(), stop_s, False
        self._first_read_at, self._arrived = 0.0, 0
        self.chunks: list[list[LoadChunk]] = []
        self._malformed: set[int] = set()
        for number, run in enumerate(runs):
            try:
                self.chunks.append(expand_run(run))
            except JOB_ERRORS as error:
                log.warning("load refused: %s", error)
                self._malformed.add(number)
                self.chunks.append([])
        self._outcomes: list[list[LoadOutcome | None]] = [[None] * len(chunks) for chunks in self.chunks]
        self._count = self._open = sum(map(len, self.chunks))
        # First bad chunk per run: what follows it in the chain is of no use.
        self._first_bad: dict[int, int] = {}
        self._lock = threading.Lock()

    @property
    def open_chunks(self) -> int:
        """How many have no outcome yet."""
        return self._open

    def places(self) -> list[tuple[int, int]]:
        """Run and index of every chunk, in order."""
        return [(run, index) for run, chunks in enumerate(self.chunks) for index in range(len(chunks))]

    def is_pointless(self, run: int, index: int) -> bool:
        """Whether an earlier chunk of the run is bad."""
        return self._first_bad.get(run, index) < index

    @property
    def elapsed_s(self) -> float:
        """Since the job was submitted."""
        return time.perf_counter() - self._started

    def must_stop(self, at_once: int) -> bool:
        """Whether to read no more; to be asked before each chunk.

        Args:
            at_once: how many chunks are read at a time; before so many have come the rate tells nothing.
        """
        if not self._stop_s:
            return False
        with self._lock:
            now = time.perf_counter()
            self._first_read_at = self._first_read_at or now
            whole_s = now - self._first_read_at
            if self._arrived >= at_once:
                whole_s *= self._count / self._arrived
            self._stopped = self._stopped or whole_s > self._stop_s
            return self._stopped

    def need_no_reading(self, chunks: int) -> None:
        """So many chunks lie in memory: ``must_stop`` is about the others."""
        with self._lock:
            self._count -= chunks

    def settle(self, run: int, index: int, outcome: LoadOutcome) -> bool:
        """Note what became of a chunk; True for the last one."""
        with self._lock:
            self._outcomes[run][index] = outcome
            self._arrived += not outcome.kind and not outcome.memory_bytes
            if outcome.kind:
                self._first_bad[run] = min(index, self._first_bad.get(run, index))
            self._open -= 1
            return not self._open

    def answer(self) -> tuple[tuple[int, ...], tuple[str, ...]]:
        """Good leading blocks of each run, and what ended it (empty: nothing); for when no chunk is open."""
        good_blocks, kinds = [], []
        for number, outcomes in enumerate(self._outcomes):
            good, kind = 0, IoServiceError.kind if number in self._malformed else ""
            for outcome in outcomes:
                good += outcome.good_blocks if outcome else 0
                kind = outcome.kind if outcome else "io_error"
                if kind:
                    break
            good_blocks.append(good)
            kinds.append(kind)
        return tuple(good_blocks), tuple(kinds)

    def settled(self) -> list[LoadOutcome]:
        """Every outcome so far."""
        return [outcome for outcomes in self._outcomes for outcome in outcomes if outcome is not None]


class StoreTally:
    """The chunks of a store. Thread-safe.

    Args:
        job_id: of the job.
        count: how many chunks; at least one.
    """

    def __init__(self, job_id: int, count: int) -> None:
        self.job_id = job_id
        self._outcomes = [""] * count
        self._open = count
        self._written_bytes = self._payload_bytes = 0
        self._lock = threading.Lock()

    def settle(self, index: int, outcome: str, written_bytes: int = 0, payload_bytes: int = 0) -> StoreDone | None:
        """Note what became of a chunk; the answer, once it was the last one.

        Args:
            index: of the chunk.
            outcome: as in ``StoreDone``.
            written_bytes: what reached the device.
            payload_bytes: of the chunk, if it was written.
        """
        with self._lock:
            self._outcomes[index] = outcome
            self._written_bytes += written_bytes
            self._payload_bytes += payload_bytes
            self._open -= 1
            if self._open:
                return None
        return StoreDone(self.job_id, tuple(self._outcomes), self._written_bytes, self._payload_bytes)
