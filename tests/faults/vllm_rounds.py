"""A real vLLM under faults. To be run by the interpreter of that environment.

Per round a prompt that is stored and one that is not are answered while things go wrong, and again afterwards; their
tokens are held against those of an engine without storage.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tests.engines.prompts import tokens_of
from tests.engines.vllm.scenario import (
    LONG_TIMEOUT_S,
    Reports,
    Step,
    ask,
    misses,
    play,
    reset,
    settle,
    start,
)
from tests.faults.control import FAULTS, Injector
from tests.faults.rows import CONTROL, Row

MODEL = "tiny-llama"
PROMPT_TOKENS = 1400
PROBE_TIMEOUT_S, LOAD_TIMEOUT_S, FENCE_TIMEOUT_S = 1.0, 1.5, 0.5
# What the connector may make a request wait for, and what a busy machine needs to answer it.
DEADLINE_S = PROBE_TIMEOUT_S + LOAD_TIMEOUT_S + FENCE_TIMEOUT_S + 10.0
BEHIND_S = 0.3
# A load that is late on a busy machine is recomputed, with or without verification.
CONTROL_TRIES = 3
SETTINGS = {
    "probe_timeout_ms": int(PROBE_TIMEOUT_S * 1000),
    "load_timeout_ms": int(LOAD_TIMEOUT_S * 1000),
    "fence_timeout_ms": int(FENCE_TIMEOUT_S * 1000),
}
# What is known is soon forgotten, so that look-ups meet the faults first; else loads do.
FORGETFUL = {"hit_ttl_s": 0.5, "miss_ttl_s": 0.1}
LOST = ("store_failed", "store_full", "store_shed", "probe_timeouts", "load_rereads")


def prompts_of(number: int, seed: int) -> list[list[int]]:
    """The prompt of a round that is stored before it, and the one that is not."""
    return [tokens_of(10_000 * (seed + 1) + 2 * number + i, PROMPT_TOKENS) for i in range(2)]


def steps_of(
    tier: Path, injector: Injector, plan: Sequence[tuple[str, int]], seed: int, *, forgets: bool
) -> list[Step]:
    """The scenario for rounds of (fault, chance per 1024 calls), the control's last."""
    settings = {**SETTINGS, **(FORGETFUL if forgets else {})}
    every = [prompts_of(number, seed) for number in range(len(plan) + 1)]
    steps = [start(MODEL), ask("cold", [prompt for pair in every for prompt in pair])]
    steps += [{"do": "environment", "variables": injector.environment()}, start(MODEL, tier / "kv", **settings)]
    steps += [ask("stored before", [first for first, _ in every]), settle()]
    for number, (fault, per_1024) in enumerate(plan):
        armed = {"control": str(injector.control), "fault": fault, "seed": seed + number, "per_1024": per_1024}
        steps += [reset(), *[{"do": "nudge", "seconds": 0.6}] * forgets, {"do": "arm", **armed}]
        steps += [ask(f"{number} under, {i}", [prompt]) for i, prompt in enumerate(every[number])]
        # For what is stored behind the answer.
        steps += [{"do": "nudge", "name": f"{number} behind", "seconds": BEHIND_S}]
        steps += [{"do": "disarm", "name": f"{number} injected"}, {"do": "await_service", "name": f"{number} back"}]
        steps += [settle(f"{number} settled"), reset(), ask(f"{number} after", every[number]), settle()]
        if FAULTS[fault].looks_full:
            # Another process has not heard of it, and stores at once.
            steps += [{"do": "strike", "how": "kill", "whose": "worker"}, {"do": "nudge", "seconds": 0.2}]
            steps += [{"do": "await_service"}]
    # What the checks are for: the same faults, believed.
    armed = {"control": str(injector.control), "fault": "misdirected read", "seed": seed, "per_1024": 1024}
    steps += [{"do": "environment", "variables": injector.environment(verified=False)}]
    steps += [start(MODEL, tier / "kv", **SETTINGS, store=False), {"do": "arm", **armed}]
    for number in range(CONTROL_TRIES):
        steps += [ask(f"control {number}", [every[-1][0]]), reset()]
    return [*steps, {"do": "disarm", "name": "control injected"}]


def rows_of(reports: Reports, plan: Sequence[tuple[str, int]]) -> list[Row]:
    """What came of the rounds."""
    cold = reports["cold"]["tokens"]
    rows = []
    for number, (fault, _) in enumerate(plan):
        row = Row(fault, "vllm", rounds=1, deadline_s=DEADLINE_S)
        row.injected = reports[f"{number} injected"]["injected"]
        expected = cold[2 * number : 2 * number + 2]
        under = [reports[f"{number} under, {i}"] for i in range(2)]
        after = reports[f"{number} after"]
        row.wrong_tokens = sum(
            a != b for a, b in zip([*(u["tokens"][0] for u in under), *after["tokens"]], 2 * expected, strict=True)
        )
        row.longest_wait_s = max(u["seconds"] for u in under)
        later = [reports[f"{number} {name}"] for name in ("behind", "back", "settled")]
        for report in (*under, *later, after):
            row.detected += sum(misses(report).values()) + sum(report["counted"].get(name, 0) for name in LOST)
            row.dead_engines += report["counted"].get("boundary_errors", 0)
        rows.append(row)
    control = Row(CONTROL, "vllm", rounds=1, deadline_s=DEADLINE_S)
    control.injected = reports["control injected"]["injected"]
    tries = [reports[f"control {number}"] for number in range(CONTROL_TRIES)]
    control.wrong_tokens = sum(tried["tokens"][0] != cold[2 * len(plan)] for tried in tries)
    control.note = f"counted {[tried['counted'] for tried in tries]}"
    return [*rows, control]


def play_rounds(folder: Path, plan: Sequence[tuple[str, int]], seed: int, *, forgets: bool = False) -> list[Row]:
    """Start an engine, play the rounds, and say what came of them; an engine that dies is a row, too.

    Args:
        folder: for the tier.
        plan: rounds of (fault, chance per 1024 calls).
        seed: of prompts and faults.
        forgets: the engine's index forgets at once what is stored, so that every round begins with look-ups.
    """
    with Injector(folder / "kv") as injector:
        try:
            steps = steps_of(folder, injector, plan, seed, forgets=forgets)
            reports = play(*steps, timeout_s=LONG_TIMEOUT_S)
        except AssertionError as error:
            names = ", ".join(dict.fromkeys(fault for fault, _ in plan))
            return [Row(names, "vllm", rounds=1, injected=injector.injected, dead_engines=1, note=str(error)[-3000:])]
    return rows_of(reports, plan)
