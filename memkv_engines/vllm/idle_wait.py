"""Waits for a look-up's answer while the engine has nothing else to do.

A look-up is answered in about a millisecond (a message to the I/O process and back, a few look-ups of names). A request
that is asked for before is asked for again in the next step, and that is right while the engine is busy. An idle engine
would only run empty steps meanwhile; and whatever arrives in that millisecond would be computed in one step with the
request that came first, whose first token then comes as late as the last one's.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from memkv_engines.limits import IDLE_LOOKUP_WAIT_S


class IdleWait:
    """Whether to wait and how long, in the scheduler's process.

    Args:
        wait: blocks until something may have come in, or for so many seconds.
        clock: monotonic seconds.
    """

    def __init__(self, wait: Callable[[float], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._wait, self._clock = wait, clock
        self._has_pages: set[str] = set()
        self._left_s = IDLE_LOOKUP_WAIT_S

    def got_pages(self, request_id: str) -> None:
        """The engine has a request to run."""
        self._has_pages.add(request_id)

    def ended(self, request_id: str) -> None:
        """It has one less."""
        self._has_pages.discard(request_id)

    def step_planned(self) -> None:
        """What is waited in one step, whoever for, is bounded; the next one begins."""
        self._left_s = IDLE_LOOKUP_WAIT_S

    def wait(self) -> bool:
        """Wait until something may have come in.

        Returns:
            Whether to look again; False at once where the engine has something to run or this step's time is used up.
        """
        if self._has_pages or self._left_s < IDLE_LOOKUP_WAIT_S / 100:
            return False
        started = self._clock()
        self._wait(self._left_s)
        self._left_s -= self._clock() - started
        return True
