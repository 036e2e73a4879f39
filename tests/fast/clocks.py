"""A clock that stands still until it is told to go on."""

from __future__ import annotations


class Clock:
    """Callable like ``time.monotonic``."""

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now
