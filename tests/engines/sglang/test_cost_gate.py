"""The cost gate in real SGLang engines, through both doors: a tier that is throttled below the speed of recomputing.

Judged by what was loaded and by what the gate says in the log, since times on a shared machine prove nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.engines.prompts import tokens_of
from tests.engines.sglang.engines import PAGE_TOKENS, Answer, hicache, linker, memkv_extra, wait_until
from tests.engines.sglang.forked_engines import ForkedEngine
from tests.engines.sglang.tier_of_engine import stored_tokens
from tests.faults.control import Injector, throttle

PROMPT_TOKENS = 1900
WHOLE = (PROMPT_TOKENS - 1) // PAGE_TOKENS * PAGE_TOKENS
PROMPTS = [tokens_of(700 + number, PROMPT_TOKENS) for number in range(3)]
SLOW_MB_PER_S = 2.0
"""Eight megabytes take four seconds, which is many times what recomputing takes."""
TRIES = 10
# One chunk is read at a time, so that a load of four can be stopped.
SETTINGS: dict[str, Any] = {
    "cost_gate": "on",
    "io_threads": 2,
    "chunk_target_bytes": 2 << 20,
    "probe_timeout_ms": 20_000,
    "miss_ttl_s": 0.01,
}
DOORS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "hicache": lambda tier: hicache("dynamic", **memkv_extra(tier, **SETTINGS)),
    "linker": lambda tier: linker(tier, **SETTINGS),
}


@dataclass(frozen=True)
class Run:
    """What an engine answered, and what it logged."""

    door: str
    answers: dict[str, Answer]
    again: list[Answer]
    log: str


@pytest.fixture(scope="module", params=sorted(DOORS))
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    tier, log = tmp_path_factory.mktemp("tier") / "kv", tmp_path_factory.mktemp("logs") / "engine.log"
    answers: dict[str, Answer] = {}
    again = []
    with (
        Injector(tier) as injector,
        ForkedEngine("tiny-sg-llama", log=log, env=injector.environment(), **DOORS[request.param](tier)) as engine,
    ):

        def ask(name: str, prompt: list[int]) -> None:
            answers[name] = engine.generate(prompt)
            engine.flush()

        for number, prompt in enumerate(PROMPTS):
            answers[f"cold {number}"] = engine.generate(prompt)
            wait_until(lambda: stored_tokens(tier) >= (number + 1) * WHOLE, "a prompt's pages are stored")  # noqa: B023
            engine.flush()
        ask("quick", PROMPTS[0])
        injector.arm(throttle(SLOW_MB_PER_S))
        ask("slow at first", PROMPTS[1])
        ask("slow", PROMPTS[2])
        injector.disarm()
        time.sleep(5.2)
        while len(again) < TRIES and (not again or again[-1].cached < WHOLE):
            again.append(engine.generate(PROMPTS[0]))
            engine.flush()
    return Run(request.param, answers, again, log.read_text(errors="replace"))


def test_tokens_are_right(run: Run) -> None:
    cold = [run.answers[f"cold {number}"].tokens for number in range(3)]
    assert [run.answers[name].tokens for name in ("quick", "slow at first", "slow")] == cold
    assert all(answer.tokens == cold[0] for answer in run.again)


def test_a_quick_tier_is_loaded_from_in_full(run: Run) -> None:
    assert run.answers["quick"].cached == WHOLE


def test_a_tier_that_turns_slow_costs_one_load_that_is_stopped(run: Run) -> None:
    # The linker takes a whole load or none.
    assert run.answers["slow at first"].cached < WHOLE
    assert run.answers["slow"].cached == 0
    assert "are not loaded any more" in run.log
    assert "unexpected error in" not in run.log


def test_a_tier_that_is_well_again_is_noticed(run: Run) -> None:
    assert run.again[-1].cached == WHOLE
    assert "(trial)" in run.log
