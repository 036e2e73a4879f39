"""What a fault did to a door, row by row: the promise, the table, the file."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

CONTROL = "control: verification off"


@dataclass
class Row:
    """One fault against one door.

    Attributes:
        fault: the fault.
        door: what it was done to: `tier`, `pipelines`, `vllm`, `sglang-hicache`, `sglang-linker`.
        rounds: how often it was tried.
        injected: calls that went wrong.
        detected: misses and failed stores that were counted.
        dead_engines: engines (or, without one, callers) that did not survive.
        wrong_tokens: answers that differ from those of an engine without storage; without an engine, wrong bytes.
        longest_wait_s: the longest that anyone waited for one answer.
        deadline_s: the longest that anyone may wait.
        note: what else to know.
    """

    fault: str
    door: str
    rounds: int = 0
    injected: int = 0
    detected: int = 0
    dead_engines: int = 0
    wrong_tokens: int = 0
    longest_wait_s: float = 0.0
    deadline_s: float = 0.0
    note: str = ""

    @property
    def is_control(self) -> bool:
        """Whether this row must fail: it shows that the others could."""
        return self.fault.startswith(CONTROL)

    @property
    def broken(self) -> str:
        """What of the promise does not hold; empty if all does."""
        if not self.rounds:
            return "not run"
        if not self.injected:
            return "nothing was injected"
        if self.dead_engines:
            return "a dead engine"
        if self.is_control:
            return "" if self.wrong_tokens else "no wrong tokens without verification: this suite proves nothing"
        if self.wrong_tokens:
            return "wrong tokens"
        if self.longest_wait_s > self.deadline_s:
            return f"a wait of {self.longest_wait_s:.1f} s, over {self.deadline_s:.1f} s"
        return ""

    def add(self, other: Row) -> None:
        """Take further rounds of the same in."""
        for name in ("rounds", "injected", "detected", "dead_engines", "wrong_tokens"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.longest_wait_s = max(self.longest_wait_s, other.longest_wait_s)
        self.deadline_s = max(self.deadline_s, other.deadline_s)
        self.note = self.note or other.note


def as_json(rows: Iterable[Row]) -> str:
    """The rows as a text."""
    body = [{**dataclasses.asdict(row), "broken": row.broken} for row in rows]
    return json.dumps(body, indent=1) + "\n"


def from_json(text: str) -> list[Row]:
    """The rows of a text."""
    return [Row(**{k: v for k, v in row.items() if k != "broken"}) for row in json.loads(text)]


def merged(rows: Iterable[Row]) -> list[Row]:
    """One row per fault and door, in the order of their first."""
    found: dict[tuple[str, str], Row] = {}
    for row in rows:
        key = (row.door, row.fault)
        if key in found:
            found[key].add(row)
        else:
            found[key] = dataclasses.replace(row)
    return list(found.values())


def check(rows: Sequence[Row]) -> None:
    """Assert the promise for every row.

    Raises:
        AssertionError: it does not hold; names every row that breaks it.
    """
    assert rows, "no rows"
    broken = [f"{row.door}, {row.fault}: {row.broken} ({row.note})" for row in rows if row.broken]
    assert not broken, "\n".join(broken)


def write(rows: Sequence[Row], path: Path) -> None:
    """Write the rows to a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(as_json(rows), encoding="utf-8")
