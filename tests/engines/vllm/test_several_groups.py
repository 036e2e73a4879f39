"""Models with several KV groups, some with a sliding window, whose failed loads are reported in a way of their own."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.engines.prompts import tokens_of
from tests.engines.vllm.scenario import Reports, Step, ask, misses, play_all, reset, settle, start

WINDOW_GROUP, FULL_GROUP = 0, 5
# Each group has one layer, so a chunk of 2 MiB holds 64 blocks of 32 tokens.
CHUNK_TOKENS = 2048
ENGINE = {"max_model_len": 8192}
PROMPTS = [tokens_of(seed, 4300) for seed in range(4)]
SHARED_TOKENS = 4200
DIVERGING = PROMPTS[0][:SHARED_TOKENS] + tokens_of(9, 200)
ALL = [*PROMPTS, DIVERGING]
LAST_BLOCK = 4299 // 32 * 32
# kind of damage, what it is counted as, group, chunk of the prompt
CASES = [
    ("flip_payload", "damaged", FULL_GROUP, 1),
    ("truncate", "truncated", WINDOW_GROUP, 1),
    ("delete", "missing", FULL_GROUP, 0),
    ("flip_header", "damaged", WINDOW_GROUP, 2),
]
ROUNDS = 3


def oracle() -> list[Step]:
    return [start("tiny-gemma3", engine=ENGINE), ask("cold", ALL), ask("local hit", PROMPTS[-1:])]


def visit(tier: Path) -> list[Step]:
    steps = [start("tiny-gemma3", tier, engine=ENGINE)]
    for number, prompt in enumerate(PROMPTS):
        steps += [ask(f"first visit {number}", [prompt]), settle(), {"do": "chunks", "name": f"chunks {number}"}]
    steps.append(reset())
    for number, prompt in enumerate(PROMPTS):
        steps += [ask(f"external hit {number}", [prompt]), reset()]
    return steps


def restart(tier: Path) -> list[Step]:
    return [
        start("tiny-gemma3", tier, engine=ENGINE),
        # First, so that all that this engine has learned of the chunk it diverges in comes from the tier.
        ask("diverging", [DIVERGING]),
        settle(),
        reset(),
        ask("restart", PROMPTS),
        reset(),
    ]


def damage() -> list[Step]:
    return [
        {"do": "damage", "how": how, "of": f"chunks {number}", "which": which, "group": group}
        for number, (how, _, group, which) in enumerate(CASES)
    ]


def fail(tier: Path) -> list[Step]:
    steps = damage()
    for number, prompt in enumerate(PROMPTS):
        steps += [ask(f"damaged {number}", [prompt]), settle(), reset()]
    for number, prompt in enumerate(PROMPTS):
        steps += [ask(f"mended {number}", [prompt]), reset()]
    steps += [*damage(), start("tiny-gemma3", tier, engine=ENGINE, store=False)]
    for round_ in range(ROUNDS):
        steps += [ask(f"permanent {round_}", PROMPTS), reset()]
    return steps


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Reports:
    tier = tmp_path_factory.mktemp("groups")
    cold, run = play_all(oracle(), [*visit(tier), *restart(tier), *fail(tier)])
    return {**cold, **run}


def test_tokens_are_those_of_an_engine_without_connector(runs: Reports) -> None:
    cold = runs["cold"]["tokens"]
    for how in ("first visit", "external hit", "damaged", "mended"):
        assert [runs[f"{how} {number}"]["tokens"][0] for number in range(len(PROMPTS))] == cold[:-1], how
    assert runs["restart"]["tokens"] == cold[:-1]
    assert runs["diverging"]["tokens"] == cold[-1:]
    assert runs["local hit"]["tokens"] == cold[len(PROMPTS) - 1 : len(PROMPTS)]


def test_the_whole_prompt_comes_from_the_tier(runs: Reports) -> None:
    for number in range(len(PROMPTS)):
        run = runs[f"external hit {number}"]
        assert (run["cached"], run["counted"]["external"], misses(run)) == ([LAST_BLOCK], LAST_BLOCK, {})
    assert runs["restart"]["cached"] == [LAST_BLOCK] * len(PROMPTS)


def test_a_prompt_that_diverges_inside_a_chunk_hits_its_leading_blocks(runs: Reports) -> None:
    assert runs["diverging"]["cached"] == [SHARED_TOKENS // 32 * 32]


@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda n: "{0} of group {2}".format(*CASES[n]))
def test_a_damaged_chunk_is_a_counted_miss_and_written_again(runs: Reports, number: int) -> None:
    run = runs[f"damaged {number}"]
    assert misses(run) == {f"miss_{CASES[number][1]}": 1}
    assert run["counted"]["load_jobs_failed"] == 1
    mended = runs[f"mended {number}"]
    assert (mended["cached"], misses(mended)) == ([LAST_BLOCK], {})


def test_a_permanently_damaged_chunk_costs_one_failed_load(runs: Reports) -> None:
    rounds = [runs[f"permanent {round_}"] for round_ in range(ROUNDS)]
    assert [run["tokens"] for run in rounds] == [runs["cold"]["tokens"][:-1]] * ROUNDS
    # A chunk that is not there is never advertised to a new engine.
    assert sum(misses(rounds[0]).values()) == len([case for case in CASES if case[0] != "delete"])
    assert [misses(run) for run in rounds[1:]] == [{}] * (ROUNDS - 1)
