"""The I/O service: executes load, store and probe jobs on its own threads.

It runs in a child process (outside the engine's GIL) or, where that is not possible, on threads of the engine. Loads
and stores have pipelines of their own (``load_jobs``, ``store_jobs``); one thread probes.
"""

from __future__ import annotations

import json
import queue
import threading
import time
from collections.abc import Callable

from memkv_engines.chunk.protection import Protection
from memkv_engines.errors import ConfigError, IoServiceError
from memkv_engines.keys import Namespace
from memkv_engines.limits import MAX_STAGING_SLOTS, MIN_STAGING_SLOTS, PROTECTION_KEY_BYTES
from memkv_engines.log import get_logger
from memkv_engines.offload.groups import Group
from memkv_engines.offload.host_loads import HostLoad, ResidentLoad
from memkv_engines.offload.load_jobs import LoadJobs
from memkv_engines.offload.loading import LoadChunk, place_of
from memkv_engines.offload.memory_keeper import MemoryKeeper
from memkv_engines.offload.messages import (
    InMemory,
    Load,
    LoadDone,
    Manifest,
    MemorySize,
    Probe,
    ProbeDone,
    Reply,
    Request,
    Setup,
    Store,
    StoreDone,
)
from memkv_engines.offload.pages import Pages
from memkv_engines.offload.probing import ChainWalk
from memkv_engines.offload.staging import StagingPool
from memkv_engines.offload.store_jobs import StoreJobs
from memkv_engines.offload.threads import JOB_ERRORS, ThreadGroup
from memkv_engines.tier.base import Tier

log = get_logger(__name__)

_PLACERS = 2
_GATHERERS = 2
_DIGESTERS = 2


