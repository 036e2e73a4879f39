"""``MemKVCacheLinker``: SGLang's device pools straight to the tier, without a host pool in between.

    --enable-unified-cache-external-linker --unified-cache-external-linker-backend dynamic
    --unified-cache-external-linker-config '{"linker": "MemKVCacheLinker",
      "linker_module_path": "memkv_engines.sglang.linker", "linker_extra_config": {"path": "/nvme/memkv"}}'

Lives in the scheduler process of each rank and is called on the scheduler's thread; offloads go on in a thread of ours.

SGLang aborts a request whose load fails once the load is under way. So ``load`` itself reads, verifies and places every
page, and says no if one of them is not right: the request is recomputed then, as if there had been no hit. The price is
that the scheduler's thread waits for the read. Loading layer by layer would overlap the read with the forward, but a
block's digest covers all its layers, and what is used before it is verified cannot be taken back.

Back of the envelope (6,200 tokens of SmolLM2 in 16 bits, 141 MB, 1.2 GB/s): the scheduler's thread waits 0.12 s for a
prefill of seconds; HiCache would copy the same bytes once more, from the host pool.
"""

from __future__ import annotations

from typing import Any

from sglang.srt.mem_cache.hicache_storage import HiCacheStorageConfig, PoolName, PoolTransfer
from sglang.srt.mem_cache.unified_cache.unified_cache_linker import LayerWiseLoadCounter, UnifiedCacheLinker

from memkv_engines.config import load_config
from memkv_engines.errors import ConfigError, LayoutError
from memkv_engines.log import get_logger
from memkv_engines.metrics import Counters
from memkv_engines.offload.boundary import guarded
from memkv_engines.sglang import compat, device_pools, identity
from memkv_engines.sglang.device_pools import DevicePool, pool_group
from memkv_engines.sglang.offloads import OffloadQueue
from memkv_engines.sglang.pools import PagedPool
from memkv_engines.sglang.recent import RecentAnswers
from memkv_engines.sglang.stores import PageStores

log = get_logger(__name__)

NOTHING_STARTED = -1


