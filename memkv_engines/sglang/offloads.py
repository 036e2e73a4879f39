"""Offloads of the linker: one thread, results in the order of submission."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

from memkv_engines.log import get_logger

log = get_logger(__name__)


class OffloadQueue:
    """Runs offloads one after the other; each is a batch of chunks already, written by many threads.

    Args:
        store: stores the pages of one offload and tells whether the tier holds all of them; must not raise.
        is_owner: False where another rank stores the same bytes: every offload succeeds at once.
        timeout_s: longest wait of ``reset`` and ``close``.
    """

    def __init__(self, store: Callable[[Any], bool], *, is_owner: bool, timeout_s: float) -> None:
        self._store, self._is_owner, self._timeout_s = store, is_owner, timeout_s
        self._tasks: queue.SimpleQueue[tuple[int, Any] | None] = queue.SimpleQueue()
        self._results: deque[bool] = deque()
        self._changed = threading.Condition()
        self._unfinished = 0
        # Offloads from before a reset must not leave a result after it: results are matched by their order.
        self._generation = 0
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="memkv-offload", daemon=True)
        self._thread.start()

    def put(self, transfers: Any) -> None:
        """Queue an offload; does not block."""
        with self._changed:
            if self._is_owner and not self._closed:
                self._unfinished += 1
                self._tasks.put((self._generation, transfers))
            else:
                self._results.append(not self._is_owner)

    @property
    def completed(self) -> int:
        """Results that wait."""
        with self._changed:
            return len(self._results)

    def pop(self) -> bool:
        """Take the oldest result.

        Raises:
            IndexError: there is none.
        """
        with self._changed:
            return self._results.popleft()

    def reset(self) -> None:
        """Skip what has not begun, wait for what has, drop the results. Bounded by ``timeout_s``."""
        with self._changed:
            self._generation += 1
            if not self._changed.wait_for(lambda: not self._unfinished, self._timeout_s):
                log.error("%d offloads still run after %.0f s", self._unfinished, self._timeout_s)
            self._results.clear()

    def close(self) -> None:
        """Finish what was queued, bounded by ``timeout_s``, and end the thread; idempotent."""
        with self._changed:
            self._closed = True
        self._tasks.put(None)
        self._thread.join(self._timeout_s)

    def _run(self) -> None:
        while (task := self._tasks.get()) is not None:
            generation, transfers = task
            good = generation == self._generation and self._store(transfers)
            with self._changed:
                self._unfinished -= 1
                if generation == self._generation:
                    self._results.append(good)
                self._changed.notify_all()
            del transfers, task
