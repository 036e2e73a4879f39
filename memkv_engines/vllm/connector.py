"""``MemKVConnector``: the facade vLLM loads. Every hook delegates to the scheduler or the worker side.

::

    vllm serve MODEL --kv-transfer-config '{"kv_connector": "MemKVConnector",
        "kv_connector_module_path": "memkv_engines.vllm.connector", "kv_role": "kv_both",
        "kv_connector_extra_config": {"path": "/nvme/memkv"}}'
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorRole,
    KVConnectorTransferResults,
    SupportsHMA,
)
from vllm.v1.metrics.cache_hit_source import CacheHitSource

from memkv_engines.config import load_config
from memkv_engines.log import adopt_handlers, get_logger
from memkv_engines.vllm import compat
from memkv_engines.vllm.metadata import Handshake, StepMetadata, WorkerReport
from memkv_engines.vllm.scheduler_side import SchedulerSide
from memkv_engines.vllm.stats import MemKVPromMetrics, MemKVStats
from memkv_engines.vllm.worker_side import WorkerSide

if TYPE_CHECKING:
    from vllm.v1.request import Request

log = get_logger(__name__)


class MemKVConnector(KVConnectorBase_V1, SupportsHMA):
    """Keeps KV chunks in a MemKV tier.

    One instance lives in the scheduler's process, one in each worker's. Loads and stores are asynchronous; a failed
    load is recomputed, a failed store is forgotten. Extra config: the keys of ``memkv_engines.config``.

    Raises:
        ConfigError, IdentityError, LayoutError: at construction or KV cache registration, before the engine serves.
    """

    _cache_hit_source = CacheHitSource.DISK

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        adopt_handlers("vllm")
        transfer = self._kv_transfer_config
        config = load_config(transfer.kv_connector_extra_config)
        stores = transfer.is_kv_producer and config.policy.store
        self._scheduler: SchedulerSide | None = None
        self._worker: WorkerSide | None = None
        if role == KVConnectorRole.SCHEDULER:
            note = compat.version_note()
            if note:
                log.warning("%s", note)
            log.info("configuration:\n%s", config.describe())
            self._scheduler = SchedulerSide(
                vllm_config,
                kv_cache_config,
                config,
                role_stores=transfer.is_kv_producer,
                role_loads=transfer.is_kv_consumer,
            )
        else:
            self._worker = WorkerSide(vllm_config, kv_cache_config, config, stores=stores)

    @property
    def requires_kv_delivery(self) -> bool:
        """A dropped store is only a future miss."""
        return False

    @classmethod
    def supports_sleep_mode(cls, kv_transfer_config: Any) -> bool:
        """Asked by vLLM 0.33: the I/O service holds addresses of pages that sleep mode would unmap."""
        return False

    @classmethod
    def get_required_kvcache_layout(cls, vllm_config: Any) -> str | None:
        """A wish, whatever its name says: vLLM drops it with a warning where a backend has no such layout."""
        return compat.wanted_kv_cache_layout(vllm_config)

    # --- worker side ---------------------------------------------------------

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        self._w.register(kv_caches)

    def get_handshake_metadata(self) -> Handshake:
        return self._w.handshake()

    def handle_preemptions(self, kv_connector_metadata: Any) -> None:
        self._w.before_forward(kv_connector_metadata)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        self._w.start_loads(self._step)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Loads end between steps: there is nothing to wait for."""

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        """Stores take all layers at once, after the forward."""

    def wait_for_save(self) -> None:
        self._w.start_stores(self._step)

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        self._w.poll()
        finished, failed = self._w.take_finished()
        return KVConnectorTransferResults(finished_recving=finished, failed_recving=failed)

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        """For engines that do not ask for ``get_transfer_results``."""
        return None, self.get_transfer_results(finished_req_ids).finished_recving or None

    def get_block_ids_with_load_errors(self) -> set[int]:
        return self._w.take_bad_blocks()

    def build_connector_worker_meta(self) -> WorkerReport | None:
        return self._w.take_report()

    # --- scheduler side ------------------------------------------------------

    def set_xfer_handshake_metadata_pp_aware(self, metadata: dict[tuple[int, int], Any]) -> None:
        self._s.take_handshakes([metadata[rank] for rank in sorted(metadata)])

    def bind_gpu_block_pool(self, gpu_block_pool: Any) -> None:
        self._s.bind_block_pool(gpu_block_pool)

    def on_new_request(self, request: Request) -> None:
        self._s.on_new_request(request)

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        answer: tuple[int | None, bool] = self._s.matched_tokens(request, num_computed_tokens)
        return answer

    def update_state_after_alloc(self, request: Request, blocks: Any, num_external_tokens: int) -> None:
        self._s.after_alloc(request, blocks.get_block_ids() if num_external_tokens else (), num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> StepMetadata:
        meta: StepMetadata = self._s.build_meta(scheduler_output)
        return meta

    def update_connector_output(self, connector_output: Any) -> None:
        self._s.take_output(connector_output)

    def request_finished(self, request: Request, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        return self.request_finished_all_groups(request, (block_ids,))

    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        answer: tuple[bool, dict[str, Any] | None] = self._s.request_finished(request, block_ids)
        return answer

    def has_pending_push_work(self) -> bool:
        return self._scheduler is not None and self._scheduler.has_work

    def reset_cache(self) -> bool:
        answer: bool = self._s.reset_cache()
        return answer

    # --- both ----------------------------------------------------------------

    def get_kv_connector_stats(self) -> MemKVStats | None:
        side = self._scheduler or self._worker
        counted = side.counters.drain() if side is not None else {}
        return MemKVStats(data=counted) if counted else None

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> MemKVStats:
        return MemKVStats(data=data or {})

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: Any,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> MemKVPromMetrics:
        return MemKVPromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    def shutdown(self) -> None:
        for side in (self._scheduler, self._worker):
            if side is not None:
                side.shutdown()

    @property
    def _w(self) -> WorkerSide:
        assert self._worker is not None, "worker hook called on the scheduler's connector"
        return self._worker

    @property
    def _s(self) -> SchedulerSide:
        assert self._scheduler is not None, "scheduler hook called on a worker's connector"
        return self._scheduler

    @property
    def _step(self) -> StepMetadata:
        meta = self._get_connector_metadata()
        assert isinstance(meta, StepMetadata)
        return meta
