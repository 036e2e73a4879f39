"""The level of memory in a real vLLM: what was stored or loaded comes from there, whatever the tier does meanwhile.

Judged by decisions and counters, since times on a shared machine prove nothing.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.engines.prompts import tokens_of
from tests.engines.vllm.scenario import MIB, Reports, ask, misses, play, reset, settle, start
from tests.faults.control import Injector

PROMPT_TOKENS = 3300
LAST_BLOCK = (PROMPT_TOKENS - 1) // 32 * 32
PROMPTS = [tokens_of(1300 + number, PROMPT_TOKENS) for number in range(3)]
HEAD_TOKENS = 2000
SLOW_MB_PER_S = 1.0
"""13.5 MB take 13.5 s, which is many times what recomputing takes, on a busy machine too."""
# One chunk is read at a time, so that a load of seven is stopped after the first.
SETTINGS: dict[str, Any] = {"cost_gate": "on", "io_threads": 2, "memory_bytes": 64 * MIB}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Reports:
    tier = tmp_path_factory.mktemp("memory") / "kv"
    with Injector(tier) as injector:
        slow = {"do": "throttle", "control": str(injector.control), "mb_per_s": SLOW_MB_PER_S}
        return play(
            start("tiny-llama"),
            ask("cold", PROMPTS),
            {"do": "environment", "variables": injector.environment()},
            start("tiny-llama", tier, **SETTINGS),
            ask("first visit", PROMPTS),
            settle(),
            reset(),
            slow,
            ask("from memory", PROMPTS),
            {"do": "disarm", "name": "throttled"},
            # Another process has the tier alone, and keeps what it loads.
            start("tiny-llama", tier, **SETTINGS, store=False),
            ask("head, from the tier", [PROMPTS[0][:HEAD_TOKENS]]),
            ask("other, from the tier", PROMPTS[1:2]),
            reset(),
            slow,
            ask("slow at first", PROMPTS[2:3]),
            reset(),
            ask("head from memory, and no more", PROMPTS[:1]),
            ask("all from memory", PROMPTS[1:2]),
        )


def counted(run: dict[str, Any], name: str) -> int:
    return int(run["counted"].get(name, 0))


def test_tokens_are_right(runs: Reports) -> None:
    cold = runs["cold"]["tokens"]
    assert runs["first visit"]["tokens"] == runs["from memory"]["tokens"] == cold
    assert runs["head from memory, and no more"]["tokens"] == cold[:1]
    assert runs["other, from the tier"]["tokens"] == runs["all from memory"]["tokens"] == cold[1:2]
    assert runs["slow at first"]["tokens"] == cold[2:]
    assert all(not misses(run) for run in runs.values() if "counted" in run and "tokens" in run)


def test_what_was_stored_comes_from_memory_although_the_tier_is_slow(runs: Reports) -> None:
    run = runs["from memory"]
    assert run["cached"] == [LAST_BLOCK] * len(PROMPTS)
    assert counted(run, "load_memory_bytes") > 0 == counted(run, "load_bytes")
    assert (counted(run, "gate_memory"), counted(run, "gate_slower")) == (len(PROMPTS), 0)


def test_what_was_loaded_stays(runs: Reports) -> None:
    for name in ("head, from the tier", "other, from the tier"):
        assert counted(runs[name], "load_bytes") > 0 == counted(runs[name], "load_memory_bytes")
    run = runs["all from memory"]
    assert run["cached"] == [LAST_BLOCK] and counted(run, "gate_memory") == 1
    assert counted(run, "load_memory_bytes") > 0 == counted(run, "load_bytes")


def test_of_a_hit_whose_head_lies_in_memory_no_more_is_loaded_from_a_slow_tier(runs: Reports) -> None:
    assert counted(runs["slow at first"], "load_stopped") == 1
    run = runs["head from memory, and no more"]
    assert 0 < run["cached"][0] <= HEAD_TOKENS < LAST_BLOCK
    assert counted(run, "load_memory_bytes") > 0 == counted(run, "load_bytes")
    assert (counted(run, "gate_memory"), counted(run, "load_stopped")) == (1, 0)
    assert counted(run, "gate_declined_tokens") == LAST_BLOCK - run["cached"][0]
