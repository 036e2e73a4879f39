"""A thread that looks after a directory tier: counts what it holds, once, makes room whenever it or a tenant's share of
it is nearly full, and looks for expired chunks now and then.
"""

from __future__ import annotations

import contextlib
import threading

from memkv_engines.errors import MemKVError
from memkv_engines.limits import EVICT_PAUSE_MAX_S, EVICT_PAUSE_S, UPKEEP_EVERY_S
from memkv_engines.log import Throttle, get_logger
from memkv_engines.tier.directory import DirectoryTier
from memkv_engines.tier.striped import StripedTier

log = get_logger(__name__)


def start_keepers(tier: DirectoryTier | StripedTier) -> list[Keeper]:
    """A keeper for each directory of a tier."""
    directories = tier.directories if isinstance(tier, StripedTier) else [tier]
    return [Keeper(directory) for directory in directories]


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
        pause_s = EVICT_PAUSE_S
        while not self._stopped.is_set():
            pressed = self._tier.wait_for_pressure(UPKEEP_EVERY_S)
            if self._stopped.is_set():
                return
            freed = self._evict(recount=not pressed)
            # Another process may be at it, or nothing be left to remove: no listing without a pause.
            pause_s = EVICT_PAUSE_S if freed or not pressed else min(2 * pause_s, EVICT_PAUSE_MAX_S)
            self._stopped.wait(pause_s)

    def _evict(self, *, recount: bool) -> int:
        try:
            freed = self._tier.evict(recount=recount)
        except (MemKVError, OSError) as error:
            held = self._lines.admit("evict")
            if held is not None:
                log.warning("cannot evict: %s (%d more such lines held back)", error, held)
            return 0
        if freed:
            log.info("evicted %.1f MiB", freed / 2**20)
        return freed
