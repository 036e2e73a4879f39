"""What commands print: JSON one row at a time, sizes and ages for people, progress on a terminal."""

from __future__ import annotations

import importlib
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any


class JsonRows:
    """Prints ``{"<rows>": [...], "summary": {...}}`` without holding the rows; prints nothing where it is off."""

    def __init__(self, rows: str, *, on: bool) -> None:
        self._rows, self._on = rows, on
        self._between = ""
        self.summary: dict[str, Any] = {}

    def __enter__(self) -> JsonRows:
        if self._on:
            print(f'{{"{self._rows}": [', end="")
        return self

    def add(self, row: dict[str, Any]) -> None:
        """Print a row."""
        if self._on:
            print(f"{self._between}\n{json.dumps(row)}", end="")
            self._between = ","

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        # After an error what is printed is not JSON, which is better than JSON that is not all.
        if self._on and kind is None:
            print(f'\n], "summary": {json.dumps(self.summary)}}}')


class Progress:
    """Bytes so far."""

    def __init__(self, bar: Any) -> None:
        self._bar = bar

    def bytes(self, count: int) -> None:
        """So many more."""
        if self._bar is not None:
            self._bar.update(count)


@contextmanager
def progress(total_bytes: int | None) -> Iterator[Progress]:
    """A bar on standard error, if that is a terminal and tqdm is installed (engines bring it)."""
    bar = None
    if sys.stderr.isatty():
        try:
            bar = importlib.import_module("tqdm").tqdm(total=total_bytes, unit="B", unit_scale=True, unit_divisor=1024)
        except ImportError:
            pass
    try:
        yield Progress(bar)
    finally:
        if bar is not None:
            bar.close()


def plain(text: object) -> str:
    """Text from a disk as it may be shown on a terminal: what does not print is escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in str(text))


def human_size(count: int) -> str:
    """``1.5 GiB``."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:,.1f} TiB"


def human_age(when_ns: int) -> str:
    """``3 h ago``; ``-`` for never."""
    if not when_ns:
        return "-"
    seconds = (time.time_ns() - when_ns) / 1e9
    for unit, length in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit} ago"
    return f"{seconds:.0f} s ago" if seconds >= 0 else "in the future"


def table(rows: list[tuple[str, ...]]) -> str:
    """Columns side by side, the first row as their heads."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines)
