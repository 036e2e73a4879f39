"""The cost gate in a real vLLM: a tier that is throttled below the speed of recomputing, and one that is not.

Judged by decisions and counters, since times on a shared machine prove nothing.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.engines.prompts import tokens_of
from tests.engines.vllm.scenario import Reports, ask, misses, play, reset, settle, start
from tests.faults.control import Injector

PROMPT_TOKENS = 3300
LAST_BLOCK = (PROMPT_TOKENS - 1) // 32 * 32
PROMPTS = [tokens_of(900 + number, PROMPT_TOKENS) for number in range(4)]
SLOW_MB_PER_S = 1.0
"""13.5 MB take 13.5 s, which is many times what recomputing takes, on a busy machine too."""
# One chunk is read at a time, so that a load of seven is stopped after the first.
SETTINGS = {"cost_gate": "on", "io_threads": 2}
TRIES = 6
QUIET_S = 5.2
LOADED = ("gate_faster", "gate_negligible", "gate_unmeasured")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Reports:
    tier = tmp_path_factory.mktemp("gate") / "kv"
    with Injector(tier) as injector:
        slow = {"do": "throttle", "control": str(injector.control), "mb_per_s": SLOW_MB_PER_S}
        again = []
        for number in range(TRIES):
            again += [
                reset(),
                {"do": "nudge", "seconds": QUIET_S if not number else 0.1},
                ask(f"again {number}", PROMPTS[:1]),
            ]
        return play(
            start("tiny-llama"),
            ask("cold", PROMPTS),
            {"do": "environment", "variables": injector.environment()},
            start("tiny-llama", tier, **SETTINGS),
            ask("first visit", PROMPTS),
            settle(),
            reset(),
            ask("quick", PROMPTS),
            reset(),
            slow,
            ask("slow at first", PROMPTS[:1]),
            reset(),
            ask("slow", PROMPTS[1:2]),
            {"do": "disarm", "name": "throttled"},
            *again,
            # A process that starts on a slow tier knows nothing of it.
            start("tiny-llama", tier, **SETTINGS, store=False),
            slow,
            ask("cold start", PROMPTS[:1]),
            ask("cold start, then", PROMPTS[1:2]),
        )


def decided(run: dict[str, Any], *names: str) -> int:
    return sum(run["counted"].get(name, 0) for name in names)


def test_tokens_are_right(runs: Reports) -> None:
    cold = runs["cold"]["tokens"]
    assert runs["first visit"]["tokens"] == runs["quick"]["tokens"] == cold
    assert runs["slow at first"]["tokens"] + runs["slow"]["tokens"] == cold[:2]
    assert runs["cold start"]["tokens"] + runs["cold start, then"]["tokens"] == cold[:2]
    assert all(runs[f"again {number}"]["tokens"] == cold[:1] for number in range(TRIES))
    assert all(not misses(run) for run in runs.values() if "counted" in run and "tokens" in run)


def test_a_quick_tier_is_loaded_from_in_full(runs: Reports) -> None:
    run = runs["quick"]
    assert run["cached"] == [LAST_BLOCK] * len(PROMPTS)
    assert (decided(run, *LOADED), decided(run, "load_stopped")) == (len(PROMPTS), 0)


def test_a_tier_that_turns_slow_costs_one_load_that_is_stopped(runs: Reports) -> None:
    first, then = runs["slow at first"], runs["slow"]
    assert (decided(first, *LOADED), decided(first, "load_stopped")) == (1, 1)
    # vLLM's own count of cached tokens keeps those that did not come.
    assert 0 < decided(first, "load_blocks") < LAST_BLOCK // 32
    assert (decided(then, *LOADED), decided(then, "gate_slower")) == (0, 1)
    assert (then["cached"], decided(then, "gate_declined_tokens")) == ([0], LAST_BLOCK)


def test_a_tier_that_is_well_again_is_noticed(runs: Reports) -> None:
    tries = [runs[f"again {number}"] for number in range(TRIES)]
    assert decided(tries[0], "gate_trial") == 1
    assert 0 < tries[0]["cached"][0] < LAST_BLOCK
    assert tries[-1]["cached"] == [LAST_BLOCK]
    assert sum(decided(run, "load_stopped") for run in tries) == 0


def test_a_cold_start_on_a_slow_tier_costs_one_load_that_is_stopped(runs: Reports) -> None:
    first, then = runs["cold start"], runs["cold start, then"]
    assert (decided(first, "gate_unmeasured"), decided(first, "load_stopped")) == (1, 1)
    assert 0 < decided(first, "load_blocks") < LAST_BLOCK // 32
    assert (decided(then, *LOADED), decided(then, "gate_slower")) == (0, 1)
