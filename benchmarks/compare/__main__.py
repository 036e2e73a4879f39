"""Compares ours with its peers, in one command, on one machine, in one run.

    make compare                              # about an hour, two on a CPU that does not multiply bfloat16
    python -m benchmarks.compare              # the same
    make compare ARGS="--profile full"        # an hour and three quarters: more rounds, longer prompts, a larger model
    make compare ARGS="--stages sglang"       # one engine only
    make compare ARGS="--stages vllm --profile conversations"   # those alone, 48 units: an hour
    make compare ARGS="--stages vllm --profile long"            # a larger model, up to 16,000 tokens
    make compare ARGS="--minutes 30"          # fewer rounds: intervals get wider

Prints its plan and an estimate first. Each engine's contestants run in that engine's environment (`stage`), and write
what they measured as they go; a side that fails is a row of the results, and makes the exit code 1. Writes
`build/compare.json`, and `RESULTS.md` with its plots into `benchmarks/`; a profile that asks for some workloads only
has a folder of its own there, so that it does not take the place of the whole.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks import cpu_dtype, harness
from benchmarks.compare import judge, plan, report
from benchmarks.compare.names import NO_CACHE, PREFIX_CACHE, SGLANG_SIDES, THROTTLED, VLLM_SIDES
from benchmarks.compare.plan import PROFILES, Profile
from benchmarks.compare.side import tree_of
from tests.environments.engine_env import ROOT

STAGES = {"vllm": VLLM_SIDES, "sglang": SGLANG_SIDES}
JUDGES = {"vllm": judge.judge_vllm, "sglang": judge.judge_sglang}
# When a stage is ended. A slow machine needs longer than the stage's own clock for what is never left out: starting,
# the first rounds, the round under way, the engines' end.
LIMIT_TIMES, GRACE_MINUTES = 3.0, 12.0
END_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Run:
    """One stage with one profile.

    Attributes:
        name: What it is called in the record.
        stage: Whose contestants.
        profile: What they are asked for.
        sides: Who takes part.
    """

    name: str
    stage: str
    profile: Profile
    sides: tuple[str, ...]

    @property
    def minutes(self) -> float:
        """When it leaves out what it can leave out."""
        return self.profile.vllm_minutes if self.stage == "vllm" else self.profile.sglang_minutes

    def estimates(self) -> list[plan.Estimate]:
        """Returns what it takes."""
        if self.stage == "sglang":
            return plan.estimate_sglang(self.profile, len(self.sides))
        asked = [side for side in self.sides if side != THROTTLED]
        storing = [side for side in asked if side not in (NO_CACHE, PREFIX_CACHE)]
        return plan.estimate_vllm(self.profile, len(asked), len(storing))


def runs_of(
    profile: Profile, stages: Sequence[str], wanted: Sequence[str] | None = None, memory_bytes: int | None = None
) -> list[Run]:
    """Returns what is run, in order.

    Args:
        profile: What is asked for.
        stages: Whose contestants.
        wanted: The only sides that take part; all by default, in two runs where memory does not hold them.
        memory_bytes: What there is; None for enough.
    """
    found = []
    for stage in stages:
        if stage == "sglang":
            found.append(Run(stage, stage, profile, _among(SGLANG_SIDES, wanted)))
            continue
        first = Run(stage, stage, profile, _among(profile.vllm_sides, wanted))
        then = profile.then
        if profile.apart and not wanted and memory_bytes is not None and memory_needed(first) > memory_bytes:
            first = replace(first, sides=tuple(name for name in first.sides if name not in plan.APART))
            then = (profile.apart, *then)
        found.append(first)
        for one in (plan.in_dtype(PROFILES[name], profile.dtype) for name in then):
            found.append(Run(f"{stage}, {one.name}", stage, one, _among(one.vllm_sides, wanted)))
    return [run for run in found if run.sides]


def _among(sides: Sequence[str], wanted: Sequence[str] | None) -> tuple[str, ...]:
    return tuple(name for name in sides if not wanted or name in wanted)


def memory_needed(run: Run) -> int:
    """Returns about how many bytes of memory a run needs; SGLang's few sides fit everywhere."""
    return plan.vllm_memory_bytes(run.profile, run.sides) if run.stage == "vllm" else 0


