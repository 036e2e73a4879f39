"""Chunks that were damaged behind the engine's back: a counted miss, right tokens, and the chunk is written again."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.engines.prompts import tokens_of
from tests.engines.vllm.scenario import (
    Reports,
    Step,
    ask,
    misses,
    play_all,
    reset,
    settle,
    start,
)

CHUNK_TOKENS = 512
PROMPT_TOKENS = 1400
LAST_BLOCK = (PROMPT_TOKENS - 1) // 32 * 32


@dataclass(frozen=True)
class Case:
    """One damaged chunk.

    Attributes:
        how: What happened to it.
        counted: The kind it is counted under.
        which: Its number in the prompt.
        mends: Whether it can be replaced by a good one.
    """

    how: str
    counted: str
    which: int = 1
    mends: bool = True

    @property
    def name(self) -> str:
        return f"{self.how} of chunk {self.which}"

    @property
    def prompt(self) -> list[int]:
        return tokens_of(100 + CASES.index(self), PROMPT_TOKENS)


CASES = [
    Case("flip_payload", "damaged"),
    Case("flip_payload", "damaged", which=0),
    Case("flip_payload", "damaged", which=2),
    Case("flip_header", "damaged"),
    Case("flip_block_table", "damaged"),
    Case("truncate", "truncated"),
    Case("empty", "truncated"),
    Case("grow", "foreign"),
    Case("delete", "missing"),
    Case("other_namespace", "foreign"),
    Case("other_prefix", "foreign"),
    Case("version", "version"),
    Case("link", "foreign"),
    Case("pipe", "foreign"),
    Case("folder", "foreign", mends=False),
]
if os.geteuid() == 0:
    # Only root can give files away.
    CASES.append(Case("owner", "foreign"))
PROMPTS = [case.prompt for case in CASES]
ROUNDS = 3


def damage_one_each(tier: Path) -> list[Step]:
    """Stores every case's prompt, damages one chunk of each, and asks again, twice."""
    steps = [start("tiny-llama-b", tier), ask("stranger", PROMPTS[:1]), settle(), {"do": "chunks"}]
    steps.append(start("tiny-llama", tier))
    for case in CASES:
        steps += [ask("first visit", [case.prompt]), settle(), {"do": "chunks", "name": f"chunks of {case.name}"}]
    steps += [{"do": "damage", "how": case.how, "of": f"chunks of {case.name}", "which": case.which} for case in CASES]
    steps.append(reset())
    steps += [ask(f"damaged: {case.name}", [case.prompt]) for case in CASES]
    steps += [settle(), reset()]
    steps += [ask(f"mended: {case.name}", [case.prompt]) for case in CASES]
    return steps


def damage_for_good(tier: Path) -> list[Step]:
    """Damages a chunk of each prompt for an engine that may not remove or rewrite it, and asks again and again."""
    steps = [start("tiny-llama"), ask("cold", PROMPTS), start("tiny-llama", tier)]
    for number in range(3):
        steps += [ask("first visit", [PROMPTS[number]]), settle(), {"do": "chunks", "name": f"chunks {number}"}]
        steps.append({"do": "damage", "how": "flip_payload", "of": f"chunks {number}", "which": number})
    steps.append(start("tiny-llama", tier, store=False))
    for round_ in range(ROUNDS):
        steps += [ask(f"permanent {round_}", PROMPTS[:3]), reset()]
    # What the checks are for: the same engine, believing what it reads.
    steps += [start("tiny-llama", tier, store=False, io_process="off"), {"do": "believe_everything"}]
    steps += [{"do": "damage", "how": "scramble", "of": f"chunks {number}", "which": "all"} for number in range(3)]
    steps.append(ask("believed", PROMPTS[:3]))
    return steps


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Reports:
    folder = tmp_path_factory.mktemp("damaged")
    each, permanent = play_all(damage_one_each(folder / "each"), damage_for_good(folder / "permanent"))
    return {**each, **permanent}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_damaged_chunk_is_a_counted_miss(runs: Reports, case: Case) -> None:
    run = runs[f"damaged: {case.name}"]
    assert run["tokens"] == [runs["cold"]["tokens"][CASES.index(case)]]
    assert misses(run) == {f"miss_{case.counted}": 1}
    assert run["counted"]["load_jobs_failed"] == 1


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_damaged_chunk_is_written_again(runs: Reports, case: Case) -> None:
    run = runs[f"mended: {case.name}"]
    assert run["tokens"] == [runs["cold"]["tokens"][CASES.index(case)]]
    assert misses(run) == {}
    assert run["cached"] == [LAST_BLOCK if case.mends else case.which * CHUNK_TOKENS]


def test_a_permanently_damaged_chunk_costs_one_failed_load(runs: Reports) -> None:
    rounds = [runs[f"permanent {round_}"] for round_ in range(ROUNDS)]
    assert [run["tokens"] for run in rounds] == [runs["cold"]["tokens"][:3]] * ROUNDS
    assert [misses(run) for run in rounds] == [{"miss_damaged": 3}, {}, {}]
    # What lies before it still comes from the tier.
    for run in rounds[1:]:
        assert run["cached"] == [number * CHUNK_TOKENS for number in range(3)]


def test_unverified_damage_changes_tokens(runs: Reports) -> None:
    assert runs["believed"]["cached"] == [LAST_BLOCK] * 3
    assert all(a != b for a, b in zip(runs["believed"]["tokens"], runs["cold"]["tokens"], strict=False))