def staging_slots(staging_bytes: int, slot_bytes: int, io_threads: int) -> tuple[int, int]:
    """Share staging memory out: slots for loads (as many being placed as being read into) and for stores (the rest)."""
    slots = staging_bytes // slot_bytes
    load = max(min(2 * io_threads, slots // 2), MIN_STAGING_SLOTS)
    return load, min(max(slots - load, MIN_STAGING_SLOTS), MAX_STAGING_SLOTS)


def open_protection(setup: Setup) -> Protection | None:
    """What protects the chunks that a setup asks for.

    Raises:
        ConfigError: ``cryptography`` is missing, or the key has another length.
    """
    spec = setup.protection
    if spec is None:
        return None
    if len(spec.key) != PROTECTION_KEY_BYTES:
        raise ConfigError(f"a key has {PROTECTION_KEY_BYTES} bytes, not {len(spec.key)}")
    return Protection(spec.key, encrypt=spec.encrypt)


class IoService:
    """Serves one worker (loads, stores) or one scheduler (probes).

    Args:
        setup: sizes and groups.
        tier: where chunks live.
        pages: how to reach the engine's pages; None for a service that only probes.
        reply: called from any service thread with each reply; must be thread-safe.

    Raises:
        ConfigError: as ``open_protection``.
    """

    def __init__(self, setup: Setup, tier: Tier, pages: Pages | None, reply: Callable[[Reply], None]) -> None:
        self._tier, self._reply = tier, reply
        self._protection = open_protection(setup)
        self._probes: queue.SimpleQueue[Probe | Manifest | None] = queue.SimpleQueue()
        self._prober: ThreadGroup[Probe | Manifest] = ThreadGroup("probe", 1, self._probes, self._probe)
        self._loads: LoadJobs | None = None
        self._stores: StoreJobs | None = None
        self._staging: tuple[StagingPool, ...] = ()
        self._memory: MemoryKeeper | None = None
        self._news_lock = threading.Lock()
        groups = {g.group: Group.from_spec(g) for g in setup.groups if g.tiles}
        if groups:
            if pages is None:
                raise IoServiceError("a service with groups needs pages")
            self._make_pipelines(setup, groups, pages)

    def _make_pipelines(self, setup: Setup, groups: dict[int, Group], pages: Pages) -> None:
        slot_bytes = max(g.slot_bytes for g in groups.values())
        load_slots, store_slots = staging_slots(setup.staging_bytes, slot_bytes, setup.io_threads)
        load_staging, store_staging = StagingPool(slot_bytes, load_slots), StagingPool(slot_bytes, store_slots)
        load_staging.touch()
        self._staging = (load_staging, store_staging)
        if setup.memory_bytes:
            kept = StagingPool(slot_bytes, max(1, setup.memory_bytes // load_staging.slot_bytes))
            self._memory, self._staging = MemoryKeeper(self._tier, kept), (*self._staging, kept)
        memory = self._memory.level if self._memory is not None else None
        # Reads that are in flight together end together, and the last ones are placed after the device is done: half as
        # many readers as writers keep it just as busy.
        readers = (setup.io_threads + 1) // 2
        # Registered for good: the pools live as long as the service, and the device may be late with a transfer. Slots
        # change places between them.
        for pool in self._staging:
            self._tier.register_memory(pool.address, pool.nbytes)
        self._loads = LoadJobs(
            self._tier,
            load_staging,
            lambda chunk, slot: HostLoad(chunk, groups[chunk.group], self._tier, pages, slot, self._protection, memory),
            readers=readers,
            placers=_PLACERS,
            reply=self._reply_with_news,
            find_resident=lambda chunk: self._find_resident(chunk, groups[chunk.group], pages),
        )
        self._stores = StoreJobs(
            groups,
            self._tier,
            pages,
            store_staging,
            gatherers=_GATHERERS,
            digesters=_DIGESTERS,
            writers=setup.io_threads,
            yield_to_loads=self._loads.wait_idle,
            reply=self._reply_with_news,
            protection=self._protection,
            memory=memory,
        )

    def _find_resident(self, chunk: LoadChunk, group: Group, pages: Pages) -> ResidentLoad | None:
        if self._memory is None or (self._protection is not None and self._protection.encrypt):
            return None
        level = self._memory.level
        held = level.pin(*place_of(chunk, group))
        if held is None:
            return None
        return ResidentLoad(chunk, group, self._tier, pages, level, held, self._protection)

    def _reply_with_news(self, reply: Reply) -> None:
        """Answer, and before it tell what has come to memory or gone from it meanwhile."""
        if self._memory is not None and isinstance(reply, (LoadDone, StoreDone)):
            # One at a time: news that overtake each other would be wrong in the end.
            with self._news_lock:
                came, went = self._memory.level.take_changes()
                if came or went:
                    self._reply(InMemory(came, went))
        self._reply(reply)

    @property
    def memory(self) -> MemorySize:
        """What fits into the level of memory."""
        return self._memory.size if self._memory is not None else MemorySize()

    def start(self) -> None:
        """Start the threads."""
        self._prober.start()
        if self._loads is not None and self._stores is not None:
            self._loads.start()
            self._stores.start()
        if self._memory is not None:
            self._memory.start()

    def submit(self, message: Request) -> None:
        """Queue a job; does not block."""
        if isinstance(message, Store) and self._stores is not None:
            self._stores.submit(message)
        elif isinstance(message, Load) and self._loads is not None:
            self._loads.submit(message)
        elif isinstance(message, (Probe, Manifest)):
            self._probes.put(message)
        else:
            raise IoServiceError(f"unexpected message {type(message).__name__}")

    def stop(self, timeout_s: float) -> None:
        """Finish what was gathered, then end the threads; gives up waiting after ``timeout_s``."""
        deadline = time.monotonic() + timeout_s
        if self._loads is not None and self._stores is not None:
            self._loads.stop(deadline)
            self._stores.stop(deadline)
        self._prober.stop(deadline)
        if self._memory is not None:
            self._memory.stop()

    def _probe(self, message: Probe | Manifest) -> None:
        if isinstance(message, Manifest):
            self._write_manifest(message)
            return
        start = time.perf_counter()
        try:
            segments = tuple(ChainWalk(message, self._tier, self._protection).run())
        except JOB_ERRORS as error:
            log.warning("probe failed: %s", error)
            segments = ()
        self._reply(ProbeDone(message.probe_id, segments, int((time.perf_counter() - start) * 1e6)))

    def _write_manifest(self, message: Manifest) -> None:
        try:
            fields = json.loads(message.fields_json)
            self._tier.write_manifest(Namespace(fields))
        except JOB_ERRORS as error:
            log.warning("cannot write the namespace manifest: %s", error)
