"""Tasks as LMCache's server wants them: started without blocking, signalled by a descriptor, fetched once."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Generic, TypeVar

from lmcache.v1.platform import create_event_notifier

from memkv_engines.metrics import Counters
from memkv_engines.offload.boundary import guarded

Result = TypeVar("Result")


class Tasks(Generic[Result]):
    """Tasks of one kind. Thread-safe; every task gets exactly one result until ``close``.

    Args:
        name: of the threads.
        threads: tasks that run at a time.
        counters: where unexpected errors are counted.
    """

    def __init__(self, name: str, threads: int, counters: Counters) -> None:
        self.counters = counters
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix=f"memkv-{name}")
        self._notifier = create_event_notifier()
        self._lock = threading.Lock()
        self._last = 0
        self._done: dict[int, Result] = {}
        self._closing = False

    @property
    def event_fd(self) -> int:
        """Readable when a result has come; LMCache resets it."""
        return int(self._notifier.fileno())

    def start(self, work: Callable[[], Result], failed: Result) -> int:
        """Run ``work`` on a thread. Does not block and raises nothing.

        Args:
            work: returns the result.
            failed: the result where ``work`` raises, or can't be run any more.

        Returns:
            The task's number.
        """
        with self._lock:
            self._last += 1
            task = self._last
            if not self._closing:
                self._executor.submit(self._run, task, work, failed)
                return task
        self._settle(task, failed)
        return task

    def aside(self, work: Callable[[], object]) -> None:
        """Run something on a thread that nobody waits for. Does not block and raises nothing."""
        with self._lock:
            if not self._closing:
                self._executor.submit(self._guarded, work)

    def take(self, task: int) -> Result | None:
        """The result of a task, once; None while there is none."""
        with self._lock:
            return self._done.pop(task, None)

    def take_all(self) -> dict[int, Result]:
        """All results that have come, each once."""
        with self._lock:
            done, self._done = self._done, {}
        return done

    def stop(self) -> None:
        """Start nothing any more, and drop what has not begun. Does not block."""
        with self._lock:
            self._closing = True
        self._executor.shutdown(wait=False, cancel_futures=True)

    def close(self) -> None:
        """Wait for what runs, and close the descriptor."""
        self._executor.shutdown(wait=True)
        with self._lock:
            self._notifier.close()

    def _run(self, task: int, work: Callable[[], Result], failed: Result) -> None:
        result = self._guarded(work)
        self._settle(task, failed if result is None else result)

    @guarded(refusals=False)
    def _guarded(self, work: Callable[[], Any]) -> Any:
        return work()

    def _settle(self, task: int, result: Result) -> None:
        with self._lock:
            self._done[task] = result
            if self._notifier.fileno() >= 0:
                self._notifier.notify()
