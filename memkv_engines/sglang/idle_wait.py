"""A scheduler that has nothing to run waits for our prefetches instead of polling for them.

While a request waits for its prefetch, SGLang 0.5.23 calls ``on_idle`` over and over, which sleeps only when no request
waits for anything (``sleep_on_idle``). That takes a core from the kernel's and our reading, verifying and copying, and
the interpreter lock from the controller's threads. Without a scheduler to hold up (another version, a test) it polls.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from memkv_engines.limits import IDLE_LOAD_WAIT_S
from memkv_engines.sglang.compat import wrap_method


class IdleWait:
    """Holds the scheduler up in ``on_idle`` while a prefetch is under way, for ``IDLE_LOAD_WAIT_S`` at most.

    Args:
        scheduler: SGLang's; None: there is nobody to hold up.
    """

    def __init__(self, scheduler: Any | None) -> None:
        self._ended = threading.Condition()
        self._under_way = 0
        self._undo = wrap_method(scheduler, "on_idle", self._then_wait)

    @contextmanager
    def prefetching(self) -> Iterator[None]:
        """Around what a request waits for; any thread."""
        with self._ended:
            self._under_way += 1
        try:
            yield
        finally:
            with self._ended:
                self._under_way -= 1
                self._ended.notify_all()

    def stop(self) -> None:
        """The scheduler goes on polling; idempotent."""
        self._undo()

    def _then_wait(self, on_idle: Callable[..., Any]) -> Callable[..., Any]:
        def held(*args: Any, **kwargs: Any) -> Any:
            answer = on_idle(*args, **kwargs)
            with self._ended:
                if self._under_way:
                    self._ended.wait(IDLE_LOAD_WAIT_S)
            return answer

        return held
