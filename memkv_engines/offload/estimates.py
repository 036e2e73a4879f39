"""What loading and recomputing cost here, learnt from what they have cost. Pure; not thread-safe.

Both costs are lines in two features, with coefficients that are never negative:

    load of b bytes                latency + b / bandwidth
    prefill of tokens [a, b)       alpha * (b - a) + beta * (b^2 - a^2) / 2

A transformer's layers cost the same for each token, but for attention, in which a token looks at all tokens before it
(FlashAttention counts 4 * layers * heads * head size FLOP for each such pair); sliding windows and MLA only change
beta. What a step of the engine costs on top is in alpha, as are the requests it serves beside.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from memkv_engines.limits import (
    ESTIMATE_CLIP,
    ESTIMATE_HALF_LIFE_S,
    ESTIMATE_HALF_LIFE_SAMPLES,
    ESTIMATE_WARM_UP_STEPS,
    MIN_PREFILL_SAMPLE_TOKENS,
    MIN_PREFILL_SPAN_TOKENS,
)

# Share by which samples must differ in shape before they can tell the second coefficient from the first.
_RIDGE = 0.005


class DecayedFit:
    """``y = first * u + second * v``, by least squares over ``y / v`` with weights that decay.

    Old samples fade with the samples that follow and with time, so that after a pause the next one tells most. A sample
    counts at most ``ESTIMATE_CLIP`` times what was expected: one hiccup moves the line, but does not make it. Where all
    samples have one shape, ``first`` is zero.

    Args:
        clock: monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._last = 0.0
        self._weight = self._uu = self._u = self._uy = self._y = 0.0
        self.first = self.second = 0.0

    @property
    def known(self) -> bool:
        """Whether there was a sample."""
        return self._weight > 0

    def at(self, u: float, v: float) -> float:
        """The line's value; 0 while nothing is known."""
        return self.first * u + self.second * v

    def observe(self, u: float, v: float, y: float) -> None:
        """Learn from one sample; ``u`` >= 0, ``v`` and ``y`` > 0."""
        now = self._clock()
        if self.known:
            y = min(y, ESTIMATE_CLIP * self.at(u, v))
            keep = 0.5 ** (1 / ESTIMATE_HALF_LIFE_SAMPLES + max(0.0, now - self._last) / ESTIMATE_HALF_LIFE_S)
            self._weight, self._uu, self._u, self._uy, self._y = (
                keep * value for value in (self._weight, self._uu, self._u, self._uy, self._y)
            )
        self._last = now
        u, y = u / v, y / v
        self._weight += 1
        self._uu += u * u
        self._u += u
        self._uy += u * y
        self._y += y
        self._solve()

    def _solve(self) -> None:
        uu = self._uu * (1 + _RIDGE)
        determinant = uu * self._weight - self._u**2
        if determinant > 0:
            self.first = (self._uy * self._weight - self._y * self._u) / determinant
            self.second = (uu * self._y - self._u * self._uy) / determinant
        if determinant <= 0 or self.first < 0:
            self.first, self.second = 0.0, self._y / self._weight
        elif self.second < 0:
            self.first, self.second = self._uy / self._uu, 0.0


class LoadCost:
    """Seconds that a load takes, by its bytes.

    Args:
        clock: monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._fit = clock, DecayedFit(clock)

    @property
    def known(self) -> bool:
        """Whether a load was measured."""
        return self._fit.known

    def forget(self) -> None:
        """The tier is not what it was: the next sample tells all."""
        self._fit = DecayedFit(self._clock)

    def observe(self, size_bytes: int, seconds: float) -> None:
        """A load took so long, waiting behind others included."""
        if size_bytes > 0 and seconds > 0:
            self._fit.observe(1.0, size_bytes, seconds)

    def seconds(self, size_bytes: int) -> float:
        """What a load would take; 0 for nothing and while nothing is known."""
        return self._fit.at(1.0, size_bytes) if size_bytes > 0 else 0.0

    def bytes_in(self, seconds: float) -> int:
        """How many bytes a load of that length brings."""
        return int(max(0.0, seconds - self._fit.first) / self._fit.second) if self._fit.second > 0 else 0


class PrefillCost:
    """Seconds that a prefill takes, by the tokens it computes and those before them.

    Args:
        clock: monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._fit = DecayedFit(clock)
        # The first steps of a process compile, allocate and touch memory: nothing that a later prefill would cost.
        self._warm_up = ESTIMATE_WARM_UP_STEPS

    @property
    def known(self) -> bool:
        """Whether a prefill was measured."""
        return self._fit.known

    def observe(self, spans: Iterable[tuple[int, int]], seconds: float) -> None:
        """A step computed these spans of tokens, [start, stop) of each request in it, in so many seconds."""
        spans = list(spans)
        tokens, pairs = _features(spans)
        prefill = sum(stop - start for start, stop in spans if stop - start >= MIN_PREFILL_SPAN_TOKENS)
        if prefill < MIN_PREFILL_SAMPLE_TOKENS or 2 * prefill < tokens or seconds <= 0:
            return
        if self._warm_up:
            self._warm_up -= 1
            return
        self._fit.observe(pairs, tokens, seconds)

    def seconds(self, start: int, stop: int) -> float:
        """What computing tokens [start, stop) of one request would take; 0 while nothing is known."""
        tokens, pairs = _features([(start, stop)])
        return self._fit.at(pairs, tokens)


def _features(spans: Iterable[tuple[int, int]]) -> tuple[float, float]:
    tokens = pairs = 0.0
    for start, stop in spans:
        tokens += stop - start
        pairs += (stop * stop - start * start) / 2
    return tokens, pairs


class StepClock:
    """How long each step of an engine took, also of one that starts a step before it has the last one's result.

    Args:
        clock: monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._last_end = 0.0

    def now(self) -> float:
        """The time, to be handed back as ``started``."""
        return self._clock()

    def ended(self, started: float) -> float:
        """A step that was started then has its result; the seconds it had to itself."""
        now = self._clock()
        seconds = now - max(started, self._last_end)
        self._last_end = now
        return seconds
