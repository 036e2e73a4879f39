"""Worker side of the connector: hands jobs to the I/O service and reports what came of them.

Order within a step: the fence (every earlier gather is done), tails (gathered before anything else may touch their
freed pages), the forward, loads, stores. Loads run between steps; stores are gathered until the next step's fence.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from memkv_engines.config import Config
from memkv_engines.doors.fingerprint import parameter_sums
from memkv_engines.doors.io_client import worker_client
from memkv_engines.limits import IDLE_LOAD_WAIT_S
from memkv_engines.log import Throttle, get_logger
from memkv_engines.metrics import Counters
from memkv_engines.offload.boundary import guarded
from memkv_engines.offload.device_client import DeviceIoClient
from memkv_engines.offload.direct_client import DirectIoClient
from memkv_engines.offload.job_client import JobClient
from memkv_engines.offload.messages import STOPPED, LoadRun, StoreChunk
from memkv_engines.offload.results import LoadResult, StoreResult
from memkv_engines.vllm import compat, geometry
from memkv_engines.vllm.metadata import GroupFacts, Handshake, StepMetadata, WorkerReport

log = get_logger(__name__)

# A full tier loses chunks with every request.
LOST_STORES_LINE_S = 60.0
_LOST = {
    "full": "full (free the device or raise capacity_bytes)",
    "shed": "shed (no staging was free: raise staging_bytes; they are offered again while their pages hold them)",
}


class WorkerSide:
    """Lives in a worker's process, on its main thread.

    Args:
        vllm_config: the engine's configuration.
        kv_cache_config: groups and sizes.
        config: ours.
        stores: this engine stores.
    """

    def __init__(self, vllm_config: Any, kv_cache_config: Any, config: Config, *, stores: bool) -> None:
        self._vllm_config, self._kv_cache_config, self._config = vllm_config, kv_cache_config, config
        self._stores = stores
        self.counters = Counters()
        self._client: JobClient | None = None
        self._facts: list[GroupFacts] = []
        self._writers: frozenset[int] = frozenset()
        self._loading: dict[int, tuple[str, tuple[LoadRun, ...]]] = {}
        self._skipped: dict[int, tuple[str, ...]] = {}
        self._idle = self._awaits_stores = False
        self._report = WorkerReport()
        self._bad_blocks: set[int] = set()
        self._finished: set[str] = set()
        self._failed: set[str] = set()
        self._lines = Throttle(LOST_STORES_LINE_S)
        geometry.reject_unsupported(vllm_config)

    # --- start-up ------------------------------------------------------------

    def register(self, kv_caches: dict[str, Any]) -> None:
        """``register_kv_caches``: plan the layouts and start the I/O service.

        Raises:
            LayoutError: a KV cache we cannot move.
            ConfigError: the tier cannot be used, or the engine's sleep mode is of a kind that is not known.
            GpuUnavailable: the KV cache lies on a GPU, and no driver or kernels are there to move it.
        """
        config = self._config
        self._facts, specs = geometry.describe_groups(
            self._vllm_config, self._kv_cache_config, kv_caches, config.chunk.chunk_target_bytes
        )
        self._writers = frozenset(f.group for f in self._facts if f.writes)
        # The pages must outlive the service: keep the tensors.
        self._kv_caches = kv_caches
        pages = geometry.device_pages(kv_caches)
        watched = pages is not None and compat.sleeps(self._vllm_config)
        self._client = worker_client(config, specs, stores=self._stores, counters=self.counters, pages=pages)
        if watched and isinstance(self._client, (DeviceIoClient, DirectIoClient)):
            compat.watch_sleep(compat.page_allocator(), self._client.suspend, self._client.wake)
        self._client.start()
        log.info("I/O service: %s, %s", self._client.mode, self._client.ready.text)

    def handshake(self) -> Handshake:
        """Geometry and weights for the scheduler. Reads every weight once."""
        weights = None
        if not self._config.identity.weights_id:
            model = compat.worker_model(depth=2)
            weights = parameter_sums(model) if model is not None else None
        return Handshake(self._facts, weights)

    # --- a step --------------------------------------------------------------

    @guarded(recover="_abandon_gathers")
    def before_forward(self, meta: StepMetadata) -> None:
        """``handle_preemptions``: from here on pages may be overwritten, so earlier gathers must be done."""
        client = self._require_client()
        client.fence()
        if meta.tails:
            for job_id, chunks in meta.tails:
                self._store(job_id, chunks)
            client.fence()

    def _abandon_gathers(self, meta: StepMetadata) -> None:
        """The fence broke: a gather that goes on now would store other tokens' KV under these names."""
        self._require_client().abandon("the fence failed")

    def start_loads(self, meta: StepMetadata) -> None:
        """``start_load_kv``: hand over this step's loads."""
        self._report.step, self._idle, self._awaits_stores = meta.step, meta.idle, meta.awaits_stores
        for request_id, job_id, runs, stop_s in meta.loads:
            self._start_load(request_id, job_id, runs, stop_s)
        for request_id, block_ids in meta.failed:
            self._fail_request(request_id, block_ids)

    @guarded(recover="_load_not_started")
    def _start_load(self, request_id: str, job_id: int, runs: tuple[LoadRun, ...], stop_s: float) -> None:
        self._loading[job_id] = (request_id, runs)
        self._require_client().submit_load(job_id, runs, stop_s)

    def _load_not_started(self, request_id: str, job_id: int, runs: tuple[LoadRun, ...], stop_s: float) -> None:
        """The engine waits for every load it planned: one that did not start has failed."""
        self._loading.pop(job_id, None)
        self._report.failed[job_id] = tuple((0, "io_service") for _ in runs)
        self._fail_request(request_id, [i for run in runs for i in _ids(run)])

    def _fail_request(self, request_id: str, block_ids: Sequence[int]) -> None:
        self._failed.add(request_id)
        self._bad_blocks.update(block_ids)
        self._finished.add(request_id)

    @guarded()
    def start_stores(self, meta: StepMetadata) -> None:
        """``wait_for_save``: the forward has written its KV; gather it."""
        for job_id, chunks in meta.stores:
            self._store(job_id, chunks)

    def _store(self, job_id: int, chunks: tuple[StoreChunk, ...]) -> None:
        mine = tuple(c for c in chunks if c.group in self._writers)
        if len(mine) != len(chunks):
            # Another rank holds the same bytes and writes them; ours count as present.
            self._skipped[job_id] = tuple("" if c.group in self._writers else "present" for c in chunks)
        if mine:
            self._require_client().submit_store(job_id, mine)
        else:
            self._report.stored[job_id] = (1, self._skipped.pop(job_id))

    # --- results -------------------------------------------------------------

    @guarded()
    def poll(self) -> None:
        """Take in what the service has finished; in a step without a forward, wait a little for what it runs for.

        The engine would only run empty steps meanwhile, and take the time for them from the I/O service.
        """
        client = self._require_client()
        results = client.poll()
        if self._idle and (self._loading or self._awaits_stores) and not results and not self._finished:
            client.wait(IDLE_LOAD_WAIT_S)
            results = client.poll()
        for result in results:
            if isinstance(result, LoadResult):
                self._take_load(result)
            elif isinstance(result, StoreResult):
                self._take_store(result)
        # A report that nobody has fetched yet has the news of an earlier poll.
        for key, change in client.residents.take_changes().items():
            self._report.residents[key] = self._report.residents.get(key, 0) + change

    def _take_load(self, result: LoadResult) -> None:
        found = self._loading.pop(result.job_id, None)
        if found is None:
            return  # answered as failed already
        request_id, runs = found
        if result.measures:
            elapsed_us = int(result.seconds * 1e6)
            moved = result.read_bytes, result.memory_bytes
            self._report.measured[result.job_id] = (*moved, elapsed_us, STOPPED in result.kinds)
        if not any(result.kinds):
            self._finished.add(request_id)
            return
        self._report.failed[result.job_id] = tuple(zip(result.good_blocks, result.kinds, strict=True))
        bad: list[int] = []
        for run, good, kind in zip(runs, result.good_blocks, result.kinds, strict=True):
            # Behind the first bad block of a chain nothing counts, good or not.
            bad += _ids(run) if bad else _ids(run)[good:] if kind else []
        self._fail_request(request_id, bad)

    def _take_store(self, result: StoreResult) -> None:
        self._tell_lost(result)
        outcomes = result.outcomes
        pattern = self._skipped.pop(result.job_id, None)
        if pattern is not None:
            mine = iter(outcomes)
            outcomes = tuple(p or next(mine) for p in pattern)
        self._report.stored[result.job_id] = (1, outcomes)

    def _tell_lost(self, result: StoreResult) -> None:
        lost = result.lost
        held = self._lines.admit("store") if lost else None
        if held is not None:
            text = "%d of %d chunks were not stored: %s (%d more such lines held back)"
            kinds = ", ".join(_LOST.get(kind, kind) for kind in sorted(set(lost)))
            log.warning(text, len(lost), len(result.outcomes), kinds, held)

    def take_finished(self) -> tuple[set[str], set[str]]:
        """Requests whose loads have ended, and those of them that failed with several KV groups."""
        finished, self._finished = self._finished, set()
        failed, self._failed = self._failed, set()
        return finished, failed if len(self._kv_cache_config.kv_cache_groups) > 1 else set()

    def take_bad_blocks(self) -> set[int]:
        """Pages whose load failed; only meaningful (and only reported) with a single KV group."""
        bad, self._bad_blocks = self._bad_blocks, set()
        return bad if len(self._kv_cache_config.kv_cache_groups) == 1 else set()

    def take_report(self) -> WorkerReport | None:
        """What the scheduler side should learn."""
        if self._report == WorkerReport():
            return None
        report, self._report = self._report, WorkerReport()
        return report

    def shutdown(self) -> None:
        """Let gathered stores finish, then end the service."""
        if self._client is not None:
            self._client.close()

    def _require_client(self) -> JobClient:
        assert self._client is not None, "register_kv_caches comes first"
        return self._client


def _ids(run: LoadRun) -> list[int]:
    ids: list[int] = np.frombuffer(run.block_ids, dtype="<i4").tolist()
    return ids
