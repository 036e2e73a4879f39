"""The engine's side of the I/O service: start, submit, poll, fence, give up, start again.

All methods are called from one engine thread. Only ``start``, ``fence`` and ``close`` block, each with a bound.
Whatever happens to the service, every job submitted gets exactly one answer: a lost job is answered as failed.

A service that died or hung is started again after a pause that doubles. From then on it is on trial: one load at a
time, with a short deadline, while all others are misses at once; the first load that it answers ends that. So a tier
that hangs costs one load its deadline now and then, and nobody else anything.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from memkv_engines.errors import ConfigError, IoServiceError, MemKVError, TierUnavailable
from memkv_engines.limits import (
    MAX_DYING_SERVICES,
    SERVICE_RESTART_BACKOFF_MAX_S,
    SERVICE_RESTART_BACKOFF_S,
    SERVICE_START_TIMEOUT_S,
    STORE_SILENCE_S,
    TRIAL_LOAD_BYTES_PER_S,
    TRIAL_LOAD_S,
)
from memkv_engines.log import get_logger
from memkv_engines.metrics import Counters
from memkv_engines.offload.backends import Backend, ProcessBackend, ThreadBackend, still_dying
from memkv_engines.offload.breaker import Breaker
from memkv_engines.offload.messages import (
    Gathered,
    InMemory,
    Load,
    LoadDone,
    LoadRun,
    Manifest,
    Probe,
    ProbeDone,
    Ready,
    Reply,
    Request,
    Setup,
    Store,
    StoreChunk,
    StoreDone,
)
from memkv_engines.offload.residents import Residents
from memkv_engines.offload.results import LoadResult, StoreResult, count_load, count_store

log = get_logger(__name__)


@dataclass
class _Pending:
    parts: int
    deadline: float
    gathered: bool = True


class _NotInTime(IoServiceError):
    """The service gave no sign of life; what it was asked may still hang."""


class IoClient:
    """Talks to one I/O service and keeps its promises.

    Args:
        setup: what the service needs to know.
        io_process: ``auto`` (child process, threads where that fails), ``on``, ``off``.
        load_timeout_ms: age at which a load is given up; a service that answers no look-up for so long is ended too.
        fence_timeout_ms: longest wait for gathers.
        store_silence_s: a service that has stores and answers none for so long is ended, once no load is pending.
        counters: where to count.
        make_backend: makes the service itself, in place of ``io_process``; may be called again after a loss.

    Attributes:
        counters: as given, or its own.
        residents: chunks that lie in the service's memory, as far as it has told.
    """

    def __init__(
        self,
        setup: Setup,
        *,
        io_process: str = "auto",
        load_timeout_ms: int = 30_000,
        fence_timeout_ms: int = 2_000,
        store_silence_s: float = STORE_SILENCE_S,
        counters: Counters | None = None,
        make_backend: Callable[[Setup], Backend] | None = None,
    ) -> None:
        self._setup = setup
        self._make_backend = make_backend
        self._io_process = io_process
        self._load_timeout_s = load_timeout_ms / 1000
        self._fence_timeout_s = fence_timeout_ms / 1000
        self._store_silence_s = store_silence_s
        self._block_bytes = {g.group: g.block_bytes for g in setup.groups}
        self.counters = counters or Counters()
        self.residents = Residents()
        self.ready = Ready()
        self._backend: Backend | None = None
        self._starting: Backend | None = None
        self._loads: dict[int, _Pending] = {}
        self._stores: dict[int, _Pending] = {}
        self._probes: set[int] = set()
        # When the service was last heard of on a store or a look-up, or had none.
        self._store_news = self._probe_news = 0.0
        self._results: list[LoadResult | StoreResult | ProbeDone] = []
        self._breaker = Breaker(SERVICE_RESTART_BACKOFF_S, SERVICE_RESTART_BACKOFF_MAX_S)
        self._start_deadline = 0.0
        self._closed = False

    # --- life ----------------------------------------------------------------

    def start(self) -> None:
        """Start the service and wait until it is ready, for at most ``SERVICE_START_TIMEOUT_S``.

        A child process that gives no answer in that time, as on a mount that hangs, does not keep the engine from
        starting: there is no storage then until a later start of it succeeds.

        Raises:
            ConfigError: the tier or the transport cannot be used; nothing to do with the child process.
            IoServiceError: the service does not start in the mode asked for.
        """
        if self._make_backend is not None:
            self._backend = self._started(self._make_backend)
            return
        if self._io_process != "off":
            try:
                self._backend = self._started(ProcessBackend)
                return
            except ConfigError:
                raise
            except _NotInTime as error:
                # Threads would hang just the same, and could not be killed.
                self._lose_service(f"{error}; is the file system of {self._setup.tier_path} hung?")
                return
            except (MemKVError, OSError) as error:
                if self._io_process == "on":
                    raise IoServiceError(f"io_process=on, but the I/O process does not work: {error}") from error
                log.warning("the I/O process does not work here (%s): falling back to threads of the engine", error)
        self._io_process = "off"
        self._backend = self._started(ThreadBackend)

    @property
    def mode(self) -> str:
        """``process``, ``thread`` or ``down``."""
        return self._backend.name if self._backend else "down"

    @property
    def child_pid(self) -> int | None:
        """The child's process id, if there is a child."""
        return self._backend.pid if isinstance(self._backend, ProcessBackend) else None

    def _started(self, make: Callable[[Setup], Backend]) -> Backend:
        try:
            backend = make(self._setup)
        except TierUnavailable as error:
            raise ConfigError(str(error)) from error
        try:
            self._take_greeting(self._greeting(backend))
        except BaseException:
            backend.kill()
            raise
        return backend

    def _take_greeting(self, ready: Ready) -> None:
        self.ready = ready
        if not self._setup.mount_points:
            # From now on the directories must be found there, and are not made any more.
            self._setup = msgspec.structs.replace(self._setup, mount_points=ready.mount_points)

    @staticmethod
    def _greeting(backend: Backend) -> Ready:
        deadline = time.monotonic() + SERVICE_START_TIMEOUT_S
        while time.monotonic() < deadline:
            for reply in backend.receive():
                if not isinstance(reply, Ready):
                    continue
                if reply.error_kind in (TierUnavailable.__name__, ConfigError.__name__):
                    raise ConfigError(reply.error)
                if reply.error:
                    raise IoServiceError(reply.error)
                return reply
            backend.wait(0.05)
        raise _NotInTime(f"the I/O service was not ready after {SERVICE_START_TIMEOUT_S:.0f} s")

    def close(self) -> None:
        """Let gathered stores finish, bounded, then end the service for good. Idempotent."""
        self._closed = True
        backend, self._backend = self._backend, None
        starting, self._starting = self._starting, None
        if starting is not None:
            starting.kill()
        if backend is not None:
            backend.stop()

    # --- jobs ----------------------------------------------------------------

    def submit_load(self, job_id: int, runs: tuple[LoadRun, ...], stop_s: float = 0.0) -> None:
        """Start a load; a ``LoadResult`` will come from ``poll``.

        Stopped, with its leading blocks in place, once it is seen to take longer than ``stop_s``; 0: never.
        """
        timeout_s = self._load_timeout_s
        if not self._breaker.closed:
            if self._loads or self._backend is None:
                self._fail_load(job_id, len(runs))
                return
            timeout_s = min(timeout_s, TRIAL_LOAD_S + self._bytes_of(runs) / TRIAL_LOAD_BYTES_PER_S)
        self._loads[job_id] = _Pending(len(runs), time.monotonic() + timeout_s)
        self._send(Load(job_id, runs, int(stop_s * 1e6)))

    def submit_store(self, job_id: int, chunks: tuple[StoreChunk, ...]) -> None:
        """Start a store; the pages must not change before ``fence`` returns. A ``StoreResult`` will come."""
        # A store has no deadline of its own: what the engine waits for is the fence.
        if not self._stores:
            self._store_news = time.monotonic()
        self._stores[job_id] = _Pending(len(chunks), float("inf"), gathered=False)
        self._send(Store(job_id, chunks))

    def submit_probe(self, probe: Probe) -> None:
        """Start a look-up; a ``ProbeDone`` will come unless the service dies: callers keep their own deadline."""
        if not self._probes:
            self._probe_news = time.monotonic()
        self._probes.add(probe.probe_id)
        self._send(probe)

    def submit_manifest(self, manifest: Manifest) -> None:
        """Record a namespace, best effort."""
        self._send(manifest)

    def fence(self) -> bool:
        """Wait until every submitted store has been gathered: from then on its pages may be overwritten.

        Bounded by ``fence_timeout_ms``: past it the service is killed, and the stores are lost.

        Returns:
            False if the service had to be killed.
        """
        if all(p.gathered for p in self._stores.values()):
            return True
        start = time.perf_counter()
        deadline = time.monotonic() + self._fence_timeout_s
        if self._backend is not None:
            self._backend.fence()
            self._receive()
        while not all(p.gathered for p in self._stores.values()):
            left = deadline - time.monotonic()
            if left <= 0:
                self._lose_service("gathers are overdue")
                break
            if self._backend is not None:
                self._backend.wait(left)
            self._receive()
        self.counters.add("gather_microseconds", int((time.perf_counter() - start) * 1e6))
        return self._backend is not None

    def is_gathered(self, job_id: int) -> bool:
        """Whether the pages of a store are no longer read; a job without an answer to come is not."""
        pending = self._stores.get(job_id)
        return pending is None or pending.gathered

    def abandon(self, why: str) -> None:
        """End the service now: on return no page is read or written any more, and every job has its answer."""
        self._lose_service(why)

    def poll(self) -> list[LoadResult | StoreResult | ProbeDone]:
        """Results that have come in; never blocks. Gives up what is overdue (kills the service first)."""
        self._receive()
        now = time.monotonic()
        overdue = self._overdue(now)
        if overdue:
            self._lose_service(overdue)
        if self._backend is None and not self._closed:
            self._try_restart(now)
        results, self._results = self._results, []
        return results

    @property
    def pending_loads(self) -> int:
        """Loads without an answer."""
        return len(self._loads)

    @property
    def pending_stores(self) -> int:
        """Stores without an answer."""
        return len(self._stores)

    def wait(self, timeout_s: float) -> None:
        """Block until something may have come in. May run beside the other methods, on another thread."""
        backend = self._backend
        if backend is not None:
            backend.wait(timeout_s)

    # --- inside --------------------------------------------------------------

    def _overdue(self, now: float) -> str:
        """What the service has not answered in time; empty if nothing."""
        if any(p.deadline <= now for p in self._loads.values()):
            return "a load is overdue"
        if self._io_process == "off":
            return ""  # Threads are not started again: what is late may still come.
        if self._probes and now > self._probe_news + self._load_timeout_s:
            return "look-ups are overdue"
        if self._stores and not self._loads and now > self._store_news + self._store_silence_s:
            return "stores are overdue"
        return ""

    def _bytes_of(self, runs: tuple[LoadRun, ...]) -> int:
        return sum(len(run.block_ids) // 4 * self._block_bytes.get(run.group, 0) for run in runs)

    def _send(self, message: Request) -> None:
        if self._backend is None:
            self._fail_pending()
            return
        try:
            self._backend.send(message)
        except IoServiceError as error:
            self._lose_service(str(error))

    def _receive(self) -> None:
        if self._backend is None:
            return
        try:
            replies = self._backend.receive()
        except IoServiceError as error:
            self._lose_service(str(error))
            return
        for reply in replies:
            self._take(reply)

    def _take(self, reply: Reply) -> None:
        if isinstance(reply, Gathered):
            if reply.job_id in self._stores:
                self._stores[reply.job_id].gathered = True
        elif isinstance(reply, LoadDone):
            pending = self._loads.pop(reply.job_id, None)
            if pending is None or len(reply.kinds) != pending.parts or len(reply.good_blocks) != pending.parts:
                if pending is not None:
                    self._fail_load(reply.job_id, pending.parts)
                return
            self._breaker.succeeded()
            count_load(self.counters, reply)
            self._results.append(LoadResult.of(reply))
        elif isinstance(reply, StoreDone):
            self._store_news = time.monotonic()
            if self._stores.pop(reply.job_id, None) is not None:
                count_store(self.counters, reply)
                self._results.append(StoreResult(reply.job_id, reply.outcomes))
        elif isinstance(reply, InMemory):
            self.residents.take_news(reply.came, reply.went)
        elif isinstance(reply, ProbeDone):
            self._probe_news = time.monotonic()
            self._probes.discard(reply.probe_id)
            self._results.append(reply)

    def _lose_service(self, why: str) -> None:
        log.warning("I/O service lost: %s; its jobs become misses", why)
        self.residents.clear()
        backend, self._backend = self._backend, None
        if backend is not None:
            # Only after this is it safe to tell the engine that its pages are its own again.
            backend.kill()
        self._breaker.failed()
        self._fail_pending()

    def _fail_pending(self) -> None:
        self._probes.clear()
        for job_id, pending in list(self._loads.items()):
            self._fail_load(job_id, pending.parts)
        self._loads.clear()
        for job_id, pending in self._stores.items():
            self.counters.add("store_failed", pending.parts)
            self._results.append(StoreResult(job_id, ("failed",) * pending.parts))
        self._stores.clear()

    def _fail_load(self, job_id: int, parts: int) -> None:
        self.counters.add("load_jobs")
        self.counters.add("load_jobs_failed")
        self.counters.add("miss_io_service", parts)
        self._results.append(LoadResult(job_id, (0,) * parts, ("io_service",) * parts))

    def _try_restart(self, now: float) -> None:
        """Bring a lost child process back without blocking: spawn it, then look for its greeting at later polls.

        Threads are not started again: one that hangs cannot be ended, and another would hang beside it. A backend that
        was given sees to that itself.
        """
        if self._starting is not None:
            self._await_restart(now)
        elif self._restartable and still_dying() < MAX_DYING_SERVICES and self._breaker.admits():
            self.counters.add("io_service_restarts")
            self._start_deadline = now + SERVICE_START_TIMEOUT_S
            try:
                self._starting = (self._make_backend or ProcessBackend)(self._setup)
            except (MemKVError, OSError) as error:
                self._give_up_restart(str(error))

    @property
    def _restartable(self) -> bool:
        return self._make_backend is not None or self._io_process != "off"

    def _await_restart(self, now: float) -> None:
        backend = self._starting
        if backend is None:
            return
        try:
            greeting = next((r for r in backend.receive() if isinstance(r, Ready)), None)
        except IoServiceError as error:
            greeting = Ready(error=str(error))
        if greeting is None and now < self._start_deadline:
            return
        self._starting = None
        if greeting is None or greeting.error:
            backend.kill()
            self._give_up_restart(greeting.error if greeting else "no greeting in time")
            return
        self._backend = backend
        self._take_greeting(greeting)
        log.warning("I/O service runs again")

    def _give_up_restart(self, why: str) -> None:
        log.warning("I/O service does not start: %s", why)
        self._breaker.failed()
