"""A figure, its 95% bootstrap interval over units that were measured side by side, and what that says about a limit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

MET, MISSED, UNDECIDED = "met", "missed", "not decided"
MIN_UNITS = 4
SAMPLES = 4000

Indices = npt.NDArray[np.intp]
Statistic = Callable[[Indices], float]


@dataclass(frozen=True)
class Judgement:
    """One promise.

    Attributes:
        promise: In words.
        status: `MET`, `MISSED` or `UNDECIDED`.
        value: The figure; None where nothing was measured.
        low, high: Its 95% interval.
        limit: What it is held against.
        at_most: Whether the figure has to stay below the limit, rather than above.
        units: How many were measured side by side.
        note: What one has to know about it.
        required: Whether the project has promised it; the others are told for the reader.
    """

    promise: str
    status: str
    value: float | None
    low: float | None
    high: float | None
    limit: float
    at_most: bool
    units: int
    note: str = ""
    required: bool = True

    def as_dict(self) -> dict[str, Any]:
        """Returns it for the JSON."""
        return asdict(self)


def status_of(low: float, high: float, limit: float, *, at_most: bool) -> str:
    """Returns what an interval says about a limit."""
    if at_most:
        return MET if high <= limit else MISSED if low > limit else UNDECIDED
    return MET if low >= limit else MISSED if high < limit else UNDECIDED


def median_of(values: npt.NDArray[np.float64]) -> Statistic:
    """Returns the statistic that is the median of the units' values."""
    return lambda indices: float(np.median(values[indices]))


def interval(
    units: int, statistic: Statistic, seed: int = 1, *, sets: Sequence[int] | None = None
) -> tuple[float, float, float]:
    """Returns a statistic of all units, and its 95% bootstrap interval over them.

    Args:
        units: How many.
        statistic: Of the units with some indices.
        seed: Of the samples.
        sets: The set of processes that each unit was measured in. Processes that do the same differ from each other as
            long as they live, so that of several sets whole ones are drawn, and of each its units anew.
    """
    generator = np.random.default_rng(seed)
    members = [np.flatnonzero(np.array(sets) == one) for one in sorted(set(sets))] if sets is not None else []

    def draw() -> Indices:
        if len(members) < 2:
            return generator.integers(0, units, units)
        chosen = (members[number] for number in generator.integers(0, len(members), len(members)))
        return np.concatenate([generator.choice(indices, len(indices)) for indices in chosen])

    drawn = [statistic(draw()) for _ in range(SAMPLES)]
    low, high = np.percentile(drawn, [2.5, 97.5])
    return statistic(np.arange(units)), float(low), float(high)


def judged(
    promise: str,
    units: int,
    statistic: Statistic,
    limit: float,
    *,
    at_most: bool,
    note: str = "",
    required: bool = True,
    sets: Sequence[int] | None = None,
) -> Judgement:
    """Returns the judgement on a statistic; `sets` as for `interval`."""
    processes = len(set(sets or ()))
    if processes > 1:
        note = "; ".join(filter(None, [note, f"in {processes} sets of fresh processes"]))
    if units < MIN_UNITS:
        value = statistic(np.arange(units)) if units else None
        found = f"{units} of at least {MIN_UNITS} comparisons"
        note = f"{note}; {found}" if note else found
        return Judgement(promise, UNDECIDED, value, None, None, limit, at_most, units, note, required)
    value, low, high = interval(units, statistic, sets=sets)
    status = status_of(low, high, limit, at_most=at_most)
    return Judgement(promise, status, value, low, high, limit, at_most, units, note, required)
