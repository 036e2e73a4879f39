"""``MemKVHiCache``: storage backend of SGLang's hierarchical cache.

    --hicache-storage-backend dynamic --hicache-storage-backend-extra-config '{"backend_name": "memkv_engines",
      "module_path": "memkv_engines.sglang.hicache", "class_name": "MemKVHiCache", "interface_v1": 1,
      "hicache_storage_pass_prefix_keys": true, "path": "/nvme/memkv"}'

Lives in the scheduler process of each rank. The controller calls it from three threads (look-ups, loads, stores); each
call blocks its thread only, and no exception leaves it, since a controller thread that dies is not started again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sglang.srt.mem_cache.hicache_storage import (
    HiCacheStorage,
    HiCacheStorageConfig,
    HiCacheStorageExtraInfo,
    PoolName,
    PoolTransfer,
    PoolTransferResult,
)

from memkv_engines.config import load_config
from memkv_engines.errors import ConfigError, IoServiceError, LayoutError
from memkv_engines.keys import JsonValue
from memkv_engines.limits import MIN_TRIAL_TOKENS
from memkv_engines.log import get_logger
from memkv_engines.metrics import Counters
from memkv_engines.offload.boundary import guarded
from memkv_engines.sglang import compat, identity
from memkv_engines.sglang.flat import BouncePool, FlatPages
from memkv_engines.sglang.pools import PagedPool, is_logical
from memkv_engines.sglang.stores import PageStores

log = get_logger(__name__)

_SGLANG_KEYS = frozenset({"backend_name", "module_path", "class_name", "interface_v1", "file_storage_path"})


class MemKVHiCache(HiCacheStorage):
    """Pages of the host pools as chunks in the tier.

    Args:
        storage_config: SGLang's; ``extra_config`` holds our keys beside SGLang's own.
        kwargs: unused; part of SGLang's contract.

    Raises:
        ConfigError: bad or missing keys.
        IdentityError: the weights are unknown.
    """

    def __init__(self, storage_config: HiCacheStorageConfig, kwargs: Any = None) -> None:
        identity.refuse_unsupported(storage_config, compat.passes_prefix_keys())
        extra = {k: v for k, v in (storage_config.extra_config or {}).items() if k not in _SGLANG_KEYS}
        self._config = load_config(extra)
        self._storage_config = storage_config
        self._scheduler = compat.scheduler()
        self._least_tokens = compat.prefetch_threshold(MIN_TRIAL_TOKENS)
        runner = compat.model_runner()
        self._model_config = getattr(runner, "model_config", None)
        self._sums = identity.weights_of(self._config, runner)
        self.counters = Counters()
        self._pools: dict[str, PagedPool] = {}
        self._stores: PageStores | None = None
        self._row_layout: JsonValue = None
        self._direct = bool((storage_config.extra_config or {}).get("interface_v1"))
        self._flat: FlatPages | None = None
        if not self._direct:
            log.warning("key 'interface_v1' is not set: pages are copied once more; set it to 1 to avoid that")

    # --- start and end -------------------------------------------------------

    def register_mem_pool_host(self, mem_pool_host: Any) -> None:
        """The anchor pool, which holds the KV of full attention, or numbers its pages for the pools that do.

        Raises:
            ConfigError: it only numbers them, and ``interface_v1`` is not set.
            IdentityError: it only numbers them, and the layout of their rows is unknown.
        """
        super().register_mem_pool_host(mem_pool_host)
        if is_logical(mem_pool_host):
            if not self._direct:
                raise ConfigError(
                    "key 'interface_v1' is missing in --hicache-storage-backend-extra-config: set it to 1; the model's "
                    "anchor pool holds no bytes that could be handed over as flat pages"
                )
            self._row_layout = compat.row_layout(compat.device_pool())
            return
        self._register(PoolName.KV, mem_pool_host if self._direct else BouncePool(mem_pool_host))

    def register_mem_host_pool_v2(self, host_pool: Any, host_pool_name: Any) -> None:
        """A pool of the hybrid cache; the anchor comes once more."""
        super().register_mem_host_pool_v2(host_pool, host_pool_name)
        if self._stores is not None:
            log.warning("host pool %s came after the start and is not stored", host_pool_name)
        elif host_pool_name != PoolName.KV:
            self._register(host_pool_name, host_pool)

    def _register(self, name: Any, pool: Any) -> None:
        try:
            made = PagedPool(str(name), pool, self._storage_config, self._config.chunk.chunk_target_bytes)
        except LayoutError as error:
            if name == PoolName.KV:
                raise
            # SGLang counts a hit only where every pool it needs has one: without this pool it recomputes.
            log.warning("%s; it is not stored, and prompts that need it are recomputed", error)
            return
        self._pools[made.name] = made

    def on_host_pools_registered(self) -> None:
        """Every pool is known: fix the namespace and start the I/O service.

        Raises:
            ConfigError: the tier cannot be used.
            IdentityError: the weights are unknown.
        """
        stores = PageStores(
            self._config,
            self._storage_config,
            list(self._pools.values()),
            self._sums,
            self._model_config,
            self._row_layout,
            scheduler=self._scheduler,
            least_tokens=self._least_tokens,
        )
        if not self._direct:
            anchor = PoolName.KV.value
            self._flat = FlatPages(stores.by_pool[anchor], self._pools[anchor].pool)
        self._stores = stores

    @guarded(refusals=False)
    def close(self) -> None:
        """End the I/O service; idempotent."""
        stores, self._stores, self._flat = self._stores, None, None
        if stores is not None:
            stores.close()

    @guarded(lambda: False, refusals=False)
    def clear(self) -> bool:
        """Remove every chunk of this namespace from the tier. Blocks while it lists the folder, bounded."""
        self._started().clear()
        return True

    def _started(self) -> PageStores:
        if self._stores is None:
            raise IoServiceError("a call before on_host_pools_registered or after close")
        return self._stores

    # --- look-ups ------------------------------------------------------------

    def exists(self, key: str) -> bool:
        """Whether a page is stored."""
        return self.batch_exists([key]) == 1

    @guarded(lambda: 0, refusals=False)
    def batch_exists(self, keys: list[str], extra_info: HiCacheStorageExtraInfo | None = None) -> int:
        """How many leading pages are stored and worth loading. Blocks for at most ``probe_timeout_ms``.

        Each rank answers by its own measurements; SGLang takes the least of all.
        """
        stores, prefix = self._started(), _prefix(extra_info)
        with stores.idle.prefetching():
            hits = stores.hits(keys, (), prefix)
        return max(stores.worth_loading(hits, (), len(prefix)).usable, default=0)

    @guarded(lambda: PoolTransferResult.empty(), refusals=False)
    def batch_exists_v2(
        self,
        keys: list[str],
        pool_transfers: list[PoolTransfer] | None = None,
        extra_info: HiCacheStorageExtraInfo | None = None,
    ) -> PoolTransferResult:
        """How many leading pages are usable, with what each pool needs, and worth loading.

        The semantics are those of ``HiCacheFile``.
        """
        stores, prefix = self._started(), _prefix(extra_info)
        with stores.idle.prefetching():
            hits = stores.hits(keys, pool_transfers or [], prefix)
        hits = stores.worth_loading(hits, pool_transfers or [], len(prefix))
        return PoolTransferResult(max(hits.usable, default=0), hits.by_pool, sorted(hits.usable))

    # --- transfers -----------------------------------------------------------

    @guarded(list, refusals=False)
    def batch_get_v1(
        self, keys: list[str], host_indices: Any, extra_info: HiCacheStorageExtraInfo | None = None
    ) -> list[bool]:
        """Load KV pages into the host pool; per page whether it is there and right. Blocks until all are."""
        return self._get(PoolName.KV.value, keys, host_indices, _prefix(extra_info))

    @guarded(list, refusals=False)
    def batch_set_v1(
        self, keys: list[str], host_indices: Any, extra_info: HiCacheStorageExtraInfo | None = None
    ) -> list[bool]:
        """Store KV pages from the host pool; per page whether the tier holds it now. Blocks until all are written."""
        return self._set(PoolName.KV.value, keys, host_indices, _prefix(extra_info))

    @guarded(recover="_nothing_loaded", refusals=False)
    def batch_get_v2(
        self, transfers: list[PoolTransfer], extra_info: HiCacheStorageExtraInfo | None = None
    ) -> dict[str, list[bool]]:
        """``batch_get_v1`` for any pool."""
        prefix = _prefix(extra_info)
        return {t.name: self._get(str(t.name), t.keys or [], t.host_indices, prefix) for t in transfers}

    def _nothing_loaded(self, transfers: list[PoolTransfer], extra_info: Any = None) -> dict[str, list[bool]]:
        # SGLang takes the least of what it is told, and a pool it is not told of for one that does not matter.
        return {t.name: [False] * len(t.keys or []) for t in transfers}

    @guarded(dict, refusals=False)
    def batch_set_v2(
        self, transfers: list[PoolTransfer], extra_info: HiCacheStorageExtraInfo | None = None
    ) -> dict[str, list[bool]]:
        """``batch_set_v1`` for any pool."""
        prefix = _prefix(extra_info)
        return {t.name: self._set(str(t.name), t.keys or [], t.host_indices, prefix) for t in transfers}

    def _get(self, pool: str, keys: list[str], host_indices: Any, prefix: list[str]) -> list[bool]:
        return self._load(pool, keys, host_indices, prefix) or [False] * len(keys)

    def _set(self, pool: str, keys: list[str], host_indices: Any, prefix: list[str]) -> list[bool]:
        return self._store(pool, keys, host_indices, prefix) or [False] * len(keys)

    @guarded(refusals=False)
    def _load(self, pool: str, keys: list[str], host_indices: Any, prefix: list[str]) -> list[bool] | None:
        stores = self._started()
        with stores.idle.prefetching():
            return stores.load(pool, keys, prefix, host_indices)

    @guarded(refusals=False)
    def _store(self, pool: str, keys: list[str], host_indices: Any, prefix: list[str]) -> list[bool] | None:
        return self._started().store(pool, keys, prefix, host_indices)

    # --- the oldest interface: flat tensors ------------------------------------

    def get(self, key: str, target_location: Any = None, target_sizes: Any = None) -> Any:
        """Fill one flat page; None is a miss."""
        found = self.batch_get([key], [target_location])
        return found[0] if found else None

    @guarded(list, refusals=False)
    def batch_get(self, keys: list[str], target_locations: Any = None, target_sizes: Any = None) -> list[Any]:
        """Fill flat pages, which are returned; None for each that is missing or wrong."""
        if self._flat is None or not self._config.policy.load:
            return [None] * len(keys)
        good = self._flat.load(keys, target_locations)
        return [target if ok else None for target, ok in zip(target_locations, good, strict=True)]

    def set(self, key: str, value: Any = None, target_location: Any = None, target_sizes: Any = None) -> bool:
        """Store one flat page."""
        return self.batch_set([key], [value])

    @guarded(lambda: False, refusals=False)
    def batch_set(
        self, keys: list[str], values: Any = None, target_locations: Any = None, target_sizes: Any = None
    ) -> bool:
        """Store flat pages; whether the tier holds all of them now."""
        if self._flat is None or not self._config.policy.store:
            return False
        return self._flat.store(keys, values)


def _prefix(extra_info: HiCacheStorageExtraInfo | None) -> list[str]:
    keys: Sequence[str] | None = extra_info.prefix_keys if extra_info is not None else None
    return list(keys or ())
