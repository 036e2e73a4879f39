"""``MemKVL2Adapter``: the tier as second level of LMCache's server.

    lmcache server ... --l2-adapter '{"type": "plugin", "module_path": "memkv_engines.lmcache.l2_adapter",
      "class_name": "MemKVL2Adapter", "adapter_params": {"path": "/nvme/memkv", "weights_id": "qwen3-8b@b968826d"}}'

Lives in the server's process. Its controllers start tasks, which run on threads of ours, and read the results when a
descriptor says so; no method blocks (but ``delete`` and ``close``) and no exception leaves one after construction.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from lmcache.lmcache_native import Bitmap
from lmcache.v1.distributed.api import MemoryLayoutDesc, ObjectKey
from lmcache.v1.distributed.internal_api import L1MemoryDesc, L2StoreResult
from lmcache.v1.distributed.l2_adapters.base import L2AdapterInterface
from lmcache.v1.memory_management import MemoryFormat, MemoryObj

from memkv_engines.config import load_config
from memkv_engines.errors import ConfigError
from memkv_engines.limits import MAX_OBJECT_SIZES, MAX_REMEMBERED_LAYOUTS
from memkv_engines.lmcache import compat
from memkv_engines.lmcache.identity import Identity, Layout, layout_of, object_bytes, server_hash
from memkv_engines.lmcache.objects import Arena, ObjectBuffer, ObjectName, ObjectStore
from memkv_engines.lmcache.tasks import Tasks
from memkv_engines.log import Throttle, adopt_handlers, get_logger
from memkv_engines.metrics import Counters
from memkv_engines.offload.boundary import guarded
from memkv_engines.offload.messages import IN_TIER

log = get_logger(__name__)

_STORE_THREADS, _LOOKUP_THREADS, _LOAD_THREADS = 2, 2, 4
_FORMATS_WITHOUT_LAYOUT = (MemoryFormat.BINARY, MemoryFormat.BINARY_BUFFER)


class MemKVL2Adapter(L2AdapterInterface):
    """Objects of LMCache's first level as chunks in the tier.

    LMCache's locks are not needed: an object that is evicted between look-up and load is a miss of that load, and what
    was opened before stays readable. The tier bounds its own size (``capacity_bytes``), so LMCache's eviction of this
    adapter by usage is off; quotas per salt work, for what was stored by this process.

    Args:
        params: our keys, flat, as ``adapter_params``.
        l1_memory_desc: LMCache's first level, which all buffers lie in.

    Raises:
        ConfigError: bad or missing keys, or a first level that is not host memory.
        IdentityError: nothing names the weights.
    """

    def __init__(self, params: dict[str, Any], l1_memory_desc: L1MemoryDesc | None = None) -> None:
        super().__init__()
        adopt_handlers(compat.LOGGER)
        config = load_config(params)
        self._identity = Identity(config, "l2 adapter")
        if l1_memory_desc is None or not l1_memory_desc.size:
            raise ConfigError(
                "LMCache describes no memory of its first level: --l1-size-gb must be above 0, and the first level in "
                "host memory"
            )
        arena = Arena(l1_memory_desc.ptr, l1_memory_desc.size, l1_memory_desc.align_bytes)
        self.counters = Counters()
        self._path = config.tier.path
        self._lines = Throttle()
        self._layouts: dict[tuple[str, int, int], set[Layout]] = {}
        self._objects = ObjectStore(config, arena)
        self._stores: Tasks[L2StoreResult] = Tasks("store", _STORE_THREADS, self.counters)
        self._lookups: Tasks[Bitmap] = Tasks("lookup", _LOOKUP_THREADS, self.counters)
        self._loads: Tasks[Bitmap] = Tasks("load", _LOAD_THREADS, self.counters)
        log.info("configuration:\n%s", config.describe())

    # --- descriptors -----------------------------------------------------------

    def get_store_event_fd(self) -> int:
        """Readable when a store has ended."""
        return self._stores.event_fd

    def get_lookup_and_lock_event_fd(self) -> int:
        """Readable when a look-up has ended."""
        return self._lookups.event_fd

    def get_load_event_fd(self) -> int:
        """Readable when a load has ended."""
        return self._loads.event_fd

    # --- stores ----------------------------------------------------------------

    def submit_store_task(self, keys: list[ObjectKey], objects: list[MemoryObj]) -> int:
        """Start to store objects; those that the tier has already are left as they are."""
        return self._stores.start(lambda: self._store(keys, objects), L2StoreResult(False, 0))

    def pop_completed_store_tasks(self) -> dict[int, L2StoreResult]:
        """Stores that have ended: whether the tier holds every object now, and the bytes that were new."""
        return self._stores.take_all()

    def _store(self, keys: list[ObjectKey], objects: list[MemoryObj]) -> L2StoreResult:
        buffers = [self._buffer(key, memory) for key, memory in zip(keys, objects, strict=True)]
        known = [index for index, buffer in enumerate(buffers) if buffer is not None]
        outcomes = self._objects.store([buffer for buffer in buffers if buffer is not None])
        # LMCache lets go of its memory when it stops, whatever is under way: what it freed may have been overwritten.
        freed = [buffers[i].name for i in known if not objects[i].is_valid()]  # type: ignore[union-attr]
        if freed:
            self._objects.remove(freed)
            return L2StoreResult(False, 0)
        new = [i for i, outcome in zip(known, outcomes, strict=True) if outcome == "stored"]
        sizes = [objects[i].get_size() for i in new]
        if new:
            self._notify_keys_stored([keys[i] for i in new], sizes)
        complete = len(known) == len(keys) and all(outcome in IN_TIER for outcome in outcomes)
        return L2StoreResult(complete, sum(sizes))

    # --- look-ups ----------------------------------------------------------------

    def submit_lookup_and_lock_task(
        self, keys: list[ObjectKey], group_layout_descs: dict[int, MemoryLayoutDesc]
    ) -> int:
        """Start to look objects up; a look-up that is not answered in ``probe_timeout_ms`` finds nothing."""
        return self._lookups.start(lambda: self._look_up(keys, group_layout_descs), Bitmap(len(keys)))

    def query_lookup_and_lock_result(self, task_id: int) -> Bitmap | None:
        """Which objects are stored, once; None while the look-up runs."""
        return self._lookups.take(task_id)

    def submit_unlock(self, keys: list[ObjectKey]) -> None:
        """Nothing to do: there are no locks."""

    def _look_up(self, keys: list[ObjectKey], descs: dict[int, MemoryLayoutDesc]) -> Bitmap:
        layouts = {group: layout_of(desc.shapes, desc.dtypes) for group, desc in descs.items()}
        names = {
            index: name
            for index, key in enumerate(keys)
            if key.object_group_id in layouts and (name := self._name(key, layouts[key.object_group_id])) is not None
        }
        found = Bitmap(len(keys))
        present = self._objects.find(list(names.values()))
        hits = [index for index, stored in zip(names, present, strict=True) if stored]
        found.batched_set(hits)
        for group in {keys[index].object_group_id for index in hits}:
            # The load that follows finds the service for its size under way.
            self._loads.aside(partial(self._objects.prepare, object_bytes(layouts[group])))
        return found

    # --- loads -------------------------------------------------------------------

    def submit_load_task(self, keys: list[ObjectKey], objects: list[MemoryObj]) -> int:
        """Start to load objects into LMCache's buffers."""
        return self._loads.start(lambda: self._load(keys, objects), Bitmap(len(keys)))

    def query_load_result(self, task_id: int) -> Bitmap | None:
        """Which buffers hold their objects, every byte verified, once; None while the load runs."""
        return self._loads.take(task_id)

    def _load(self, keys: list[ObjectKey], objects: list[MemoryObj]) -> Bitmap:
        buffers = [self._buffer(key, memory) for key, memory in zip(keys, objects, strict=True)]
        known = [index for index, buffer in enumerate(buffers) if buffer is not None]
        good = self._objects.load([buffer for buffer in buffers if buffer is not None])
        loaded = Bitmap(len(keys))
        loaded.batched_set([index for index, ok in zip(known, good, strict=True) if ok])
        if loaded.popcount():
            self._notify_keys_accessed([keys[index] for index in loaded.get_indices_list()])
        return loaded

    # --- what else LMCache asks -------------------------------------------------

    @guarded(refusals=False)
    def delete(self, keys: list[ObjectKey]) -> None:
        """Remove objects of layouts that this process has met. Blocks, bounded."""
        places = [
            (key, layout, name)
            for key in keys
            for layout in tuple(self._layouts.get((key.model_name, key.kv_rank, key.object_group_id), ()))
            if (name := self._name(key, layout)) is not None
        ]
        removed = self._objects.remove([name for _, _, name in places])
        gone = [(key, object_bytes(layout)) for (key, layout, _), ok in zip(places, removed, strict=True) if ok]
        if gone:
            self._notify_keys_deleted([key for key, _ in gone], [size for _, size in gone])

    @guarded(dict, refusals=False)
    def report_status(self) -> dict[str, Any]:
        """Health and counters, for LMCache's status page."""
        counters = Counters()
        counters.merge(self._objects.counters())
        counters.merge(self.counters.as_dict())
        return {
            "is_healthy": self._objects.is_up,
            "type": type(self).__name__,
            "path": self._path,
            "counters": counters.as_dict(),
        }

    @guarded(refusals=False)
    def close(self) -> None:
        """Write what has begun, bounded, and end the I/O services. On return no buffer is touched any more."""
        tasks: tuple[Tasks[Any], ...] = (self._stores, self._lookups, self._loads)
        for kind in tasks:
            kind.stop()
        self._objects.close()
        for kind in tasks:
            kind.close()

    # --- names -------------------------------------------------------------------

    def _buffer(self, key: ObjectKey, memory: MemoryObj) -> ObjectBuffer | None:
        """None for what cannot be identified; that is neither stored nor loaded."""
        if memory.get_memory_format() in _FORMATS_WITHOUT_LAYOUT:
            self._report("format", "an object in format %s: leave out serde_config", memory.get_memory_format().name)
            return None
        layout = layout_of(memory.get_shapes(), memory.get_dtypes())
        if memory.get_size() != object_bytes(layout):
            self._report("size", "an object whose size is not that of its shape %s: leave out serde_config", layout)
            return None
        name = self._name(key, layout)
        return None if name is None else ObjectBuffer(name, memory.data_ptr, memory.get_size())

    def _name(self, key: ObjectKey, layout: Layout) -> ObjectName | None:
        digest = server_hash(key)
        if digest is None:
            text = "a key made of %d bytes of hash: start the server with --hash-algorithm blake3 or sha256_cbor"
            self._report("hash", text, len(key.chunk_hash))
            return None
        place = (key.model_name, key.kv_rank, key.object_group_id)
        if place in self._layouts or len(self._layouts) < MAX_REMEMBERED_LAYOUTS:
            known = self._layouts.setdefault(place, set())
            if len(known) < MAX_OBJECT_SIZES:
                known.add(layout)
        return ObjectName(self._identity.of_server(key, layout), digest)

    def _report(self, kind: str, text: str, value: object) -> None:
        held = self._lines.admit(kind)
        if held is not None:
            log.warning(text + "; it is neither stored nor loaded (%d more such lines held back)", value, held)
