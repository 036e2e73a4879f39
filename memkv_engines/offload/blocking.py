"""The I/O service for callers that wait: one answer per call, from any thread.

SGLang's controller asks, loads and stores from three threads of its own, each of which waits for its answer. Whoever
waits first also takes answers in, for all: a thread of ours that did so would have to get the interpreter lock from the
engine's busy main thread once more for every answer (up to 5 ms each). A housekeeper looks after the service while
nobody waits.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Sequence

from memkv_engines.errors import IoServiceError
from memkv_engines.limits import PROBE_SILENCE_MAX_S, PROBE_SILENCE_S
from memkv_engines.offload.breaker import Breaker
from memkv_engines.offload.job_client import JobClient
from memkv_engines.offload.messages import LoadRun, Manifest, Probe, ProbeDone, Segment, StoreChunk
from memkv_engines.offload.results import LoadResult, StoreResult

Answer = LoadResult | StoreResult | ProbeDone
_HOUSEKEEPING_S = 0.05


class BlockingClient:
    """Wraps a client; thread-safe. Nobody else may use the client.

    Args:
        client: not started yet.
        store_timeout_s: age at which a store is given up and the service ended; loads have the client's own.
    """

    def __init__(self, client: JobClient, store_timeout_s: float = 30.0) -> None:
        self._client = client
        self._store_timeout_s = store_timeout_s
        self._lock = threading.Lock()
        self._news = threading.Condition(self._lock)
        self._ids = itertools.count(1)
        self._wanted: set[int] = set()
        self._probing: set[int] = set()
        self._answers: dict[int, Answer] = {}
        # A tier that does not answer costs one caller its deadline; after that nobody waits for it, but for a trial.
        self._probe_breaker = Breaker(PROBE_SILENCE_S, PROBE_SILENCE_MAX_S)
        self._closed = threading.Event()
        self._is_read = False
        self._housekeeper = threading.Thread(target=self._keep, name="memkv-housekeeper", daemon=True)

    @property
    def description(self) -> str:
        """Where the service runs, which transport it took, and what memory it has before the tier."""
        return f"{self._client.mode}, {self._client.ready.text}"

    @property
    def is_up(self) -> bool:
        """Whether there is a service; one that was lost is started again."""
        return self._client.mode != "down"

    def start(self) -> None:
        """Start the service; errors as in ``IoClient.start``. To be called on the process's main thread."""
        self._client.start()
        self._housekeeper.start()

    def close(self) -> None:
        """Let gathered stores finish, bounded, and end the service. Calls that wait are answered as failed."""
        with self._news:
            self._closed.set()
            self._client.close()
            self._news.notify_all()

    def load(self, runs: Sequence[LoadRun], stop_s: float = 0.0) -> LoadResult:
        """Load; blocks for at most the client's load timeout. A failure is an answer, never an exception.

        Stopped once it is seen to take longer than ``stop_s``; 0: never.
        """
        with self._news:
            job = self._next()
            self._client.submit_load(job, tuple(runs), stop_s)
            answer = self._await(job, None)
        if isinstance(answer, LoadResult):
            return answer
        return LoadResult(job, (0,) * len(runs), (IoServiceError.kind,) * len(runs))

    def store(self, chunks: Sequence[StoreChunk]) -> StoreResult:
        """Store; blocks until every chunk is published or lost. A failure is an answer, never an exception.

        On return no page is read any more: a store that takes too long costs the service its life.
        """
        with self._news:
            job = self._next()
            self._client.submit_store(job, tuple(chunks))
            answer = self._await(job, time.monotonic() + self._store_timeout_s)
            if answer is None and not self._closed.is_set():
                self._client.abandon("a store is overdue")
        return answer if isinstance(answer, StoreResult) else StoreResult(job, ("failed",) * len(chunks))

    def probe(self, probe: Probe, timeout_s: float) -> tuple[Segment, ...]:
        """Look up; what is not known in time is not there. ``probe_id`` is given here.

        After a look-up that was late, others are answered with nothing at once (``Breaker``) until one is in time.
        """
        with self._news:
            if not self._probe_breaker.admits():
                return ()
            job = self._next()
            self._client.counters.add("probe_requests")
            self._client.submit_probe(probe.numbered(job))
            if self._client.mode == "down":
                # Nobody took it, and a service that comes back knows nothing of it.
                self._wanted.discard(job)
                return ()
            self._probing.add(job)
            answer = self._await(job, time.monotonic() + timeout_s)
            self._probing.discard(job)
            if answer is None and not self._closed.is_set():
                self._client.counters.add("probe_timeouts")
                self._probe_breaker.failed()
        return answer.segments if isinstance(answer, ProbeDone) else ()

    def in_memory(self, keys: Sequence[bytes]) -> list[bool]:
        """Which chunks lie in the service's memory, by ``resident_key``, as far as it has told. Does not block long."""
        with self._lock:
            residents = self._client.residents
            return [key in residents for key in keys] if len(residents) else [False] * len(keys)

    def manifest(self, manifest: Manifest) -> None:
        """Record a namespace, best effort."""
        with self._lock:
            self._client.submit_manifest(manifest)

    def counters(self) -> dict[str, int]:
        """What was counted so far."""
        with self._lock:
            return self._client.counters.as_dict()

    def _next(self) -> int:
        job = next(self._ids)
        self._wanted.add(job)
        return job

    def _await(self, job: int, deadline: float | None) -> Answer | None:
        while job not in self._answers and not self._closed.is_set():
            left = _HOUSEKEEPING_S if deadline is None else min(_HOUSEKEEPING_S, deadline - time.monotonic())
            if left <= 0:
                break
            if self._is_read:
                self._news.wait(left)
            else:
                self._read(left)
        self._wanted.discard(job)
        return self._answers.pop(job, None)

    def _read(self, timeout_s: float) -> None:
        """Take answers in, for everybody. The lock is held, and let go while there is nothing to read."""
        self._is_read = True
        self._lock.release()
        try:
            self._client.wait(timeout_s)
        except (OSError, ValueError):
            pass  # The service was lost, and its socket closed, while we waited; the poll deals with it.
        finally:
            self._lock.acquire()
            self._is_read = False
            # Those who wait must also learn that somebody else has to read now.
            self._news.notify_all()
        if not self._closed.is_set():
            self._take()

    def _keep(self) -> None:
        while not self._closed.wait(_HOUSEKEEPING_S):
            with self._news:
                if not self._is_read and not self._closed.is_set():
                    self._take()

    def _take(self) -> None:
        answers: list[Answer] = self._client.poll()
        if any(isinstance(answer, ProbeDone) for answer in answers):
            self._probe_breaker.succeeded()
        if self._client.mode == "down":
            # Jobs have been answered as failed; look-ups are lost without a word.
            answers += [ProbeDone(job, (), 0) for job in self._probing]
        for answer in answers:
            job = answer.probe_id if isinstance(answer, ProbeDone) else answer.job_id
            if job in self._wanted:
                self._answers[job] = answer
        if answers:
            self._news.notify_all()
