"""What the scheduler does to requests while their KV is stored and loaded: preempt, abort, interleave, run ahead."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.engines.prompts import tokens_of
from tests.engines.vllm.scenario import Reports, Step, ask, misses, play_all, reset, settle, start

KV_BYTES_PER_TOKEN = 4096  # tiny-llama in float32
# Six requests grow from 15 blocks to 18; there is room for 80 blocks.
PRESSED = {
    "kv_cache_memory_bytes": 80 * 32 * KV_BYTES_PER_TOKEN,
    "max_model_len": 1024,
    "max_num_batched_tokens": 512,
}
PRESSED_PROMPTS = [tokens_of(500 + number, 460 + 3 * number) for number in range(6)]
PRESSED_TOKENS = 100
# Several steps per prompt, so that requests can be aborted in the middle of it.
STEPPED = {"max_num_batched_tokens": 512}
# Hardly more room than one request needs, so that freed pages are written to at once.
TIGHT = {**STEPPED, "kv_cache_memory_bytes": 52 * 32 * KV_BYTES_PER_TOKEN, "max_model_len": 1536}
PROMPTS = [tokens_of(520 + number, 1400) for number in range(6)]
LAST_BLOCK = 1399 // 32 * 32
ROUNDS = 2
# Long enough for an engine that does not wait to write to the pages, short enough for the fence.
HOLD_S, FENCE_TIMEOUT_MS = 1.5, 20_000


def pressed(name: str) -> Step:
    return ask(name, PRESSED_PROMPTS, together=True, max_tokens=PRESSED_TOKENS)


def pressure(tier: Path) -> list[Step]:
    steps = [start("tiny-llama"), pressed("pressed, cold"), start("tiny-llama", tier, engine=PRESSED)]
    for number in range(ROUNDS):
        steps += [pressed(f"pressed {number}"), settle(), reset()]
    return [*steps, ask("pressed, alone", PRESSED_PROMPTS[:1], max_tokens=PRESSED_TOKENS)]


def aborts(tier: Path) -> list[Step]:
    hold: list[Step] = [
        {"do": "strike", "how": "stop", "whose": "worker"},
        {"do": "strike", "how": "continue", "whose": "worker", "after_s": HOLD_S},
    ]
    return [
        start("tiny-llama", engine=STEPPED),
        ask("cold", PROMPTS),
        start("tiny-llama", tier, engine=TIGHT, fence_timeout_ms=FENCE_TIMEOUT_MS),
        # Aborted after one of three steps: its first chunk is being gathered, and its pages go to the next request.
        *hold,
        {"do": "abort", "name": "aborted store", "prompt": PROMPTS[0], "at": 512},
        ask("after an aborted store", PROMPTS[1:2]),
        settle(),
        # The next request has been waiting for the pages: it gets them in the step that gathers the tail.
        {
            "do": "abort",
            "name": "aborted tail",
            "prompt": PROMPTS[2],
            "at": 1402,
            "rival": PROMPTS[5],
            "freeze_s": HOLD_S,
        },
        settle(),
        reset(),
        ask("of aborted requests", [PROMPTS[0], PROMPTS[2]]),
        settle(),
        reset(),
        # Aborted while its load is under way, before and after the pages go to someone else.
        *hold,
        {"do": "abort", "name": "aborted load", "prompt": PROMPTS[1], "at": "loading"},
        ask("after an aborted load", PROMPTS[3:5]),
        settle(),
        reset(),
        ask("in the end", PROMPTS),
    ]


def run_ahead(tier: Path) -> list[Step]:
    ahead = {"force_async_scheduling": True}
    return [
        start("tiny-llama", tier, engine=STEPPED) | ahead | {"name": "ahead"},
        ask("ahead, first visit", PROMPTS, together=True),
        settle(),
        reset(),
        ask("ahead, external hit", PROMPTS, together=True),
        settle(),
        reset(),
        ask("ahead, one by one", PROMPTS),
        start("tiny-llama", tier / "pressed", engine=PRESSED) | ahead,
        pressed("ahead, pressed"),
        settle(),
        reset(),
        pressed("ahead, pressed again"),
    ]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Reports:
    folder = tmp_path_factory.mktemp("scheduling")
    first, second = play_all(
        [*pressure(folder / "pressure"), *aborts(folder / "aborts")],
        run_ahead(folder / "ahead"),
    )
    return {**first, **second}


def test_preempted_requests_answer_the_same(runs: Reports) -> None:
    for number in range(ROUNDS):
        run = runs[f"pressed {number}"]
        assert run["counted"].get("preemptions", 0) >= 1
        assert run["tokens"] == runs["pressed, cold"]["tokens"]
        assert misses(run) == {}
    assert runs["pressed 1"]["counted"]["external"] > 0
    assert runs["pressed, alone"]["tokens"] == runs["pressed, cold"]["tokens"][:1]
    assert "preemptions" not in runs["pressed, cold"]["counted"]


def test_aborted_requests_leave_nothing_wrong_behind(runs: Reports) -> None:
    for name, numbers in {
        "after an aborted store": [1],
        "aborted tail": [5],
        "of aborted requests": [0, 2],
        "after an aborted load": [3, 4],
        "in the end": range(6),
    }.items():
        assert runs[name]["tokens"] == [runs["cold"]["tokens"][number] for number in numbers], name
        assert misses(runs[name]) == {}
    for name in ("aborted store", "aborted tail", "aborted load"):
        assert not runs[name]["finished"], "the test needs a request that is still running"
    assert runs["in the end"]["cached"] == [LAST_BLOCK] * len(PROMPTS)


def test_what_an_aborted_request_had_computed_is_used(runs: Reports) -> None:
    first, second = runs["of aborted requests"]["cached"]
    assert first >= 512
    assert second >= LAST_BLOCK


@pytest.mark.parametrize("how", ["first visit", "external hit", "one by one"])
def test_async_scheduling_gives_the_same_tokens(runs: Reports, how: str) -> None:
    assert runs["ahead"]["async_scheduling"]
    assert runs[f"ahead, {how}"]["tokens"] == runs["cold"]["tokens"]
    assert misses(runs[f"ahead, {how}"]) == {}
    assert runs["ahead, external hit"]["cached"] == [LAST_BLOCK] * len(PROMPTS)


def test_async_scheduling_under_pressure_gives_the_same_tokens(runs: Reports) -> None:
    for name in ("ahead, pressed", "ahead, pressed again"):
        assert runs[name]["counted"].get("preemptions", 0) >= 1
        assert runs[name]["tokens"] == runs["pressed, cold"]["tokens"]
        assert misses(runs[name]) == {}
