"""A real SGLang under faults, through either door. To be run by the interpreter of that environment.

Per round a prompt that is stored and one that is not are answered while things go wrong, and again afterwards; their
tokens are held against those of an engine without storage.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests.engines.prompts import tokens_of
from tests.engines.sglang.engines import (
    PAGE_TOKENS,
    Answer,
    Engine,
    hicache,
    linker,
    memkv_extra,
    wait_until,
)
from tests.engines.sglang.forked_engines import ForkedEngine
from tests.engines.sglang.tier_of_engine import stored_tokens
from tests.faults.control import FAULTS, Injector
from tests.faults.rows import CONTROL, Row

MODEL = "tiny-sg-llama"
PROMPT_TOKENS = 600
WHOLE = PROMPT_TOKENS - PAGE_TOKENS
PROBE_TIMEOUT_S, LOAD_TIMEOUT_S = 1.0, 1.5
# What a door may make a request wait for, look-up and load, and what a busy machine needs to answer it.
DEADLINE_S = PROBE_TIMEOUT_S + LOAD_TIMEOUT_S + 10.0
BACK_S = 60.0
SETTINGS = {
    "probe_timeout_ms": int(PROBE_TIMEOUT_S * 1000),
    "load_timeout_ms": int(LOAD_TIMEOUT_S * 1000),
    "miss_ttl_s": 0.01,
}
DOORS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "sglang-hicache": lambda tier: hicache("dynamic", **memkv_extra(tier, **SETTINGS)),
    "sglang-linker": lambda tier: linker(tier, **SETTINGS),
}


def prompts_of(number: int, seed: int) -> list[list[int]]:
    """The prompt of a round that is stored before it, and the one that is not."""
    return [tokens_of(10_000 * (seed + 1) + 2 * number + i, PROMPT_TOKENS) for i in range(2)]


def io_pids(engine: Engine) -> list[int]:
    """The engine's I/O processes."""
    found = []
    for pid in engine.pids():
        try:
            if b"memkv_engines.offload.process" in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(pid)
        except OSError:
            pass
    return found


class Rounds:
    """An engine, its tier, and what the prompts' answers must be.

    Args:
        engine: with our door.
        tier: its directory.
        injector: its faults.
        cold: the answers of an engine without storage, two for each round.
        seed: of prompts and faults.
    """

    def __init__(self, engine: Engine, tier: Path, injector: Injector, cold: list[list[list[int]]], seed: int) -> None:
        self._engine, self._tier, self._injector, self._cold, self._seed = engine, tier, injector, cold, seed

    def store(self, rounds: int) -> None:
        """Answer and store the first prompt of each round."""
        for number in range(rounds):
            self._engine.generate(prompts_of(number, self._seed)[0])
            wait_until(lambda: stored_tokens(self._tier) >= (number + 1) * WHOLE, "a prompt's pages are stored")  # noqa: B023
        self._engine.flush()

    def play(self, number: int, fault: str, per_1024: int, row: Row) -> None:
        """One round."""
        self._injector.arm(FAULTS[fault], seed=self._seed + number, per_1024=per_1024)
        under = [self._timed(prompt, row) for prompt in prompts_of(number, self._seed)]
        time.sleep(0.2)  # for what is stored behind the answer
        row.injected += self._injector.disarm()
        self._engine.flush()
        after = [self._timed(prompt, row) for prompt in prompts_of(number, self._seed)]
        row.wrong_tokens += sum(
            answer.tokens != tokens for answer, tokens in zip(under + after, 2 * self._cold[number], strict=True)
        )
        # Loads and stores that were lost, as requests that hit less than they would have.
        row.detected += sum(answer.cached < WHOLE for answer in (under[0], *after))
        row.rounds += 1
        self._engine.flush()
        if FAULTS[fault].looks_full:
            # Another process has not heard of it, and stores at once.
            for pid in io_pids(self._engine):
                os.kill(pid, signal.SIGKILL)

    def await_hits(self, number: int) -> None:
        """Ask for a prompt that is stored until it hits: the service is back, and nobody stands back from it."""
        deadline = time.monotonic() + BACK_S
        while self._engine.generate(prompts_of(number, self._seed)[0]).cached < WHOLE:
            assert time.monotonic() < deadline, "no hit any more, although all is well again"
            self._engine.flush()
        self._engine.flush()

    def _timed(self, prompt: list[int], row: Row) -> Answer:
        start = time.monotonic()
        answer = self._engine.generate(prompt)
        row.longest_wait_s = max(row.longest_wait_s, time.monotonic() - start)
        return answer


def cold_answers(folder: Path, rounds: int, seed: int) -> list[list[list[int]]]:
    """The tokens of an engine without storage."""
    with ForkedEngine(MODEL, log=folder / "cold.log") as engine:
        return [[engine.generate(prompt).tokens for prompt in prompts_of(n, seed)] for n in range(rounds)]


def play_rounds(folder: Path, door: str, plan: Sequence[tuple[str, int]], seed: int) -> list[Row]:
    """Start engines, play the rounds of (fault, chance per 1024 calls), and say what came of them; the control's last.

    An engine that dies ends it with a row that says so.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tier = folder / "kv"
    rows: list[Row] = []
    # One prompt more, which is never under a fault, tells whether all is well.
    cold = cold_answers(folder, len(plan) + 1, seed)
    with Injector(tier) as injector:
        try:
            with ForkedEngine(
                MODEL, log=folder / "engine.log", env=injector.environment(), **DOORS[door](tier)
            ) as engine:
                rounds = Rounds(engine, tier, injector, cold, seed)
                rounds.store(len(plan) + 1)
                for number, (fault, per_1024) in enumerate(plan):
                    rows.append(Row(fault, door, deadline_s=DEADLINE_S))
                    rounds.play(number, fault, per_1024, rows[-1])
                    rounds.await_hits(len(plan))
            rows.append(_control(folder, door, injector, cold, len(plan), seed))
        except AssertionError as error:
            rows[-1:] = [
                Row(
                    rows[-1].fault if rows else "none",
                    door,
                    1,
                    injector.injected,
                    dead_engines=1,
                    note=str(error)[-3000:],
                )
            ]
    return rows


def _control(folder: Path, door: str, injector: Injector, cold: list[list[list[int]]], number: int, seed: int) -> Row:
    """What the checks are for: the same faults, believed."""
    row = Row(CONTROL, door, deadline_s=DEADLINE_S)
    environment = injector.environment(verified=False)
    arguments = DOORS[door](folder / "kv")
    with ForkedEngine(MODEL, log=folder / "control.log", env=environment, **arguments) as engine:
        # An engine may open a single chunk for a prompt: another must have been seen to be read instead of it.
        engine.generate(prompts_of(number - 1, seed)[0])
        engine.flush()
        injector.arm(FAULTS["misdirected read"], seed=seed)
        row.wrong_tokens += engine.generate(prompts_of(number, seed)[0]).tokens != cold[number][0]
        row.injected += injector.disarm()
        row.rounds += 1
    return row
