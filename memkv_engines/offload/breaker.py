"""A circuit breaker: whether to ask something that may be out of order."""

from __future__ import annotations

import time
from collections.abc import Callable


class Breaker:
    """Closed, open, half-open. Not thread-safe; nothing blocks.

    Closed: everybody is admitted. A failure opens it: nobody is, for a pause that doubles with every trial that fails.
    After a pause it is half-open: one is admitted as a trial, and one more after each further pause in which nothing
    was heard of the trial before. A success closes it.

    Args:
        first_s: the first pause.
        longest_s: bound of all pauses.
        clock: monotonic seconds.
    """

    def __init__(self, first_s: float, longest_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._first_s, self._longest_s, self._clock = first_s, longest_s, clock
        self._pause_s = 0.0
        self._until = 0.0
        self._on_trial = False

    @property
    def closed(self) -> bool:
        """Whether all is well as far as anyone knows."""
        return not self._pause_s

    def admits(self) -> bool:
        """Whether to ask now. Grants the trial when it is half-open, so ask only if you mean it."""
        if self.closed:
            return True
        now = self._clock()
        if now < self._until:
            return False
        self._on_trial, self._until = True, now + self._pause_s
        return True

    def failed(self) -> None:
        """What was asked failed, or gave no answer in time."""
        if self._pause_s and not self._on_trial:
            return  # It was asked before the breaker opened, and tells nothing new.
        self._pause_s = min(2 * self._pause_s, self._longest_s) if self._pause_s else self._first_s
        self._until = self._clock() + self._pause_s
        self._on_trial = False

    def succeeded(self) -> None:
        """What was asked has answered."""
        self._pause_s, self._on_trial = 0.0, False
