"""A prompt whose KV is several times what staging holds, computed in one step and answered with one token."""

from __future__ import annotations

from typing import Any

import pytest

from memkv_engines.limits import MIB
from tests.engines.prompts import tokens_of
from tests.engines.vllm.scenario import Reports, Step, ask, misses, play_all, reset, settle, start

KV_BYTES_PER_TOKEN = 4096  # tiny-llama in float32
BLOCK_TOKENS = 32
LENGTH, ROOM = 6000, 6144
LONG = [tokens_of(910 + number, LENGTH) for number in range(2)]
HIT = (LENGTH - 1) // BLOCK_TOKENS * BLOCK_TOKENS
# Four MiB of it for stores: two chunks of twelve.
LITTLE = {"staging_bytes": 8 * MIB}


def engine(requests: int, **more: Any) -> dict[str, Any]:
    """An engine with pages for so many of the prompts."""
    pages = requests * (ROOM // BLOCK_TOKENS) + 2
    return {
        "kv_cache_memory_bytes": pages * BLOCK_TOKENS * KV_BYTES_PER_TOKEN,
        "max_model_len": ROOM,
        "max_num_batched_tokens": ROOM,
        **more,
    }


def one_token(name: str, prompts: list[list[int]]) -> Step:
    return ask(name, prompts, max_tokens=1)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Reports:
    folder = tmp_path_factory.mktemp("leftovers")
    idle: Step = {"do": "idle", "name": "idle"}
    first, second = play_all(
        [
            start("tiny-llama", engine=engine(1)),
            one_token("cold", LONG),
            start("tiny-llama", folder / "idle", engine=engine(2), **LITTLE),
            one_token("first", LONG[:1]),
            idle,
            reset(),
            one_token("second", LONG[:1]),
        ],
        [
            # The second prompt needs every page of the first, whose chunks are waiting by then.
            start("tiny-llama", folder / "reused", engine=engine(1), **LITTLE),
            one_token("reused, first", LONG),
            idle | {"name": "reused, idle"},
            reset(),
            one_token("reused, second", LONG),
            settle(),
            start("tiny-llama", folder / "uncached", engine=engine(2, enable_prefix_caching=False), **LITTLE),
            one_token("uncached", LONG[:1]),
            idle | {"name": "uncached, idle"},
        ],
    )
    return {**first, **second}


def test_an_idle_engine_stores_all_of_it(runs: Reports) -> None:
    assert runs["first"]["counted"].get("store_shed", 0) + runs["idle"]["counted"].get("store_shed", 0) > 0
    assert runs["second"]["counted"]["external"] == HIT
    assert runs["second"]["tokens"] == runs["cold"]["tokens"][:1]
    assert misses(runs["second"]) == misses(runs["idle"]) == {}
    assert "store_leftovers_lost" not in runs["idle"]["counted"]


def test_pages_that_others_need_are_never_waited_for(runs: Reports) -> None:
    again = runs["reused, second"]
    assert again["tokens"] == runs["cold"]["tokens"]
    assert misses(again) == misses(runs["reused, idle"]) == {}
    assert again["cached"][0] < HIT
    # The second prompt's own chunks were waiting when nobody needed the pages.
    assert again["cached"][1] == HIT


def test_without_a_prefix_cache_nothing_waits(runs: Reports) -> None:
    assert runs["uncached, idle"]["steps"] <= 2
    assert "store_leftovers" not in runs["uncached, idle"]["counted"]
