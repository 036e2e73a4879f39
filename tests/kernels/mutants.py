"""Changes the kernels' source, one place at a time, and says which check notices.

    python -m tests.kernels.mutants                     # all of them
    python -m tests.kernels.mutants --match ring        # those with this in their name
    python -m tests.kernels.mutants --sample 8 --seed 1
    python -m tests.kernels.mutants --json results.json

A mutant is killed by the suites over the PTX of sm_90 (or by its translation or compilation), by those over the host
build, or by the machine code's gate; the first that kills it counts. One that survives fails the run.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tqdm import tqdm

from kernels.build import CUBINS, SOURCE, BuildError
from tests.kernels import copy_suite, digest_suite, routes
from tests.kernels.mutant_list import ALL, BULK, COPY, DIGEST, EQUIVALENT, MUTANTS, SASS, Mutant
from tests.kernels.ptx_syntax import PtxError
from tests.kernels.routes import ROOT, Route, build_host, build_ptx, ptx_of
from tests.kernels.sass_table import facts_of

TIMEOUT_S = 60.0
PTX_TARGET = 90


@dataclass(frozen=True)
class Verdict:
    """What became of a mutant.

    Attributes:
        name: The mutant.
        family: Its family.
        killed_by: `compiler`, `ptx`, `host` or `sass`; empty for a survivor.
        how: What was noticed.
        seconds: How long it took.
    """

    name: str
    family: str
    killed_by: str
    how: str
    seconds: float


def run_suites(library: Path, name: str, family: str) -> None:
    """Runs the checks of a family; raises `AssertionError`."""
    route = Route(name, library)
    if family in (COPY, ALL):
        for check in copy_suite.ORDINARY:
            check(copy_suite.Variant(route))
    if family in (DIGEST, ALL):
        for digest_check in (*digest_suite.CHECKS, digest_suite.check_every_short_length):
            digest_check(route)
    if family in (BULK, ALL) and route.has_bulk:
        for lazy in (False, True):
            for check in copy_suite.BULK:
                check(copy_suite.Variant(route, bulk=True, lazy=lazy))


def in_a_process(library: Path, name: str, family: str) -> str:
    """Runs the checks where a crash or a hang does no harm; returns what was noticed, or nothing."""
    command = [sys.executable, "-m", "tests.kernels.mutants", "--library", str(library), name, family]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, cwd=ROOT)
    except subprocess.TimeoutExpired:
        return "does not end"
    if done.returncode == 0:
        return ""
    lines = done.stderr.strip().splitlines() or [f"ended with code {done.returncode}"]
    return lines[-1].removeprefix("AssertionError: ")


def by_ptx(mutant: Mutant, source: str) -> tuple[str, str]:
    """Compiles and runs the PTX of a mutant; returns who killed it and how."""
    try:
        library = build_ptx(ptx_of(PTX_TARGET, source), "mutant")
    except (BuildError, PtxError, RuntimeError) as error:
        return "compiler", str(error).strip().splitlines()[-1]
    how = in_a_process(library, "mutant", mutant.family)
    return ("ptx", how) if how else ("", "")


def by_host(mutant: Mutant, source: str) -> tuple[str, str]:
    """The same for the host build."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / SOURCE.name
        path.write_text(source)
        try:
            library = build_host(path, optimize="-O0")
        except RuntimeError as error:
            return "compiler", str(error).strip().splitlines()[-1]
    how = in_a_process(library, "host", mutant.family)
    return ("host", how) if how else ("", "")


def by_sass(mutant: Mutant, source: str) -> tuple[str, str]:
    """The gate over the machine code of all targets."""
    problems = [problem for target in CUBINS for facts in facts_of(target, source) for problem in facts.problems()]
    return ("sass", problems[0]) if problems else ("", "")


def judge(mutant: Mutant) -> Verdict:
    """Applies a mutant and asks one check after the other."""
    started = time.monotonic()
    source = mutant.apply(SOURCE.read_text())
    asked: Sequence[Callable[[Mutant, str], tuple[str, str]]] = (by_ptx, by_host, by_sass)
    killed_by = how = ""
    for ask in (by_sass,) if mutant.family == SASS else asked:
        killed_by, how = ask(mutant, source)
        if killed_by:
            break
    return Verdict(mutant.name, mutant.family, killed_by, how, round(time.monotonic() - started, 1))


def line_of(verdict: Verdict) -> str:
    """A verdict as a line of the table."""
    who = verdict.killed_by or "ALIVE"
    return f"{who:<9} {verdict.seconds:>5.1f} s  {verdict.family:<7} {verdict.name:<40} {verdict.how[:90]}"


def judge_all(mutants: Sequence[Mutant], jobs: int = 2, quiet: bool = False) -> list[Verdict]:
    """Judges mutants, some at a time, and prints each verdict; blocks until all have been judged.

    What they are built into is thrown away.
    """
    kept, verdicts = routes.CACHE, []
    with tempfile.TemporaryDirectory() as folder, concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        routes.CACHE = Path(folder)
        try:
            for verdict in tqdm(pool.map(judge, mutants), total=len(mutants), unit="mutant", disable=quiet):
                verdicts.append(verdict)
                if not quiet:
                    tqdm.write(line_of(verdict))
                    sys.stdout.flush()
        finally:
            routes.CACHE = kept
    return verdicts


def print_summary(verdicts: Sequence[Verdict]) -> None:
    """How many each check killed, and what is left."""
    counts = Counter(v.killed_by or "alive" for v in verdicts)
    print(", ".join(f"{count} {'by ' if who != 'alive' else ''}{who}" for who, count in counts.most_common()))
    for alive in (verdict for verdict in verdicts if not verdict.killed_by):
        print(line_of(alive))
    for mutant in EQUIVALENT:
        print(f"not judged, equivalent: {mutant.name}: {mutant.reason}")


def main() -> int:
    """Returns 0 when no mutant survives."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--match", default="", help="only mutants with this in their name or family")
    parser.add_argument("--sample", type=int, help="only so many, drawn with --seed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2, help="mutants judged at a time")
    parser.add_argument("--json", type=Path, help="write the verdicts here")
    parser.add_argument("--library", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.library:
        run_suites(Path(arguments.library[0]), *arguments.library[1:])
        return 0
    chosen = [mutant for mutant in MUTANTS if arguments.match in mutant.name or arguments.match == mutant.family]
    if arguments.sample:
        chosen = random.Random(arguments.seed).sample(chosen, min(arguments.sample, len(chosen)))
    started = time.monotonic()
    verdicts = judge_all(chosen, arguments.jobs)
    print_summary(verdicts)
    print(f"{len(verdicts)} mutants in {time.monotonic() - started:.0f} s")
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(verdict) for verdict in verdicts], indent=1) + "\n")
    return 1 if any(not verdict.killed_by for verdict in verdicts) else 0


if __name__ == "__main__":
    raise SystemExit(main())
