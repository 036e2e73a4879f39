"""The engine's side of the I/O service: start, submit, poll, fence, give up, start again.

All methods are called from one engine thread. Only ``start``, ``fence`` and ``close`` block, each with a bound.
Whatever happens to the service, every job submitted gets exactly one answer: a lost job is answered as failed.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from memkv_engines.errors import ConfigError, IoServiceError, MemKVError, TierUnavailable
from memkv_engines.limits import (
    SERVICE_MAX_RESTARTS,
    SERVICE_RESTART_BACKOFF_MAX_S,
    SERVICE_RESTART_BACKOFF_S,
    SERVICE_START_TIMEOUT_S,
)
from memkv_engines.log import get_logger
from memkv_engines.metrics import Counters
from memkv_engines.offload.backends import Backend, ProcessBackend, ThreadBackend
from memkv_engines.offload.messages import (
    Gathered,
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

log = get_logger(__name__)


@dataclass(frozen=True)
class LoadResult:
    """Answer to a load: per run its good leading blocks and why it stopped there."""

    job_id: int
    good_blocks: tuple[int, ...]
    kinds: tuple[str, ...]


@dataclass(frozen=True)
class StoreResult:
    """Answer to a store: per chunk ``stored | present | shed | full | failed``."""

    job_id: int
    outcomes: tuple[str, ...]


@dataclass
class _Pending:
    parts: int
    deadline: float
    gathered: bool = True


class IoClient:
    """Talks to one I/O service and keeps its promises.

    Args:
        setup: what the service needs to know.
        io_process: ``auto`` (child process, threads where that fails), ``on``, ``off``.
        load_timeout_ms: age at which a load is given up.
        fence_timeout_ms: longest wait for gathers.
        counters: where to count.
        make_backend: makes the service itself, in place of ``io_process``; may be called again after a loss.
    """

    def __init__(
        self,
        setup: Setup,
        *,
        io_process: str = "auto",
        load_timeout_ms: int = 30_000,
        fence_timeout_ms: int = 2_000,
        counters: Counters | None = None,
        make_backend: Callable[[Setup], Backend] | None = None,
    ) -> None:
        self._setup = setup
        self._make_backend = make_backend
        self._io_process = io_process
        self._load_timeout_s = load_timeout_ms / 1000
        self._fence_timeout_s = fence_timeout_ms / 1000
        self.counters = counters or Counters()
        self.ready = Ready()
        self._backend: Backend | None = None
        self._starting: Backend | None = None
        self._loads: dict[int, _Pending] = {}
        self._stores: dict[int, _Pending] = {}
        self._results: list[LoadResult | StoreResult | ProbeDone] = []
        self._restarts = 0
        self._restart_at = 0.0
        self._closed = False

    # --- life ----------------------------------------------------------------

    def start(self) -> None:
        """Start the service and wait until it is ready.

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
            self.ready = self._greeting(backend)
        except BaseException:
            backend.kill()
            raise
        return backend

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
        raise IoServiceError(f"the I/O service was not ready after {SERVICE_START_TIMEOUT_S:.0f} s")

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

    def submit_load(self, job_id: int, runs: tuple[LoadRun, ...]) -> None:
        """Start a load; a ``LoadResult`` will come from ``poll``."""
        self._loads[job_id] = _Pending(len(runs), time.monotonic() + self._load_timeout_s)
        self._send(Load(job_id, runs))

    def submit_store(self, job_id: int, chunks: tuple[StoreChunk, ...]) -> None:
        """Start a store; the pages must not change before ``fence`` returns. A ``StoreResult`` will come."""
        # A store has no deadline of its own: what the engine waits for is the fence.
        self._stores[job_id] = _Pending(len(chunks), float("inf"), gathered=False)
        self._send(Store(job_id, chunks))

    def submit_probe(self, probe: Probe) -> None:
        """Start a look-up; a ``ProbeDone`` will come unless the service dies: callers keep their own deadline."""
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
        """Results that have come in; never blocks. Gives up overdue loads (kills the service first)."""
        self._receive()
        now = time.monotonic()
        if any(p.deadline <= now for p in self._loads.values()):
            self._lose_service("a load is overdue")
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
                    self._fail_load(reply.job_id, pending)
                return
            self._count_load(reply)
            self._results.append(LoadResult(reply.job_id, reply.good_blocks, reply.kinds))
        elif isinstance(reply, StoreDone):
            if self._stores.pop(reply.job_id, None) is not None:
                self._count_store(reply)
                self._results.append(StoreResult(reply.job_id, reply.outcomes))
        elif isinstance(reply, ProbeDone):
            self._results.append(reply)

    def _count_load(self, reply: LoadDone) -> None:
        count = self.counters.add
        count("load_jobs")
        count("load_blocks", sum(reply.good_blocks))
        count("load_bytes", reply.read_bytes)
        count("load_microseconds", reply.elapsed_us)
        count("load_chunks", reply.chunks)
        if any(reply.kinds):
            count("load_jobs_failed")
        for kind in reply.kinds:
            if kind:
                count(f"miss_{kind}" if f"miss_{kind}" in MISS_COUNTERS else "miss_io_error")

    def _count_store(self, reply: StoreDone) -> None:
        names = {
            "stored": "store_chunks",
            "present": "store_present",
            "shed": "store_shed",
            "full": "store_full",
            "failed": "store_failed",
        }
        for outcome in reply.outcomes:
            self.counters.add(names.get(outcome, "store_failed"))
        self.counters.add("store_bytes", reply.written_bytes)
        self.counters.add("store_payload_bytes", reply.payload_bytes)

    def _lose_service(self, why: str) -> None:
        log.warning("I/O service lost: %s; its jobs become misses", why)
        backend, self._backend = self._backend, None
        if backend is not None:
            # Only after this is it safe to tell the engine that its pages are its own again.
            backend.kill()
        self._restart_at = time.monotonic() + self._backoff_s()
        self._fail_pending()

    def _fail_pending(self) -> None:
        for job_id, pending in list(self._loads.items()):
            self._fail_load(job_id, pending)
        self._loads.clear()
        for job_id, pending in self._stores.items():
            self.counters.add("store_failed", pending.parts)
            self._results.append(StoreResult(job_id, ("failed",) * pending.parts))
        self._stores.clear()

    def _fail_load(self, job_id: int, pending: _Pending) -> None:
        self.counters.add("load_jobs")
        self.counters.add("load_jobs_failed")
        self.counters.add("miss_io_service", pending.parts)
        self._results.append(LoadResult(job_id, (0,) * pending.parts, ("io_service",) * pending.parts))

    def _try_restart(self, now: float) -> None:
        """Bring a lost child process back without blocking: spawn it, then look for its greeting at later polls.

        Threads are not started again: one that hangs cannot be ended, and another would hang beside it. A backend that
        was given sees to that itself.
        """
        if self._starting is not None:
            self._await_restart(now)
        elif self._restartable and now >= self._restart_at and self._restarts < SERVICE_MAX_RESTARTS:
            self._restarts += 1
            self.counters.add("io_service_restarts")
            self._restart_at = now + SERVICE_START_TIMEOUT_S
            try:
                self._starting = (self._make_backend or ProcessBackend)(self._setup)
            except (MemKVError, OSError) as error:
                self._give_up_restart(now, str(error))

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
        if greeting is None and now < self._restart_at:
            return
        self._starting = None
        if greeting is None or greeting.error:
            backend.kill()
            self._give_up_restart(now, greeting.error if greeting else "no greeting in time")
            return
        self._backend, self.ready = backend, greeting
        log.warning("I/O service runs again (restart %d of %d)", self._restarts, SERVICE_MAX_RESTARTS)

    def _give_up_restart(self, now: float, why: str) -> None:
        log.warning("I/O service does not start: %s", why)
        self._restart_at = now + self._backoff_s()

    def _backoff_s(self) -> float:
        return float(min(SERVICE_RESTART_BACKOFF_S * 2**self._restarts, SERVICE_RESTART_BACKOFF_MAX_S))


MISS_COUNTERS = frozenset(
    {
        "miss_missing",
        "miss_truncated",
        "miss_damaged",
        "miss_foreign",
        "miss_version",
        "miss_io_error",
        "miss_io_service",
    }
)
