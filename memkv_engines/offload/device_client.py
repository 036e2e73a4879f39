"""The engine's side of the I/O service where the KV cache lies in device memory.

Same calls and promises as ``IoClient``. Between the pages and the I/O service lie pinned slots of host memory:

    store: pages --gather, one copy--> slot --I/O service--> tier        load: the same backwards

The engine's thread never waits for the device: gathers are ordered by events against the engine's stream, and tickets
are looked at when the engine polls.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence

from memkv_engines.log import get_logger
from memkv_engines.offload.client import IoClient
from memkv_engines.offload.device_loads import DeviceLoads
from memkv_engines.offload.device_stores import DeviceStores
from memkv_engines.offload.messages import GroupSpec, LoadRun, Manifest, Probe, ProbeDone, Ready, StoreChunk
from memkv_engines.offload.moving import Mover, pause_quietly, wake_quietly
from memkv_engines.offload.pinned import PinnedStaging
from memkv_engines.offload.residents import Residents
from memkv_engines.offload.results import LoadResult, StoreResult

log = get_logger(__name__)

_POLL_S = 0.0002
_left_behind: list[PinnedStaging] = []


class DeviceIoClient:
    """All methods are called from one engine thread, but for ``wait``.

    Args:
        make_client: makes the I/O client for the groups as they lie in the staging.
        make_mover: makes the mover; it knows the groups and has pinned the staging.
        groups: the KV groups; tiles in device memory.
        staging_bytes: of pinned memory.
        stream: the engine's compute stream of the calling thread, as a number.
        load_timeout_ms: age at which a load is given up.
        fence_timeout_ms: longest wait for what cannot be ordered on the device.

    Raises:
        ConfigError: too little staging.
        GpuUnavailable: no driver, device or kernels.
    """

    def __init__(
        self,
        make_client: Callable[[Sequence[GroupSpec]], IoClient],
        make_mover: Callable[[PinnedStaging], Mover],
        groups: Sequence[GroupSpec],
        *,
        staging_bytes: int,
        stream: Callable[[], int],
        load_timeout_ms: int = 30_000,
        fence_timeout_ms: int = 2_000,
    ) -> None:
        self._staging = PinnedStaging(groups, staging_bytes)
        self._client = make_client(self._staging.specs)
        self._mover = make_mover(self._staging)
        self._fence_timeout_s = fence_timeout_ms / 1000
        ids = itertools.count(1)
        self._loads = DeviceLoads(
            self._client, self._mover, self._staging, stream, load_timeout_ms / 1000, lambda: next(ids)
        )
        self._stores = DeviceStores(
            self._client, self._mover, self._staging, stream, self._client.counters, lambda: next(ids)
        )
        self.counters = self._client.counters

    # --- life ----------------------------------------------------------------

    def start(self) -> None:
        """As ``IoClient.start``."""
        self._client.start()

    @property
    def mode(self) -> str:
        """``process``, ``thread`` or ``down``."""
        return self._client.mode

    @property
    def ready(self) -> Ready:
        """The I/O service's greeting."""
        return self._client.ready

    @property
    def residents(self) -> Residents:
        """As ``IoClient.residents``."""
        return self._client.residents

    @property
    def child_pid(self) -> int | None:
        """The child's process id, if there is a child."""
        return self._client.child_pid

    def close(self) -> None:
        """Let gathered stores finish, bounded; then end the I/O service and free the device's staging. Idempotent."""
        self._stores.drain(self._fence_timeout_s)
        self._stores.poll()
        self._loads.drain(self._fence_timeout_s)
        self._client.close()
        if not self._mover.close():
            # A copy that comes late must not meet memory that has become something else.
            _left_behind.append(self._staging)

    def suspend(self) -> None:
        """Before the engine unmaps its pages: on return nothing touches them, until ``wake``. Blocking, bounded.

        Copies under way are waited for; then pinned and device memory are given back. Chunks that were gathered are
        written; whatever else is asked for meanwhile fails, which is a miss.

        Raises:
            GpuOverdue: copies have not ended: the pages must stay mapped. No new copy is started until ``wake``.
        """
        self._stores.drain(self._fence_timeout_s)
        self._loads.drain(self._fence_timeout_s)
        pause_quietly(self._mover, self._fence_timeout_s)

    def wake(self) -> None:
        """The pages are mapped again, at their old addresses. Where we get no memory, all stays a miss."""
        wake_quietly(self._mover)

    # --- jobs ----------------------------------------------------------------

    def submit_load(self, job_id: int, runs: tuple[LoadRun, ...], stop_s: float = 0.0) -> None:
        """As ``IoClient.submit_load``."""
        self._loads.submit(job_id, runs, stop_s)

    def submit_store(self, job_id: int, chunks: tuple[StoreChunk, ...]) -> None:
        """Start a store behind what the engine's stream has been given; ``fence`` orders what comes after."""
        self._stores.submit(job_id, chunks)

    def submit_probe(self, probe: Probe) -> None:
        """As ``IoClient.submit_probe``."""
        self._client.submit_probe(probe)

    def submit_manifest(self, manifest: Manifest) -> None:
        """As ``IoClient.submit_manifest``."""
        self._client.submit_manifest(manifest)

    def fence(self) -> bool:
        """What the engine's stream is given from now on may overwrite the pages. Does not wait for the device.

        Returns:
            False if the driver failed and a gather is overdue.
        """
        start = time.perf_counter()
        good = self._stores.fence(self._fence_timeout_s)
        self.counters.add("gather_microseconds", int((time.perf_counter() - start) * 1e6))
        return good

    def abandon(self, why: str) -> None:
        """End the service; on return no page is read or written any more, bounded by the fence's time-out."""
        self._client.abandon(why)
        self._stores.drain(self._fence_timeout_s)
        self._loads.drain(self._fence_timeout_s)

    def poll(self) -> list[LoadResult | StoreResult | ProbeDone]:
        """Results that have come in; never blocks."""
        results: list[LoadResult | StoreResult | ProbeDone] = []
        for result in self._client.poll():
            if isinstance(result, LoadResult):
                if self._loads.owns(result.job_id):
                    self._loads.take(result)
            elif isinstance(result, StoreResult):
                if self._stores.owns(result.job_id):
                    self._stores.take(result)
            else:
                results.append(result)
        results += self._loads.poll()
        results += self._stores.poll()
        return results

    @property
    def pending_loads(self) -> int:
        """Loads without an answer."""
        return self._loads.pending

    @property
    def pending_stores(self) -> int:
        """Stores without an answer."""
        return self._stores.pending

    def wait(self, timeout_s: float) -> None:
        """Block until something may have come in. May run beside the other methods, on another thread."""
        if self._loads.moving or self._stores.moving:
            time.sleep(min(timeout_s, _POLL_S))
        else:
            self._client.wait(timeout_s)
