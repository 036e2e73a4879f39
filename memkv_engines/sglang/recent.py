"""Answers of look-ups, kept for a moment."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence

CAPACITY = 1024


class RecentAnswers:
    """Bounded, thread-safe. An answer that is out of date costs a miss: every load verifies.

    Args:
        ttl_s: how long an answer is good for.
        clock: monotonic, in seconds.
    """

    def __init__(self, ttl_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._ttl_s, self._clock = ttl_s, clock
        self._answers: OrderedDict[tuple[str, str, int], tuple[float, list[int]]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, keys: Sequence[str]) -> list[int] | None:
        """The answer for these pages (a hash stands for all before it), None if there is none or it is too old."""
        with self._lock:
            until, answer = self._answers.get(_name(keys), (0.0, []))
            return list(answer) if self._clock() < until else None

    def put(self, keys: Sequence[str], answer: Sequence[int]) -> None:
        """Keep an answer."""
        with self._lock:
            self._answers[_name(keys)] = (self._clock() + self._ttl_s, list(answer))
            self._answers.move_to_end(_name(keys))
            while len(self._answers) > CAPACITY:
                self._answers.popitem(last=False)

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._answers.clear()


def _name(keys: Sequence[str]) -> tuple[str, str, int]:
    return keys[0], keys[-1], len(keys)
