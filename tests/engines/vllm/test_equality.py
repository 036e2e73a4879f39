"""The same tokens whether a prompt's KV is computed, in the engine, or in the tier, even since another process."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from tests.engines.prompts import tokens_of
from tests.engines.vllm.scenario import (
    MAX_TOKENS,
    MIB,
    Reports,
    Step,
    ask,
    play,
    play_all,
    reset,
    settle,
    start,
)

BLOCK_SIZES = (32, 64, 128)
KV_BYTES_PER_TOKEN = 4096  # tiny-llama in float32
CHUNK_TOKENS = 2 * MIB // KV_BYTES_PER_TOKEN
FIRST = tokens_of(1, 1500)
SECOND = tokens_of(2, 1700)
SHARED_TOKENS = 700
DIVERGING = FIRST[:SHARED_TOKENS] + tokens_of(3, 500)
OPENING = tokens_of(4, 200)
MESSAGES = [tokens_of(20 + turn, 260) for turn in range(5)]
UNSEEN = FIRST[:SHARED_TOKENS] + tokens_of(5, 500)
ALL = [FIRST, SECOND, DIVERGING, UNSEEN]


def converse(name: str) -> Step:
    return {"do": "converse", "name": name, "opening": OPENING, "messages": MESSAGES, "max_tokens": MAX_TOKENS}


def oracle() -> list[Step]:
    return [start("tiny-llama"), ask("cold", ALL), converse("turns computed")]


def visit(tier: Path) -> list[Step]:
    steps: list[Step] = []
    for size in BLOCK_SIZES:
        steps += [
            start("tiny-llama", tier, engine={"block_size": size}),
            ask(f"first visit {size}", [FIRST, SECOND]),
            ask(f"local hit {size}", [FIRST, SECOND]),
            settle(),
            reset(),
            ask(f"diverging {size}", [DIVERGING]),
            ask(f"half local hit {size}", [FIRST]),
            settle(),
            reset(),
            ask(f"external hit {size}", [FIRST, SECOND]),
            settle(),
            reset(),
            converse(f"turns {size}"),
        ]
    return steps


def restart(tier: Path) -> list[Step]:
    steps: list[Step] = []
    for size in BLOCK_SIZES:
        steps += [
            start("tiny-llama", tier, engine={"block_size": size}),
            # First, so that all that this engine has learned of the chunk it diverges in comes from the tier.
            ask(f"restart, diverging {size}", [UNSEEN]),
            settle(),
            reset(),
            ask(f"restart {size}", ALL[:-1]),
        ]
    return steps


@pytest.fixture(scope="module")
def tier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("equality") / "made" / "by the connector"


@pytest.fixture(scope="module")
def runs(tier: Path) -> Reports:
    cold, visited = play_all(oracle(), visit(tier))
    warm = play(*restart(tier))
    return {**cold, **visited, **warm}


def whole_blocks(tokens: int, size: int) -> int:
    return tokens - tokens % size


def stored_tokens(prompt: list[int], size: int) -> int:
    """Tokens of a prompt's whole blocks, but for the last token, which the engine always computes."""
    return whole_blocks(len(prompt) - 1, size)


@pytest.mark.parametrize("size", BLOCK_SIZES)
@pytest.mark.parametrize("how", ["first visit", "local hit", "external hit", "restart"])
def test_tokens_are_those_of_an_engine_without_connector(runs: Reports, how: str, size: int) -> None:
    cold, run = runs["cold"], runs[f"{how} {size}"]
    assert run["tokens"] == cold["tokens"][: len(run["tokens"])]


@pytest.mark.parametrize("size", BLOCK_SIZES)
def test_the_whole_prompt_comes_from_where_it_is(runs: Reports, size: int) -> None:
    want = [stored_tokens(prompt, size) for prompt in (FIRST, SECOND)]
    first, local, external = (runs[f"{how} {size}"] for how in ("first visit", "local hit", "external hit"))
    assert first["cached"] == [0, 0]
    assert local["cached"] == want
    assert local["counted"]["local"] == sum(want)
    assert "external" not in local["counted"]
    assert external["cached"] == want
    assert external["counted"]["external"] == sum(want)
    assert "local" not in external["counted"]
    assert external["counted"]["load_chunks"] == sum(-(-tokens // CHUNK_TOKENS) for tokens in want)
    assert not [name for name in external["counted"] if name.startswith("miss_") or name == "boundary_errors"]


@pytest.mark.parametrize("size", BLOCK_SIZES)
def test_another_process_finds_everything(runs: Reports, size: int) -> None:
    run = runs[f"restart {size}"]
    # The third prompt shares its beginning with the first, which is in the engine's own cache by then.
    assert run["cached"] == [stored_tokens(prompt, size) for prompt in ALL[:-1]]
    assert run["counted"]["local"] == whole_blocks(SHARED_TOKENS, size)
    assert run["counted"]["external"] == sum(run["cached"]) - run["counted"]["local"]


@pytest.mark.parametrize("size", BLOCK_SIZES)
@pytest.mark.parametrize(("how", "number"), [("diverging", 2), ("restart, diverging", 3)])
def test_a_prompt_that_diverges_inside_a_chunk_hits_its_leading_blocks(
    runs: Reports, how: str, number: int, size: int
) -> None:
    run = runs[f"{how} {size}"]
    shared = whole_blocks(SHARED_TOKENS, size)
    assert shared % CHUNK_TOKENS, "the test needs a prompt that diverges inside a chunk"
    assert run["tokens"] == [runs["cold"]["tokens"][number]]
    assert run["cached"] == [shared]
    assert run["counted"]["external"] == shared


@pytest.mark.parametrize("size", BLOCK_SIZES)
def test_a_load_may_begin_inside_a_chunk(runs: Reports, size: int) -> None:
    run = runs[f"half local hit {size}"]
    local = whole_blocks(SHARED_TOKENS, size)
    assert run["tokens"] == [runs["cold"]["tokens"][0]]
    assert run["counted"]["local"] == local
    assert run["counted"]["external"] == stored_tokens(FIRST, size) - local


@pytest.mark.parametrize("size", BLOCK_SIZES)
def test_a_conversation_hits_all_that_was_said_before(runs: Reports, size: int) -> None:
    computed, restored = (runs[name]["turns"] for name in ("turns computed", f"turns {size}"))
    assert [turn["tokens"] for turn in restored] == [turn["tokens"] for turn in computed]
    # An answer's last token is never computed: nothing came after it.
    said = [turn["prompt_tokens"] + MAX_TOKENS - 1 for turn in restored[:-1]]
    assert [turn["cached"][0] for turn in restored] == [0, *(whole_blocks(tokens, size) for tokens in said)]


def test_only_the_owner_may_look(runs: Reports, tier: Path) -> None:
    places = [tier, *tier.rglob("*")]
    modes = {(place.is_dir(), stat.S_IMODE(place.stat().st_mode)) for place in places}
    assert modes == {(True, 0o700), (False, 0o600)}
