"""Looks after the level of memory: brings its slots, and tells the tier of the use of what is in them.

Chunks that are loaded from memory are not opened in the tier, which would take them for unused and evict them; then
nobody would find them any more. So a chunk in use is opened now and then, and one that is gone leaves memory, too.
"""

from __future__ import annotations

import ctypes
import queue
import threading

from memkv_engines.errors import ChunkMissing, MemKVError
from memkv_engines.keys import ChunkName
from memkv_engines.limits import MAX_USES_NOTED
from memkv_engines.log import get_logger
from memkv_engines.offload.memory_level import MemoryLevel
from memkv_engines.offload.messages import MemorySize
from memkv_engines.offload.staging import StagingPool
from memkv_engines.tier.base import Tier

log = get_logger(__name__)


class MemoryKeeper:
    """Makes the level, and keeps it with one thread. A tier that hangs holds up that thread and nobody else.

    Args:
        tier: holds what the level holds.
        pool: the level's slots; nobody else's.

    Attributes:
        level: the level.
    """

    def __init__(self, tier: Tier, pool: StagingPool) -> None:
        self._tier, self._pool = tier, pool
        self._used: queue.SimpleQueue[tuple[str, ChunkName] | None] = queue.SimpleQueue()
        self.level = MemoryLevel(self._note_use)
        self._thread = threading.Thread(target=self._run, name="memkv-memory", daemon=True)
        self._stopped = threading.Event()

    @property
    def size(self) -> MemorySize:
        """What fits in."""
        return MemorySize(self._pool.slots, self._pool.slot_bytes)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread soon; what it is at is not waited for."""
        self._stopped.set()
        self._used.put(None)

    def _note_use(self, folder: str, name: ChunkName) -> None:
        if self._used.qsize() < MAX_USES_NOTED:
            self._used.put((folder, name))

    def _run(self) -> None:
        # Memory is taken before it is needed: whoever touches it first waits for the kernel, and a load must not.
        while not self._stopped.is_set() and (slot := self._pool.try_acquire()) is not None:
            ctypes.memset(slot.address, 0, self._pool.slot_bytes)
            self.level.add(slot)
        while (used := self._used.get()) is not None and not self._stopped.is_set():
            try:
                self._tier.open(*used).close()
            except ChunkMissing:
                self.level.drop(*used)
            except (MemKVError, OSError) as error:
                log.debug("use of a chunk not noted: %s", error)
