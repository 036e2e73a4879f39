"""Objects of LMCache as chunks in the tier: find them, load them, store them, remove them.

One object is one chunk of one block, and lies at any place of an arena that LMCache's allocator hands out. Objects are
not put together into larger chunks: LMCache asks for each by its own hash, in no order, without the hashes before, so
that an object inside a chunk could not be found by its name. Their size is LMCache's chunk size.

To the I/O service a place in the arena is a block's page, so that bytes go between staging memory and LMCache's buffer
with one copy and no Python in between. Back of the envelope (256 tokens of SmolLM2 in bf16, 5.6 MiB): 1.6 ms of copy
beside 4.7 ms of a device of 1.2 GB/s.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from memkv_engines.chunk.layout import align_up
from memkv_engines.config import Config, split_paths
from memkv_engines.doors.io_client import worker_client
from memkv_engines.doors.protection import protection_spec
from memkv_engines.errors import ConfigError, IoServiceError, MemKVError, TierUnavailable
from memkv_engines.keys import ChunkKey, Namespace, Shard
from memkv_engines.limits import (
    BAD_OBJECT_S,
    CLEAR_TIMEOUT_S,
    MAX_BAD_CHUNKS,
    MAX_OBJECT_JOB_BYTES,
    MAX_OBJECT_SIZES,
    MAX_REMEMBERED_LAYOUTS,
    SERVICE_RESTART_BACKOFF_MAX_S,
    SERVICE_RESTART_BACKOFF_S,
    SMALL_OBJECT_BYTES,
)
from memkv_engines.log import Throttle, get_logger
from memkv_engines.metrics import Counters
from memkv_engines.offload.blocking import BlockingClient
from memkv_engines.offload.breaker import Breaker
from memkv_engines.offload.client import IoClient
from memkv_engines.offload.messages import GroupSpec, LoadRun, Manifest, Probe, Setup, StoreChunk, TileSpec
from memkv_engines.offload.service import staging_slots
from memkv_engines.tier.striped import open_directories

log = get_logger(__name__)

# LMCache's rank is in the namespace: what part of the heads or layers a rank holds, it does not say.
_WHOLE = Shard(0, 1, 1, 0, 1, 1)


@dataclass(frozen=True)
class Arena:
    """Memory that LMCache's allocator hands out.

    Attributes:
        base: address.
        size_bytes: length.
        align_bytes: every buffer begins at a multiple of this from the base.
    """

    base: int
    size_bytes: int
    align_bytes: int

    def place(self, address: int, size_bytes: int) -> int | None:
        """The place of a buffer, as a page number; None if it does not lie in the arena."""
        offset = address - self.base
        if offset < 0 or offset % self.align_bytes or offset + size_bytes > self.size_bytes:
            return None
        return offset // self.align_bytes

    def group(self, object_bytes: int) -> GroupSpec:
        """Objects of one size as a KV group."""
        places = (self.size_bytes - object_bytes) // self.align_bytes + 1
        tile = TileSpec(self.base, self.align_bytes, object_bytes, in_arena=True)
        return GroupSpec(0, _WHOLE.as_tuple(), 1, object_bytes, 1, places, (tile,))


@dataclass(frozen=True)
class ObjectName:
    """What an object is called."""

    namespace: Namespace
    digest: bytes


@dataclass(frozen=True)
class ObjectBuffer:
    """An object and where its bytes are, or are to go. The memory must stay the object's until the call returns."""

    name: ObjectName
    address: int
    size_bytes: int


