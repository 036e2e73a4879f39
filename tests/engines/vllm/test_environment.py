"""What the other vLLM tests stand on: a real engine on a CPU that repeats itself in float32, and models that notice."""

from __future__ import annotations

import random
from typing import Any

import pytest

from tests.engines.vllm.scenario import ask, model, play, start

PROMPT_TOKENS = 900


def prompts() -> list[list[int]]:
    """Returns a prompt, the same again, and one that differs from it in a single early token."""
    choice = random.Random(5)
    first = [choice.randrange(4, 260) for _ in range(PROMPT_TOKENS)]
    return [first, first, [*first[:40], 4 + (first[40] + 1) % 256, *first[41:]]]


def answers_of(kind: str, loras: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    """Returns the greedy tokens for each prompt, without and then with each adapter, from one fresh engine."""
    adapters = [None, *map(model, loras)]
    engine = {"enable_lora": True, "max_loras": 2} if loras else {}
    questions = [ask(f"answers {number}", prompts(), lora=lora) for number, lora in enumerate(adapters)]
    reports = play(start(kind, engine=engine), *questions)
    return [
        {"tokens": tokens, "cached": cached}
        for number in range(len(adapters))
        for tokens, cached in zip(*(reports[f"answers {number}"][what] for what in ("tokens", "cached")), strict=True)
    ]


@pytest.mark.parametrize(("kind", "loras"), [("tiny-llama", ("lora-a", "lora-b")), ("tiny-gemma3", ())])
def test_tokens_repeat_from_the_local_cache_and_depend_on_prompt_and_adapter(kind: str, loras: tuple[str, ...]) -> None:
    cold, cached, changed, *adapted = answers_of(kind, loras)
    assert cold["cached"] == 0
    assert cached["cached"], "the engine's own prefix cache was not used"
    assert cold["tokens"] == cached["tokens"]
    different = [cold, changed, *adapted[::3]]
    assert len({tuple(answer["tokens"]) for answer in different}) == 2 + len(loras)