class MemKVCacheLinker(UnifiedCacheLinker):
    """Pages of the device pools as chunks in the tier.

    Args:
        server_args: SGLang's.
        params: SGLang's; pools and process groups.
        components: kinds of cache that the model has.
        extra_config: our keys.
        forward_stream: the stream of the forward; None on a CPU.

    Raises:
        ConfigError: bad or missing keys, or a set-up we cannot serve.
        IdentityError: the weights are unknown.
    """

    def __init__(
        self,
        server_args: Any,
        params: Any,
        *,
        components: Any,
        extra_config: dict[str, Any] | None = None,
        forward_stream: Any = None,
    ) -> None:
        self.forward_stream = forward_stream
        config = load_config(extra_config or {})
        self._pool_group = pool_group(params, components)
        self.pools = self._pool_group.entry_map
        self.layer_done_counter = LayerWiseLoadCounter(self._pool_group.num_layers)
        self.counters = Counters()
        self._ranks = compat.RankGroup(params)
        storage_config = _storage_config(params, self._pool_group.rank_replicated, self._ranks)
        runner = compat.model_runner()
        devices = {name: DevicePool(entry) for name, entry in self.pools.items()}
        pages = device_pools.device_pages(list(devices.values()), forward_stream)
        if pages is not None and getattr(server_args, "enable_memory_saver", False):
            raise ConfigError(
                "enable_memory_saver=True: SGLang unmaps the KV cache without telling a linker, whose offloads may "
                "still read it. Start without --enable-memory-saver, or use the hierarchical cache instead"
            )
        self._stores = PageStores(
            config,
            storage_config,
            [_paged(name, pool, storage_config, config.chunk.chunk_target_bytes) for name, pool in devices.items()],
            identity.weights_of(config, runner),
            getattr(runner, "model_config", None),
            None if PoolName.KV in self.pools else compat.row_layout(params.token_to_kv_pool_allocator.get_kvcache()),
            pages,
            scheduler=compat.scheduler(),
        )
        self._recent = RecentAnswers(config.lookup.miss_ttl_s)
        self._offloads = OffloadQueue(
            self._store, is_owner=storage_config.is_storage_writer, timeout_s=2 * config.io.load_timeout_ms / 1000
        )

    # --- look-ups and loads: the scheduler's thread waits -----------------------

    @guarded(list, refusals=False)
    def lookup(self, rid: str, transfers: list[PoolTransfer]) -> list[int]:
        """Every prefix length, in pages, that all pools could load and that is worth loading.

        Blocks for at most ``probe_timeout_ms``. Each rank answers by its own measurements; SGLang takes what all have.
        A request that waits in the queue is matched again in every round: an answer is good for ``miss_ttl_s``.
        """
        expanded = self._pool_group.resolve_transfers(transfers)
        if not expanded:
            return []
        keys = _keys(transfers)
        known = self._recent.get(keys)
        if known is None:
            others = [transfer for transfer in expanded if transfer.name != PoolName.KV]
            # SGLang does not say how many pages come before these.
            hits = self._stores.worth_loading(self._stores.hits(keys, others, ()), others, 0)
            known = sorted(hits.usable)
            self._recent.put(keys, known)
        return known

    def load(self, rid: str, transfers: list[PoolTransfer]) -> bool:
        """Read, verify and place every page; whether all are right, on every rank. Blocks until then.

        Bounded by ``load_timeout_ms`` for each pool. After a no, nothing writes into the pages any more.
        """
        good = self._ranks.all_agree(self._load(transfers))
        if not good:
            self._recent.clear()
        return good

    @guarded(lambda: False, refusals=False)
    def _load(self, transfers: list[PoolTransfer]) -> bool:
        keys = _keys(transfers)
        expanded = self._pool_group.resolve_transfers(transfers)
        for transfer in expanded:
            own = list(transfer.keys or ())
            # Other pools hold a tail of the pages; what comes before tells in which chunk the tail begins.
            before = keys[: len(keys) - len(own)]
            found = self._stores.load(str(transfer.name), own, before, transfer.host_indices)
            if not found or not all(found):
                return False
        return bool(expanded)

    def start_layer_wise_loading(self) -> int:
        """Nothing to start: what ``load`` accepted is in place."""
        return NOTHING_STARTED

    def finish_layer_wise_loading(self, counter_index: int) -> bool:
        """Always True: what ``load`` accepted is in place."""
        return True

    def cancel_queued_load(self, rid: str) -> bool:
        """Always False: no load is ever queued."""
        return False

    # --- offloads: in the background --------------------------------------------

    def offload(self, transfers: list[PoolTransfer], session_id: str | None = None) -> bool:
        """Queue a node's pages; does not block. The tree keeps them in place until the result was taken.

        The answer depends on the transfers alone, as ranks must agree on it; failures show in the result.
        """
        if not any(transfer.keys for transfer in transfers if transfer.name == PoolName.KV):
            return False
        self._offloads.put(list(transfers))
        return True

    @guarded(lambda: False, refusals=False)
    def _store(self, transfers: list[PoolTransfer]) -> bool:
        expanded = self._pool_group.resolve_transfers(transfers, allow_partial=True)
        keys = _keys(transfers)
        good = True
        for transfer in expanded:
            own = list(transfer.keys or ())
            stored = self._stores.store(str(transfer.name), own, keys[: len(keys) - len(own)], transfer.host_indices)
            good = good and bool(stored) and all(stored or ())
        self._recent.clear()
        return good and bool(expanded)

    def num_completed_offloads(self) -> int:
        """Offloads whose result waits."""
        return self._offloads.completed

    def pop_completed_offload(self) -> bool:
        """Whether the oldest offload whose result waits was stored; results come in the order of submission."""
        return self._offloads.pop()

    # --- end ------------------------------------------------------------------------

    @guarded(refusals=False)
    def reset(self) -> None:
        """Wait, bounded, until no page is read any more, and forget results. What is stored stays."""
        self._offloads.reset()
        self._recent.clear()
        self.layer_done_counter.reset()

    @guarded(refusals=False)
    def close(self) -> None:
        """Finish offloads, bounded, and end the I/O service; idempotent."""
        self._offloads.close()
        self._stores.close()


def _keys(transfers: list[PoolTransfer]) -> list[str]:
    """Page hashes of the pool of full attention: those of all pages."""
    return next((list(transfer.keys or ()) for transfer in transfers if transfer.name == PoolName.KV), [])


def _storage_config(params: Any, is_replicated: bool, ranks: compat.RankGroup) -> HiCacheStorageConfig:
    """Ranks and model, as SGLang's hierarchical cache describes them to storage backends.

    Raises:
        ConfigError: a kind of parallelism whose hits SGLang's linker does not reconcile between ranks.
    """
    for key, size in (("pp_size", params.pp_size), ("dcp_size", compat.dcp_size())):
        if size > 1:
            raise ConfigError(f"{key}={size}: the linker does not support it; use the hierarchical cache instead")
    return HiCacheStorageConfig(
        tp_rank=ranks.rank,
        tp_size=ranks.size,
        pp_rank=0,
        pp_size=1,
        attn_cp_rank=params.attn_cp_rank,
        attn_cp_size=params.attn_cp_size,
        is_mla_model=is_replicated,
        enable_storage_metrics=False,
        is_page_first_layout=False,
        model_name=compat.model_path(),
    )


def _paged(name: Any, pool: DevicePool, storage_config: HiCacheStorageConfig, chunk_target_bytes: int) -> PagedPool:
    try:
        return PagedPool(str(name), pool, storage_config, chunk_target_bytes)
    except LayoutError as error:
        raise ConfigError(f"{error}; the linker cannot serve this model: use the hierarchical cache instead") from error
