"""The same prompts under many tenants and salts, in real engines: who hits what?

    .venvs/dev/bin/python -m tests.trust.tenants                             # 3 tenants, 3 salts, 4 prompts (5 minutes)
    .venvs/dev/bin/python -m tests.trust.tenants --doors vllm --tenants 5

Tenants are `tenant` of the configuration, an engine for each, on one directory; salts are those of the requests
(`cache_salt` in both engines), of which one is none. Each prompt is asked by each (tenant, salt) a first time, when all
before it have stored theirs: any hit is a cross hit. Then again, with the engine's own cache emptied, and after that in
a fresh process: the control, which must hit. Hits are those that the engine counts.

Writes build/tenants.json. Exit status 0: no cross hit, no wrong token, and every control hits; 1: not so; 2: wrong
usage.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from tests.environments.engine_env import ROOT, engine_settings, sglang_settings
from tests.trust import report

DOORS = ("vllm", "sglang-hicache", "sglang-linker")
LOGS = report.BUILD / "logs"


def visits_of(door: str, tenants: int, salts: int, prompts: int, seed: int) -> list[dict[str, Any]]:
    """What was asked of one door and what hit, from a process of the engine's own environment; none if it died."""
    environment = "vllm" if door == "vllm" else "sglang"
    settings = {**engine_settings(), **(sglang_settings() if environment == "sglang" else {})}
    LOGS.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, (LOGS / f"tenants-{door}.log").open("wb") as log:
        answer = Path(folder, "visits.json")
        numbers = [str(number) for number in (tenants, salts, prompts, seed)]
        python = ROOT / ".venvs" / environment / "bin" / "python"
        subprocess.run(
            [str(python), "-m", "tests.trust.tenants_in_engine", door, *numbers, str(answer)],
            cwd=ROOT,
            env={**os.environ, **settings, "PYTHONPATH": str(ROOT)},
            stdout=log,
            stderr=log,
            check=False,
        )
        return json.loads(answer.read_text()) if answer.exists() else []


def row_of(door: str, visits: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The line of the table."""
    first, again = ([v for v in visits if (v["when"] == "first") is is_first] for is_first in (True, False))
    return {
        "door": door,
        "first visits": len(first),
        "cross hits": sum(visit["hit_tokens"] > 0 for visit in first),
        "visits again": len(again),
        "of them hits": sum(visit["hit_tokens"] >= visit["whole_tokens"] for visit in again),
        "wrong answers": sum(not visit["right"] for visit in visits),
    }


def broken(door: str, visits: Sequence[dict[str, Any]]) -> list[str]:
    """What does not hold for a door."""
    row = row_of(door, visits)
    if not row["first visits"] or not row["visits again"]:
        return [f"{door}: no answer; see {(LOGS / f'tenants-{door}.log').relative_to(ROOT)}"]
    told = []
    for visit in visits:
        who = f"{door}, tenant {visit['tenant']!r}, salt {visit['salt']!r}, prompt {visit['prompt']}, {visit['when']}"
        if visit["when"] == "first" and visit["hit_tokens"]:
            told.append(f"{who}: a cross hit of {visit['hit_tokens']} tokens")
        if visit["when"] != "first" and visit["hit_tokens"] < visit["whole_tokens"]:
            told.append(f"{who}: {visit['hit_tokens']} of {visit['whole_tokens']} tokens hit: no control")
        if not visit["right"]:
            told.append(f"{who}: wrong tokens")
    return told


def main(arguments: Sequence[str] | None = None) -> int:
    """Ask, show, write."""
    parser = report.parser(__doc__ or "", "tenants.json")
    parser.add_argument("--doors", nargs="+", choices=DOORS, default=list(DOORS))
    parser.add_argument("--tenants", type=int, default=3, help="one of them has no name")
    parser.add_argument("--salts", type=int, default=3, help="one of them is none")
    parser.add_argument("--prompts", type=int, default=4)
    options = parser.parse_args(arguments)
    if min(options.tenants, options.salts, options.prompts) < 1 or options.tenants * options.salts < 2:
        parser.error("--tenants, --salts, --prompts: give at least 1, and 2 pairs of tenant and salt")
    numbers = (options.tenants, options.salts, options.prompts, options.seed)
    found = {door: visits_of(door, *numbers) for door in tqdm(options.doors, unit="door", disable=None)}
    wrong = [line for item in found.items() for line in broken(*item)]
    return report.conclude(options, {"doors": found}, [row_of(*item) for item in found.items()], wrong)


if __name__ == "__main__":
    sys.exit(main())
