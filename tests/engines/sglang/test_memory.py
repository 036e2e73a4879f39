"""The level of memory in real SGLang engines, through both doors: hits come from there while the tier is slow.

Judged by what was loaded and by what the gate says in the log, since times on a shared machine prove nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.engines.prompts import tokens_of
from tests.engines.sglang.engines import Answer, hicache, linker, memkv_extra, wait_until
from tests.engines.sglang.forked_engines import ForkedEngine
from tests.engines.sglang.test_cost_gate import PROMPT_TOKENS, SETTINGS, SLOW_MB_PER_S, WHOLE
from tests.engines.sglang.tier_of_engine import stored_tokens
from tests.faults.control import Injector, throttle

PROMPTS = [tokens_of(1700 + number, PROMPT_TOKENS) for number in range(2)]
WITH_MEMORY = {**SETTINGS, "memory_bytes": 64 << 20}
DOORS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "hicache": lambda tier: hicache("dynamic", **memkv_extra(tier, **WITH_MEMORY)),
    "linker": lambda tier: linker(tier, **WITH_MEMORY),
}


@pytest.mark.parametrize("door", sorted(DOORS))
def test_what_was_stored_comes_from_memory_although_the_tier_is_slow(door: str, tmp_path: Path) -> None:
    tier, log = tmp_path / "kv", tmp_path / "engine.log"
    cold: list[Answer] = []
    again: list[Answer] = []
    with (
        Injector(tier) as injector,
        ForkedEngine("tiny-sg-llama", log=log, env=injector.environment(), **DOORS[door](tier)) as engine,
    ):
        for number, prompt in enumerate(PROMPTS):
            cold.append(engine.generate(prompt))
            wait_until(lambda: stored_tokens(tier) >= (number + 1) * WHOLE, "a prompt's pages are stored")  # noqa: B023
            engine.flush()
        injector.arm(throttle(SLOW_MB_PER_S))
        for prompt in PROMPTS:
            again.append(engine.generate(prompt))
            engine.flush()
    assert [answer.tokens for answer in again] == [answer.tokens for answer in cold]
    assert [answer.cached for answer in again] == [WHOLE] * len(PROMPTS)
    text = log.read_text(errors="replace")
    assert "MiB in memory" in text and "are not loaded any more" not in text and "unexpected error in" not in text
