"""``MemKVStoragePlugin``: the tier as a storage backend of LMCache inside an engine.

    chunk_size: 256
    pre_caching_hash_algorithm: sha256_cbor      # and PYTHONHASHSEED=0 in the environment
    storage_plugins: [memkv]
    extra_config:
      storage_plugin.memkv.module_path: memkv_engines.lmcache.storage_plugin
      storage_plugin.memkv.class_name: MemKVStoragePlugin
      memkv_engines.path: /nvme/memkv
      memkv_engines.weights_id: qwen3-8b@b968826d

Lives in the process of LMCache's engine. What it refuses at its construction, LMCache logs, and runs without it.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from lmcache.utils import CacheEngineKey
from lmcache.v1.memory_management import MemoryFormat, MemoryObj
from lmcache.v1.storage_backend.abstract_backend import StoragePluginInterface

from memkv_engines.config import load_config
from memkv_engines.errors import ConfigError
from memkv_engines.lmcache import compat
from memkv_engines.lmcache.identity import Identity, engine_hash, layout_of
from memkv_engines.lmcache.objects import ObjectBuffer, ObjectName, ObjectStore
from memkv_engines.log import Throttle, adopt_handlers, get_logger
from memkv_engines.metrics import Counters
from memkv_engines.offload.boundary import guarded
from memkv_engines.offload.messages import IN_TIER

log = get_logger(__name__)

KEY_PREFIX = "memkv_engines."
_UNSUPPORTED = {
    "use_layerwise": "objects of single layers are not stored",
    "enable_blending": "what is blended is no prefix, which is what a chunk's hash stands for",
    "enable_p2p": "its allocator has memory of its own",
    "enable_pd": "its allocator has memory of its own",
}


class MemKVStoragePlugin(StoragePluginInterface):
    """LMCache's full chunks in the tier; a shorter last chunk stays in LMCache's own memory.

    Calls block their own thread only, each with a bound, and no exception leaves one after construction.

    Args:
        config: LMCache's; ``extra_config`` holds our keys after ``memkv_engines.``.
        metadata: LMCache's; model, ranks and shapes.
        local_cpu_backend: whose memory is loaded into and stored from; None in a scheduler, which only looks up.
        loop: LMCache's event loop, unused: our threads do the waiting.
        dst_device: part of LMCache's contract.

    Raises:
        ConfigError: bad or missing keys, or an option of LMCache's that does not go with this.
        IdentityError: nothing names the weights, or the keys are not safe.
        LayoutError: the memory of LMCache's allocator is not known.
    """

    def __init__(
        self,
        config: Any = None,
        metadata: Any = None,
        local_cpu_backend: Any = None,
        loop: Any = None,
        dst_device: str = "cpu",
    ) -> None:
        super().__init__(dst_device, config, metadata, local_cpu_backend, loop)
        adopt_handlers(compat.LOGGER)
        for option, why in _UNSUPPORTED.items():
            if getattr(config, option, False):
                raise ConfigError(f"{option}=True: {why}; leave it out, or use LMCache's server with MemKVL2Adapter")
        compat.refuse_unsafe_hash(config)
        extra = config.extra_config or {}
        ours = load_config({k.removeprefix(KEY_PREFIX): v for k, v in extra.items() if k.startswith(KEY_PREFIX)})
        self.counters = Counters()
        self._hash_name = config.pre_caching_hash_algorithm
        self._format = MemoryFormat.KV_MLA_FMT if metadata.use_mla else MemoryFormat.KV_2LTD
        self._identity = Identity(ours, "storage plugin")
        arena = compat.arena_of(local_cpu_backend) if local_cpu_backend is not None else None
        self._lines = Throttle()
        self._lock = threading.Lock()
        self._putting: set[CacheEngineKey] = set()
        self._objects = ObjectStore(ours, arena)
        self._puts = ThreadPoolExecutor(2, thread_name_prefix="memkv-put")
        self._gets = ThreadPoolExecutor(4, thread_name_prefix="memkv-get")
        if local_cpu_backend is not None:
            compat.before_memory_goes(local_cpu_backend, self.close)
        log.info("configuration:\n%s", ours.describe())

    def __str__(self) -> str:
        return "MemKVStoragePlugin"

    # --- look-ups ----------------------------------------------------------------

    def contains(self, key: CacheEngineKey, pin: bool = False) -> bool:
        """Whether a chunk is stored. Nothing is pinned: one that goes before it is loaded is a miss of that load."""
        return self.batched_contains([key], pin) == 1

    @guarded(lambda: 0, refusals=False)
    def batched_contains(self, keys: list[CacheEngineKey], pin: bool = False) -> int:
        """How many leading chunks are stored. Blocks for at most ``probe_timeout_ms``."""
        found = self._objects.find([self._name(key) for key in keys])
        return found.index(False) if False in found else len(found)

    async def batched_async_contains(self, lookup_id: str, keys: list[CacheEngineKey], pin: bool = False) -> int:
        """``batched_contains`` without blocking the event loop."""
        return await self._aside(self.batched_contains, 0, keys)

    def exists_in_put_tasks(self, key: CacheEngineKey) -> bool:
        """Whether a chunk is being stored."""
        with self._lock:
            return key in self._putting

    def pin(self, key: CacheEngineKey) -> bool:
        """Nothing to do: see ``contains``."""
        return True

    def unpin(self, key: CacheEngineKey) -> bool:
        """Nothing to do."""
        return True

    def touch_cache(self) -> None:
        """Nothing to do: loads touch their chunks."""

    # --- stores --------------------------------------------------------------------

    @guarded(refusals=False)
    def batched_submit_put_task(
        self,
        keys: Sequence[CacheEngineKey],
        objs: list[MemoryObj],
        transfer_spec: Any = None,
        on_complete_callback: Callable[[CacheEngineKey], None] | None = None,
    ) -> None:
        """Start to store chunks; does not block. LMCache's memory is held until they are written."""
        layout = self._layout()
        with self._lock:
            puts = [
                (key, memory)
                for key, memory in zip(keys, objs, strict=False)
                if key not in self._putting
                and memory.get_memory_format() == self._format
                and layout_of(memory.get_shapes(), memory.get_dtypes()) == layout
            ]
            self._putting.update(key for key, _ in puts)
        for _, memory in puts:
            memory.ref_count_up()
        try:
            self._puts.submit(self._put, puts, on_complete_callback)
        except RuntimeError:
            self._release(puts)  # Closed.

    async def async_batched_submit_put_task(
        self,
        keys: Sequence[CacheEngineKey],
        objs: list[MemoryObj],
        transfer_spec: Any = None,
        on_complete_callback: Callable[[CacheEngineKey], None] | None = None,
    ) -> None:
        """``batched_submit_put_task``, which does not block either."""
        self.batched_submit_put_task(keys, objs, transfer_spec, on_complete_callback)

    def _put(self, puts: list[tuple[CacheEngineKey, MemoryObj]], done: Callable[[CacheEngineKey], None] | None) -> None:
        try:
            for key in self._store(puts):
                if done is not None:
                    self._tell(done, key)
        finally:
            self._release(puts)

    @guarded(list, refusals=False)
    def _store(self, puts: list[tuple[CacheEngineKey, MemoryObj]]) -> list[CacheEngineKey]:
        outcomes = self._objects.store([self._buffer(key, memory) for key, memory in puts])
        return [key for (key, _), outcome in zip(puts, outcomes, strict=True) if outcome in IN_TIER]

    @guarded(refusals=False)
    def _tell(self, done: Callable[[CacheEngineKey], None], key: CacheEngineKey) -> None:
        done(key)

    def _release(self, puts: list[tuple[CacheEngineKey, MemoryObj]]) -> None:
        for _, memory in puts:
            memory.ref_count_down()
        with self._lock:
            self._putting.difference_update(key for key, _ in puts)

    # --- loads -----------------------------------------------------------------------

    def get_blocking(self, key: CacheEngineKey) -> MemoryObj | None:
        """Load a chunk into memory of LMCache's, which is the caller's then; None is a miss."""
        return self.batched_get_blocking([key])[0]

    def batched_get_blocking(self, keys: list[CacheEngineKey]) -> list[MemoryObj | None]:
        """Load chunks, all together; blocks until they are there and verified, or given up. None is a miss."""
        return self._load(keys, wait=True) or [None] * len(keys)

    def get_non_blocking(self, key: CacheEngineKey, location: str | None = None) -> Future[MemoryObj | None] | None:
        """``get_blocking`` on a thread of ours; None where there is nothing to load."""
        if not self.contains(key):
            return None
        try:
            return self._gets.submit(self.get_blocking, key)
        except RuntimeError:
            return None  # Closed.

    async def batched_get_non_blocking(
        self, lookup_id: str, keys: list[CacheEngineKey], transfer_spec: Any = None
    ) -> list[MemoryObj]:
        """Load chunks without blocking the event loop: the leading ones that are there and right."""
        return await self._aside(self._leading, [], keys)

    def _leading(self, keys: list[CacheEngineKey]) -> list[MemoryObj]:
        # Nobody waits for memory here: who holds it may be waiting for this very load.
        found = self._load(keys, wait=False) or []
        stop = found.index(None) if None in found else len(found)
        for memory in found[stop:]:
            if memory is not None:
                memory.ref_count_down()
        return [memory for memory in found[:stop] if memory is not None]

    @guarded(refusals=False)
    def _load(self, keys: list[CacheEngineKey], *, wait: bool) -> list[MemoryObj | None] | None:
        allocated: list[MemoryObj] = []
        good: list[bool] = []
        try:
            self._allocate(allocated, len(keys), wait=wait)
            good = self._objects.load([self._buffer(key, own) for key, own in zip(keys, allocated, strict=False)])
        finally:
            good += [False] * (len(allocated) - len(good))
            for memory, ok in zip(allocated, good, strict=True):
                if not ok:
                    memory.ref_count_down()
        loaded = [memory if ok else None for memory, ok in zip(allocated, good, strict=True)]
        return loaded + [None] * (len(keys) - len(loaded))

    def _allocate(self, allocated: list[MemoryObj], count: int, *, wait: bool) -> None:
        """Add memory for some chunks; less if LMCache has no more."""
        backend = self.local_cpu_backend
        while backend is not None and len(allocated) < count:
            # It waits for memory only as long as nothing of ours holds any.
            memory = backend.allocate(
                self.metadata.get_shapes(),
                self.metadata.get_dtypes(),
                self._format,
                busy_loop=wait and not allocated,
            )
            if memory is None:
                break
            allocated.append(memory)

    # --- the rest ----------------------------------------------------------------------

    @guarded(lambda: False, refusals=False)
    def remove(self, key: CacheEngineKey, force: bool = True) -> bool:
        """Remove a chunk, for all who share the tier. Blocks, bounded."""
        return self._objects.remove([self._name(key)])[0]

    @guarded(lambda: 0, refusals=False)
    def batched_remove(self, keys: list[CacheEngineKey], force: bool = True) -> int:
        """Remove chunks; how many there were. Blocks, bounded."""
        return sum(self._objects.remove([self._name(key) for key in keys]))

    def get_allocator_backend(self) -> Any:
        """Whose memory our buffers come from."""
        return self.local_cpu_backend

    def status(self) -> dict[str, int]:
        """What was counted so far."""
        counters = Counters()
        counters.merge(self._objects.counters())
        counters.merge(self.counters.as_dict())
        return counters.as_dict()

    @guarded(refusals=False)
    def close(self) -> None:
        """Write what has begun, bounded, and end the I/O services; idempotent. No memory of LMCache's is held then."""
        self._gets.shutdown(wait=False, cancel_futures=True)
        self._puts.shutdown(wait=False)
        self._objects.close()
        self._puts.shutdown(wait=True)
        self._gets.shutdown(wait=True)

    async def _aside(self, call: Callable[..., Any], closed: Any, *arguments: Any) -> Any:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._gets, call, *arguments)
        except RuntimeError:
            return closed

    def _layout(self) -> Any:
        return layout_of(self.metadata.get_shapes(), self.metadata.get_dtypes())

    def _name(self, key: CacheEngineKey) -> ObjectName:
        namespace = self._identity.of_engine(key, self._layout(), self._format.name, self._hash_name)
        return ObjectName(namespace, engine_hash(key))

    def _buffer(self, key: CacheEngineKey, memory: MemoryObj) -> ObjectBuffer:
        return ObjectBuffer(self._name(key), memory.data_ptr, memory.get_size())