class _Mover:
    """The I/O service of one object size."""

    def __init__(self, config: Config, arena: Arena, object_bytes: int) -> None:
        self.arena = arena
        client = worker_client(config, [arena.group(object_bytes)], stores=config.policy.store)
        self.client = BlockingClient(client, store_timeout_s=config.io.load_timeout_ms / 1000)
        self.client.start()
        # A store that finds no staging is shed; so no call submits more than half of what there is.
        slots = staging_slots(config.io.staging_bytes, 2 * align_up(object_bytes), config.io.io_threads)[1]
        self.stores_at_once = max(1, slots // 2)
        self.loads_at_once = max(1, MAX_OBJECT_JOB_BYTES // object_bytes)
        self.manifests: set[bytes] = set()
        log.info("objects of %d B: I/O service: %s", object_bytes, self.client.description)
        if object_bytes < SMALL_OBJECT_BYTES:
            log.warning(
                "objects of %d B are small: with a larger chunk size in LMCache they would be 2-16 MiB", object_bytes
            )


class ObjectStore:
    """Finds, loads, stores and removes objects. Calls block, each with a bound; any thread.

    Args:
        config: ours.
        arena: where buffers lie; None where there are only look-ups.

    Raises:
        ConfigError: the tier cannot be used, or ``memory_bytes`` was given.
    """

    def __init__(self, config: Config, arena: Arena | None) -> None:
        if config.tier.memory_bytes:
            raise ConfigError(
                f"memory_bytes={config.tier.memory_bytes}: LMCache has a level of memory of its own; leave out "
                "memory_bytes, and give LMCache more (--l1-size-gb, or max_local_cpu_size)"
            )
        self._config, self._arena = config, arena
        self._probe_timeout_s = config.lookup.probe_timeout_ms / 1000
        # Starting a service may take seconds: what only reads must not wait for it.
        self._start_lock, self._lock = threading.Lock(), threading.Lock()
        self._movers: dict[int, _Mover] = {}
        self._breakers: dict[int, Breaker] = {}
        self._bad: OrderedDict[tuple[bytes, bytes], float] = OrderedDict()
        self._lines = Throttle()
        self._closed = False
        self._prober = BlockingClient(
            IoClient(
                Setup(
                    config.tier.path,
                    config.tier.direct_io,
                    config.tier.capacity_bytes,
                    read_only=not config.policy.store,
                    io_threads=1,
                    staging_bytes=0,
                    eviction=config.tier.eviction,
                    protection=protection_spec(config),
                ),
                io_process=config.io.io_process,
                load_timeout_ms=config.io.load_timeout_ms,
            )
        )
        self._prober.start()
        log.info("look-ups: %s", self._prober.description)

    @property
    def is_up(self) -> bool:
        """Whether the tier can be asked."""
        return self._prober.is_up

    def counters(self) -> dict[str, int]:
        """What was counted so far, of all services."""
        total = Counters()
        for client in [self._prober, *(mover.client for mover in list(self._movers.values()))]:
            total.merge(client.counters())
        return total.as_dict()

    def close(self) -> None:
        """Write what was gathered, bounded, and end the services. Calls that wait are answered as failed; idempotent.

        On return no buffer is read or written any more.
        """
        with self._start_lock:
            self._closed = True
        self._prober.close()
        for mover in self._movers.values():
            mover.client.close()

    # --- look-ups ------------------------------------------------------------

    def find(self, names: Sequence[ObjectName]) -> list[bool]:
        """Which objects are stored. Blocks for at most ``probe_timeout_ms`` per namespace among them."""
        found = [False] * len(names)
        if not self._config.policy.load:
            return found
        places: dict[bytes, list[int]] = {}
        for index, name in enumerate(names):
            if not self._is_bad(name):
                places.setdefault(name.namespace.digest, []).append(index)
        for namespace, indices in places.items():
            hashes = b"".join(names[index].digest for index in indices)
            probe = Probe(0, namespace, 0, 1, 0, 0, hashes, (_WHOLE.as_tuple(),), survey=True, exact=True)
            for segment in self._prober.probe(probe, self._probe_timeout_s):
                found[indices[segment.position]] = True
        return found

    # --- transfers -----------------------------------------------------------

    def prepare(self, object_bytes: int) -> None:
        """Start the I/O service for a size, if there is none yet, so that the first load does not wait for it."""
        self._mover(object_bytes)

    def load(self, buffers: Sequence[ObjectBuffer]) -> list[bool]:
        """Fill buffers; per buffer whether all of it is there and verified. What is in the others is undefined."""
        good = [False] * len(buffers)
        if not self._config.policy.load:
            return good
        for mover, jobs in self._by_mover(buffers):
            for start in range(0, len(jobs), mover.loads_at_once):
                part = jobs[start : start + mover.loads_at_once]
                result = mover.client.load([_load_run(buffers[index], place) for index, place in part])
                for (index, _), blocks, kind in zip(part, result.good_blocks, result.kinds, strict=True):
                    good[index] = blocks == 1
                    if kind and kind != IoServiceError.kind:
                        self._mark_bad(buffers[index].name)
                bad = sorted({kind for kind in result.kinds if kind})
                if bad:
                    self._report("load", "%d objects are not used and will be recomputed: %s", len(part), bad)
        return good

    def store(self, buffers: Sequence[ObjectBuffer]) -> list[str]:
        """Store what is not stored; blocks until written. Per buffer ``stored | present | shed | full | failed``."""
        outcomes = ["failed"] * len(buffers)
        if not self._config.policy.store:
            return ["shed"] * len(buffers)
        for mover, jobs in self._by_mover(buffers):
            for start in range(0, len(jobs), mover.stores_at_once):
                part = jobs[start : start + mover.stores_at_once]
                self._record(mover, [buffers[index].name.namespace for index, _ in part])
                result = mover.client.store([_store_chunk(buffers[index], place) for index, place in part])
                for (index, _), outcome in zip(part, result.outcomes, strict=True):
                    outcomes[index] = outcome
                    if outcome == "stored":
                        self._unmark(buffers[index].name)
                if result.lost:
                    self._report("store", "of %d objects some were not stored: %s", len(part), sorted(set(result.lost)))
        return outcomes

    def remove(self, names: Sequence[ObjectName]) -> list[bool]:
        """Remove objects; per object whether it was there. Blocks, bounded.

        Raises:
            TierUnavailable: it failed, or is not done yet and goes on in the background.
        """
        removed = [False] * len(names)
        failed: list[Exception] = []

        def run() -> None:
            try:
                tier = open_directories(split_paths(self._config.tier.path), direct_io="off")
                try:
                    for index, name in enumerate(names):
                        removed[index] = tier.remove(name.namespace.folder, _key_of(name).name)
                finally:
                    tier.close()
            except (MemKVError, OSError) as error:
                failed.append(error)

        # On a thread of its own: a mount that hangs must not take LMCache's thread with it.
        thread = threading.Thread(target=run, name="memkv-remove", daemon=True)
        thread.start()
        thread.join(CLEAR_TIMEOUT_S)
        if thread.is_alive():
            raise TierUnavailable(f"{len(names)} objects are not removed after {CLEAR_TIMEOUT_S:.0f} s")
        if failed:
            raise TierUnavailable(f"{len(names)} objects cannot be removed: {failed[0]}") from failed[0]
        return removed

    # --- inside --------------------------------------------------------------

    def _by_mover(self, buffers: Sequence[ObjectBuffer]) -> list[tuple[_Mover, list[tuple[int, int]]]]:
        """The buffers of each size: index and place of those that lie in the arena."""
        by_size: dict[int, list[int]] = {}
        for index, buffer in enumerate(buffers):
            by_size.setdefault(buffer.size_bytes, []).append(index)
        grouped = []
        for size, indices in by_size.items():
            mover = self._mover(size)
            if mover is None:
                continue
            places = [(index, mover.arena.place(buffers[index].address, size)) for index in indices]
            inside = [(index, place) for index, place in places if place is not None]
            if len(inside) < len(places):
                text = "%d buffers do not lie in the memory that LMCache described: %s"
                self._report("arena", text, len(places) - len(inside), ["neither stored nor loaded"])
            grouped.append((mover, inside))
        return grouped

    def _mover(self, object_bytes: int) -> _Mover | None:
        mover = self._movers.get(object_bytes)
        if mover is not None:
            return mover
        with self._start_lock:
            mover = self._movers.get(object_bytes)
            if mover is not None or self._closed or self._arena is None:
                return mover
            if not 0 < object_bytes <= self._arena.size_bytes or len(self._movers) >= MAX_OBJECT_SIZES:
                self._report("size", "no I/O service for objects of %d B: %s", object_bytes, [*self._movers])
                return None
            breaker = self._breakers.setdefault(
                object_bytes, Breaker(SERVICE_RESTART_BACKOFF_S, SERVICE_RESTART_BACKOFF_MAX_S)
            )
            if not breaker.admits():
                return None
            try:
                mover = _Mover(self._config, self._arena, object_bytes)
            except MemKVError as error:
                breaker.failed()
                self._report("start", "no I/O service for objects of %d B: %s", object_bytes, [str(error)])
                return None
            breaker.succeeded()
            self._movers[object_bytes] = mover
            return mover

    def _record(self, mover: _Mover, namespaces: Sequence[Namespace]) -> None:
        """Record namespaces, once each."""
        for namespace in namespaces:
            if namespace.digest not in mover.manifests:
                if len(mover.manifests) >= MAX_REMEMBERED_LAYOUTS:
                    mover.manifests.clear()
                mover.manifests.add(namespace.digest)
                mover.client.manifest(Manifest(namespace.canonical_json))
                log.info("namespace %s: %s", namespace.folder, namespace.canonical_json.decode())

    def _is_bad(self, name: ObjectName) -> bool:
        with self._lock:
            until = self._bad.get((name.namespace.digest, name.digest))
        return until is not None and time.monotonic() < until

    def _mark_bad(self, name: ObjectName) -> None:
        with self._lock:
            self._bad[name.namespace.digest, name.digest] = time.monotonic() + BAD_OBJECT_S
            while len(self._bad) > MAX_BAD_CHUNKS:
                self._bad.popitem(last=False)

    def _unmark(self, name: ObjectName) -> None:
        with self._lock:
            self._bad.pop((name.namespace.digest, name.digest), None)

    def _report(self, kind: str, text: str, count: int, words: Sequence[object]) -> None:
        with self._lock:
            held = self._lines.admit(kind)
        if held is not None:
            listed = ", ".join(map(str, words))
            log.warning(text + " (%d more such lines held back)", count, listed, held)


def _key_of(name: ObjectName) -> ChunkKey:
    return ChunkKey(name.namespace.digest, name.digest, name.digest, 1, 0, _WHOLE)


def _load_run(buffer: ObjectBuffer, place: int) -> LoadRun:
    ids = np.array([place], dtype="<i4").tobytes()
    return LoadRun(buffer.name.namespace.digest, 0, 1, 1, 0, b"", 0, buffer.name.digest, ids)


def _store_chunk(buffer: ObjectBuffer, place: int) -> StoreChunk:
    return StoreChunk(buffer.name.namespace.digest, 0, 0, 0, buffer.name.digest, (place,))