def show_plan(profile: Profile, runs: Sequence[Run]) -> None:
    """Prints what will be run and how long it takes on a machine like the one it was planned on."""
    rows, total = [], 0.0
    for run in runs:
        print(f"{run.name}: {'; '.join(run.sides)}")
        for one in run.estimates():
            rows.append([f"{run.name}: {one.what}", str(one.visits), f"{one.seconds / 60:.1f} min"])
            total += one.seconds
    rows.append(["all", "", f"{total / 60:.0f} min"])
    harness.print_table(f"plan of profile {profile.name}", ["", "visits", "estimate"], rows)
    limits = ", ".join(f"{run.name} {run.minutes:.0f} min" for run in runs)
    print(f"Rounds beyond those needed are left out once a stage has taken this long: {limits}.", flush=True)
    warn_of_memory(runs, harness.available_memory_bytes())


def warn_of_memory(runs: Sequence[Run], available_bytes: int) -> None:
    """Says which runs need more memory than there is: the kernel would end an engine in the middle of them."""
    for run in runs:
        if memory_needed(run) > available_bytes:
            print(
                f"WARNING: {run.name} needs about {memory_needed(run) / 2**30:.0f} GiB of memory, and "
                f"{available_bytes / 2**30:.0f} GiB are free: leave some sides out with --sides",
                file=sys.stderr,
                flush=True,
            )


