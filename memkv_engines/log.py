"""Logging: one logger tree, and a helper for lines that must not flood."""

from __future__ import annotations

import logging
import time

ROOT = "memkv_engines"


def get_logger(name: str) -> logging.Logger:
    """Return a logger below the package's root logger; handlers are the application's business."""
    return logging.getLogger(name if name.startswith(ROOT) else f"{ROOT}.{name}")


class Throttle:
    """Lets one message per key through every ``interval_s`` seconds and counts the rest. Not thread-safe."""

    def __init__(self, interval_s: float = 10.0, max_keys: int = 256) -> None:
        self._interval_s = interval_s
        self._max_keys = max_keys
        self._last: dict[str, tuple[float, int]] = {}

    def admit(self, key: str) -> int | None:
        """Return how many messages of ``key`` were held back since the last one, or None to stay silent."""
        now = time.monotonic()
        last, held = self._last.get(key, (-self._interval_s, 0))
        if now - last < self._interval_s:
            self._last[key] = (last, held + 1)
            return None
        if len(self._last) >= self._max_keys:
            self._last.clear()
        self._last[key] = (now, 0)
        return held


def adopt_handlers(engine_logger_name: str) -> None:
    """Print through an engine's handlers if the application has given our logger none.

    Engines configure only their own logger; without this our lines would vanish, warnings of failed loads included.
    """
    ours, theirs = logging.getLogger(ROOT), logging.getLogger(engine_logger_name)
    if ours.handlers or logging.getLogger().handlers or not theirs.handlers:
        return
    ours.handlers = list(theirs.handlers)
    ours.setLevel(theirs.getEffectiveLevel())
    ours.propagate = False
