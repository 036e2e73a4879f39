"""What the long proofs have in common: options, the file, the verdict, the exit status."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.harness import environment
from tests.environments.engine_env import ROOT

BUILD = ROOT / "build"


def parser(doc: str, output: str) -> argparse.ArgumentParser:
    """A parser with the options that all have: `--seed`, `--json`, `--output`."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--seed", type=int, default=1)
    made.add_argument("--json", action="store_true", help="print the report instead of a table")
    made.add_argument("--output", type=Path, default=BUILD / output, help="where the report goes")
    return made


def conclude(
    options: argparse.Namespace, found: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], broken: Sequence[str]
) -> int:
    """Write the report, show it, and return the exit status: 0, or 1 where something is broken.

    Args:
        options: the parsed options; they are in the report.
        found: the report.
        rows: the table that is printed, each with the same columns.
        broken: what does not hold.
    """
    given = {k: v for k, v in vars(options).items() if k not in ("json", "output") and not isinstance(v, Path)}
    report = {"environment": environment(ROOT), "options": given, **found, "broken": list(broken)}
    text = json.dumps(report, indent=1)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(text + "\n", encoding="utf-8")
    if options.json:
        print(text)
    else:
        show(rows)
    for line in broken:
        print(f"broken: {line}"[:2000], file=sys.stderr)
    return 1 if broken else 0


def show(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print a table."""
    table = Table()
    for column in rows[0] if rows else ():
        table.add_column(str(column), justify="left" if column == next(iter(rows[0])) else "right")
    for row in rows:
        table.add_row(*(f"{value:.3g}" if isinstance(value, float) else str(value) for value in row.values()))
    console = Console()
    (console if console.is_terminal else Console(width=180)).print(table)


def added(total: dict[str, Any], more: Mapping[str, Any], **how: Callable[[Any, Any], Any]) -> dict[str, Any]:
    """Sums of counts and joined lists; `how` names fields that are combined otherwise. Returns `total`."""
    for name, value in more.items():
        if name not in total:
            total[name] = dict(value) if isinstance(value, dict) else value
        elif name in how:
            total[name] = how[name](total[name], value)
        elif isinstance(value, dict):
            added(total[name], value)
        else:
            total[name] = total[name] + value
    return total
