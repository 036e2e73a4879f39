"""Every fault against every door, at length: never wrong tokens, never a dead engine, never a wait without end.

    python -m tests.faults                             # everything, twice (make faults)
    python -m tests.faults --doors vllm --rounds 10 --seed 7
    python -m tests.faults --faults "hang in a read" "kill in a write"

Prints a table and writes build/faults.json. Exit status 0: every row keeps the promise, something was injected in each,
and without verification the same faults give wrong tokens; 1: not so; 2: wrong usage.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from tests.environments.engine_env import engine_settings, sglang_settings
from tests.faults import pipelines, rows, tier_machine
from tests.faults.control import FAULTS, ROOT
from tests.faults.rows import Row

OUTPUT = ROOT / "build" / "faults.json"
LOGS = ROOT / "build" / "logs"
EXAMPLES_PER_ROUND = 150
TIER_SEEDS = 8
PIPELINE_ROUNDS = 4
TABLE_COLUMNS = 150
DOORS = ("tier", "pipelines", "vllm", "vllm, look-ups", "sglang-hicache", "sglang-linker")
# A vLLM plays so many faults: its start is dear, but a scenario has a time limit.
FAULTS_PER_SCENARIO = 12
_VLLM = """
import sys, tempfile
from pathlib import Path
from tests.faults.rows import as_json
from tests.faults.vllm_rounds import play_rounds
seed, per_1024, forgets, *names = sys.argv[1:]
with tempfile.TemporaryDirectory() as folder:
    plan = [(name, int(per_1024)) for name in names]
    rows = play_rounds(Path(folder), plan, int(seed), forgets=forgets == "yes")
Path(sys.stdin.readline().strip()).write_text(as_json(rows))
"""
_SGLANG = """
import sys, tempfile
from pathlib import Path
from tests.faults.rows import as_json
from tests.faults.sglang_rounds import play_rounds
seed, per_1024, door, *names = sys.argv[1:]
with tempfile.TemporaryDirectory() as folder:
    rows = play_rounds(Path(folder), door, [(name, int(per_1024)) for name in names], int(seed))
Path(sys.stdin.readline().strip()).write_text(as_json(rows))
"""


def in_engine(door: str, names: Sequence[str], seed: int, per_1024: int) -> list[Row]:
    """One round of every fault, in a process of the engine's own environment."""
    environment = "vllm" if door.startswith("vllm") else "sglang"
    script = _VLLM if environment == "vllm" else _SGLANG
    third = ("yes" if door == "vllm, look-ups" else "no") if environment == "vllm" else door
    settings = {**engine_settings(), **(sglang_settings() if environment == "sglang" else {})}
    LOGS.mkdir(parents=True, exist_ok=True)
    log = LOGS / f"faults-{environment}.log"
    with tempfile.TemporaryDirectory() as folder, log.open("wb") as output:
        answer = Path(folder) / "rows.json"
        command = [ROOT / ".venvs" / environment / "bin" / "python", "-c", script, str(seed), str(per_1024), third]
        subprocess.run(
            [*map(str, command), *names],
            cwd=ROOT,
            env={**os.environ, **settings, "PYTHONPATH": str(ROOT)},
            input=f"{answer}\n".encode(),
            stdout=output,
            stderr=output,
            check=False,
        )
        if not answer.exists():
            return [Row("all", door, 1, dead_engines=1, note=f"see {log.relative_to(ROOT)}")]
        found = rows.from_json(answer.read_text())
    for row in found:
        row.door = door
    return found


def rows_of(door: str, names: Sequence[str], seed: int, number: int) -> Iterator[Row]:
    """One round of every fault against a door; now every call goes wrong, now some."""
    if door == "tier":
        tried = {fault.name for fault in tier_machine.TRIED}.intersection(names)
        found: dict[str, Row] = {}
        for more in range(TIER_SEEDS):
            # Chance leaves some out; one that it leaves out every time is a row that was not run.
            played = rows.merged([*found.values(), *tier_machine.run(seed + more, EXAMPLES_PER_ROUND)])
            found = {row.fault: row for row in played}
            if tried <= found.keys():
                break
        yield from (found.get(name, Row(name, "tier")) for name in names if name in tried)
        yield from tier_machine.run(seed, EXAMPLES_PER_ROUND // 4, verified=False)
    elif door == "pipelines":
        yield from pipelines.play(names, PIPELINE_ROUNDS, seed)
    else:
        step = FAULTS_PER_SCENARIO if door.startswith("vllm") else len(names)
        for start in range(0, len(names), step):
            yield from in_engine(door, names[start : start + step], seed + start, (1024, 300)[number % 2])


def played(doors: Sequence[str], names: Sequence[str], count: int, seed: int, output: Path) -> list[Row]:
    """Every round against every door; the file holds what is known so far."""
    found: list[Row] = []
    turns = [(door, number) for number in range(count) for door in doors]
    for door, number in tqdm(turns, unit="door", disable=None):
        found = rows.merged([*found, *rows_of(door, names, seed + 1000 * number, number)])
        rows.write(found, output)
    return found


def show(found: Sequence[Row]) -> None:
    """Print the table."""
    table = Table(title="faults")
    for column in ("door", "fault", "rounds", "injected", "detected", "dead", "wrong", "longest wait", "deadline", ""):
        table.add_column(column, justify="left" if column in ("door", "fault", "") else "right", no_wrap=True)
    for row in found:
        numbers = (row.rounds, row.injected, row.detected, row.dead_engines, row.wrong_tokens)
        waits = (f"{row.longest_wait_s:.2f} s", f"{row.deadline_s:.1f} s")
        verdict = f"[bold red]{row.broken}[/]" if row.broken else "as it must" if row.is_control else "kept"
        table.add_row(row.door, row.fault, *map(str, numbers), *waits, verdict)
    console = Console()
    (console if console.is_terminal else Console(width=TABLE_COLUMNS)).print(table)
    for row in found:
        if row.broken and row.note:
            print(f"\n{row.door}, {row.fault}:\n{row.note}", file=sys.stderr)


def main(arguments: Sequence[str] | None = None) -> int:
    """Play, show, write; 0 if the promise holds."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.faults", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--doors", nargs="+", choices=DOORS, default=list(DOORS))
    parser.add_argument("--faults", nargs="+", choices=list(FAULTS), default=list(FAULTS), metavar="FAULT")
    parser.add_argument("--rounds", type=int, default=2, help="of every fault against every door")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="print the rows instead of a table")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error("--rounds: give at least 1")
    found = played(options.doors, options.faults, options.rounds, options.seed, options.output)
    print(rows.as_json(found)) if options.json else show(found)
    try:
        rows.check(found)
    except AssertionError as error:
        print(f"\nbroken:\n{error}"[:4000], file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
