"""A stage of a pipeline: some threads that take items from one queue until they are told to stop."""

from __future__ import annotations

import queue
import struct
import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

from memkv_engines.errors import MemKVError

# What a job can end with, messages that contradict themselves included. It fails the job, never the thread.
JOB_ERRORS = (
    MemKVError,
    OSError,
    LookupError,
    ValueError,
    TypeError,
    ArithmeticError,
    MemoryError,
    RecursionError,
    struct.error,
)

Item = TypeVar("Item")


class ThreadGroup(Generic[Item]):
    """Daemon threads that call ``work`` for each item; None ends one thread.

    Args:
        name: of the stage; threads are called ``memkv-<name>-<number>``.
        count: how many.
        items: where items come from.
        work: must not raise.
    """

    def __init__(
        self, name: str, count: int, items: queue.SimpleQueue[Item | None], work: Callable[[Item], None]
    ) -> None:
        self._items, self._work = items, work
        self._threads = [
            threading.Thread(target=self._run, name=f"memkv-{name}-{index}", daemon=True) for index in range(count)
        ]

    def start(self) -> None:
        """Start them."""
        for thread in self._threads:
            thread.start()

    def stop(self, deadline: float) -> None:
        """End them after the items queued so far; gives up waiting at the deadline (monotonic clock)."""
        for _ in self._threads:
            self._items.put(None)
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    @property
    def ended(self) -> bool:
        """Whether all have ended."""
        return not any(thread.is_alive() for thread in self._threads)

    def _run(self) -> None:
        while (item := self._items.get()) is not None:
            self._work(item)
            # Not kept while waiting for the next: an item holds views and descriptors.
            del item