def run_stage(run: Run, output: Path, folder: Path) -> dict[str, Any]:
    """Runs a stage in its engine's environment; whatever becomes of it, returns what it wrote.

    Args:
        run: Which.
        output: The stage's JSON file, written as it goes.
        folder: Where the sides store.

    Returns:
        The stage's record; with `error` where it did not reach its end.
    """
    output.unlink(missing_ok=True)
    command = [
        str(ROOT / ".venvs" / run.stage / "bin" / "python"), "-m", "benchmarks.compare.stage", run.stage,
        "--profile", run.profile.name, "--dtype", run.profile.dtype, "--output", str(output), "--folder", str(folder),
        "--sides", ";".join(run.sides), "--minutes", str(run.minutes),
    ]  # fmt: skip
    why = ""
    try:
        process = subprocess.Popen(command, cwd=ROOT, env=stage_environment(run.stage))
    except OSError as error:
        return failed_stage(run, f"it could not be started ({error.strerror}): build .venvs/{run.stage} first")
    try:
        code = process.wait(60.0 * (LIMIT_TIMES * run.minutes + GRACE_MINUTES))
        why = f"it ended with code {code}" if code not in (0, 1) else ""
    except subprocess.TimeoutExpired:
        why = "it ran past its limit"
    finally:
        end(process)
    try:
        body: dict[str, Any] = json.loads(output.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return failed_stage(run, why or "it wrote nothing")
    if not body["complete"]:
        body["error"] = why or "it ended early; its output says why"
    return body


def stage_environment(stage: str) -> dict[str, str]:
    """Returns the environment of a stage's process."""
    from tests.environments.engine_env import engine_env, sglang_settings

    more = sglang_settings() if stage == "sglang" else {}
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return engine_env(None, PYTHONPATH=paths, PYTHONUNBUFFERED="1", **more)


def failed_stage(run: Run, why: str) -> dict[str, Any]:
    """Returns the record of a stage that left none."""
    sides = {name: {"what": "", "status": "failed", "error": why} for name in run.sides}
    return {
        "stage": run.stage,
        "asked": list(run.sides),
        "profile": asdict(run.profile),
        "environment": {"versions": {}},
        "complete": False,
        "error": why,
        "sides": sides,
        "notes": [],
        "raw_reads": [],
        "batches": [],
    }


def end(process: subprocess.Popen[bytes]) -> None:
    """Ends a stage; asked politely it ends its engines and removes what they stored."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            for pid in tree_of([process.pid]):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
    process.wait()


def combined(
    profile: Profile, stages: dict[str, dict[str, Any]], seconds: float, environment: dict[str, Any]
) -> dict[str, Any]:
    """Returns the content of `build/compare.json`: all records, judged."""
    judgements: list[dict[str, Any]] = []
    cells: list[dict[str, Any]] = []
    noise: dict[str, float | None] = {}
    for name, body in stages.items():
        verdict = JUDGES[body["stage"]](body)
        judgements += [{"run": name, **one.as_dict()} for one in verdict.judgements]
        cells += [{"run": name, **asdict(cell)} for cell in verdict.cells]
        noise[name] = verdict.noise
    return {
        "benchmark": "compare",
        "profile": profile.name,
        "minutes": seconds / 60,
        "environment": environment,
        "judgements": judgements,
        "cells": cells,
        "noise": noise,
        "tables": {
            name: {
                workload: report.workload_rows(body["batches"], workload, list(body["sides"]))
                for workload in sorted({batch["workload"] for batch in body["batches"]})
            }
            for name, body in stages.items()
        },
        "stages": stages,
    }


def results_folder(profile: Profile, output: Path) -> Path:
    """Returns where RESULTS.md goes by default: a part does not take the place of the whole."""
    if profile.light:
        return output
    return ROOT / "benchmarks" if profile.name in plan.WHOLE else ROOT / "benchmarks" / "results" / profile.name


def problems_of(body: dict[str, Any]) -> list[str]:
    """Returns what failed; a promise that was missed is a result and no failure."""
    found = []
    for name, stage in body["stages"].items():
        if not stage["complete"]:
            found.append(f"{name}: {stage.get('error', 'it did not reach its end')}")
        found += [
            f"{name}: {side}: {report.first_line(one['error'])}"
            for side, one in stage["sides"].items()
            if one["status"] != "ok"
        ]
    return found


def show(body: dict[str, Any]) -> None:
    """Prints the judgements."""
    rows = [
        [one["promise"], one["status"], report.number(one["value"], 3), report.number(one["limit"], 3)]
        for one in body["judgements"]
    ]
    harness.print_table("what was promised", ["", "holds", "figure", "limit"], rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs all stages; returns 0 only when no side failed."""
    # `make` ends this with SIGTERM: unwinding ends the stage, and the stage its engines.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    parser = argparse.ArgumentParser(
        prog="benchmarks.compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--profile", choices=PROFILES, default="default")
    parser.add_argument(
        "--dtype",
        choices=(cpu_dtype.BFLOAT16, cpu_dtype.FLOAT32),
        default=cpu_dtype.native_dtype(),
        help="of weights and KV (default: %(default)s, which this CPU multiplies)",
    )
    parser.add_argument(
        "--stages", type=lambda text: text.split(","), default=list(STAGES), help="vllm, sglang, or both"
    )
    parser.add_argument(
        "--sides",
        type=lambda text: [name.strip() for name in text.split(";")],
        help="only these, separated by semicolons",
    )
    parser.add_argument(
        "--minutes", type=float, help="when vLLM's stage leaves out further rounds (default: the profile's)"
    )
    parser.add_argument("--folder", type=Path, default=ROOT / "build", help="where the sides store")
    parser.add_argument("--output", type=Path, default=ROOT / "build", help="folder for the JSON")
    parser.add_argument("--results", type=Path, help="folder for RESULTS.md (benchmarks/, or one below it)")
    parser.add_argument("--plan", action="store_true", help="print the plan and end")
    parsed = parser.parse_args(arguments)
    if unknown := [name for name in parsed.stages if name not in STAGES]:
        parser.error(f"--stages: {', '.join(unknown)}: choose from {', '.join(STAGES)}")
    known = [name for names in STAGES.values() for name in names]
    if unknown := [name for name in parsed.sides or () if name not in known]:
        parser.error(f"--sides: {'; '.join(unknown)}: choose from {'; '.join(known)}")
    profile = plan.in_dtype(PROFILES[parsed.profile], parsed.dtype)
    if parsed.minutes is not None:
        profile = replace(profile, vllm_minutes=parsed.minutes)
    runs = runs_of(profile, parsed.stages, parsed.sides, harness.available_memory_bytes())
    show_plan(profile, runs)
    if parsed.plan:
        return 0
    results = parsed.results or results_folder(profile, parsed.output)
    parsed.output.mkdir(parents=True, exist_ok=True)
    # Before the results are written, which would count as a change of the checkout.
    environment = harness.environment(parsed.output)
    started, stages = time.monotonic(), {}
    body: dict[str, Any] = {}
    for run in runs:
        partial = parsed.output / f"compare-{run.name.replace(', ', '-')}.json"
        stages[run.name] = run_stage(run, partial, parsed.folder)
        # After every stage, so that a later one cannot take it along.
        body = combined(profile, stages, time.monotonic() - started, environment)
        harness.write_json(body, parsed.output / "compare.json")
        report.write(body, results)
    if not body:
        print("FAILED: no side of these stages was asked for", file=sys.stderr)
        return 1
    show(body)
    print(f"wrote {parsed.output / 'compare.json'}, {results / 'RESULTS.md'} and {report.PLOT}")
    problems = problems_of(body)
    for problem in problems:
        print(f"FAILED: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    raise SystemExit(main())
