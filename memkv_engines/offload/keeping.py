"""A thread that looks after a directory tier: counts what it holds, once, and makes room whenever it is nearly full.

Where nothing may be evicted it ends after the count.
"""

from __future__ import annotations

import contextlib
import threading

from memkv_engines.errors import MemKVError
from memkv_engines.limits import EVICT_LOOK_EVERY_S, EVICT_PAUSE_S
from memkv_engines.log import Throttle, get_logger
from memkv_engines.tier.directory import DirectoryTier

log = get_logger(__name__)


class Keeper:
    """Starts at once; ends with the process, or soon after ``stop``.

    Args:
        tier: not to be closed before the keeper was stopped.
    """

    def __init__(self, tier: DirectoryTier) -> None:
        self._tier = tier
        self._stopped = threading.Event()
        self._lines = Throttle()
        threading.Thread(target=self._run, name="memkv-keeper", daemon=True).start()

    def stop(self) -> None:
        """Do nothing more; what is under way is not waited for."""
        self._stopped.set()
        self._tier.wake()

    def _run(self) -> None:
        with contextlib.suppress(MemKVError, OSError):
            self._tier.scan()
        while self._tier.evicts and not self._stopped.is_set():
            # Nobody wakes it for what other processes write, the engine's own with GPUDirect among them.
            self._tier.wait_for_pressure(EVICT_LOOK_EVERY_S)
            if self._stopped.is_set():
                return
            self._evict()
            # Another process may be at it, or nothing be left to remove: no listing without a pause.
            self._stopped.wait(EVICT_PAUSE_S)

    def _evict(self) -> None:
        try:
            freed = self._tier.evict()
        except (MemKVError, OSError) as error:
            held = self._lines.admit("evict")
            if held is not None:
                log.warning("cannot evict: %s (%d more such lines held back)", error, held)
            return
        if freed:
            log.info("evicted %.1f MiB", freed / 2**20)
